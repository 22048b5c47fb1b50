"""The backbone of a conditioned drafter: a `Transformer` whose layers also see what the target made of the text.

The context is the tapped target layers' outputs, side by side, projected and normalised: c = norm(fc(tapped)). Each
layer makes keys and values of c as it makes them of its own rows (same weights, true positions), but c is not put
through the layers: so they are computed once per committed token and cached. Rows are those of blocks (`Blocks`): an
anchor, which the target has not read yet, and what is to be drafted behind it.

Parameters (`transformer.abstract_params` of a `ConditionedConfig`) are a pure nested dict without embedding and head,
which are the target's:

    fc [D, n*D'] · hidden_norm [D] · norm [D]
    layers: as in `transformer`; with convolutions attention_conv_base, mlp_conv_base [2, kernel, D] (of a sublayer's
      input, of its output) and attention_conv_projection, mlp_conv_projection [2 * kernel * groups, D]
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deer_jax.build import Remat
from deer_jax.models.blocks import Blocks
from deer_jax.models.cache import KVCache
from deer_jax.models.layers import linear, rms_norm, rotary
from deer_jax.models.transformer import Transformer
from deer_jax.models.weights import outer_weights
from deer_jax.sharding import constrain, whole


def context_of(model: Transformer, tapped) -> jax.Array:
    """The context [B, T, D] of tapped hidden states [B, T, n*D']."""
    with jax.named_scope("context"):
        fc = whole(model.fc[...], outer_weights(model.config)["fc"].axes)
        c = linear(constrain(tapped, "batch", None, "mlp"), fc)
        return constrain(rms_norm(c, model.hidden_norm[...], model.config.norm_eps), "batch", None, None)


def context_kv(model: Transformer, tapped, start) -> KVCache:
    """All layers' keys and values [L, B, K, T, H] of tapped hidden states [B, T, n*D'] at positions start [B] ..

    For `cache.write_cache` at `start`; of rows that do not stay, what is written is invisible and written over later.
    """
    c = context_of(model, tapped)
    positions = start[:, None] + jnp.arange(c.shape[1], dtype=start.dtype)[None]
    cos_sin = rotary(positions, model.config.rope, model.config.head_width, c.dtype)

    def of(layer):
        sides = (jnp.swapaxes(side, 1, 2) for side in layer.keys_values(c, cos_sin))
        return tuple(constrain(side, "batch", "kv_heads", None, None) for side in sides)

    with jax.named_scope("context"):
        if model.scan:
            graph, weights = nnx.split(model.layers)
            _, (keys, values) = lax.scan(lambda _, weights: (None, of(nnx.merge(graph, weights))), None, weights)
        else:
            keys, values = map(jnp.stack, zip(*(of(layer) for layer in model.layers), strict=True))
        return KVCache(keys, values)


def draft_block(model: Transformer, x, cache: KVCache, start) -> jax.Array:
    """Final hidden states [B, W, D] of a block's embeddings x [B, W, D], whose first is the anchor at start int [B].

    cache: the context's keys and values, of which rows see the slots before their start.
    """
    blocks, x = Blocks(start[:, None], x.shape[1]), constrain(x, "batch", None, None)
    return model(x, blocks.positions, visible=blocks, cache=cache, start=start).hidden


def read_blocks(model: Transformer, x, tapped, blocks: Blocks, remat: Remat = "none") -> jax.Array:
    """Final hidden states [B, M*W, D] of many blocks of a text at once, for training; none sees another.

    x: their embeddings [B, M*W, D]; tapped [B, S, n*D'] at positions 0..S-1. Sorted anchors are faster.
    """
    context, x = context_of(model, tapped), constrain(x, "batch", None, None)
    return model(x, blocks.positions, visible=blocks, context=context, remat=remat).hidden
