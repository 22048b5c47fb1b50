"""EAGLE-3's layer: rows in a chain, each made of a token and of a state of the text before it (arXiv 2503.01840).

Where the target has read that text, the state is made of its tapped layers' outputs, side by side and projected;
behind that it is what the layer itself gave one row before. A layer's keys and values are made of its input alone, so
those of committed tokens, the context, are computed once each and cached. A row is at its token's place.

    text        def  f  (  x  :            the target has read def f ( and chosen x, the anchor
    context          f  (                  with the states of def, f
    chain                  x  :  ..        with the state of (, then with what the layer gave for x, ..

The first token has no state before it: its row is no context, and where it is the anchor its state is zeros.

Parameters (`transformer.abstract_params` of an `Eagle3Config`): fc [D, n*D'] · norm [D] · tapped_norm [n*D'] if it has
one · layers, one, with q, k, v [.., 2 * D], of the embedding first, and a norm for either half.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deer_jax.build import Remat
from deer_jax.config import Eagle3Config
from deer_jax.models.attention import attend
from deer_jax.models.cache import KVCache
from deer_jax.models.layers import gated_mlp, linear, rms_norm, rotary
from deer_jax.models.parts import Part, merge, normalised, part
from deer_jax.models.transformer import Layer, Transformer
from deer_jax.models.weights import outer_weights
from deer_jax.sharding import constrain, whole

FIRST = 1  # the first token that is context


def states_of(model: Transformer, tapped) -> jax.Array:
    """States [B, T, D] of the target's tapped outputs [B, T, n*D']; zeros of zeros."""
    config = _shape(model)
    with jax.named_scope("context"):
        tapped = constrain(tapped, "batch", None, "mlp")
        if config.norm_tapped:
            tapped = rms_norm(tapped, model.tapped_norm[...], config.norm_eps)
        return constrain(linear(tapped, whole(model.fc[...], outer_weights(config)["fc"].axes)), "batch", None, None)


def context_kv(model: Transformer, embedded, states, start) -> KVCache:
    """Keys and values [1, B, K, T, H] of tokens at positions start [B] .., by their embeddings [B, T, D] and the states
    [B, T, D] before them. For `cache.write_cache` at `start`."""
    with jax.named_scope("context"):
        positions = start[:, None] + jnp.arange(embedded.shape[1], dtype=start.dtype)[None]
        layer = _layer(model)
        keys, values = layer.keys_values(_joined(layer, embedded, states)[0], _rotary(model, positions, states.dtype))
        sides = (jnp.swapaxes(side, 1, 2)[None] for side in (keys, values))
        return KVCache(*(constrain(side, None, "batch", "kv_heads", None, None) for side in sides))


class Row(NamedTuple):
    """What a row of each chain asks and offers."""

    query: jax.Array  # [B, M, N, H]
    key: jax.Array  # [B, M, K, H]
    value: jax.Array  # [B, M, K, H]
    residual: jax.Array  # [B, M, D]


def begin_row(model: Transformer, embedded, states, positions) -> Row:
    """A row of each of M chains: embeddings and states [B, M, D], positions int [B, M]."""
    layer = _layer(model)
    joined, normed = _joined(layer, embedded, states)
    cos_sin = _rotary(model, positions, states.dtype)
    key, value = layer.keys_values(joined, cos_sin)
    return Row(layer.queries(joined, cos_sin), key, value, normed if _shape(model).norm_residual else states)


def end_row(model: Transformer, row: Row, mixed):
    """The states [B, M, D] that the next row is made of, and those that predict, of attention's output [B, M, N, H]."""
    config, layer = _shape(model), _layer(model)
    x = row.residual + linear(mixed.reshape(*mixed.shape[:2], -1), layer.weight("o"))
    h = rms_norm(x, layer.weight("post_norm"), config.norm_eps)
    x = x + gated_mlp(h, *(layer.weight(name) for name in ("gate", "up", "down")))
    x = constrain(x, "batch", None, None)
    final = rms_norm(x, model.norm[...], config.norm_eps)
    return final if config.norm_output else x, final


