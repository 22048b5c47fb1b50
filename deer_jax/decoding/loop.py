"""The decode loop: draft, verify, accept, commit, all on the device.

Plain decoding is the same loop with k = 0.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.config import ModelConfig
from deer_jax.decoding.accept import Verdict, accept_greedy, accept_sampled
from deer_jax.decoding.sampling import Kind, Knobs, pick_draft, picked
from deer_jax.decoding.state import CERTAINTIES, DRAFTER, NONE, TARGET, DecodeState
from deer_jax.drafters.protocol import Draft, Method, Seen
from deer_jax.models.cache import KVCache, write_cache, write_rows
from deer_jax.models.transformer import Params, bind, read_prompts
from deer_jax.sharding import constrain, constrain_tree


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when a decode is compiled, beside the shapes of its arguments."""

    target: ModelConfig
    drafter: Method | None
    k: int
    kind: Kind
    gated: bool = False  # whether drafts of too little certainty, see `Knobs.least`, are not verified

    @property
    def taps(self) -> tuple[int, ...]:
        return self.drafter.taps if self.drafter else ()


class Weights(NamedTuple):
    """The parameters of both models; a drafter's are its own, and those of the target that it reads."""

    target: Params
    drafter: Params
    shared: Params


def one_round(plan: Plan, weights: Weights, state: DecodeState, knobs: Knobs, stop_ids):
    """One draft and one verify: the state with accepted + 1 more tokens in every running row."""
    draft, drafter = propose(plan, weights, state, knobs)
    verify = functools.partial(verified, plan, weights.target, state, knobs)
    if plan.gated and draft.certainty is not None:
        # A row's own first token has no part in this, only what it is drawn from: so what is verified is exact.
        worth = jnp.any(~state.done & (draft.certainty >= knobs.least))
        like = jax.eval_shape(verify, draft)
        check = lax.cond(worth, lambda: verify(draft), lambda: padded(verify(none_of(draft)), like))
        certain = counted(state, draft.certainty, worth, check.verdict)
    else:
        check, certain = verify(draft), state.certain
    after = commit(state, check.verdict, stop_ids, check.faults)
    if plan.drafter is not None:
        seen = Seen(check.block, check.tapped, state.length - 1, after.length - state.length)
        drafter = plan.drafter.observe(weights.drafter, weights.shared, drafter, seen, None)
    cache = write_cache(state.cache, check.fresh, state.length - 1)
    return placed(plan, dataclasses.replace(after, drafter=drafter, cache=cache, certain=certain))


class Checked(NamedTuple):
    """What the target says about a block of the anchor and k drafts."""

    verdict: Verdict
    faults: jax.Array  # int32 [B, k+1], see `faults_of`
    block: jax.Array  # int32 [B, k+1]
    tapped: jax.Array | None  # [B, k+1, n*D]
    fresh: KVCache  # keys and values of the block


def verified(plan: Plan, params: Params, state: DecodeState, knobs: Knobs, draft: Draft) -> Checked:
    """The target reads a draft, of whatever length, and says what is kept of it."""
    block, read = read_block(plan, params, state, draft)
    logits = bind(plan.target, params).logits(read.hidden)
    if plan.kind.sampled:
        verdict = accept_sampled(
            logits, draft, length=state.length, prompt_index=state.prompt_index, rounds=state.rounds,
            kind=plan.kind, knobs=knobs,
        )  # fmt: skip
    else:
        verdict = accept_greedy(logits, draft)
    best = jnp.max(logits, axis=-1) if plan.kind.sampled else picked(logits, verdict.choice)
    return Checked(verdict, faults_of(best, draft), block, read.tapped, read.fresh)


def counted(state: DecodeState, certainty, worth, verdict: Verdict):
    """`DecodeState.certain` after a round whose drafts were verified, or were not worth it (bool [])."""
    part = jnp.floor(jnp.nan_to_num(certainty) * CERTAINTIES).astype(jnp.int32)
    at = jax.nn.one_hot(jnp.clip(part, 0, CERTAINTIES - 1), CERTAINTIES, dtype=jnp.int32)
    kinds = jnp.stack([~state.done, ~state.done & worth, ~state.done & worth & (verdict.accepted > 0)], axis=1)
    return state.certain + at[:, None] * kinds[..., None].astype(jnp.int32)


