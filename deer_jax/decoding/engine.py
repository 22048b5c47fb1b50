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

from deer_jax.config import Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.decoding.sampling import Kind, Knobs
from deer_jax.decoding.state import DecodeResult, DecodeState, DecodeStats, idle_state
from deer_jax.drafters.protocol import Drafter
from deer_jax.errors import InputError, PromptError
from deer_jax.models.cache import cache_bytes
from deer_jax.models.target import Target
from deer_jax.sharding import replicated

PREFILL_CHUNK = 512  # prompt tokens one pass reads per row; longer prompts take several
PREFILL_TOKENS = 32768  # prompt tokens one pass reads over all rows; bounds its activations
DEFAULT_SLOTS = 16
PROGRAMS = 128  # compiled programs that are kept: each holds memory maps, of which a process has a limited number
ROUNDS_PER_SEGMENT = 32  # when progress is shown: the time until it moves, or until Ctrl-C is served

Progress = Callable[[int, int, int], None]  # finished prompts, all prompts, new tokens of finished ones
Row = dict[str, np.ndarray]  # one slot's part of what a segment fetched


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
        self.prefill_seconds: float | None = None
        self.fetches = 0
        check_memory(target, drafter, slots, capacity)
        self.state = self._idle()

    def _idle(self) -> DecodeState:
        drafter_state = (
            self.plan.drafter.init_state(self.params[1], self.slots, self.capacity) if self.plan.drafter else ()
        )
        dtype = self.target.dtype
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
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], indices: Sequence[int], rows: Sequence[int],
        rounds: Sequence[int] | None = None,
    ):  # fmt: skip
        """Prefill the prompts and put them into the given slots; indices are their numbers in the whole call.

        rounds: what the rows' counts start from, 0 by default. A plain answer begun earlier goes on unchanged if it is
        admitted as prompt + its n tokens with the limit and index it had, and rounds n.
        """
        rounds = [0] * len(prompts) if rounds is None else rounds
        width = max(len(prompt) - 1 for prompt in prompts)
        # A second pass over a row needs a copy of that row's cache, so long prompts go one at a time.
        group = 1 if width > PREFILL_CHUNK else PREFILL_TOKENS // power_of_two(width, 16)
        for first in range(0, len(prompts), group):
            part = slice(first, first + group)
            self._admit(prompts[part], limits[part], indices[part], rounds[part], rows[part])

    def _admit(self, prompts, limits, indices, rounds, rows):
        # Padding repeats the last prompt: it is written twice into the same slot.
        repeat = [*range(len(prompts)), *[len(prompts) - 1] * (power_of_two(len(prompts)) - len(prompts))]
        tokens = np.zeros((len(repeat), self.capacity), np.int32)
        for i, source in enumerate(repeat):
            tokens[i, : len(prompts[source])] = prompts[source]
        numbers = ([len(prompt) for prompt in prompts], limits, indices, rounds, rows)
        placing = [jnp.asarray([x[i] for i in repeat], jnp.int32) for x in numbers]
        for start, width in prefill_chunks(max(len(prompt) for prompt in prompts) - 1):
            chunk = jnp.asarray(tokens[:, start : start + width])  # cut where the capacity ends
            models, caches = (self.plan.target, self.plan.drafter), (self.state.cache, self.state.drafter)
            caches = self._run(
                loop.prefill, models, *self.params, caches, chunk, jnp.int32(start), placing[-1], first=start == 0
            )
            self.state = dataclasses.replace(self.state, cache=caches[0], drafter=caches[1])
        self.state = self._run(loop.admit, (self.plan,), *self.params, self.state, jnp.asarray(tokens), *placing)

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


def capacity_for(prompts: Sequence[Sequence[int]], limits: Sequence[int], k: int) -> int:
    """Slots of cache per row that hold every prompt, padded as prefill reads it, and every answer's last block."""
    needed = [limit + k + 1 for limit in limits]
    needed += [start + width for start, width in prefill_chunks(max(map(len, prompts)) - 1)]
    return bucket(max(needed), 64)


def check_memory(target: Target, drafter: Drafter | None, slots: int, capacity: int):
    """Refuse caches that do not fit beside what a device already holds. On a mesh every device holds all of them."""

    def needed(slots: int) -> int:
        total = cache_bytes(target.config, slots, capacity, target.dtype)
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


