"""Attention in two parts: slots committed earlier, and the fresh block of this pass, under one softmax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.models.cache import KVCache
from deer_jax.models.layers import precision

HIDDEN = -1e30  # finite, so that a fully hidden part contributes exp(-1e30 - max) = 0 and never NaN


class BlockMask(NamedTuple):
    """Who sees whom when M blocks of R rows stand behind a text: text, block 0, .., block M-1.

    Text rows are causal; a block's rows see the text up to the block's anchor, and the real rows of their own block.
    """

    anchor: jax.Array  # int32 [B, M] position in the text
    real: jax.Array  # bool [B, M, R]


class _Part(NamedTuple):
    """Softmax over some of the keys, not yet normalised; parts of the same queries can be merged."""

    top: jax.Array  # float32 [B, K, Q, 1] largest score
    total: jax.Array  # float32 [B, K, Q, 1] sum of exp(score - top)
    mixed: jax.Array  # float32 [B, K, Q, H] values weighted by exp(score - top)


def attend(q, k, v, *, visible=None, cache: KVCache | None = None, layer=None, start=None) -> jax.Array:
    """Attention output [B, T, N, H] of fresh queries over cached slots and fresh keys.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H], N a multiple of K (grouped queries).
      visible: bool [B or 1, T, T], which fresh key (last axis) a fresh query sees; or `BlockMask`; None is causal.
      cache: keys and values of earlier passes, all layers; this one's are read at index `layer`. None: there are none.
      start: int [B], number of cached slots that exist; slots from there on are hidden.
    """
    if isinstance(visible, BlockMask):
        assert cache is None
        return _attend_blocks(q, k, v, visible)
    rows, keys, values = _rows(q, k.shape[2]), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    with jax.named_scope("attend_fresh"):
        if visible is None:
            visible = _causal(q.shape[1])
        out = _part(rows, keys, values, visible[:, None, None])
    if cache is not None:
        with jax.named_scope("attend_cache"):
            out = _merge_cache(out, rows, cache, layer, start, cache.block or cache.capacity)
    return _finish(out, rows.shape, v.dtype)


def with_finite_values(k, v):
    """Keys and values whose values are all finite: a row of values that is not has keys of NaN instead.

    Hidden keys leave no trace, but a weight of 0 times a value of NaN would be NaN. So whoever sees a row that is not
    finite is not finite either, and nobody else, as if the row were not there: a rejected draft's is never seen.
    """
    finite = jnp.isfinite(v)
    k = jnp.where(jnp.all(finite, axis=-1, keepdims=True), k, jnp.array(jnp.nan, k.dtype))
    return k, jnp.where(finite, v, jnp.zeros((), v.dtype))


def _attend_blocks(q, k, v, blocks: BlockMask) -> jax.Array:
    """`attend` without the scores that nobody may see: each block apart, blocks against the text, text alone."""
    (B, M, R), K = blocks.real.shape, k.shape[2]
    T = q.shape[1] - M * R
    keys, values = jnp.swapaxes(k[:, :T], 1, 2), jnp.swapaxes(v[:, :T], 1, 2)
    with jax.named_scope("attend_text"):
        text = _rows(q[:, :T], K)
        text = _finish(_part(text, keys, values, _causal(T)[:, None, None]), text.shape, v.dtype)
    with jax.named_scope("attend_blocks"):
        rows = _rows(q[:, T:], K)
        before = jnp.repeat(jnp.arange(T)[None, None] <= blocks.anchor[..., None], R, axis=1)  # [B, M*R, T]
        out = _part(rows, keys, values, before[:, None, None])
        own_q, own_k, own_v = (x[:, T:].reshape(B * M, R, *x.shape[2:]) for x in (q, k, v))
        own_keys, own_values = jnp.swapaxes(own_k, 1, 2), jnp.swapaxes(own_v, 1, 2)
        seen = blocks.real.reshape(B * M, 1, 1, 1, R)
        own = _part(_rows(own_q, K), own_keys, own_values, seen)
        # [B*M, K, G*R, x] -> [B, K, G*M*R, x]
        own = _Part(
            *(jnp.moveaxis(x.reshape(B, M, K, -1, R, x.shape[-1]), 1, 3).reshape(B, K, -1, x.shape[-1]) for x in own)
        )
        block = _finish(_merge(out, own), rows.shape, v.dtype)
    return jnp.concatenate([text, block], axis=1)


def _causal(T: int):
    return jnp.tril(jnp.ones((1, T, T), bool))


def _rows(q, K: int):
    """[B, T, N, H] -> [B, K, N/K, T, H]: heads that share a key head are further query rows of it."""
    B, T, N, H = q.shape
    return jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)


def _part(rows, keys, values, seen) -> _Part:
    """rows [B, K, G, T, H]; keys, values [B, K, S, H]; seen bool, broadcastable to [B, K, G, T, S]."""
    B, K, G, T, H = rows.shape
    exact = precision(rows.dtype)
    # With the rows of a key head on one axis, both products are plain batched ones.
    scores = jnp.einsum("bkqh,bksh->bkqs", rows.reshape(B, K, G * T, H), keys, precision=exact,
                        preferred_element_type=jnp.float32)  # fmt: skip
    scores = scores.reshape(B, K, G, T, -1) * H**-0.5
    scores = jnp.where(seen, scores, HIDDEN).reshape(B, K, G * T, -1)
    # The result is the same for any `top`, so nothing is lost by not differentiating it, and half of the time is won.
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weights.astype(values.dtype), values, precision=exact,
                       preferred_element_type=jnp.float32)  # fmt: skip
    return _Part(top, jnp.sum(weights, axis=-1, keepdims=True), mixed)


def _finish(out: _Part, shape: tuple[int, ...], dtype) -> jax.Array:
    """The normalised result [B, T, N, H] of rows of shape [B, K, G, T, H]."""
    B, K, G, T, H = shape
    mixed = (out.mixed / out.total).astype(dtype)
    return jnp.moveaxis(mixed.reshape(B, K, G, T, H), 3, 1).reshape(B, T, K * G, H)


def _merge_cache(out: _Part, rows, cache: KVCache, layer, start, width: int) -> _Part:
    S = cache.capacity
    width = min(width, S)

    def read(i, out):
        # The last block may not be full: it is moved back, and what an earlier one has read is hidden.
        first = jnp.minimum(i * width, S - width)
        slots = first + jnp.arange(width)
        seen = (slots >= i * width)[None] & (slots[None] < start[:, None])
        # Sliced at (layer, block) in one step: a layer sliced out first would be copied whole.
        keys, values = (_slice(side, layer, first, width) for side in (cache.keys, cache.values))
        return _merge(out, _part(rows, keys, values, seen[:, None, None, None]))

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
