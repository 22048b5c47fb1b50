"""Attention in two parts: slots committed earlier, and the fresh block of this pass, under one softmax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.models.cache import KVCache
from deer_jax.models.layers import precision

HIDDEN = -1e30  # finite, so that a fully hidden part contributes exp(-1e30 - max) = 0 and never NaN


class _Part(NamedTuple):
    """Softmax over some of the keys, not yet normalised; parts of the same queries can be merged."""

    top: jax.Array  # float32 [B, K, Q, 1] largest score
    total: jax.Array  # float32 [B, K, Q, 1] sum of exp(score - top)
    mixed: jax.Array  # float32 [B, K, Q, H] values weighted by exp(score - top)


def attend(q, k, v, *, visible=None, cache: KVCache | None = None, layer=None, start=None, block: int | None = None):
    """Attention output [B, T, N, H] of fresh queries over cached slots and fresh keys.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H], N a multiple of K (grouped queries).
      visible: bool [B or 1, T, T], which fresh key (last axis) a fresh query sees; None is causal.
      cache: keys and values of earlier passes, all layers; this one's are read at index `layer`. None: there are none.
      start: int [B], number of cached slots that exist; slots from there on are hidden.
      block: read the cache in pieces of so many slots, up to the longest row; None reads its whole capacity at once.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # Heads that share a key head are further query rows of it, so that everything below is a plain batched product.
    rows = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)

    def part(keys, values, seen):
        """keys, values [B, K, S, H]; seen bool, broadcastable to [B, K, N/K, T, S]."""
        exact = precision(q.dtype)
        scores = jnp.einsum("bkqh,bksh->bkqs", rows, keys, precision=exact, preferred_element_type=jnp.float32)
        scores = scores.reshape(B, K, N // K, T, -1) * H**-0.5
        scores = jnp.where(seen, scores, HIDDEN).reshape(B, K, rows.shape[2], -1)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        mixed = jnp.einsum("bkqs,bksh->bkqh", weights.astype(values.dtype), values, precision=exact,
                           preferred_element_type=jnp.float32)  # fmt: skip
        return _Part(top, jnp.sum(weights, axis=-1, keepdims=True), mixed)

    with jax.named_scope("attend_fresh"):
        if visible is None:
            visible = jnp.tril(jnp.ones((1, T, T), bool))
        out = part(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), visible[:, None, None])
    if cache is not None:
        with jax.named_scope("attend_cache"):
            out = _merge_cache(out, part, cache, layer, start, block or cache.capacity)
    mixed = (out.mixed / out.total).astype(v.dtype)
    return jnp.moveaxis(mixed.reshape(B, K, N // K, T, H), 3, 1).reshape(B, T, N, H)


def _merge_cache(out: _Part, part, cache: KVCache, layer, start, width: int) -> _Part:
    S = cache.capacity
    width = min(width, S)

    def read(i, out):
        # The last block may not be full: it is moved back, and what an earlier one has read is hidden.
        first = jnp.minimum(i * width, S - width)
        slots = first + jnp.arange(width)
        seen = (slots >= i * width)[None] & (slots[None] < start[:, None])
        # Sliced at (layer, block) in one step: a layer sliced out first would be copied whole.
        keys, values = (_slice(side, layer, first, width) for side in (cache.keys, cache.values))
        return _merge(out, part(keys, values, seen[:, None, None, None]))

    if width == S:
        return read(0, out)
    return lax.fori_loop(0, -(-jnp.max(start) // width), read, out)


def _slice(side, layer, first, width: int):
    """[L, B, K, S, H] -> [B, K, width, H]"""
    _, B, K, _, H = side.shape
    where = [jnp.asarray(index, jnp.int32) for index in (layer, 0, 0, first, 0)]
    return lax.dynamic_slice(side, where, (1, B, K, width, H)).reshape(B, K, width, H)


def _merge(one: _Part, other: _Part) -> _Part:
    top = jnp.maximum(one.top, other.top)
    a, b = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return _Part(top, one.total * a + other.total * b, one.mixed * a + other.mixed * b)
