"""Token choice: temperature, then top-k, then top-p, and random numbers that depend on nothing but what they are for.

The cuts find their threshold by bisection on the bits of a float instead of sorting: exact, the same for ties as in
transformers' top-k (kept at the k-th value), and cheap where the vocabulary is large or sharded.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.config import Sampling
from deer_jax.drafters.protocol import Draft, Row

# What a random number is for. Part of its key, so that no two uses share one.
DRAFT, ACCEPT, RESAMPLE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Kind:
    """What of the sampling settings changes the compiled program."""

    sampled: bool  # the target samples; otherwise greedy
    draft_sampled: bool
    top_k: bool
    top_p: bool
    block: bool = False  # whether the drafts are verified as a whole

    @classmethod
    def of(cls, sampling: Sampling) -> "Kind":
        draft = sampling.temperature if sampling.draft_temperature is None else sampling.draft_temperature
        sampled = sampling.temperature > 0
        block = sampled and sampling.verification == "block"
        return cls(sampled, draft > 0, sampling.top_k > 0, sampling.top_p < 1, block)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """The numbers of the sampling settings, traced: changing one compiles nothing.

    least: drafts of less certainty are not verified, where the plan is gated.
    """

    temperature: jax.Array  # float32 []
    draft_temperature: jax.Array  # float32 []
    top_k: jax.Array  # int32 []
    top_p: jax.Array  # float32 []
    seed: jax.Array  # PRNG key []
    least: jax.Array  # float32 []

    @classmethod
    def of(cls, sampling: Sampling, seed: int) -> "Knobs":
        draft = sampling.temperature if sampling.draft_temperature is None else sampling.draft_temperature
        return cls(
            jnp.float32(sampling.temperature),
            jnp.float32(draft),
            jnp.int32(sampling.top_k),
            jnp.float32(sampling.top_p),
            jax.random.key(seed),
            jnp.float32(0),
        )


def log_probabilities(logits, temperature, kind: Kind, knobs: Knobs):
    """float32 log-probabilities [..., V] after temperature, top-k and top-p; -inf where cut away."""
    scaled = logits.astype(jnp.float32) / temperature
    if kind.top_k:
        wanted = jnp.minimum(knobs.top_k, scaled.shape[-1]).astype(jnp.float32)
        threshold = largest_threshold(scaled, jnp.ones_like(scaled), wanted)
        scaled = jnp.where(scaled >= threshold, scaled, -jnp.inf)
    if kind.top_p:
        mass = jax.nn.softmax(scaled, axis=-1)
        # A float32 sum of all masses may fall short of a top_p just below 1; then nothing is cut.
        threshold = largest_threshold(mass, mass, knobs.top_p)
        scaled = jnp.where(mass >= threshold, scaled, -jnp.inf)
    return jax.nn.log_softmax(scaled, axis=-1)


def largest_threshold(values, weights, amount):
    """The largest float t [..., 1] with sum(weights where values >= t) >= amount, or the least float if there is none.

    values, weights float32 [..., V]; amount float32 []. Found bit by bit: floats order like their bits read as
    integers once negative ones are flipped.

      values 3 1 2 2, weights 1 1 1 1:  amount 1 -> 3;  amount 2 -> 2;  amount 3 -> 2;  amount 4 -> 1
    """
    keys = _ordered(values)

    def try_bit(i, low):
        # Unsigned order: `low` always satisfies the condition, and one more bit is kept if it still does.
        candidate = low | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        enough = jnp.sum(jnp.where(keys >= candidate, weights, 0), axis=-1, keepdims=True) >= amount
        return jnp.where(enough, candidate, low)

    start = jnp.zeros((*values.shape[:-1], 1), jnp.uint32)
    return _unordered(lax.fori_loop(0, 32, try_bit, start))


def _ordered(x):
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 0, bits | jnp.uint32(0x80000000), ~bits)


def _unordered(keys):
    bits = jnp.where(keys >> 31 == 1, keys & jnp.uint32(0x7FFFFFFF), ~keys)
    x = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(x), -jnp.inf, x)  # the least key is the bits of a negative NaN


def keys_for(seed, prompt_index, round_index, position, purpose: int):
    """One key per (seed, prompt, that row's own round, position, purpose).

    prompt_index, round_index int32 [B]; position int32 [B, n]. The round is part of it because a position that was
    drafted and rejected is drafted again. Slots and batch composition are not, so results do not depend on them.
    """

    def one(prompt, round_index, position):
        key = jax.random.fold_in(jax.random.fold_in(seed, prompt), round_index)
        return jax.random.fold_in(jax.random.fold_in(key, position), purpose)

    return jax.vmap(jax.vmap(one, in_axes=(None, None, 0)))(prompt_index, round_index, position)


def draw(keys, log_p):
    """int32 [B, n] drawn from log-probabilities [B, n, V], each with its own key [B, n]."""
    gumbel = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, log_p.shape[-1:], jnp.float32)))(keys)
    return jnp.argmax(log_p + gumbel, axis=-1).astype(jnp.int32)


def uniform(keys):
    """float32 [B, n] in [0, 1), each with its own key [B, n]."""
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32)))(keys)


def picked(logits, tokens):
    """[B, n]: the entries of [B, n, m] at places int32 [B, n]."""
    return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]


def pick_draft(logits, first: int, ids=None, *, row: Row, rounds, kind: Kind, knobs: Knobs) -> Draft:
    """Draft tokens for positions first.. of a round, and the distribution they were drawn from.

    logits [B, n, m], of all ids or of those given; see `drafters.protocol.Pick`.
    """

    def named(places):
        return places if ids is None else picked(jnp.broadcast_to(ids, logits.shape), places)

    with jax.named_scope("pick"):
        # The largest logit is NaN where one is, and infinite where one is or where nothing may be picked.
        if not kind.draft_sampled:
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            finite = jnp.all(jnp.isfinite(picked(logits, tokens)), axis=1)
            certainty = jnp.max(jax.nn.softmax(logits[:, 0].astype(jnp.float32), axis=-1), axis=-1)
            return Draft(named(tokens), None, finite=finite, certainty=certainty)
        finite = jnp.all(jnp.isfinite(jnp.max(logits, axis=-1)), axis=1)
        log_q = log_probabilities(logits, knobs.draft_temperature, kind, knobs)
        position = row.length[:, None] + first + jnp.arange(logits.shape[1])[None]
        keys = keys_for(knobs.seed, row.prompt_index, rounds, position, DRAFT)
        return Draft(named(draw(keys, log_q)), log_q, ids, finite, jnp.exp(jnp.max(log_q[:, 0], axis=-1)))
