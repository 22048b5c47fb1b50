"""Hugging Face model families: `config.json` in both directions, and one table of tensor keys per family.

Weights are [out, in] on both sides, so a table only renames; layers and experts are stacked by the reader.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from deer_jax.config import TOKEN_IDS, ModelConfig, Rope, check_flag, check_token_ids, check_whole
from deer_jax.errors import InputError, shown
from deer_jax.models.transformer import Weight, expert_weights, layer_weights, outer_weights
from deer_jax.sharding import Axis

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
DRAFTERS = re.compile(r"eagle|medusa|draft|dspark|speculator|mtp", re.IGNORECASE)  # architectures of drafters
ROPE_KINDS = ("default", "linear", "llama3", "yarn")

# Our name of a parameter -> the Hugging Face key; {i} is the layer, {e} the expert. Experts' names are prefixed.
_COMMON = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "input_norm": "model.layers.{i}.input_layernorm.weight",
    "q": "model.layers.{i}.self_attn.q_proj.weight",
    "k": "model.layers.{i}.self_attn.k_proj.weight",
    "v": "model.layers.{i}.self_attn.v_proj.weight",
    "o": "model.layers.{i}.self_attn.o_proj.weight",
    "post_norm": "model.layers.{i}.post_attention_layernorm.weight",
}
_BIASES = {
    "q_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{i}.self_attn.v_proj.bias",
}
_HEAD_NORMS = {
    "q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{i}.self_attn.k_norm.weight",
}
_MLP = {
    "gate": "model.layers.{i}.mlp.gate_proj.weight",
    "up": "model.layers.{i}.mlp.up_proj.weight",
    "down": "model.layers.{i}.mlp.down_proj.weight",
}
_EXPERTS = {
    "router": "model.layers.{i}.mlp.gate.weight",
    "experts.gate": "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
    "experts.up": "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    "experts.down": "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
}
KEYS: dict[str, dict[str, str]] = {
    "llama": _COMMON | _MLP,
    "qwen2": _COMMON | _BIASES | _MLP,
    "qwen3": _COMMON | _HEAD_NORMS | _MLP,
    "qwen3_moe": _COMMON | _HEAD_NORMS | _EXPERTS,
}


class Slot(NamedTuple):
    """Where one tensor of a folder belongs: params[group][name] at index, or params[name] where group is empty."""

    group: str  # "", "layers", "experts", or a further part of a drafter
    name: str
    index: tuple[int, ...]  # (layer,) or (layer, expert); () outside the layers
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]


def tensor_slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor that a folder of this configuration has, by Hugging Face key.

    A tied model's `lm_head.weight` is not among them. Raises InputError where the family cannot hold the model.

      llama, 2 layers:  "model.layers.1.mlp.up_proj.weight" -> Slot("layers", "up", (1,), (F, D), ("mlp", "width"))
    """
    keys, layers = KEYS[config.family], range(config.layers)

    def filled(group: str, table: Mapping[str, Weight], indices: Sequence[tuple[int, ...]]) -> dict[str, Slot]:
        prefix = "experts." if group == "experts" else ""
        for name in table:
            if prefix + name not in keys:
                raise InputError(
                    f"the {config.family} family has no {prefix + name}: no folder can hold this configuration"
                )
        return fill_slots({name: keys[prefix + name] for name in table}, group, table, indices)

    slots = filled("", outer_weights(config), [()])
    slots |= filled("layers", layer_weights(config), [(i,) for i in layers])
    if outer := expert_weights(config):
        # A folder has one tensor per expert: the leading expert axis is the reader's.
        single = {name: Weight(weight.shape[1:], weight.axes[1:]) for name, weight in outer.items()}
        slots |= filled("experts", single, [(i, e) for i in layers for e in range(config.experts)])
    return slots


def fill_slots(
    keys: Mapping[str, str], group: str, table: Mapping[str, Weight], indices: Sequence[tuple[int, ...]]
) -> dict[str, Slot]:
    """The slots of a group's weights at all indices, by their keys."""
    return {
        keys[name].format(**dict(zip("ie", index, strict=False))): Slot(group, name, index, weight.shape, weight.axes)
        for name, weight in table.items()
        for index in indices
    }


def tensor_count(config: ModelConfig) -> int:
    """The number of tensors that `tensor_slots` would list, without listing them."""
    experts = config.experts * len(expert_weights(config))
    return len(outer_weights(config)) + config.layers * (len(layer_weights(config)) + experts)