def none_of(draft: Draft) -> Draft:
    """A draft of no tokens, of logits as finite as this one's."""
    return Draft(draft.tokens[:, :0], None, finite=draft.finite)


def padded(found: Checked, like: Checked) -> Checked:
    """What a shorter block gave, zeros behind it as in a longer one; nothing behind what is committed is looked at."""

    def pad(x, to):
        return jnp.pad(x, [(0, more - size) for size, more in zip(x.shape, to.shape, strict=True)])

    return jax.tree.map(pad, found, like)


def placed(plan: Plan, state: DecodeState) -> DecodeState:
    """The state where its declared axes say, so that every program takes and returns it in one place."""
    axes = state.axes(plan.drafter.state_axes(state.drafter) if plan.drafter else ())
    return constrain_tree(state, axes)


def propose(plan: Plan, weights: Weights, state: DecodeState, knobs: Knobs):
    """k drafted tokens per row and the drafter's next state."""
    if plan.k == 0:
        return Draft(jnp.zeros((state.length.shape[0], 0), jnp.int32), None), state.drafter
    assert plan.drafter is not None
    pick = functools.partial(pick_draft, row=state.row, rounds=state.rounds, kind=plan.kind, knobs=knobs)
    return plan.drafter.propose(weights.drafter, weights.shared, state.drafter, state.row, plan.k, pick)


def read_block(plan: Plan, params: Params, state: DecodeState, draft: Draft):
    """The block [anchor, draft] int32 [B, k+1], and what the target's pass over it gives."""
    with jax.named_scope("verify"):
        model = bind(plan.target, params)
        at = state.length[:, None] - 1
        block = jnp.concatenate([jnp.take_along_axis(state.tokens, at, axis=1), draft.tokens], axis=1)
        block = constrain(block, "batch", None)
        positions = at + jnp.arange(block.shape[1])[None]
        start = state.length - 1
        return block, model(model.lookup(block), positions, cache=state.cache, start=start, taps=plan.taps)


def faults_of(best, draft: Draft):
    """int32 [B, k+1]: whose logits are not finite at each block position; the drafter's count for the whole draft.

    best float32 [B, k+1]: the target's largest logits. NaN and infinity are the largest wherever they stand; a token of
    -inf beside others is only one that is never said.
    """
    with jax.named_scope("finite"):
        finite = jnp.isfinite(best)
        drafter = jnp.int32(NONE)
        if draft.finite is not None:
            drafter = jnp.where(draft.finite, NONE, DRAFTER)[:, None]
        return jnp.where(finite, drafter, TARGET).astype(jnp.int32)


def commit(state: DecodeState, verdict: Verdict, stop_ids, faults) -> DecodeState:
    """Append accepted + 1 tokens to every running row, up to its first stop token and its limit.

    stop_ids int32 [n]. Writes all k+1 choices; those behind the committed ones are scratch. faults int32 [B, k+1]: a
    row that has one at a position that decided a token it would commit ends here and commits nothing; what lies behind
    a rejected draft decided nothing.
    """
    with jax.named_scope("commit"):
        choice, accepted = verdict
        stop_at = first_stop(choice, stop_ids)
        offered = jnp.minimum(accepted, stop_at) + 1
        count = jnp.where(state.done, 0, jnp.minimum(offered, state.limit - state.length))
        decided = jnp.arange(choice.shape[1])[None] < count[:, None]
        fault = jnp.maximum(state.fault, jnp.max(jnp.where(decided, faults, NONE), axis=1))
        count = jnp.where(fault == NONE, count, 0)
        length = state.length + count
        running = (~state.done & (fault == NONE)).astype(jnp.int32)
        committed = jax.nn.one_hot(offered - 1, state.histogram.shape[1], dtype=jnp.int32) * running[:, None]
        return dataclasses.replace(
            state,
            tokens=write_rows(state.tokens, choice, state.length, ("batch", "slots")),
            length=length,
            done=state.done | (stop_at < count) | (length >= state.limit) | (fault != NONE),
            rounds=state.rounds + running,
            histogram=state.histogram + committed,
            fault=fault,
        )


