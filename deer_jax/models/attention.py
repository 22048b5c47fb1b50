"""Attention in two parts: slots committed earlier, and the fresh block of this pass."""

import jax
import jax.numpy as jnp

from deer_jax.models.layers import precision

HIDDEN = -1e30  # finite, so that a fully hidden part contributes exp(-1e30 - max) = 0 and never NaN


def attend(q, k, v, *, visible=None, cached=None, start=None):
    """Attention output [B, T, N, H] of fresh queries over cached slots and fresh keys, one softmax over both.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H], N a multiple of K (grouped queries).
      visible: bool [B or 1, T, T], which fresh key (last axis) a fresh query sees; None is causal.
      cached: keys and values [B, K, S, H] of earlier passes, or None.
      start: int [B], number of cached slots that exist; slots from there on are hidden.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scale = H**-0.5  # on float32 scores: scaling bfloat16 queries would round them again
    exact = precision(q.dtype)

    with jax.named_scope("attend_fresh"):
        if visible is None:
            visible = jnp.tril(jnp.ones((1, T, T), bool))
        fresh = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=exact, preferred_element_type=jnp.float32)
        fresh = jnp.where(visible[:, None, None], fresh * scale, HIDDEN)
        top = jnp.max(fresh, axis=-1, keepdims=True)
    if cached is not None:
        keys, values = cached
        with jax.named_scope("attend_cache"):
            old = jnp.einsum("btkgh,bksh->bkgts", q, keys, precision=exact, preferred_element_type=jnp.float32)
            slots = jnp.arange(keys.shape[2], dtype=start.dtype)
            seen = slots[None] < start[:, None]
            old = jnp.where(seen[:, None, None, None], old * scale, HIDDEN)
            top = jnp.maximum(top, jnp.max(old, axis=-1, keepdims=True))
            old = jnp.exp(old - top)
    fresh = jnp.exp(fresh - top)
    total = jnp.sum(fresh, axis=-1)
    mixed = jnp.einsum("bkgts,bskh->btkgh", fresh.astype(v.dtype), v, precision=exact,
                       preferred_element_type=jnp.float32)  # fmt: skip
    if cached is not None:
        total = total + jnp.sum(old, axis=-1)
        mixed = mixed + jnp.einsum("bkgts,bksh->btkgh", old.astype(v.dtype), values, precision=exact,
                                   preferred_element_type=jnp.float32)  # fmt: skip
    mixed = mixed / jnp.moveaxis(total, -1, 1)[..., None]
    return mixed.astype(v.dtype).reshape(B, T, N, H)