def number_of(values: Mapping[str, Any], key: str, where: str, default=None, kind: type = int) -> Any:
    """values[key] as an int or float; missing or null is the default, and an error without one."""
    value = values.get(key)
    if value is None:
        if default is None:
            raise InputError(f"{where}: {key} is missing")
        return default
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if isinstance(value, float):
        wrong = not math.isfinite(value) or (kind is int and value != int(value))
    try:
        if not wrong:
            return kind(value)
    except OverflowError:  # an integer beyond all floats
        pass
    raise InputError(f"{where}: {key} must be {'an integer' if kind is int else 'a number'}, got {shown(value)}")


def flag_of(values: Mapping[str, Any], key: str, where: str, default: bool = False) -> bool:
    """values[key], true or false; missing or null is the default."""
    value = values.get(key)
    if value is None:
        return default
    check_flag(f"{where}: {key}", value)  # "false" would count as true
    return value


def _family(values: Mapping[str, Any], where: str) -> str:
    named, kind = values.get("architectures"), values.get("model_type")
    if not named and isinstance(named, list | None):
        named = [ARCHITECTURES.get(kind, kind) if isinstance(kind, str) else kind]
    for family, architecture in ARCHITECTURES.items():
        if named == [architecture]:
            return family
    found = named[0] if isinstance(named, list) and len(named) == 1 else named
    said = found if isinstance(found, str) and found.isidentifier() and len(found) <= 80 else shown(found)
    if DRAFTERS.search(said) or {"speculators_model_type", "dflash_config"} & values.keys():
        raise InputError(
            f"{where}: is a drafter, architecture {said}, and no target: name here the model that it drafts for, and "
            "this folder as its drafter"
        )
    raise InputError(f"{where}: architecture {said} is not supported; supported: {', '.join(ARCHITECTURES.values())}")


def _refuse_unsupported(values: Mapping[str, Any], family: str, layers: int, where: str) -> None:
    def refuse(what: str):
        raise InputError(f"{where}: {what}")

    if values.get("quantization_config") not in (None, {}):
        refuse("quantised weights (quantization_config) are not supported; use the unquantised folder")
    if values.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {shown(values['hidden_act'])} is not supported; supported: silu")
    for key in ("attention_bias", "mlp_bias"):
        if flag_of(values, key, where):
            refuse(f"{key} is not supported for {family}")
    types = values.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(kind != "full_attention" for kind in types)):
        refuse("layer_types other than full_attention (sliding windows) are not supported")
    # As in transformers: without layer_types the layers from max_window_layers on use the window, all of them in MoE.
    windowed = family == "qwen3_moe" or number_of(values, "max_window_layers", where, 28) < layers
    active = flag_of(values, "use_sliding_window", where) and values.get("sliding_window", 4096) is not None
    if family != "llama" and types is None and active and windowed:
        refuse("sliding-window attention (use_sliding_window) is not supported")
    if family == "qwen3_moe" and (values.get("decoder_sparse_step", 1) != 1 or values.get("mlp_only_layers")):
        refuse("dense layers among the experts (decoder_sparse_step, mlp_only_layers) are not supported")


def _read_rope(values: Mapping[str, Any], context: int, where: str) -> Rope:
    # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling; where both are there,
    # transformers 5 itself follows rope_scaling.
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key), dict | None):
            raise InputError(f"{where}: {key} must be keys and values, got {shown(values[key])}")
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise InputError(f"{where}: rope_parameters that differ between layers are not supported")

    def number(key: str, default=None, kind: type = float) -> Any:
        return number_of(given, key, f"{where}: rope_parameters", default, kind)

    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise InputError(f"{where}: RoPE scaling {shown(kind)} is not supported; supported: {', '.join(ROPE_KINDS)}")
    partial = given.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise InputError(f"{where}: partial_rotary_factor {shown(partial)} is not supported, only 1")
    rope: dict[str, Any] = {
        "kind": kind,
        "theta": number("rope_theta", number_of(values, "rope_theta", where, 10000.0, float)),
    }
    if kind in ("llama3", "yarn"):
        # Outside wins over inside, and the model's own context stands in for both: transformers' rule.
        inside = number("original_max_position_embeddings", context, int)
        rope["original_context"] = number_of(values, "original_max_position_embeddings", where, inside)
        check_whole(f"{where}: original_max_position_embeddings", rope["original_context"], 1, 2**31 - 1)
    if kind == "yarn":
        rope["factor"] = number("factor", context / rope["original_context"])
        rope["beta_fast"], rope["beta_slow"] = number("beta_fast", 32.0) or 32.0, number("beta_slow", 1.0) or 1.0
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if given.get(key) is not None:
                rope[key] = number(key)
        rope["truncate"] = flag_of(given, "truncate", f"{where}: rope_parameters", default=True)
    elif kind != "default":
        rope["factor"] = number("factor")
    if kind == "llama3":
        rope["low_freq_factor"], rope["high_freq_factor"] = number("low_freq_factor"), number("high_freq_factor")
    return Rope(**rope)


