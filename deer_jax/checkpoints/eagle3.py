"""Folders of EAGLE-3 drafters: in the layout of its authors, and in that of the package `speculators`."""

from collections.abc import Mapping
from typing import Any

from deer_jax.checkpoints import speculators
from deer_jax.checkpoints.backbones import ItsTarget, ids_in, shape_from
from deer_jax.checkpoints.families import flag_of, number_of, write_config
from deer_jax.config import Eagle3Config
from deer_jax.drafters.eagle3 import Eagle3Method, default_taps
from deer_jax.drafters.tapped import TappedReading
from deer_jax.errors import InputError, named, shown
from deer_jax.formats import mapping

KIND = "eagle3"
ARCHITECTURE, PACKAGES = "LlamaForCausalLMEagle3", "Eagle3DraftModel"
ARCHITECTURES = (ARCHITECTURE, "LlamaForCausalLM", "Eagle3LlamaForCausalLM")  # those that are found
VOCABULARY, TAPS = "draft_vocab_size", "eagle_aux_hidden_state_layer_ids"
LENGTH = 7  # tokens per draft where a folder does not say, as its authors' chains have
# Of other readers and other drafters: where one is set, the numbers are others.
UNSUPPORTED = ("attention_bias", "fc_norm", "embed_requires_grad", "eagle_config", "parallel_drafting")


def is_eagle3(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is of either layout."""
    if speculators.KIND in values:
        return values[speculators.KIND] == KIND
    found = values.get("architectures")
    return VOCABULARY in values and isinstance(found, list) and len(found) == 1 and found[0] in ARCHITECTURES


def method_from(values: Mapping[str, Any], layers: int | None, where: str) -> Eagle3Method:
    """The drafter that a config.json describes, of a target of so many layers."""
    package = speculators.KIND in values
    layer, inside = values, where
    if package:
        inside = f"{where}: {speculators.LAYERS}"
        layer = mapping(values.get(speculators.LAYERS), inside)
    kind = layer.get("model_type", "qwen3" if package else "llama")
    if kind not in ("llama", "qwen3"):
        raise InputError(f"{inside}: model_type {shown(kind)} is not supported; supported: llama, qwen3")
    for key in UNSUPPORTED:
        for part in (values, layer):
            if part.get(key) not in (None, False):
                raise InputError(f"{where}: {key} is not supported for EAGLE-3")
    if "sliding_attention" in (layer.get("layer_types") or []):
        raise InputError(f"{inside}: layer_types: sliding windows are not supported for EAGLE-3")
    shape = shape_from({**layer, "model_type": kind}, inside)
    for part in (values, layer):
        if (width := part.get("target_hidden_size")) not in (None, shape["width"]):
            raise InputError(
                f"{where}: target_hidden_size {shown(width)} is not supported, only the drafter's own {shape['width']}"
            )
    vocabulary = number_of(values, VOCABULARY, where, 32000 if package else None)
    if package and values.get(TAPS) is not None:
        entries = ids_in(values, TAPS, where)
        if 0 in entries:
            raise InputError(f"{where}: {TAPS} has 0, the embedding's output, which is not supported")
        taps = tuple(entry - 1 for entry in entries)  # entry 0 of the package's list is the embedding's output
    else:
        assert layers is not None  # only folders that runs describe, which say their taps, are read without a target
        taps = default_taps(layers)
    norms = {
        "norm_tapped": flag_of(values, "norm_before_fc", where),
        "norm_residual": flag_of(values, "norm_before_residual", where),
        "norm_output": flag_of(values, "norm_output", where),
    }
    shape |= {"tied": False, "tapped_width": len(taps) * shape["width"]} | norms
    reading = TappedReading(
        taps=taps,
        draft_length=_length(values, where),
        draft_vocab=None if vocabulary == shape["vocab_size"] else vocabulary,
    )
    return Eagle3Method(Eagle3Config(**shape), reading)


def _length(values: Mapping[str, Any], where: str) -> int:
    """Tokens per draft, as the package says them."""
    about = values.get("speculators_config")
    methods = about.get("proposal_methods") if isinstance(about, dict) else None
    if not isinstance(methods, list) or not methods or not isinstance(methods[0], dict):
        return LENGTH
    return number_of(methods[0], "speculative_tokens", f"{where}: proposal_methods", LENGTH)


def write_values(method: Eagle3Method, layout: str, dtype, target: ItsTarget) -> dict[str, Any]:
    """A config.json of a layout, `eagle3` or `speculators`; InputError for a drafter that it cannot say."""
    shape = method.shape
    norms = {
        "norm_before_fc": shape.norm_tapped, "norm_before_residual": shape.norm_residual,
        "norm_output": shape.norm_output,
    }  # fmt: skip
    values = write_config(shape, dtype)
    if layout == "speculators":
        speculators.check_taps(method, target.config.layers)
        layer = {key: value for key, value in values.items() if key not in speculators.OUTSIDE}
        said = speculators.described(KIND, PACKAGES, method, layer, dtype, target)
        return said | norms | {TAPS: [tap + 1 for tap in method.taps]}
    if layout != KIND:
        raise InputError("an EAGLE-3 drafter cannot be said in this layout")
    for name, value in norms.items():
        if value:
            raise InputError(f"{named(name)} cannot be said in this layout")
    if shape.family != "llama":
        raise InputError("norms of queries and keys cannot be said in this layout")
    if method.taps != (usual := default_taps(target.config.layers)):
        raise InputError(f"taps {list(method.taps)} cannot be said in this layout, only {list(usual)}")
    return values | {"architectures": [ARCHITECTURE], VOCABULARY: method.draft_vocab, "tie_word_embeddings": False}