def prepare(
    target: Target,
    prompts: list[list[int]],
    drafter: Drafter | None,
    draft_length: int | None,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    seed: int,
    slots: int,
    ignore_stop: bool,
) -> tuple[Engine, list[int]]:
    """Check everything that can be wrong before any work is done; the engine and each prompt's limit."""
    k = 0 if drafter is None else drafter.draft_length if draft_length is None else draft_length
    if not isinstance(k, int | np.integer) or k < 0:
        raise InputError(f"draft_length must be 0 (plain decoding) or a positive whole number, got {k!r}")
    check_run(seed, slots)
    if drafter is None and draft_length:
        raise InputError(f"draft_length is {draft_length} but there is no drafter: give one, or draft_length=0")
    vocab = target.config.vocab_size
    if drafter is not None and drafter.method.target_vocab != vocab:
        raise InputError(
            f"{drafter.name} drafts for a vocabulary of {drafter.method.target_vocab}, {target.name} has {vocab}: "
            "load it for this target, load_drafter(..., target=target)"
        )
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
            raise PromptError(
                i,
                f"{len(prompt)} prompt tokens and {count} new ones exceed the context of {target.config.context}; "
                "shorten the prompt" + (f" or give max_new_tokens <= {room}" if room > 0 else ""),
            )
        limits.append(len(prompt) + int(count))
    engine = Engine(
        target, drafter if k else None, k, sampling, seed, () if ignore_stop else target.stop_ids,
        min(slots, len(prompts)), capacity_for(prompts, limits, k),
    )  # fmt: skip
    return engine, limits


def check_run(seed: int, batch_size: int):
    """Refuse a seed or a number of slots that is none."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise InputError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}")
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")


def serve(
    engine: Engine, prompts: Sequence[Sequence[int]], limits: Sequence[int], indices: Sequence[int],
    rounds: Sequence[int] | None = None, *, max_rounds: int | None = None, time_prefill: bool = False,
) -> Iterator[tuple[dict[int, Row], dict[int, Row]]]:  # fmt: skip
    """Answer all prompts: a slot that gets free takes the next. After each segment, the rows that have finished in it
    and those that run on, by the prompts' places in the list.

    Args:
      limits, indices, rounds: of each prompt, see `Engine.admit`.
      max_rounds: length of a segment; None lets it last until a slot can be refilled, or to the end.
      time_prefill: wait after each prefill, and add up `engine.prefill_seconds`.
    """
    holds: list[int | None] = [None] * engine.slots  # place of the prompt that each slot holds
    rounds = [0] * len(prompts) if rounds is None else rounds
    admitted = 0
    if time_prefill:
        engine.prefill_seconds = 0.0
    while admitted < len(prompts) or any(place is not None for place in holds):
        free = [row for row, place in enumerate(holds) if place is None][: len(prompts) - admitted]
        if free:
            taken = range(admitted, admitted + len(free))
            before, compiled = time.perf_counter(), engine.compile_seconds
            engine.admit(
                [prompts[i] for i in taken], [limits[i] for i in taken], [indices[i] for i in taken], free,
                [rounds[i] for i in taken],
            )  # fmt: skip
            if engine.prefill_seconds is not None:
                jax.block_until_ready(engine.state)
                engine.prefill_seconds += time.perf_counter() - before - (engine.compile_seconds - compiled)
            for row, place in zip(free, taken, strict=True):
                holds[row] = place
            admitted = taken.stop
        idle = sum(place is None for place in holds)
        after = engine.segment(max_rounds, idle + 1 if admitted < len(prompts) else None)
        finished: dict[int, Row] = {}
        running: dict[int, Row] = {}
        for row, place in enumerate(holds):
            if place is not None:
                done = bool(after["done"][row])
                (finished if done else running)[place] = {name: value[row] for name, value in after.items()}
                holds[row] = None if done else place
        yield finished, running


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
    encoded = encode_prompts(target, prompts, template_arguments)
    engine, limits = prepare(target, encoded, drafter, draft_length, max_new_tokens, sampling, seed, slots, ignore_stop)

    begin, new_tokens = time.perf_counter(), 0
    found: dict[int, Row] = {}
    rounds = ROUNDS_PER_SEGMENT if progress else None
    for finished, _ in serve(
        engine, encoded, limits, range(len(encoded)), max_rounds=rounds, time_prefill=time_prefill
    ):
        found |= finished
        new_tokens += sum(int(row["length"]) - len(encoded[place]) for place, row in finished.items())
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
        prefill_seconds=engine.prefill_seconds,
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
