"""Verification: what the target says about a draft, and how much of it is kept.

Greedy, the target's choices are committed, so the output is the target's whatever was drafted. Sampling follows
Leviathan et al. (arXiv 2211.17192), DEER equations 5 and 6: a draft token x is kept with probability min(1, p(x)/q(x)),
the first rejected position is drawn again from the normalised max(0, p - q), and if all are kept the target's next
distribution gives one token more. The committed tokens are then distributed exactly as the target's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deer_jax.decoding.sampling import ACCEPT, RESAMPLE, Kind, Knobs, draw, keys_for, log_probabilities, picked, uniform
from deer_jax.drafters.protocol import Draft


class Verdict(NamedTuple):
    """What a round may commit: choice[:, :accepted + 1]."""

    choice: jax.Array  # int32 [B, k+1]
    accepted: jax.Array  # int32 [B]


def accept_greedy(logits, draft: Draft) -> Verdict:
    """The target's own choices after each block position; logits float32 [B, k+1, V]."""
    choice = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return Verdict(choice, accepted_prefix(draft.tokens == choice[:, :-1]))


def accepted_prefix(kept):
    """How many leading entries of each row are true: bool [B, k] -> int32 [B].

    k = 4:  T T F T -> 2;  F T T T -> 0;  T T T T -> 4
    """
    return jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def accept_sampled(logits, draft: Draft, *, length, prompt_index, rounds, kind: Kind, knobs: Knobs) -> Verdict:
    """Keep each draft token with probability min(1, p/q), stop at the first rejection, draw there from the residual.

    logits float32 [B, k+1, V]. q is the distribution the draft was drawn from: dense, over candidates and 0 elsewhere,
    or a point mass.
    """
    k = draft.tokens.shape[1]
    log_p = log_probabilities(logits, knobs.temperature, kind, knobs)
    position = length[:, None] + jnp.arange(k + 1)[None]

    picked_p = jnp.take_along_axis(log_p[:, :k], draft.tokens[..., None], axis=-1)[..., 0]
    picked_q = log_q_of(draft, picked_p)
    coins = uniform(keys_for(knobs.seed, prompt_index, rounds, position[:, :k], ACCEPT))
    accepted = accepted_prefix(jnp.log(coins) + picked_q < picked_p)

    # Only the row after the last kept token is sampled: the residual there, or all of p where every draft was kept.
    at = accepted[:, None]
    p = jnp.exp(jnp.take_along_axis(log_p, at[..., None], axis=1))[:, 0]
    if k:
        q = q_at(draft, jnp.minimum(at, k - 1), p.shape[-1])
        residual = jnp.maximum(p - jnp.where(at < k, q, 0), 0)
        # p and q equal up to rounding are rejected with probability about zero; p itself is then the right answer.
        p = jnp.where(jnp.sum(residual, axis=-1, keepdims=True) > 0, residual, p)
    keys = keys_for(knobs.seed, prompt_index, rounds, length[:, None] + at, RESAMPLE)
    drawn = draw(keys, jnp.log(p)[:, None])
    choice = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    return Verdict(jnp.where(jnp.arange(k + 1)[None] < at, choice, drawn), accepted)


def log_q_of(draft: Draft, like):
    """float32 [B, k]: log q of each drafted token; like: an array of this shape."""
    if draft.log_q is None:
        return jnp.zeros_like(like)
    if draft.ids is None:
        return picked(draft.log_q, draft.tokens)
    return jnp.max(jnp.where(draft.ids == draft.tokens[..., None], draft.log_q, -jnp.inf), axis=-1)


def q_at(draft: Draft, at, vocab_size: int):
    """float32 [B, V]: the distribution of each row's draft position at int32 [B, 1]."""
    if draft.log_q is None:
        token = jnp.take_along_axis(draft.tokens, at, axis=1)
        return jax.nn.one_hot(token[:, 0], vocab_size, dtype=jnp.float32)
    q = jnp.exp(jnp.take_along_axis(draft.log_q, at[..., None], axis=1))[:, 0]
    if draft.ids is None:
        return q
    ids = jnp.broadcast_to(draft.ids, draft.log_q.shape)
    ids = jnp.take_along_axis(ids, at[..., None], axis=1)[:, 0]
    # A candidate may stand there twice, once with nothing.
    return jax.vmap(lambda ids, q: jnp.zeros((vocab_size,), jnp.float32).at[ids].add(q))(ids, q)
