"""Softmax over some of the keys, in parts that are merged by maximum and sum: the arithmetic under all attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.models.layers import precision

HIDDEN = -1e30  # the score of a hidden key; finite, so that differences of scores are never NaN
LOWEST = HIDDEN / 2  # the largest score counts as at least this: exp(HIDDEN - LOWEST) = 0, also where all is hidden


class Part(NamedTuple):
    """Softmax over some of the keys, not yet normalised; parts of the same queries can be merged.

    Where every key is hidden, total and mixed are 0.
    """

    top: jax.Array  # float32 [B, K, G, T, 1] largest score, or LOWEST
    total: jax.Array  # float32 [B, K, G, T, 1] sum of exp(score - top)
    mixed: jax.Array  # float32 [B, K, G, T, H] values weighted by exp(score - top)


def nothing(rows) -> Part:
    """The part of no keys, for rows [B, K, G, T, H]."""
    top = jnp.full((*rows.shape[:-1], 1), LOWEST, jnp.float32)
    return Part(top, jnp.zeros_like(top), jnp.zeros(rows.shape, jnp.float32))


def part(rows, keys, values, seen) -> Part:
    """rows [B, K, G, T, H]; keys, values [B, K, S, H]; seen bool, broadcastable to [B, K, G, T, S]."""
    scores = jnp.where(seen, scores_of(rows, keys), HIDDEN)
    # The result is the same for any `top`, so nothing is lost by not differentiating it, and half of the time is won.
    top = lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), LOWEST))
    weights = jnp.exp(scores - top)
    return Part(top, jnp.sum(weights, axis=-1, keepdims=True), by_keys(weights.astype(values.dtype), values))


def merge(one: Part, other: Part) -> Part:
    """The part of both ones' keys."""
    top = jnp.maximum(one.top, other.top)
    a, b = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return Part(top, one.total * a + other.total * b, one.mixed * a + other.mixed * b)


def normalised(whole: Part) -> jax.Array:
    """float32 [B, K, G, T, H]: the softmax-weighted values; 0 where every key is hidden."""
    return whole.mixed / jnp.where(whole.total == 0, 1, whole.total)


def scores_of(rows, keys):
    """float32 [B, K, G, T, S]: scaled products of rows [B, K, G, T, H] with keys [B, K, S, H]."""
    # With the rows of a key head on one axis, the product is a plain batched one.
    scores = jnp.einsum("bkqh,bksh->bkqs", _joined(rows), keys, precision=precision(rows.dtype),
                        preferred_element_type=jnp.float32)  # fmt: skip
    return scores.reshape(*rows.shape[:-1], -1) * rows.shape[-1] ** -0.5


def by_keys(weights, values):
    """float32 [B, K, G, T, H]: values [B, K, S, H] summed with weights [B, K, G, T, S] of the same dtype."""
    mixed = jnp.einsum("bkqs,bksh->bkqh", _joined(weights), values, precision=precision(values.dtype),
                       preferred_element_type=jnp.float32)  # fmt: skip
    return mixed.reshape(*weights.shape[:-1], -1)


def by_rows(weights, rows):
    """float32 [B, K, S, H]: rows [B, K, G, T, H] summed with weights [B, K, G, T, S] of the same dtype."""
    return jnp.einsum("bkqs,bkqh->bksh", _joined(weights), _joined(rows), precision=precision(rows.dtype),
                      preferred_element_type=jnp.float32)  # fmt: skip


def _joined(x):
    """[B, K, G, T, x] -> [B, K, G*T, x]"""
    B, K, G, T, width = x.shape
    return x.reshape(B, K, G * T, width)
