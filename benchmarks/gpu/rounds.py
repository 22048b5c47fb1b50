"""What a round costs at real size, in bfloat16 with random weights, beside a plain step of the same target.

Nine programs, compiled side by side in threads, then run one after the other. A round must read the weights of both
models and the caches once; a mixture of experts reads those experts that its rows choose. Drafts are scattered over
the ids, so that rows of a block choose experts as those of a text do, and next to none is accepted: the context stays
as long as it is said to be.
"""

import dataclasses
import functools
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from card import BYTES, Card, filled, matrices, measure_card, pass_bytes, pass_flops
from results import Results
from shapes import DRAFTER_LAYERS, MASK, shape_of

from deer_jax.build import Build
from deer_jax.config import DrafterConfig, ModelConfig, Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.programs import capacity_for, compiled
from deer_jax.decoding.sampling import Kind, Knobs
from deer_jax.decoding.state import StateShape, abstract_state, idle_state
from deer_jax.drafters.protocol import Method
from deer_jax.drafters.standalone import StandaloneMethod
from deer_jax.drafters.start import ConditionedStart
from deer_jax.models.target import Target
from deer_jax.models.transformer import abstract_params

ROUNDS, TURNS = 32, 4  # of a call, and calls: the fastest counts
COMPILING = 0.65  # of the phase's time at most: what is not compiled then is left out


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. drafter: None is plain decoding, else `conditioned` or a model of `shapes`."""

    target: str
    batch: int
    context: int
    drafter: str | None = None
    k: int = 0

    def __str__(self) -> str:
        drafting = "plain" if self.drafter is None else f"{self.drafter} k = {self.k}"
        return f"{self.target}, batch {self.batch}, context {self.context}: {drafting}"


SHORT, LONG = 1024, 8192
CASES = (
    Case("8b", 1, SHORT), Case("8b", 1, SHORT, "conditioned", 8), Case("8b", 1, SHORT, "conditioned", 16),
    Case("8b", 1, SHORT, "0.5b", 16), Case("8b", 16, LONG), Case("8b", 16, LONG, "conditioned", 8),
    Case("30b", 1, SHORT), Case("30b", 1, SHORT, "conditioned", 8), Case("30b", 1, SHORT, "conditioned", 16),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scattered(Method):
    """Another method whose drafted tokens are moved by amounts that look random."""

    inner: Any

    @property
    def target_vocab(self) -> int:
        return self.inner.target_vocab

    @property
    def draft_length(self) -> int:
        return self.inner.draft_length

    @property
    def taps(self) -> tuple[int, ...]:
        return self.inner.taps

    def state(self, *args):
        return self.inner.state(*args)

    def state_axes(self, state):
        return self.inner.state_axes(state)

    def observe(self, *args):
        return self.inner.observe(*args)

    def propose(self, params, shared, state, row, k, pick):
        draft, state = self.inner.propose(params, shared, state, row, k, pick)
        moved = (row.length[:, None] * 7919 + jnp.arange(1, k + 1, dtype=jnp.int32)[None] * 104729) % self.target_vocab
        return draft._replace(tokens=(draft.tokens + moved) % self.target_vocab), state


@dataclasses.dataclass(frozen=True)
class Made:
    """A case's program and what it is called with, as shapes."""

    case: Case
    plan: loop.Plan
    shape: StateShape
    drafter: Any
    shared: Any
    program: Any
    seconds: float


def drafter_of(case: Case, config: ModelConfig, tiny: bool) -> tuple[Method | None, Any, Any]:
    """Its method, and as shapes its parameters and what it shares with the target."""
    if case.drafter is None:
        return None, {}, {}
    dtype = jnp.bfloat16
    if case.drafter != "conditioned":
        shape = shape_of(case.drafter, tiny)
        method = StandaloneMethod(shape, DrafterConfig(draft_length=case.k), config.vocab_size)
        special = jax.ShapeDtypeStruct((2, shape.width), dtype)
        return method, abstract_params(shape, dtype) | {"special": special}, {}
    start, found = ConditionedStart(mask=MASK[tiny], draft_length=case.k), []

    def begin(params):
        target = Target(config=config, params=params, build=Build.of("gpu"))  # its layers stacked
        drafter = start.begin(target, DRAFTER_LAYERS[tiny], None, 0)
        found.append(drafter.method)
        return drafter.params, drafter.shared

    params, shared = jax.eval_shape(begin, abstract_params(config, dtype))
    return found[0], jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params), shared


def make(case: Case, tiny: bool) -> Made:
    """Compile a case from shapes alone."""
    config, build = shape_of(case.target, tiny), Build.of("gpu")
    method, drafter, shared = drafter_of(case, config, tiny)
    method = None if method is None else Scattered(method)
    capacity = capacity_for([case.context + ROUNDS], case.k)
    shape = StateShape(config, method, case.batch, capacity, case.k, build)
    plan = loop.Plan(config, method, case.k, Kind.of(Sampling()))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    weights = loop.Weights(abstract_params(config, build.dtype), drafter, shared)
    knobs = jax.eval_shape(lambda: Knobs.of(Sampling(), 0))
    stops = jax.ShapeDtypeStruct((2,), jnp.int32)
    state = abstract_state(shape, drafter, shared)
    program, seconds = compiled(loop.run_segment, (plan,), state, weights, knobs, stops, number, number)
    return Made(case, plan, shape, drafter, shared, program, seconds)