def first_stop(tokens, stop_ids):
    """Index of the first stop id in each row, or the row's width: int32 [B, T], int32 [n] -> int32 [B]."""
    is_stop = jnp.any(tokens[..., None] == stop_ids[None, None], axis=-1)
    return jnp.where(jnp.any(is_stop, axis=1), jnp.argmax(is_stop, axis=1), tokens.shape[1]).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def run_segment(
    plan: Plan, state: DecodeState, weights: Weights, knobs: Knobs, stop_ids, max_rounds, max_done
) -> DecodeState:
    """Rounds until every row is done, or `max_done` rows are, or `max_rounds` have run (both int32 []), or until a row
    has met logits that are not finite."""

    def running(carry):
        count, state = carry
        done = jnp.sum(state.done, dtype=jnp.int32)
        going = (count < max_rounds) & (done < jnp.minimum(max_done, state.done.shape[0]))
        return going & jnp.all(state.fault == NONE)

    def body(carry):
        count, state = carry
        return count + 1, one_round(plan, weights, state, knobs, stop_ids)

    return lax.while_loop(running, body, (jnp.zeros((), jnp.int32), state))[1]


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def regenerate(plan: Plan, state: DecodeState, weights: Weights, knobs: Knobs) -> DecodeState:
    """A round that commits nothing but counts: its draft lies behind each row's committed tokens, the histogram says
    how much of it would be kept, of this round alone."""
    draft, _ = propose(plan, weights, state, knobs)
    check = verified(plan, weights.target, state, knobs, draft)
    after = dataclasses.replace(
        state,
        tokens=write_rows(state.tokens, draft.tokens, state.length, ("batch", "slots")),
        rounds=state.rounds + 1,
        histogram=jax.nn.one_hot(check.verdict.accepted, state.histogram.shape[1], dtype=jnp.int32),
        fault=jnp.maximum(state.fault, jnp.max(check.faults, axis=1)),
    )
    return placed(plan, after)


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def catch_up(plan: Plan, state: DecodeState, weights: Weights) -> DecodeState:
    """The state before rounds of this plan, after those of another k."""
    assert plan.drafter is not None
    drafter = plan.drafter.catch_up(weights.drafter, weights.shared, state.drafter, state.row, plan.k)
    return placed(plan, dataclasses.replace(state, drafter=drafter))


@functools.partial(jax.jit, static_argnames=("target", "drafter", "first"), donate_argnames="caches")
def prefill(
    target: ModelConfig, drafter: Method | None, caches, weights: Weights, tokens, start, length, rows, *, first: bool
):
    """Both models read a chunk int32 [R, P], at positions start.. (int32 []), of prompts of length int32 [R] in slots
    `rows`: all but their last token.

    A row whose slot is none is padding. On a mesh every row lies on the shard of its slot.

    caches: the target's cache and the drafter's state, not the whole state, so that every k shares this program.
    """
    with jax.named_scope("prefill"):
        cache, state = caches
        model = bind(target, weights.target)
        starts = jnp.broadcast_to(start, rows.shape)
        taps = drafter.taps if drafter else ()
        cache, tapped = read_prompts(model, model.lookup(tokens), cache, starts, rows, first=first, taps=taps)
        if drafter is not None:
            count = jnp.clip(length - 1 - starts, 0, tokens.shape[1])
            seen = Seen(tokens, tapped, starts, count, first)
            state = drafter.observe(weights.drafter, weights.shared, state, seen, rows)
            state = constrain_tree(state, drafter.state_axes(state))
        return constrain_tree(cache, cache.axes), state


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def admit(plan: Plan, state: DecodeState, tokens, length, limit, index, rounds, rows) -> DecodeState:
    """Put prompts into slots: tokens int32 [R, S], length, limit, prompt index and rounds int32 [R], slots int32 [R].

    A row whose slot is none is padding.

    rounds: what the rows' own counts start from; above 0 where part of the prompt is an answer begun earlier.
    """

    def put(side, values):
        return side.at[rows].set(values, mode="drop")

    state = dataclasses.replace(
        state,
        tokens=put(state.tokens, tokens),
        length=put(state.length, length),
        limit=put(state.limit, limit),
        done=put(state.done, False),
        prompt_index=put(state.prompt_index, index),
        rounds=put(state.rounds, rounds),
        histogram=put(state.histogram, 0),
        certain=put(state.certain, 0),
        fault=put(state.fault, NONE),
    )
    return placed(plan, state)
