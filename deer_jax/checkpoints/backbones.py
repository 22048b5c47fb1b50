"""Folders of conditioned drafters: what all their layouts share, the tensors' names and the backbone's configuration.

The names are those of z-lab's dflash, which the `speculators` package took over, and so does our own the keys of
a Qwen3 model without `model.`, its embedding and its head, and a few more.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from deer_jax.checkpoints.families import KEYS, Slot, config_from, fill_slots, flag_of, number_of, write_config
from deer_jax.config import ConditionedConfig, Eagle3Config, ModelConfig
from deer_jax.drafters.heads import HEAD
from deer_jax.drafters.tapped import TappedMethod
from deer_jax.errors import InputError, shown
from deer_jax.models.weights import layer_weights, outer_weights

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW, LONGEST = 4096, 32768  # what Qwen3's configuration in transformers has where a file says nothing

_LAYERS = {name: key.removeprefix("model.") for keys in KEYS.values() for name, key in keys.items() if "{i}" in key}
BACKBONE_KEYS = _LAYERS | {
    "fc": "fc.weight",
    "hidden_norm": "hidden_norm.weight",
    "norm": "norm.weight",
    "o_bias": "layers.{i}.self_attn.o_proj.bias",
    "attention_conv_base": "layers.{i}.attention_conv.base_kernel",
    "attention_conv_projection": "layers.{i}.attention_conv.kernel_projection.weight",
    "mlp_conv_base": "layers.{i}.mlp_conv.base_kernel",
    "mlp_conv_projection": "layers.{i}.mlp_conv.kernel_projection.weight",
}
HEAD_KEYS = {
    "predecessor": "candidate_selector.predecessor_codebook",
    "successor": "candidate_selector.successor_codebook",
    "projection": "candidate_selector.hidden_projection.weight",
    "w1": "markov_head.markov_w1.weight",
    "w2": "markov_head.markov_w2.weight",
    "gate": "markov_head.gate_proj.weight",
    "gate_bias": "markov_head.gate_proj.bias",
    "joint": "markov_head.joint_proj.weight",
    "joint_bias": "markov_head.joint_proj.bias",
    "confidence": "confidence_head.proj.weight",
    "confidence_bias": "confidence_head.proj.bias",
}
EAGLE3_KEYS = {"hidden_norm": "layers.{i}.hidden_norm.weight", "tapped_norm": "input_norm.weight"}  # its own
MIDLAYER = "midlayer."  # what its authors' folders have instead of layers.0.
PREFIX, CODEBOOK = "model.", ".weight"  # what some writers put before all names, and behind those of the codebooks


class ItsTarget(NamedTuple):
    """What a public layout says about the target that a drafter is for."""

    name: str  # a folder or an id of the hub
    config: ModelConfig


def prefix_of(found: Collection[str]) -> str:
    """What stands before all names, by the keys of a folder."""
    return PREFIX if f"{PREFIX}{BACKBONE_KEYS['fc']}" in found else ""


def drafter_slots(method: TappedMethod, found: Collection[str] = (), *, midlayer: bool = False) -> dict[str, Slot]:
    """The tensors of a drafter by key. found: the keys of its folder, whose spelling of names is followed; midlayer:
    where there are none, EAGLE-3's are those of its authors."""
    shape, head, prefix = method.shape, method.head_weights(), prefix_of(found)
    keys = BACKBONE_KEYS | (EAGLE3_KEYS if isinstance(shape, Eagle3Config) else {})
    if midlayer or any(key.startswith(prefix + MIDLAYER) for key in found):
        keys = {name: key.replace("layers.{i}.", MIDLAYER) for name, key in keys.items()}
    backbone = {name: prefix + key for name, key in keys.items()}
    heads = {name: prefix + key for name, key in HEAD_KEYS.items()}
    for name in ("predecessor", "successor"):
        if heads[name] + CODEBOOK in found:
            heads[name] += CODEBOOK
    slots = fill_slots(backbone, "", outer_weights(shape), [()])
    slots |= fill_slots(backbone, "layers", layer_weights(shape), [(i,) for i in range(shape.layers)])
    return slots | fill_slots(heads, HEAD, head, [()])


def shape_from(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a `ModelConfig` in a Qwen3 configuration, as a drafter has them. Biases, windows and causality are
    the caller's."""
    handled = ("architectures", "attention_bias", "layer_types", "use_sliding_window")
    values = {"max_position_embeddings": LONGEST} | {k: v for k, v in values.items() if k not in handled}
    return dict(vars(config_from(values, where)))


def biases_from(values: Mapping[str, Any], where: str) -> dict[str, bool]:
    """The fields of a `ConditionedConfig` that attention_bias decides."""
    found = flag_of(values, "attention_bias", where)
    return {"qkv_bias": found, "o_bias": found}


def sliding_from(values: Mapping[str, Any], layers: int, where: str) -> tuple[tuple[bool, ...], int]:
    """Which layers are sliding ones by a Qwen3 configuration, and their window; 0: they have none."""
    window = 0
    if flag_of(values, "use_sliding_window", where) and values.get("sliding_window", WINDOW) is not None:
        window = number_of(values, "sliding_window", where, WINDOW)
        if window < 1:
            raise InputError(f"{where}: sliding_window must be at least 1, got {window}")
    types = values.get("layer_types")
    if types is None:  # as transformers fills them in
        first = number_of(values, "max_window_layers", where, 28)
        return tuple(bool(window) and i >= first for i in range(layers)), window
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise InputError(
            f"{where}: layer_types must be {FULL} or {SLIDING} for each of {layers} layers, got {shown(types)}"
        )
    return tuple(kind == SLIDING for kind in types), window


def ids_in(values: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """values[key], a list of ids of layers."""
    found = values.get(key)
    if not isinstance(found, list) or not found or not all(type(each) is int for each in found):
        raise InputError(f"{where}: {key} must be numbers of layers, got {shown(found)}")
    return tuple(found)


def length_of(block: int, fill_in: bool, where: str) -> int:
    """The draft length of a block of so many rows."""
    if block < 1 + fill_in:
        raise InputError(f"{where}: block_size must be at least {1 + fill_in}, got {block}")
    return block - fill_in


def qwen3_values(shape: ConditionedConfig, dtype, sliding: Sequence[bool], window: int) -> dict[str, Any]:
    """A drafter's backbone as a Qwen3 configuration; `sliding`: which layers are."""
    if not shape.qk_norm:
        raise InputError("a backbone whose layers have no norms of queries and keys cannot be said in this layout")
    if shape.qkv_bias != shape.o_bias:
        raise InputError("biases of some of attention's projections and not of all cannot be said in this layout")
    plain = dataclasses.replace(shape, family="qwen3", tied=False)
    return write_config(plain, dtype) | {
        "attention_bias": shape.o_bias,
        "layer_types": [SLIDING if each else FULL for each in sliding],
        "sliding_window": window or None,
        "use_sliding_window": bool(window),
    }


def one_window(shape: ConditionedConfig, window_from: str) -> int:
    """The window of all layers that have one, 0 where none has; InputError where a layout cannot say them."""
    found = sorted(set(shape.windows) - {0})
    if len(found) > 1:
        raise InputError(f"windows that differ between layers ({found[0]}, {found[1]}) cannot be said in this layout")
    if found and shape.window_from != window_from:
        raise InputError(
            f"a window that counts from the {shape.window_from} cannot be said in this layout, where it counts from "
            f"the {window_from}"
        )
    return found[0] if found else 0
