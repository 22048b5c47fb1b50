"""Attention in two parts: slots committed earlier, and the fresh block of this pass, under one softmax."""

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.models.cache import KVCache
from deer_jax.models.parts import Part, merge, normalised, part
from deer_jax.models.piecewise import Before, BlockMask, attend_pieces


def attend(
    q, k, v, *, visible=None, cache: KVCache | None = None, layer=None, start=None, begin=None
) -> jax.Array:  # fmt: skip
    """Attention output [B, T, N, H] of fresh queries over cached slots and fresh keys.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H], N a multiple of K (grouped queries).
      visible: bool [B or 1, T, T], which fresh key (last axis) a fresh query sees; None is causal. Without a cache also
        `Before` or `BlockMask`; whatever is not an array goes piece by piece there. Where it is an array, the keys may
        be more than the queries.
      cache: keys and values of earlier passes, all layers; this one's are read at index `layer`. None: there are none.
      start: int [B], number of cached slots that exist; slots from there on are hidden.
      begin: int [B, T], the first cached slot that a query sees; None: 0.
    """
    if cache is None and (visible is None or isinstance(visible, Before | BlockMask)):
        return attend_pieces(q, k, v, visible)
    rows, keys, values = _rows(q, k.shape[2]), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    with jax.named_scope("attend_fresh"):
        if visible is None:
            visible = _causal(q.shape[1])
        out = part(rows, keys, values, visible[:, None, None])
    if cache is not None:
        with jax.named_scope("attend_cache"):
            out = _merge_cache(out, rows, cache, layer, start, begin, cache.block or cache.capacity)
    return jnp.moveaxis(normalised(out).astype(v.dtype), 3, 1).reshape(q.shape)


def with_finite_values(k, v):
    """Keys and values whose values are all finite: a row of values that is not has keys of NaN instead.

    Hidden keys leave no trace, but a weight of 0 times a value of NaN would be NaN. So whoever sees a row that is not
    finite is not finite either, and nobody else, as if the row were not there: a rejected draft's is never seen.
    """
    finite = jnp.isfinite(v)
    k = jnp.where(jnp.all(finite, axis=-1, keepdims=True), k, jnp.array(jnp.nan, k.dtype))
    return k, jnp.where(finite, v, jnp.zeros((), v.dtype))


def _causal(T: int):
    return jnp.tril(jnp.ones((1, T, T), bool))


def _rows(q, K: int):
    """[B, T, N, H] -> [B, K, N/K, T, H]: heads that share a key head are further query rows of it."""
    B, T, N, H = q.shape
    return jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)


def _merge_cache(out: Part, rows, cache: KVCache, layer, start, begin, width: int) -> Part:
    S = cache.capacity
    width = min(width, S)

    def read(i, out):
        # The last block may not be full: it is moved back, and what an earlier one has read is hidden.
        first = jnp.minimum(i * width, S - width)
        slots = first + jnp.arange(width)
        seen = ((slots >= i * width)[None] & (slots[None] < start[:, None]))[:, None, None, None]
        if begin is not None:
            seen = seen & (slots[None, None] >= begin[..., None])[:, None, None]
        # Sliced at (layer, block) in one step: a layer sliced out first would be copied whole.
        keys, values = (_slice(side, layer, first, width) for side in (cache.keys, cache.values))
        return merge(out, part(rows, keys, values, seen))

    if width == S:
        return read(0, out)
    lowest = 0
    if begin is not None:  # queries that see nothing do not count
        lowest = jnp.min(jnp.where(begin < start[:, None], begin, S)) // width
    return lax.fori_loop(lowest, -(-jnp.max(start) // width), read, out)


def _slice(side, layer, first, width: int):
    """[L, B, K, S, H] -> [B, K, width, H]"""
    _, B, K, _, H = side.shape
    where = [jnp.asarray(index, jnp.int32) for index in (layer, 0, 0, first, 0)]
    return lax.dynamic_slice(side, where, (1, B, K, width, H)).reshape(B, K, width, H)
