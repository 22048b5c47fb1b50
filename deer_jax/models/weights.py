"""What weights a model has: shape, logical axes and initial value of each, by its configuration alone."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deer_jax.config import ConditionedConfig, Eagle3Config, ModelConfig
from deer_jax.models import experts as moe
from deer_jax.sharding import Axis, Heads


class Weight(NamedTuple):
    """Declaration of one weight: shape, the logical axis of each dimension (see `sharding`), initial value."""

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    # "normal": std 1/sqrt(in); "ones"; "zeros"; "identity": of a convolution [.., kernel, D], 1 for the row itself;
    # "tokens": of a head's table of the target's tokens, see `heads.initial`
    init: str = "normal"


def parameter(weight: Weight, rngs: nnx.Rngs, dtype, stack: tuple[int, ...] = ()) -> nnx.Param:
    """The weight with its initial value; stack: further leading dimensions."""
    shape = stack + weight.shape
    if weight.init == "normal":
        value = jax.random.normal(rngs.params(), shape, dtype) * (1 / math.sqrt(weight.shape[-1]))
    elif weight.init == "identity":
        value = jnp.zeros(shape, dtype).at[..., 0, :].set(1)
    else:
        value = (jnp.ones if weight.init == "ones" else jnp.zeros)(shape, dtype)
    return nnx.Param(value, logical_axes=(None,) * len(stack) + weight.axes)


def outer_weights(config: ModelConfig) -> dict[str, Weight]:
    """The weights outside the layers."""
    D, V = config.width, config.vocab_size
    if isinstance(config, ConditionedConfig):
        return {
            # Split as a layer's `down` is, over what comes in: its output is summed over the devices.
            "fc": Weight((D, config.tapped_width), ("width", "mlp")),
            "hidden_norm": Weight((D,), (None,), "ones"),
            "norm": Weight((D,), (None,), "ones"),
        }
    if isinstance(config, Eagle3Config):
        table = {"fc": Weight((D, config.tapped_width), ("width", "mlp")), "norm": Weight((D,), (None,), "ones")}
        if config.norm_tapped:
            table["tapped_norm"] = Weight((config.tapped_width,), (None,), "ones")
        return table
    table = {"embed": Weight((V, D), ("vocab", "width")), "norm": Weight((D,), (None,), "ones")}
    if not config.tied:
        table["head"] = Weight((V, D), ("vocab", "width"))
    return table


def layer_weights(config: ModelConfig) -> dict[str, Weight]:
    """The weights of one layer, without the experts."""
    D, F, H = config.width, config.mlp_width, config.head_width
    query, key = config.heads * H, config.kv_heads * H
    read = 2 * D if isinstance(config, Eagle3Config) else D  # an embedding and a state
    queries, keys = Heads(config.kv_heads, config.heads // config.kv_heads), Heads(config.kv_heads)
    table = {
        "input_norm": Weight((D,), (None,), "ones"),
        "q": Weight((query, read), (queries, "width")),
        "k": Weight((key, read), (keys, "width")),
        "v": Weight((key, read), (keys, "width")),
        "o": Weight((D, query), ("width", queries)),
        "post_norm": Weight((D,), (None,), "ones"),
    }
    if config.qkv_bias:
        table |= {
            "q_bias": Weight((query,), (queries,), "zeros"),
            "k_bias": Weight((key,), (keys,), "zeros"),
            "v_bias": Weight((key,), (keys,), "zeros"),
        }
    if config.qk_norm:
        table |= {"q_norm": Weight((H,), (None,), "ones"), "k_norm": Weight((H,), (None,), "ones")}
    if config.experts:
        table["router"] = Weight((config.experts, D), (None, "width"))
    else:
        table |= {
            "gate": Weight((F, D), ("mlp", "width")),
            "up": Weight((F, D), ("mlp", "width")),
            "down": Weight((D, F), ("width", "mlp")),
        }
    if isinstance(config, Eagle3Config):
        table["hidden_norm"] = Weight((D,), (None,), "ones")
    if isinstance(config, ConditionedConfig) and config.o_bias:
        table["o_bias"] = Weight((D,), (None,), "zeros")
    if isinstance(config, ConditionedConfig) and config.conv_kernel:
        kernel, groups = config.conv_kernel, D // config.conv_group
        for name in ("attention_conv", "mlp_conv"):
            table |= {
                f"{name}_base": Weight((2, kernel, D), (None, None, None), "identity"),
                f"{name}_projection": Weight((2 * kernel * groups, D), ("mlp", "width"), "zeros"),
            }
    return table


def expert_weights(config: ModelConfig) -> dict[str, Weight]:
    """The weights of one layer's experts; empty for a dense model."""
    if not config.experts:
        return {}
    E, D, F = config.experts, config.width, config.expert_width
    return {
        "gate": Weight((E, F, D), moe.AXES["gate"]),
        "up": Weight((E, F, D), moe.AXES["up"]),
        "down": Weight((E, D, F), moe.AXES["down"]),
    }
