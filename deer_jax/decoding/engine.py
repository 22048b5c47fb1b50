"""Decoding as users call it: prompts into slots, segments of the loop, finished rows out, slots refilled."""

import dataclasses
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deer_jax.config import InputError, Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.decoding.sampling import Kind, Knobs
from deer_jax.decoding.state import DecodeResult, DecodeState, DecodeStats, idle_state
from deer_jax.drafters.protocol import Drafter
from deer_jax.models.cache import cache_bytes
from deer_jax.models.target import Target
from deer_jax.sharding import replicated

PREFILL_CHUNK = 512  # prompt tokens one pass reads per row; longer prompts take several
PREFILL_TOKENS = 32768  # prompt tokens one pass reads over all rows; bounds its activations
DEFAULT_SLOTS = 16
PROGRAMS = 128  # compiled programs that are kept: each holds memory maps, of which a process has a limited number
ROUNDS_PER_SEGMENT = 32  # when progress is shown: the time until it moves, or until Ctrl-C is served
ROUNDS_PER_PIECE = 2  # when streaming

Progress = Callable[[int, int, int], None]  # finished prompts, all prompts, new tokens of finished ones


def bucket(n: int, least: int) -> int:
    """The smallest size >= n on a grid of four steps per doubling, from `least` on: few shapes, little waste."""
    size = least
    while 2 * size < n:
        size *= 2
    step = max(size // 4, 1)
    return size if n <= size else size + -(-(n - size) // step) * step


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two >= n and >= least."""
    return max(least, 1 << max(n - 1, 0).bit_length())


_compiled: dict[Any, Any] = {}  # the programs used last come last


class Engine:
    """Slots of one shape: admits prompts, runs segments, hands back what it fetched.

    Compiled programs are kept, keyed by what is static and by shapes, and shared by all engines of the process.
    """

    def __init__(self, target: Target, drafter: Drafter | None, k: int, sampling: Sampling, seed: int,
                 stop_ids: Sequence[int], slots: int, capacity: int):  # fmt: skip
        self.target, self.drafter = target, drafter
        self.slots, self.capacity = slots, capacity
        self.plan = loop.Plan(target.config, drafter.method if drafter else None, k, Kind.of(sampling))
        self.params = (target.params, drafter.params if drafter else {})
        self.knobs = Knobs.of(sampling, seed)
        self.stop_ids = jnp.asarray(stop_ids, jnp.int32).reshape(-1)
        self.compile_seconds = 0.0
        self.fetches = 0
        check_memory(target, drafter, slots, capacity)
        self.state = self._idle()

    def _idle(self) -> DecodeState:
        drafter_state = (
            self.plan.drafter.init_state(self.params[1], self.slots, self.capacity) if self.plan.drafter else ()
        )
        dtype = self.target.params["embed"].dtype
        state = idle_state(self.target.config, self.slots, self.capacity, self.plan.k, dtype, drafter_state)
        return state if self.target.mesh is None else jax.device_put(state, replicated(self.target.mesh))

    def _run(self, function, static: tuple, *args, **options):
        """Call a function of `loop` with static arguments first; a program is compiled when its shapes are new."""
        leaves, tree = jax.tree.flatten(args)
        key = (function, static, tree, tuple((x.shape, x.dtype, x.sharding) for x in leaves), *options.items())
        program = _compiled.pop(key, None)
        if program is None:
            begin = time.perf_counter()
            program = function.lower(*static, *args, **options).compile()
            self.compile_seconds += time.perf_counter() - begin
        _compiled[key] = program
        if len(_compiled) > PROGRAMS:
            del _compiled[next(iter(_compiled))]
        return program(*args)

    def admit(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], indices: Sequence[int], rows: Sequence[int]
    ):
        """Prefill the prompts and put them into the given slots; indices are their numbers in the whole call."""
        width = max(len(prompt) - 1 for prompt in prompts)
        # A second pass over a row needs a copy of that row's cache, so long prompts go one at a time.
        group = 1 if width > PREFILL_CHUNK else PREFILL_TOKENS // power_of_two(width, 16)
        for first in range(0, len(prompts), group):
            part = slice(first, first + group)
            self._admit(prompts[part], limits[part], indices[part], rows[part])

    def _admit(self, prompts, limits, indices, rows):
        # Padding repeats the last prompt: it is written twice into the same slot.
        repeat = [*range(len(prompts)), *[len(prompts) - 1] * (power_of_two(len(prompts)) - len(prompts))]
        tokens = np.zeros((len(repeat), self.capacity), np.int32)
        for i, source in enumerate(repeat):
            tokens[i, : len(prompts[source])] = prompts[source]
        rows, limits, indices = (jnp.asarray([x[i] for i in repeat], jnp.int32) for x in (rows, limits, indices))
        lengths = jnp.asarray([len(prompts[i]) for i in repeat], jnp.int32)
        for start, width in prefill_chunks(max(len(prompt) for prompt in prompts) - 1):
            chunk = jnp.asarray(tokens[:, start : start + width])
            models, caches = (self.plan.target, self.plan.drafter), (self.state.cache, self.state.drafter)
            caches = self._run(
                loop.prefill, models, *self.params, caches, chunk, jnp.int32(start), rows, first=start == 0
            )
            self.state = dataclasses.replace(self.state, cache=caches[0], drafter=caches[1])
        self.state = self._run(
            loop.admit, (self.plan,), *self.params, self.state, jnp.asarray(tokens), lengths, limits, indices, rows
        )

    def segment(self, max_rounds: int | None = None, max_done: int | None = None) -> dict[str, np.ndarray]:
        """Run rounds until all rows (or max_done) are done, or max_rounds have run; then the one fetch."""
        bounds = (2**31 - 1 if bound is None else bound for bound in (max_rounds, max_done))
        numbers = map(jnp.int32, bounds)
        self.state = self._run(
            loop.run_segment, (self.plan,), *self.params, self.state, self.knobs, self.stop_ids, *numbers
        )
        state = self.state
        return self.fetch(
            {"tokens": state.tokens, "length": state.length, "done": state.done, "rounds": state.rounds,
             "histogram": state.histogram}
        )  # fmt: skip

    def fetch(self, tree):
        """Copy to the host and wait: the only place that does."""
        self.fetches += 1
        return jax.device_get(tree)


def prefill_chunks(count: int) -> list[tuple[int, int]]:
    """Start and padded width of the passes that read `count` prompt tokens.

    600 -> [(0, 512), (512, 128)]
    """
    chunks = []
    for start in range(0, count, PREFILL_CHUNK):
        rest = count - start
        chunks.append((start, PREFILL_CHUNK if rest >= PREFILL_CHUNK else power_of_two(rest, 16)))
    return chunks


def check_memory(target: Target, drafter: Drafter | None, slots: int, capacity: int):
    """Refuse caches that do not fit beside what a device already holds. On a mesh every device holds all of them."""

    def needed(slots: int) -> int:
        total = cache_bytes(target.config, slots, capacity, target.params["embed"].dtype)
        return total + (drafter.method.state_bytes(drafter.params, slots, capacity) if drafter else 0)

    available = free_bytes([jax.devices()[0]] if target.mesh is None else target.mesh.devices.flat)
    if needed(slots) > available:
        fitting = int(available // needed(1))
        fits = f"{fitting} slots would fit; lower batch_size or max_new_tokens"
        raise InputError(
            f"the caches of {slots} slots x {capacity} tokens need {needed(slots):,} bytes, {available:,} are free: "
            + (fits if fitting else "not even one slot fits; lower max_new_tokens or shorten the prompts")
        )


def free_bytes(devices: Iterable[jax.Device]) -> int:
    """Bytes that each of the devices can still allocate."""
    devices = list(devices)
    stats = [device.memory_stats() for device in devices]
    if all(found and "bytes_limit" in found for found in stats):
        return min(found["bytes_limit"] - found["bytes_in_use"] for found in stats)
    try:  # on CPU: what the system could hand out, its file caches included
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except FileNotFoundError:
        found = None
    free = int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // len(devices)


def _prepare(
    target: Target,
    prompts: list[list[int]],
    drafter: Drafter | None,
    draft_length: int | None,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    seed: int,
    slots: int,
    ignore_stop: bool,
) -> tuple["Engine", list[int]]:
    """Check everything that can be wrong before any work is done; the engine and each prompt's limit."""
    k = 0 if drafter is None else drafter.draft_length if draft_length is None else draft_length
    if not isinstance(k, int | np.integer) or k < 0:
        raise InputError(f"draft_length must be 0 (plain decoding) or a positive whole number, got {k!r}")
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise InputError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}")
    if drafter is None and draft_length:
        raise InputError(f"draft_length is {draft_length} but there is no drafter: give one, or draft_length=0")
    if drafter is not None and k > drafter.draft_length:
        warnings.warn(
            f"draft_length {k} is beyond the {drafter.draft_length} that {drafter.name} was trained for", stacklevel=3
        )
    several = isinstance(max_new_tokens, Sequence | np.ndarray)
    new = list(max_new_tokens) if several else [max_new_tokens] * len(prompts)
    if len(new) != len(prompts):
        raise InputError(f"max_new_tokens has {len(new)} entries for {len(prompts)} prompts")
    limits = []
    for i, (prompt, count) in enumerate(zip(prompts, new, strict=True)):
        if not isinstance(count, int | np.integer) or count < 1:
            raise InputError(f"max_new_tokens must be a whole number of at least 1, got {count!r}")
        room = target.config.context - len(prompt)
        if count > room:
            raise InputError(
                f"prompt {i}: {len(prompt)} prompt tokens and {count} new ones exceed the context of "
                f"{target.config.context}; shorten the prompt"
                + (f" or give max_new_tokens <= {room}" if room > 0 else "")
            )
        limits.append(len(prompt) + int(count))
    needed = [limit + k + 1 for limit in limits]
    needed += [start + width for start, width in prefill_chunks(max(map(len, prompts)) - 1)]
    engine = Engine(
        target, drafter if k else None, k, sampling, seed, () if ignore_stop else target.stop_ids,
        min(slots, len(prompts)), bucket(max(needed), 64),
    )  # fmt: skip
    return engine, limits


def decode(
    target: Target,
    prompts: Any,
    *,
    drafter: Drafter | None = None,
    draft_length: int | None = None,
    max_new_tokens: int | Sequence[int] = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    draft_temperature: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    ignore_stop: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    time_prefill: bool = False,
) -> DecodeResult:
    """Answers of the target, drafted in blocks if a drafter is given, and the same with or without it.

    Greedy (temperature 0) the tokens are those of plain decoding, up to near-ties of the target's two best logits;
    sampling, their distribution is.

    Args:
      prompts: a string, a chat (list of messages), or a list of strings, chats or token-id lists; any number.
      drafter: proposes blocks; None decodes plainly, in the same loop with k = 0.
      draft_length: k drafted tokens per round; 0 is plain, None what the drafter was trained for.
      max_new_tokens: one number, or one per prompt.
      temperature: 0 is greedy. top_k: 0 keeps all. top_p: 1 keeps all. Applied in this order, to both models.
      draft_temperature: None is the temperature, 0 drafts the argmax; any value is exact.
      seed: with the prompt's number it fixes every random choice, whatever the batch.
      batch_size: slots that run at once (default up to 16); a finished slot takes the next prompt.
      ignore_stop: run to max_new_tokens whatever the target says.
      template_arguments: passed on to the chat template, as in {"enable_thinking": False}.
      progress: called with (finished prompts, all prompts, new tokens of finished ones); the loop then runs in short
        segments, so that Ctrl-C is served.
      time_prefill: wait after each prefill (one wait more per refill), to fill in `stats.prefill_seconds`.

    Raises:
      InputError: anything wrong with the arguments, before any work is done.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, draft_temperature=draft_temperature)
    slots = DEFAULT_SLOTS if batch_size is None else batch_size
    if not isinstance(slots, int | np.integer) or slots < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, got {slots!r}")
    encoded = encode_prompts(target, prompts, template_arguments)
    engine, limits = _prepare(
        target, encoded, drafter, draft_length, max_new_tokens, sampling, seed, slots, ignore_stop
    )

    begin, prefill_seconds, new_tokens = time.perf_counter(), 0.0, 0
    found: dict[int, dict[str, np.ndarray]] = {}
    holds: list[int | None] = [None] * engine.slots  # which prompt each slot holds
    waiting = list(range(len(encoded)))
    while len(found) < len(encoded):
        free = [row for row, index in enumerate(holds) if index is None][: len(waiting)]
        if free:
            taken, waiting = waiting[: len(free)], waiting[len(free) :]
            before, compiled = time.perf_counter(), engine.compile_seconds
            engine.admit([encoded[i] for i in taken], [limits[i] for i in taken], taken, free)
            if time_prefill:
                jax.block_until_ready(engine.state)
                prefill_seconds += time.perf_counter() - before - (engine.compile_seconds - compiled)
            for row, index in zip(free, taken, strict=True):
                holds[row] = index
        idle = sum(index is None for index in holds)
        after = engine.segment(ROUNDS_PER_SEGMENT if progress else None, idle + 1 if waiting else None)
        for row, index in enumerate(holds):
            if index is not None and after["done"][row]:
                found[index] = {name: value[row] for name, value in after.items()}
                holds[row] = None
                new_tokens += int(after["length"][row]) - len(encoded[index])
        if progress:
            progress(len(found), len(encoded), new_tokens)
    seconds = time.perf_counter() - begin - engine.compile_seconds

    rows = [found[i] for i in range(len(encoded))]
    tokens = [row["tokens"][len(prompt) : row["length"]].tolist() for row, prompt in zip(rows, encoded, strict=True)]
    stats = DecodeStats(
        draft_length=engine.plan.k,
        new_tokens=[len(answer) for answer in tokens],
        rounds=[int(row["rounds"]) for row in rows],
        accepted_histogram=[row["histogram"].tolist() for row in rows],
        seconds=seconds,
        prefill_seconds=prefill_seconds,
        compile_seconds=engine.compile_seconds,
        fetches=engine.fetches,
    )
    stops = () if ignore_stop else target.stop_ids
    texts = None if target.tokenizer is None else [answer_text(target, answer, stops) for answer in tokens]
    return DecodeResult(texts=texts, tokens=tokens, stats=stats)


def answer_text(target: Target, tokens: Sequence[int], stop_ids: Sequence[int]) -> str:
    """The text of new tokens, without the stop token that may end them."""
    assert target.tokenizer is not None
    stopped = bool(tokens) and tokens[-1] in stop_ids
    return target.tokenizer.decode(tokens[:-1] if stopped else tokens)


def stream(
    target: Target,
    prompt: Any,
    *,
    drafter: Drafter | None = None,
    draft_length: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    draft_temperature: float | None = None,
    seed: int = 0,
    ignore_stop: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Pieces of one answer as they are committed; joined they equal the text of `decode` with the same arguments."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, draft_temperature=draft_temperature)
    if target.tokenizer is None:
        raise InputError(f"{target.name} has no tokenizer, so there is no text to stream: use decode")
    encoded = encode_prompts(target, prompt, template_arguments)
    if len(encoded) != 1:
        raise InputError(f"stream takes one prompt, got {len(encoded)}: use decode")
    engine, limits = _prepare(target, encoded, drafter, draft_length, max_new_tokens, sampling, seed, 1, ignore_stop)
    return _pieces(engine, encoded, limits, () if ignore_stop else target.stop_ids)


def _pieces(engine: Engine, encoded: list[list[int]], limits: list[int], stop_ids: Sequence[int]) -> Iterator[str]:
    engine.admit(encoded, limits, [0], [0])
    shown, done, tokenizer = "", False, engine.target.tokenizer
    assert tokenizer is not None
    while not done:
        after = engine.segment(ROUNDS_PER_PIECE)
        done = bool(after["done"][0])
        tokens = after["tokens"][0, len(encoded[0]) : after["length"][0]].tolist()
        if not done:  # bytes may still become part of a character, or be found to be none
            tokens = tokens[: tokenizer.settled(tokens)]
        text = answer_text(engine.target, tokens, stop_ids)
        if not done:
            text = text.rstrip("\ufffd")  # the start of a character whose other bytes are still to come
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
