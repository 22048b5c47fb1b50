"""Rows and segments: prompts into slots, segments of the loop, finished rows out, slots refilled."""

import collections
import dataclasses
import functools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental.layout import Layout
from jax.sharding import SingleDeviceSharding

from deer_jax import processes
from deer_jax.config import Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.auto import AutoLength, Segment
from deer_jax.decoding.finite import not_finite
from deer_jax.decoding.programs import STATE, compiled, formats_of, power_of_two, prefill_chunks
from deer_jax.decoding.sampling import Kind, Knobs
from deer_jax.decoding.state import NONE, TARGET, DecodeState, StateShape, abstract_state, idle_state
from deer_jax.drafters.drafter import Drafter
from deer_jax.errors import InputError, NotFiniteError
from deer_jax.models.layers import FEW_ROWS
from deer_jax.models.target import Target
from deer_jax.sharding import batch_ways, bytes_per_device, everywhere, on_mesh, placement, put, spans

REFILL = 8  # part of the slots that is free before it is filled again: an idle slot costs less than a segment's end
PREFILL_TOKENS = 32768  # prompt tokens one pass reads over all rows; bounds its activations

Row = dict[str, np.ndarray]  # one slot's part of what a segment fetched


class Engine:
    """Slots of one shape: admits prompts, runs segments, hands back what it fetched."""

    def __init__(self, target: Target, drafter: Drafter | None, k: int, sampling: Sampling, seed: int,
                 stop_ids: Sequence[int], slots: int, capacity: int):  # fmt: skip
        self.target, self.drafter = target, drafter
        self.shards = batch_ways(target.mesh)
        self.slots, self.capacity = -(-slots // self.shards) * self.shards, capacity  # every shard has as many
        self.plan = loop.Plan(target.config, drafter.method if drafter else None, k, Kind.of(sampling))
        own = (drafter.params, drafter.shared) if drafter else ({}, {})
        self.weights = round_weights(target, drafter, self.slots * (k + 1))
        self.knobs = jax.tree.map(self.put, Knobs.of(sampling, seed))
        self.stop_ids = self.put(np.asarray(stop_ids, np.int32).reshape(-1), None)
        depth = self.slots // self.shards
        self.order = sorted(range(self.slots), key=lambda row: row % depth)  # in which slots are filled: shards in turn
        self.drafted = k  # tokens per round in the last segment
        self.auto: AutoLength | None = None  # chooses them; None: k in all rounds
        self.rounds_at: collections.Counter[int] = collections.Counter()  # the rows' rounds by what was verified then
        self.compile_seconds = 0.0
        self.prefill_seconds: float | None = None
        self.fetches = 0
        # The parameters decide the dtype, also of a target that was made in memory.
        build = dataclasses.replace(target.build, dtype=target.dtype)
        self.shape = StateShape(target.config, self.plan.drafter, self.slots, self.capacity, k, build)
        self.like = abstract_state(self.shape, *own, target.mesh)
        check_memory(target, self.like)

    @functools.cached_property
    def state(self) -> DecodeState:
        """Slots that hold no prompt, to begin with; made when first asked for, as the loop may decide how it lies."""
        shape, mesh, like, own = self.shape, self.target.mesh, self.like, self.weights[1:]
        if shape.build.auto_layouts:
            if mesh is None:
                place = SingleDeviceSharding(self.target.devices[0])
                like = jax.tree.map(lambda x: x.update(sharding=place), like)
            places = formats_of(self._program(loop.run_segment, (self.plan,), *self._round(like), formats=Layout.AUTO))
        elif mesh is not None:
            places = jax.tree.map(lambda x: x.sharding, like)
        else:
            return idle_state(shape, *own)
        return jax.jit(functools.partial(idle_state, shape), out_shardings=places)(*own)

    def _program(self, function, static: tuple, *args, **options):
        with on_mesh(self.target.mesh):
            program, seconds = compiled(function, static, *args, **options)
        self.compile_seconds += seconds
        return program

    def _run(self, function, static: tuple, *args, **options):
        """Call a function with static arguments first."""
        return self._program(function, static, *args, **options)(*args)

    def _change(self, function, static: tuple, *args, **options):
        """`_run` of a function of `loop` that changes the state, or its caches, and returns them as they lay."""
        formats = None
        if self.shape.build.auto_layouts:
            chosen = static == (self.plan,) and function is loop.run_segment  # by this program; the others follow
            formats = Layout.AUTO if chosen else jax.tree.map(lambda x: x.format, args[STATE])
        return self._run(function, static, *args, formats=formats, **options)

    def _round(self, state: DecodeState, max_rounds: int | None = None, max_done: int | None = None) -> tuple:
        """The arguments of `loop.run_segment`."""
        bounds = (2**31 - 1 if bound is None else bound for bound in (max_rounds, max_done))
        return state, self.weights, self.knobs, self.stop_ids, *(self.put(np.int32(bound)) for bound in bounds)

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
        most = 1 if len(prefill_chunks(width)) > 1 else PREFILL_TOKENS // power_of_two(width, 16)
        dealt: list[list[int]] = [[] for _ in range(self.shards)]  # to every shard of the slots, its prompts
        for i, row in enumerate(rows):
            dealt[row * self.shards // self.slots].append(i)
        for first in range(0, max(map(len, dealt)), most):
            part = [own[first : first + most] for own in dealt]
            depth = power_of_two(max(map(len, part)))
            places = [i for own in part for i in (*own, *[None] * (depth - len(own)))]
            tokens = np.zeros((len(places), self.capacity), np.int32)
            numbers = np.full((5, len(places)), self.slots, np.int32)  # padding goes to a slot that is none
            for place, i in enumerate(places):
                if i is not None:
                    tokens[place, : len(prompts[i])] = prompts[i]
                    numbers[:, place] = len(prompts[i]), limits[i], indices[i], rounds[i], rows[i]
            self._admit(tokens, numbers, max(len(prompts[i]) for i in places if i is not None))

    def _admit(self, tokens: np.ndarray, numbers: np.ndarray, longest: int):
        placing = [self.put(x, "batch") for x in numbers]
        chunks = prefill_chunks(longest - 1)
        if self.drafter and not chunks:
            chunks = prefill_chunks(1)  # it is to know that new rows begin
        for start, width in chunks:
            # Padding ends where the tokens do, at the capacity, which knows nothing of it: a write that ran over the
            # end would be moved back, onto what is there.
            chunk = self.put(tokens[:, start : start + width], "batch", None)
            models, caches = (self.plan.target, self.plan.drafter), (self.state.cache, self.state.drafter)
            caches = self._change(
                loop.prefill, models, caches, self.weights, chunk, self.put(np.int32(start)), placing[0], placing[-1],
                first=start == 0,
            )  # fmt: skip
            self.state = dataclasses.replace(self.state, cache=caches[0], drafter=caches[1])
        tokens_there = self.put(tokens, "batch", None)
        self.state = self._change(loop.admit, (self.plan,), self.state, tokens_there, *placing)

    def put(self, x, *axes: str | None) -> jax.Array:
        """An array from the host, by its logical axes."""
        return put(x, placement(self.target.mesh, np.shape(x), axes))

    def segment(
        self, max_rounds: int | None = None, max_done: int | None = None, draft_length: int | None = None,
        least: float = 0.0,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Run rounds until all rows (or max_done) are done, or max_rounds have run; then the one fetch.

        draft_length: of these rounds, up to the engine's k, which is the default; 0 is plain. least: where the length
        is given, drafts of less certainty are not verified.
        """
        plan = self.plan
        if draft_length is not None:
            plan = dataclasses.replace(plan, k=draft_length, gated=draft_length > 0)
            self.knobs = dataclasses.replace(self.knobs, least=self.put(np.float32(least)))
        if plan.k not in (0, self.drafted):
            self.state = self._change(loop.catch_up, (plan,), self.state, self.weights)
        self.drafted = plan.k
        self.state = self._change(loop.run_segment, (plan,), *self._round(self.state, max_rounds, max_done))
        state = self.state
        return self.fetch(
            {"tokens": state.tokens, "length": state.length, "done": state.done, "rounds": state.rounds,
             "histogram": state.histogram, "certain": state.certain, "fault": state.fault}
        )  # fmt: skip

    def regenerate(self) -> dict[str, np.ndarray]:
        """A round that commits nothing, see `loop.regenerate`; then the one fetch."""
        self.state = self._change(loop.regenerate, (self.plan,), self.state, self.weights, self.knobs)
        state = self.state
        return self.fetch({"tokens": state.tokens, "histogram": state.histogram, "fault": state.fault})

    def not_finite(self, fault: int, new_tokens: int) -> str:
        """What to say of a row that has ended with this `DecodeState.fault`."""
        if fault == TARGET or self.drafter is None:
            return not_finite(f"the target {self.target.name}", self.target.params, new_tokens)
        read = self.drafter.params | self.drafter.shared  # its mask, for one, is the target's
        return not_finite(f"the drafter {self.drafter.name}", read, new_tokens)

    def fetch(self, tree):
        """Copy to the host, to that of every process, and wait: the only place that does."""
        self.fetches += 1
        if spans(self.target.mesh):
            tree = self._run(everywhere(self.target.mesh), (), tree)
        return jax.device_get(tree)


def round_weights(target: Target, drafter: Drafter | None, rows: int) -> loop.Weights:
    """What rounds of so many rows read: weights that lie both ways where that is faster and there is room for them."""
    few = target.mesh is None and target.build.kind == "cpu" and 1 < rows < FEW_ROWS
    if few and "two_ways" not in vars(target):
        few = free_bytes(target.devices) > 2 * sum(x.nbytes for x in jax.tree.leaves(target.params))
    if few:
        return loop.Weights(target.two_ways, *(drafter.two_ways if drafter else ({}, {})))
    return loop.Weights(target.params, *((drafter.params, drafter.shared) if drafter else ({}, {})))


def check_memory(target: Target, state: DecodeState) -> None:
    """Refuse a state that does not fit beside what its devices already hold, on whichever process."""
    slots, capacity = state.tokens.shape
    needed = bytes_per_device(state)
    ours = [device for device in target.devices if device.process_index == processes.number()]
    available = processes.least(free_bytes(ours))
    if needed > available:
        fitting = available * slots // needed
        fits = f"{fitting} slots would fit; lower batch_size or max_new_tokens"
        where = "" if target.mesh is None else " on each device"
        raise InputError(
            f"the caches of {slots} slots x {capacity} tokens need {needed:,} bytes{where}, {available:,} are free: "
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


def chosen(
    engine: Engine, last: dict[str, np.ndarray], max_rounds: int | None, max_done: int | None
) -> dict[str, np.ndarray]:
    """A segment of the draft length that `engine.auto` chooses, which learns from it; last: what the slots hold."""
    auto = engine.auto
    assert auto is not None
    context = int(last["length"].max())
    k, rounds, least = auto.choose(engine.slots, context)
    if processes.count() > 1:  # their clocks differ
        k, rounds, least = json.loads(processes.share(json.dumps([k, rounds, least])))
    begin, compiled = time.perf_counter(), engine.compile_seconds
    after = engine.segment(rounds if max_rounds is None else min(rounds, max_rounds), max_done, k, least)
    seconds = time.perf_counter() - begin - (engine.compile_seconds - compiled)
    ran = after["rounds"] - last["rounds"]
    histogram = np.sum(after["histogram"] - last["histogram"], axis=0)
    certain = np.sum(after["certain"] - last["certain"], axis=0)
    segment = Segment(k, int(ran.max()), seconds, context, histogram, certain)
    auto.note(engine.slots, segment)
    engine.rounds_at += collections.Counter({0: segment.spared, k: int(ran.sum()) - segment.spared})
    last |= {name: np.array(after[name]) for name in last}
    return after


def serve(
    engine: Engine, prompts: Sequence[Sequence[int]], limits: Sequence[int], indices: Sequence[int],
    rounds: Sequence[int] | None = None, *, max_rounds: int | None = None, time_prefill: bool = False,
) -> Iterator[tuple[dict[int, Row], dict[int, Row]]]:  # fmt: skip
    """Answer all prompts: slots that get free take the next ones. After each segment, the rows that have finished in it
    and those that run on, by the prompts' places in the list.

    A row whose logits are not finite ends it with NotFiniteError, by its place, after the segment was handed out: it is
    among those that run on there, with the tokens it had before.

    Args:
      limits, indices, rounds: of each prompt, see `Engine.admit`.
      max_rounds: length of a segment; None lets it last until slots are to be refilled, or to the end.
      time_prefill: wait after each prefill, and add up `engine.prefill_seconds`.
    """
    holds: list[int | None] = [None] * engine.slots  # place of the prompt that each slot holds
    rounds = [0] * len(prompts) if rounds is None else rounds
    # For `chosen`: what the last segment, or an admission since, left in each slot.
    last = {
        name: np.zeros(getattr(engine.like, name).shape, np.int64)
        for name in ("length", "rounds", "histogram", "certain")
    }
    admitted = 0
    if time_prefill:
        engine.prefill_seconds = 0.0
    while admitted < len(prompts) or any(place is not None for place in holds):
        free = [row for row in engine.order if holds[row] is None]
        left = len(prompts) - admitted
        if len(free) < min(left, engine.slots):  # an admission is padded to a power of two: the rest of them wait
            free = free[: power_of_two(len(free) + 1) // 2]
        free = free[:left]
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
                last["length"][row], last["rounds"][row] = len(prompts[place]), rounds[place]
                last["histogram"][row] = last["certain"][row] = 0
            admitted = taken.stop
        idle = sum(place is None for place in holds)
        refill = max(idle + 1, engine.slots // REFILL) if admitted < len(prompts) else None
        after = engine.segment(max_rounds, refill) if engine.auto is None else chosen(engine, last, max_rounds, refill)
        finished: dict[int, Row] = {}
        running: dict[int, Row] = {}
        for row, place in enumerate(holds):
            if place is not None:
                done = bool(after["done"][row]) and after["fault"][row] == NONE
                (finished if done else running)[place] = {name: value[row] for name, value in after.items()}
                holds[row] = None if done else place
        yield finished, running
        for place, row in running.items():
            if row["fault"] != NONE:
                new_tokens = int(row["length"]) - len(prompts[place]) + rounds[place]
                raise NotFiniteError(place, engine.not_finite(int(row["fault"]), new_tokens))
