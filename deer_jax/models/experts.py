"""Mixture of experts: routing, and two ways to run the chosen experts without ever copying their weights.

A few rows (decoding) loop over the experts that at least one row chose: each is read once, the others not at all. Many
rows (prefill, full forward) are sorted by expert and multiplied by ragged products. The stacks of all layers
[L, E, ...] are passed whole and sliced at (layer, expert): a layer sliced out first would be copied every round.
"""

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.config import ModelConfig
from deer_jax.models.layers import gated_mlp, precision

LOOP_ROWS = 64  # up to here the loop: every row passes through every active expert, which costs less than it reads


def route(x, router, config: ModelConfig):
    """Expert ids int32 [R, top] and their weights [R, top] in x's dtype, for rows x [R, D] and router [E, D].

    Softmax over all experts in float32, then the best `experts_per_token`; Qwen3-MoE divides them by their sum.
    """
    scores = jnp.einsum("rd,ed->re", x, router, precision=precision(x.dtype))
    scores = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    weights, chosen = lax.top_k(scores, config.experts_per_token)
    if config.normalise_router:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return chosen, weights.astype(x.dtype)


def mix(x, router, experts, layer, config: ModelConfig):
    """The experts' weighted sum [B, T, D] for x [B, T, D].

    Args:
      experts: dict of gate, up [L, E, F, D] and down [L, E, D, F], all layers.
      layer: index of this layer, traced or not.
    """
    rows = x.reshape(-1, x.shape[-1])
    chosen, weights = route(rows, router, config)
    run = _by_active_expert if rows.shape[0] <= LOOP_ROWS else _by_sorted_rows
    return run(rows, chosen, weights, experts, layer, config).reshape(x.shape)


def _by_active_expert(rows, chosen, weights, experts, layer, config: ModelConfig):
    weight_of = jnp.zeros((rows.shape[0], config.experts), rows.dtype)
    weight_of = weight_of.at[jnp.arange(rows.shape[0])[:, None], chosen].set(weights)
    load = jnp.zeros((config.experts,), jnp.int32).at[chosen.reshape(-1)].add(1)
    by_load = jnp.argsort(-load)  # the active experts come first
    layer = jnp.asarray(layer, jnp.int32)

    def pick(stack, expert):
        zero = jnp.zeros((), jnp.int32)
        piece = lax.dynamic_slice(stack, (layer, expert, zero, zero), (1, 1, *stack.shape[2:]))
        return piece.reshape(stack.shape[2:])

    def one_expert(i, total):
        expert = by_load[i].astype(jnp.int32)
        out = gated_mlp(rows, *(pick(experts[name], expert) for name in ("gate", "up", "down")))
        weight = lax.dynamic_slice_in_dim(weight_of, expert, 1, axis=1)
        # Not out * 0 for the rows that did not choose it: an expert that is not finite would reach them too.
        return total + jnp.where(weight != 0, out * weight, jnp.zeros((), out.dtype))

    return lax.fori_loop(0, jnp.sum(load > 0), one_expert, jnp.zeros_like(rows))


def _by_sorted_rows(rows, chosen, weights, experts, layer, config: ModelConfig):
    top = config.experts_per_token
    order = jnp.argsort(chosen.reshape(-1))  # assignments sorted by expert
    sizes = jnp.zeros((config.experts,), jnp.int32).at[chosen.reshape(-1)].add(1)

    def product(x, name):
        weight = lax.dynamic_index_in_dim(experts[name], layer, axis=0, keepdims=False)
        return lax.ragged_dot(x, jnp.swapaxes(weight, 1, 2), sizes, precision=precision(x.dtype))

    x = rows[order // top]
    out = product(jax.nn.silu(product(x, "gate")) * product(x, "up"), "down")
    out = out * weights.reshape(-1)[order][:, None]
    return jnp.zeros_like(rows).at[order // top].add(out)