def config_from(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The configuration in a parsed `config.json`; `where` names it in errors. Unsupported models are an InputError."""
    family = _family(values, where)

    def number(key: str, default=None, kind: type = int) -> Any:
        return number_of(values, key, where, default, kind)

    width, heads, context = number("hidden_size"), number("num_attention_heads"), number("max_position_embeddings")
    layers = number("num_hidden_layers")
    _refuse_unsupported(values, family, layers, where)
    experts: dict[str, Any] = {}
    if family == "qwen3_moe":
        experts = {
            # transformers 5 writes num_local_experts, published folders have num_experts.
            "experts": number("num_local_experts" if values.get("num_local_experts") is not None else "num_experts"),
            "experts_per_token": number("num_experts_per_tok"),
            "expert_width": number("moe_intermediate_size"),
            "normalise_router": flag_of(values, "norm_topk_prob", where),
        }
        if not experts["experts"]:
            raise InputError(f"{where}: num_experts must be at least 1 for {family}, got 0")
    try:
        return ModelConfig(
            family=family,  # pyrefly: ignore[bad-argument-type]  # one of ARCHITECTURES
            vocab_size=number("vocab_size"),
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=number("num_key_value_heads", heads),
            head_width=number("head_dim", 128 if family == "qwen3" else width // max(heads, 1)),
            mlp_width=number("intermediate_size"),
            context=context,
            norm_eps=number("rms_norm_eps", 1e-6, float),
            rope=_read_rope(values, context, where),
            tied=flag_of(values, "tie_word_embeddings", where),
            qkv_bias=family == "qwen2",
            qk_norm=family in ("qwen3", "qwen3_moe"),
            **experts,
        )
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _write_rope(rope: Rope) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        values["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, key) is not None:
                values[key] = getattr(rope, key)
    return values


def write_config(
    config: ModelConfig, dtype, *, bos_id: int | None = None, stop_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """The `config.json` of a model whose weights have this dtype, for transformers 4 and 5 alike."""
    rope, dtype = _write_rope(config.rope), jnp.dtype(dtype).name
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "bos_token_id": bos_id,
        "eos_token_id": stop_field(stop_ids),
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        # Both spellings: version 4 reads the first two, version 5 any of them.
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else rope,
        "rope_parameters": rope | {"rope_theta": config.rope.theta},
    }
    if config.family == "llama":
        values |= {"attention_bias": False, "mlp_bias": False}
    else:
        values |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.layers}
    if config.family in ("qwen3", "qwen3_moe"):
        values["attention_bias"] = False
    if config.experts:
        values |= {
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.expert_width,
            "norm_topk_prob": config.normalise_router,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return values


def check_family(config: ModelConfig) -> None:
    """InputError for a shape that no folder of its family can say, such as Qwen3 without its norms of heads."""
    said = config_from(write_config(config, "float32"), "model")
    for field in dataclasses.fields(ModelConfig):
        mine, theirs = (json.dumps(getattr(each, field.name), default=repr) for each in (config, said))
        if mine != theirs:
            raise InputError(f"model: {field.name} must be {theirs} in the {config.family} family, got {mine}")


def stop_ids_from(values: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """`eos_token_id` of a parsed file, an id or a list of them; None where it has none."""
    found = values.get("eos_token_id")
    if found is None:
        return None
    ids = tuple(found) if isinstance(found, list) else (found,)
    try:
        check_token_ids("eos_token_id", ids)
    except InputError:
        raise InputError(f"{where}: eos_token_id must be an id or a list of ids, got {shown(found)}") from None
    return ids


def bos_id_from(values: Mapping[str, Any], where: str) -> int | None:
    """`bos_token_id` of a parsed file; None where it has none."""
    found = values.get("bos_token_id")
    if found is not None and (type(found) is not int or not 0 <= found < TOKEN_IDS):
        raise InputError(f"{where}: bos_token_id must be an id, got {shown(found)}")
    return found


def stop_field(stop_ids: Sequence[int]) -> int | list[int] | None:
    """Stop ids as `eos_token_id` is written: one number, a list, or null."""
    return list(stop_ids) if len(stop_ids) > 1 else stop_ids[0] if stop_ids else None