def draft_row(model: Transformer, embedded, states, positions, earlier: list[Row], cache: KVCache, start):
    """The next row of one chain per batch row, as `end_row`; `earlier`: the chain's rows so far, to which it is added.

    cache: the context's keys and values, seen from FIRST up to before start int [B], the anchor's place.
    """
    row = begin_row(model, embedded, states, positions)
    earlier.append(row)
    keys, values = (jnp.concatenate(side, axis=1) for side in zip(*(each[1:3] for each in earlier), strict=True))
    visible, begin = jnp.ones((1, 1, len(earlier)), bool), jnp.full_like(positions, FIRST)
    mixed = attend(row.query, keys, values, visible=visible, cache=cache, layer=0, start=start, begin=begin)
    return end_row(model, row, mixed)


def read_chains(model: Transformer, embedded, states, following, anchor, remat: Remat = "none") -> jax.Array:
    """Final states [B, M, W, D] of M chains of W rows each, for training; none sees another.

    embedded, states: [B, T, D] of a text, the states those before its tokens; following: embeddings [B, M, W, D] of the
    chains' tokens, whose first is the anchor, at position int32 [B, M].
    """
    context = context_kv(model, embedded, states, jnp.zeros(embedded.shape[:1], anchor.dtype))
    (B, M, W, _), (_, _, K, T, H) = following.shape, context.keys.shape
    slots = jnp.arange(T)[None, None]
    seen = ((slots >= FIRST) & (slots < anchor[..., None]))[:, None, None]
    rows = jnp.moveaxis(following, 2, 0)
    state = jnp.take_along_axis(states, anchor[..., None], axis=1)

    def step(carry, at):
        (state, keys, values), (j, x) = carry, at
        row = begin_row(model, x, state, anchor + j)
        keys, values = (
            lax.dynamic_update_index_in_dim(side, new.reshape(B * M, K, H), j, 2)
            for side, new in ((keys, row.key), (values, row.value))
        )
        query = row.query.reshape(B, M, K, -1, H)
        own = part(query.reshape(B * M, K, -1, 1, H), keys, values, (jnp.arange(W) <= j)[None, None, None, None])
        own = Part(*(jnp.moveaxis(x.reshape(B, M, K, -1, x.shape[-1]), 1, 3) for x in own))
        text = part(jnp.moveaxis(query, 1, 3), context.keys[0], context.values[0], seen)
        mixed = jnp.moveaxis(normalised(merge(own, text)).astype(state.dtype), 3, 1).reshape(row.query.shape)
        state, final = end_row(model, row, mixed)
        return (state, keys, values), final

    empty = jnp.zeros((B * M, K, W, H), state.dtype)
    run = step if remat == "none" else jax.checkpoint(step)  # a chain's scores are of the whole text
    _, found = lax.scan(run, (state, empty, empty), (jnp.arange(W, dtype=anchor.dtype), rows))
    return jnp.moveaxis(found, 0, 2)


def _shape(model: Transformer) -> Eagle3Config:
    assert isinstance(model.config, Eagle3Config)
    return model.config


def _layer(model: Transformer) -> Layer:
    """The layer, out of the stack of one where layers are stacked."""
    layers: Any = model.layers
    if not model.scan:
        return layers[0]
    graph, weights = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda x: x[0], weights))


def _joined(layer: Layer, embedded, states):
    """Normalised embeddings and states side by side [B, T, 2 * D], and the latter alone."""
    normed = rms_norm(states, layer.weight("hidden_norm"), layer.config.norm_eps)
    return jnp.concatenate([rms_norm(embedded, layer.weight("input_norm"), layer.config.norm_eps), normed], -1), normed


def _rotary(model: Transformer, positions, dtype):
    return rotary(positions, model.config.rope, model.config.head_width, dtype)