def floor(made: Made, rows: int) -> tuple[float, float]:
    """Bytes that a round reads and operations that it does; rows: of each text that the target reads."""
    case, config = made.case, made.shape.target
    size, flops = (count(config, case.batch, rows, case.context) for count in (pass_bytes, pass_flops))
    if made.plan.drafter is None:
        return size, flops
    shape, context = made.plan.drafter.inner.shape, case.context
    if case.drafter == "conditioned":
        tables = BYTES * shape.width * shape.tapped_width
        more = tables + 2.0 * rows * case.batch * shape.width * shape.tapped_width
        return size + pass_bytes(shape, case.batch, rows, context) + tables, (
            flops + pass_flops(shape, case.batch, rows, context) + more
        )
    own = 2 * rows  # it reads the block that was committed, and the masks
    return size + pass_bytes(shape, case.batch, own, context), flops + pass_flops(shape, case.batch, own, context)


def seconds_per_round(made: Made, params: Any, drafter: Any) -> tuple[float, float]:
    """Of the fastest call, and the tokens that its rounds committed in the mean."""
    case, rng = made.case, np.random.default_rng(0)
    shared = {name: params["embed" if name == "embed" or "head" not in params else "head"] for name in made.shared}
    state = jax.jit(functools.partial(idle_state, made.shape))(drafter, shared)
    B, S = state.tokens.shape
    tokens = rng.integers(0, made.shape.target.vocab_size, (B, S)).astype(np.int32)
    weights, knobs = loop.Weights(params, drafter, shared), Knobs.of(Sampling(), 0)
    stops = jnp.full((2,), -1, jnp.int32)
    limit = S - case.k - 1
    times, committed = [], 0.0
    for turn in range(TURNS + 1):
        begun = {"length": np.full(B, case.context, np.int32), "limit": np.full(B, limit, np.int32),
                 "done": np.zeros(B, bool), "rounds": np.zeros(B, np.int32), "tokens": tokens}  # fmt: skip
        state = dataclasses.replace(state, **{name: jnp.asarray(value) for name, value in begun.items()})
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state = made.program(state, weights, knobs, stops, jnp.int32(ROUNDS), jnp.int32(B + 1))
        rounds, length, fault = jax.device_get((state.rounds, state.length, state.fault))
        seconds = time.perf_counter() - begin
        if fault.any():
            raise FloatingPointError(f"{case}: logits that are not finite")
        if turn:  # the first one also does what a process does once
            times.append(seconds / rounds.max())
            committed = float((length - case.context).sum() / rounds.sum())
    return min(times), committed


def report(results: Results, card: Card, made: Made, plain: dict[tuple, float], seconds: float, committed: float):
    """Write down a case; plain: milliseconds of the plain steps known so far."""
    case = made.case
    key = (case.target, case.batch, case.context)
    size, flops = floor(made, case.k + 1)
    expected: dict[str, Any] = {"ms": 1e3 * card.seconds(size, flops)}
    measured = {"ms": 1e3 * seconds, "share of the floor": expected["ms"] / (1e3 * seconds),
                "tokens/round": committed, "compile s": made.seconds}  # fmt: skip
    expected["share of the floor"] = 1.0
    because = card.why(size, flops)
    if case.drafter is None:
        plain[key] = measured["ms"]
    elif key in plain:
        config = made.shape.target
        alone = (count(config, case.batch, 1, case.context) for count in (pass_bytes, pass_flops))
        measured["round/step"] = measured["ms"] / plain[key]
        expected["round/step"] = card.seconds(size, flops) / card.seconds(*alone)
    results.add(str(case), measured, expected, because)


def run(results: Results, args: Any, deadline: float) -> None:
    """The whole phase."""
    card, failures = measure_card(results, args.tiny), 0
    cases = list(CASES)
    if args.tiny:
        cases = [
            dataclasses.replace(case, batch=min(case.batch, 2), context=case.context // 64)
            for case in cases
            if case.k != 16 or case.drafter != "conditioned"  # like k = 8, but for times
        ]
    begin = time.perf_counter()
    pool = ThreadPoolExecutor(len(cases))
    programs = [pool.submit(make, case, args.tiny) for case in cases]
    wait(programs, timeout=COMPILING * (deadline - time.monotonic()))
    pool.shutdown(wait=False)
    done = [each.result().seconds for each in programs if each.done() and not each.exception()]
    results.add(
        f"{len(done)} of {len(cases)} programs compiled side by side", {"seconds": time.perf_counter() - begin},
        {"seconds": max(done, default=0.0)}, "as long as the slowest of them alone",
    )  # fmt: skip
    held, params, plain = "", None, {}
    for case, future in zip(cases, programs, strict=True):
        if time.monotonic() > deadline - 5:
            results.leave_out(str(case), "no time is left")
            continue
        if not future.done():
            results.leave_out(str(case), "it was not compiled in time")
            continue
        try:
            made = future.result()
            if held != case.target:
                params = None  # the memory of one target is needed for the next
                params = jax.block_until_ready(filled(abstract_params(made.shape.target, jnp.bfloat16)))
                held = case.target
                size = sum(x.nbytes for x in jax.tree.leaves(params))
                results.say(f"{held}: {size / 1e9:.4g} GB of weights, {matrices(made.shape.target):.4g} entries of the "
                            "layers multiplied per row")  # fmt: skip
            seconds, committed = seconds_per_round(made, params, filled(made.drafter, seed=1))
            report(results, card, made, plain, seconds, committed)
        except (jax.errors.JaxRuntimeError, FloatingPointError, ValueError) as error:
            failures += 1
            results.leave_out(str(case), " ".join(str(error).split())[:300])
    if failures:
        raise SystemExit(f"{failures} of {len(cases)} programs failed")
