"""Folders of z-lab's dflash: DFlash and DFlash 2."""

from collections.abc import Mapping
from typing import Any

from deer_jax.checkpoints.backbones import (
    ItsTarget,
    biases_from,
    ids_in,
    length_of,
    one_window,
    qwen3_values,
    shape_from,
    sliding_from,
)
from deer_jax.checkpoints.families import flag_of, number_of
from deer_jax.config import ConditionedConfig
from deer_jax.drafters.conditioned import ConditionedMethod, ConditionedReading, default_taps
from deer_jax.drafters.heads import Independent, PathSelector
from deer_jax.errors import InputError, named
from deer_jax.formats import mapping

FIRST, SECOND = "DFlashDraftModel", "DFlash2DraftModel"
NESTED = "dflash_config"
BLOCK = 16  # rows of a block where a folder does not say
KEYS = {
    "target_layer_ids", "block_size", "mask_token_id", "input_embedding_scale", "output_multiplier",
    "final_logit_softcapping", "conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k",
    "num_target_layers",
}  # fmt: skip
# Of other readers and other drafters: where one is set, the numbers are others.
UNSUPPORTED = (
    "fc_layernorm", "has_own_lm_head", "attn_output_gate", "enable_qwen35_gated_q_proj", "log_snr_conditioning",
    "markov_rank", "enable_confidence_head",
)  # fmt: skip


def is_zlab(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this layout."""
    found = _architectures(values)
    return any(each in (FIRST, SECOND) for each in found) if found else NESTED in values


def _architectures(values: Mapping[str, Any]) -> list[Any]:
    found = values.get("architectures")
    return found if isinstance(found, list) else []


def method_from(values: Mapping[str, Any], where: str) -> ConditionedMethod:
    """The drafter that a config.json describes."""
    nested = mapping(values.get(NESTED) or {}, f"{where}: {NESTED}")
    for key, value in nested.items():
        if key not in KEYS and value not in (None, False):
            raise InputError(f"{where}: {NESTED}.{named(key)} is not supported")
    for key in UNSUPPORTED:
        if values.get(key) not in (None, False):
            raise InputError(f"{where}: {key} is not supported for DFlash")
    draft = {key: nested[key] if nested.get(key) is not None else values.get(key) for key in KEYS}
    shape = shape_from({**values, "model_type": "qwen3"}, where)  # the package reads any as one of Qwen3
    layers = shape["layers"]
    if draft["target_layer_ids"] is not None:
        taps = ids_in(draft, "target_layer_ids", where)
    else:
        taps = default_taps(number_of(values, "num_target_layers", where), layers)

    sliding, window = sliding_from(values, layers, where)
    causal = sliding
    if values.get("is_causal") is not None:
        causal = (flag_of(values, "is_causal", where),) * layers
    second = SECOND in _architectures(values)
    head, conv = Independent(), {}
    if second:
        conv = {
            "conv_kernel": number_of(draft, "conv_kernel_size", where),
            "conv_group": number_of(draft, "conv_group_size", where),
        }
        if not conv["conv_kernel"]:
            raise InputError(f"{where}: conv_kernel_size must be at least 1, got 0")
        head = PathSelector(
            rank=number_of(draft, "selector_rank", where), candidates=number_of(draft, "selector_top_k", where)
        )
    cap = draft["final_logit_softcapping"]
    cap = None if cap is None else number_of(draft, "final_logit_softcapping", where, kind=float)
    block = number_of(draft, "block_size", where, BLOCK)
    reading = ConditionedReading(
        taps=taps,
        mask=number_of(draft, "mask_token_id", where),
        draft_length=length_of(block, True, where),
        input_scale=number_of(draft, "input_embedding_scale", where, 1.0, float),
        output_scale=number_of(draft, "output_multiplier", where, 1.0, float),
        softcap=None if cap is None or cap <= 0 else cap,
    )
    shape |= biases_from(values, where) | {
        "tied": False, "tapped_width": len(taps) * shape["width"], "causal": causal,
        "windows": tuple(window if each else 0 for each in sliding), "window_from": "row",
    } | conv  # fmt: skip
    return ConditionedMethod(ConditionedConfig(**shape), reading, head)


def write_values(method: ConditionedMethod, dtype, target: ItsTarget) -> dict[str, Any]:
    """A config.json of this layout; InputError for a drafter that it cannot say."""
    shape, reading, head = method.shape, method.reading, method.head
    if reading.layout != "fill_in":
        raise InputError(f"a drafter that reads in the {reading.layout} layout cannot be said in this layout")
    if reading.draft_vocab is not None:
        raise InputError("a reduced vocabulary cannot be said in this layout")
    if head.has_confidence or type(head) not in (Independent, PathSelector):
        raise InputError(f"a head of kind {type(head).__name__} cannot be said in this layout")
    selector = isinstance(head, PathSelector)
    if selector != bool(shape.conv_kernel):
        raise InputError("convolutions without a selector, or the reverse, cannot be said in this layout")

    window, windowed = one_window(shape, "row"), tuple(each > 0 for each in shape.windows)
    sliding, same = windowed, len(set(shape.causal)) == 1
    said: dict[str, Any] = {}
    if shape.causal != windowed:
        if same:
            said["is_causal"] = shape.causal[0]
        elif not window:
            sliding = shape.causal  # sliding layers without a window are causal, though the package's loop needs one
        else:
            raise InputError("some causal layers and windows on others cannot be said in this layout")
    nested: dict[str, Any] = {
        "block_size": reading.draft_length + 1,
        "mask_token_id": reading.mask,
        "target_layer_ids": list(reading.taps),
    }
    for key, value, usual in (
        ("input_embedding_scale", reading.input_scale, 1.0),
        ("output_multiplier", reading.output_scale, 1.0),
        ("final_logit_softcapping", reading.softcap, None),
    ):
        if value != usual:
            nested[key] = value
    if isinstance(head, PathSelector):
        nested |= {
            "conv_kernel_size": shape.conv_kernel, "conv_group_size": shape.conv_group, "selector_rank": head.rank,
            "selector_top_k": head.candidates,
        }  # fmt: skip
    return qwen3_values(shape, dtype, sliding, window) | said | {
        "architectures": [SECOND if selector else FIRST],
        "block_size": reading.draft_length + 1,  # some readers look for it here
        "num_target_layers": target.config.layers,
        NESTED: nested,
    }  # fmt: skip
