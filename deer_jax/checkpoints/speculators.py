"""Folders of the package `speculators`: dflash, dflash2 and dspark; its eagle3 is in `checkpoints.eagle3`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

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
from deer_jax.checkpoints.families import ARCHITECTURES, flag_of, number_of
from deer_jax.config import ConditionedConfig
from deer_jax.drafters.conditioned import ConditionedMethod, ConditionedReading
from deer_jax.drafters.heads import Head, Independent, Markov, PathSelector
from deer_jax.drafters.tapped import TappedMethod, draft_ids
from deer_jax.errors import InputError, shown
from deer_jax.formats import mapping

KIND, VERSION = "speculators_model_type", "0.9.0"
LAYERS = "transformer_layer_config"
CLASSES = {"dflash": "DFlashDraftModel", "dflash2": "DFlash2DraftModel", "dspark": "DSparkDraftModel"}
OUTSIDE = ("architectures", "dtype", "torch_dtype")  # of a layer's configuration
FORMS = ("vanilla", "gated", "rnn")
TO_TARGET, TO_DRAFT = "d2t", "t2d"
# Of the target, should a folder have them: the package puts the target's own in their place.
OF_TARGET = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")


def method_from(values: Mapping[str, Any], where: str) -> ConditionedMethod:
    """The drafter that a config.json describes."""
    kind = values[KIND]
    if not isinstance(kind, str) or kind not in CLASSES:
        supported = ", ".join((*CLASSES, "eagle3"))
        raise InputError(f"{where}: {KIND} {shown(kind)} is not supported; supported: {supported}")
    inside = f"{where}: {LAYERS}"
    layer = mapping(values.get(LAYERS), inside)
    if layer.get("model_type", "qwen3") not in ("qwen3", "llama"):
        raise InputError(f"{inside}: model_type {shown(layer['model_type'])} is not supported; supported: qwen3, llama")
    if layer.get("model_type") == "llama" and layer.get("head_dim") is None:  # its layers are Qwen3's all the same
        heads = number_of(layer, "num_attention_heads", inside)
        layer = {**layer, "head_dim": number_of(layer, "hidden_size", inside) // max(heads, 1)}
    shape = shape_from({**layer, "model_type": "qwen3"}, inside)
    sliding, window = sliding_from(layer, shape["layers"], inside)
    both_ways = flag_of(values, "sliding_window_non_causal", where, default=kind == "dflash2")

    def number(key: str, default: int) -> int:
        return number_of(values, key, where, default)

    head, conv = _head(values, kind, where), {}
    if kind == "dflash2":
        conv = {"conv_kernel": number("conv_kernel_size", 2), "conv_group": number("conv_group_size", 16)}
        if not conv["conv_kernel"]:
            raise InputError(f"{where}: conv_kernel_size must be at least 1, got 0")
    entries = ids_in(values, "aux_hidden_state_layer_ids", where)
    if 0 in entries:
        raise InputError(f"{where}: aux_hidden_state_layer_ids has 0, the embedding's output, which is not supported")
    fill_in = not flag_of(values, "sample_from_anchor", where, default=kind == "dspark")
    vocabulary = number("draft_vocab_size", 32000)
    reading = ConditionedReading(
        taps=tuple(entry - 1 for entry in entries),  # entry 0 of the package's list is the embedding's output
        mask=number_of(values, "mask_token_id", where),
        draft_length=length_of(number("block_size", 8), fill_in, where),
        layout="fill_in" if fill_in else "next_token",
        draft_vocab=None if vocabulary == shape["vocab_size"] else vocabulary,
    )
    if kind == "dflash2" and reading.draft_vocab is not None:
        raise InputError(f"{where}: draft_vocab_size must be the target's {shape['vocab_size']} for dflash2")
    shape |= biases_from(layer, inside) | {
        "tied": False, "tapped_width": len(entries) * shape["width"],
        "causal": tuple(bool(each and window and not both_ways) for each in sliding),
        "windows": tuple(window if each else 0 for each in sliding), "window_from": "anchor",
    } | conv  # fmt: skip
    return ConditionedMethod(ConditionedConfig(**shape), reading, head)


def _head(values: Mapping[str, Any], kind: str, where: str) -> Head:
    if kind == "dflash":
        return Independent()
    if kind == "dflash2":
        return PathSelector(
            rank=number_of(values, "selector_rank", where, 256),
            candidates=number_of(values, "selector_top_k", where, 16),
        )
    rank, form = number_of(values, "markov_rank", where, 256), values.get("markov_head_type", "vanilla")
    confidence = flag_of(values, "enable_confidence_head", where, default=True)
    reads_row = flag_of(values, "confidence_head_with_markov", where, default=True)
    if rank:
        if form not in FORMS:
            raise InputError(f"{where}: markov_head_type {shown(form)} is not supported; supported: {', '.join(FORMS)}")
        return Markov(rank=rank, form=form, has_confidence=confidence, confidence_reads_row=reads_row)
    if confidence and reads_row:
        raise InputError(f"{where}: confidence_head_with_markov must be false where markov_rank is 0")
    return Independent(has_confidence=confidence)


def check_taps(method: TappedMethod, layers: int) -> None:
    """InputError for a tap of the last of so many layers: the package's own training reads it before the target's final
    norm, transformers after it."""
    if layers - 1 in method.taps:
        raise InputError(
            f"the drafter reads the target's last layer (entry {layers} of its states), before or after the final "
            "norm: the layout does not say which"
        )


def ids_from(to_target: np.ndarray, method: TappedMethod, where: str) -> np.ndarray:
    """The ids of a reduced vocabulary, from the tensor d2t."""
    count = method.draft_vocab
    if to_target.shape != (count,) or to_target.dtype.kind not in "iu":
        raise InputError(
            f"{where}: {TO_TARGET} must be {count} whole numbers, got {to_target.dtype} {list(to_target.shape)}"
        )
    ids = draft_ids(method, np.arange(count) + to_target.astype(np.int64), f"{where}: what {TO_TARGET} gives")
    assert ids is not None
    return ids


def id_tensors(ids: np.ndarray, vocab: int) -> dict[str, np.ndarray]:
    """The tensors that say which ids of a vocabulary are a reduced one."""
    return {
        TO_TARGET: ids.astype(np.int64) - np.arange(len(ids)),
        TO_DRAFT: np.isin(np.arange(vocab), ids),
    }


def write_values(method: ConditionedMethod, dtype, target: ItsTarget) -> dict[str, Any]:
    """A config.json of this layout; InputError for a drafter that it cannot say."""
    shape, reading, head = method.shape, method.reading, method.head
    for name, value, usual in (
        ("input_scale", reading.input_scale, 1.0), ("output_scale", reading.output_scale, 1.0),
        ("softcap", reading.softcap, None),
    ):  # fmt: skip
        if value != usual:
            raise InputError(f"{name} {value:g} cannot be said in this layout")
    check_taps(method, target.config.layers)
    window, windowed = one_window(shape, "anchor"), tuple(each > 0 for each in shape.windows)
    causal = {c for c, w in zip(shape.causal, windowed, strict=True) if w}
    if any(c and not w for c, w in zip(shape.causal, windowed, strict=True)) or len(causal) > 1:
        raise InputError(
            "layers that are causal without a window, or some of those with one, cannot be said in this layout"
        )
    said: dict[str, Any] = {}
    if isinstance(head, PathSelector) and shape.conv_kernel and not head.has_confidence:
        if reading.draft_vocab is not None:
            raise InputError("a reduced vocabulary cannot be said beside a selector")
        if shape.conv_kernel > reading.draft_length + (reading.layout == "fill_in"):
            raise InputError("convolutions over more rows than a block has cannot be said in this layout")
        kind = "dflash2"
        said = {
            "conv_kernel_size": shape.conv_kernel, "conv_group_size": shape.conv_group, "selector_rank": head.rank,
            "selector_top_k": head.candidates,
        }  # fmt: skip
    elif isinstance(head, PathSelector) or shape.conv_kernel:
        raise InputError("a selector and convolutions can be said together only, and without a confidence")
    elif isinstance(head, Markov) or head.has_confidence:
        kind, markov = "dspark", head if isinstance(head, Markov) else None
        said = {
            "markov_rank": markov.rank if markov else 0,
            "markov_head_type": markov.form if markov else "vanilla",
            "enable_confidence_head": head.has_confidence,
            "confidence_head_with_markov": markov.confidence_reads_row if markov else False,
        }
    else:
        kind = "dflash"
    fill_in = reading.layout == "fill_in"
    layer = {k: v for k, v in qwen3_values(shape, dtype, windowed, window).items() if k not in OUTSIDE}
    return said | described(kind, CLASSES[kind], method, layer, dtype, target) | {
        "block_size": reading.draft_length + fill_in,
        "aux_hidden_state_layer_ids": [tap + 1 for tap in reading.taps],
        "mask_token_id": reading.mask,
        "sample_from_anchor": not fill_in,
        "sliding_window_non_causal": causal == {False} or (not causal and kind == "dflash2"),
    }  # fmt: skip


def described(
    kind: str, architecture: str, method: TappedMethod, layer: dict[str, Any], dtype, target: ItsTarget
) -> dict[str, Any]:
    """What the config.json of any kind has; layer: that of its layers."""
    return {
        KIND: kind,
        "speculators_version": VERSION,
        "architectures": [architecture],
        "dtype": np.dtype(dtype).name,
        "tie_word_embeddings": False,
        LAYERS: layer,
        "draft_vocab_size": method.draft_vocab,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": method.draft_length}],
            "verifier": {
                "name_or_path": target.name,
                "architectures": [ARCHITECTURES[target.config.family]],
            },
        },
    }
