"""Verification: what the target says about a draft, and how much of it is kept.

Greedy, the target's choices are committed, so the output is the target's whatever was drafted. Sampling follows
Leviathan et al. (arXiv 2211.17192), DEER equations 5 and 6: a draft token x is kept with probability min(1, p(x)/q(x)),
the first rejected position is drawn again from the normalised max(0, p - q), and if all are kept the target's next
distribution gives one token more. The committed tokens are then distributed exactly as the target's.

Block verification (Sun et al., arXiv 2403.10444, algorithm 2) keeps as many tokens on average or more, and is as exact.
It keeps the longest prefix of the draft that passes a test of its own. With w_0 = 1 and w_i = min(1, w_{i-1} p/q), the
prefix of i tokens passes with probability r_i / (r_i + 1 - w_i), r_i = sum max(0, w_i p - q) over what may follow it,
the whole draft with probability w_k; what follows the prefix is drawn from the normalised max(0, w_i p - q).

  k = 2, p/q of the tokens 0.5, 3:  token by token the first is kept with probability 1/2, and then the second;
  as a block w is 1, 0.5, 1: the whole draft is kept, as what the first token lacks the second has.
"""

import itertools
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
    """How much of a draft is kept, token by token or as a block, and the token drawn behind it from what is left over.

    logits float32 [B, k+1, V]. q is the distribution the draft was drawn from: dense, over candidates and 0 elsewhere,
    or a point mass.
    """
    k = draft.tokens.shape[1]
    log_p = log_probabilities(logits, knobs.temperature, kind, knobs)
    position = length[:, None] + jnp.arange(k + 1)[None]

    picked_p = jnp.take_along_axis(log_p[:, :k], draft.tokens[..., None], axis=-1)[..., 0]
    picked_q = log_q_of(draft, picked_p)
    coins = uniform(keys_for(knobs.seed, prompt_index, rounds, position[:, :k], ACCEPT))
    if kind.block:
        weight = prefix_weights(picked_p - picked_q)
        accepted = longest_prefix(weight, left_over(weight[:, :-1], log_p[:, :k], draft), coins)
        weight = jnp.take_along_axis(weight, accepted[:, None], axis=1)
    else:
        weight, accepted = jnp.ones((1, 1)), accepted_prefix(jnp.log(coins) + picked_q < picked_p)

    # Only the row after the last kept token is sampled: the residual there, or all of p where every draft was kept.
    at = accepted[:, None]
    p = jnp.exp(jnp.take_along_axis(log_p, at[..., None], axis=1))[:, 0]
    if k:
        q = q_at(draft, jnp.minimum(at, k - 1), p.shape[-1])
        residual = jnp.maximum(weight * p - jnp.where(at < k, q, 0), 0)
        # p and q equal up to rounding are rejected with probability about zero; p itself is then the right answer.
        p = jnp.where(jnp.sum(residual, axis=-1, keepdims=True) > 0, residual, p)
    keys = keys_for(knobs.seed, prompt_index, rounds, length[:, None] + at, RESAMPLE)
    drawn = draw(keys, jnp.log(p)[:, None])
    choice = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    return Verdict(jnp.where(jnp.arange(k + 1)[None] < at, choice, drawn), accepted)


def prefix_weights(log_ratio):
    """float32 [B, k+1]: w of each prefix of a draft, of 0 to k tokens, for log p/q float32 [B, k] of its tokens."""
    start = jnp.zeros_like(log_ratio[:, 0]) if log_ratio.shape[1] else jnp.zeros(log_ratio.shape[:1])
    columns = (log_ratio[:, j] for j in range(log_ratio.shape[1]))
    logs = itertools.accumulate(columns, lambda w, ratio: jnp.minimum(w + ratio, 0), initial=start)
    return jnp.exp(jnp.stack(list(logs), axis=1))


def left_over(weight, log_p, draft: Draft):
    """float32 [B, k]: sum of max(0, w p - q) at each place of a draft, for its prefix's w float32 [B, k].

    As w - sum of min(w p, q), which is about what the drafter may propose alone.
    """
    p = jnp.exp(log_p)
    if draft.log_q is None:
        common = jnp.minimum(weight * picked(p, draft.tokens), 1)
    else:
        q = jnp.exp(draft.log_q)
        if draft.ids is not None:
            p = jnp.take_along_axis(p, jnp.broadcast_to(draft.ids, q.shape), axis=-1)
        common = jnp.sum(jnp.minimum(weight[..., None] * p, q), axis=-1)
    return jnp.maximum(weight - common, 0)


def passing(weight, rest):
    """float32 [B, k]: how likely the prefixes of 1 to k tokens pass their tests; weight [B, k+1], rest [B, k]."""
    k = rest.shape[1]
    inner, bound = rest[:, 1:], rest[:, 1:] + 1 - weight[:, 1:k]
    # Where nothing is left over and nothing is lacking, p and q are the same, and what follows is kept.
    inner = jnp.where(bound > 0, inner / jnp.where(bound > 0, bound, 1), 1)
    return jnp.concatenate([inner, weight[:, k:]], axis=1)[:, :k]


def longest_prefix(weight, rest, coins):
    """int32 [B]: the longest prefix of a draft that passes its test, or 0; coins float32 [B, k], else as `passing`."""
    kept = coins < passing(weight, rest)
    length = jnp.arange(1, rest.shape[1] + 1)[None]
    return jnp.max(jnp.where(kept, length, 0), axis=1, initial=0).astype(jnp.int32)


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
