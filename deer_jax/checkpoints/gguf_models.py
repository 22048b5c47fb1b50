"""Models in GGUF files, said as Hugging Face folders say them: `config.json`, keys of tensors, order of rotary pairs.

So everything behind reads both alike, and a file gives the very values of the folder that it was made from, as far as
its quantisation kept them: dequantised and rounded to bfloat16.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from deer_jax.checkpoints.families import ARCHITECTURES, KEYS, number_of
from deer_jax.checkpoints.gguf import GgufFile, opened_values, values_of
from deer_jax.errors import InputError, named, shown

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}  # GGUF's name -> ours
MOST_EXPERTS = 2**16

# Our name of a parameter -> GGUF's; {i} is the layer. The experts of a layer are one tensor there.
NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "input_norm": "blk.{i}.attn_norm.weight",
    "q": "blk.{i}.attn_q.weight",
    "k": "blk.{i}.attn_k.weight",
    "v": "blk.{i}.attn_v.weight",
    "o": "blk.{i}.attn_output.weight",
    "q_bias": "blk.{i}.attn_q.bias",
    "k_bias": "blk.{i}.attn_k.bias",
    "v_bias": "blk.{i}.attn_v.bias",
    "q_norm": "blk.{i}.attn_q_norm.weight",
    "k_norm": "blk.{i}.attn_k_norm.weight",
    "post_norm": "blk.{i}.ffn_norm.weight",
    "gate": "blk.{i}.ffn_gate.weight",
    "up": "blk.{i}.ffn_up.weight",
    "down": "blk.{i}.ffn_down.weight",
    "router": "blk.{i}.ffn_gate_inp.weight",
    "experts.gate": "blk.{i}.ffn_gate_exps.weight",
    "experts.up": "blk.{i}.ffn_up_exps.weight",
    "experts.down": "blk.{i}.ffn_down_exps.weight",
}
HEAD, FREQUENCIES = NAMES["head"], "rope_freqs.weight"
INTERLEAVED = {"q": "attention.head_count", "k": "attention.head_count_kv"}  # of llama: rows by rotary pairs

# What may stand under the architecture's name. Anything else may change what a model computes.
SETTINGS = frozenset(
    {"vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "rope.freq_base",
     "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
     "rope.scaling.finetuned", "attention.head_count", "attention.head_count_kv", "attention.key_length",
     "attention.value_length", "attention.layer_norm_rms_epsilon"}
)  # fmt: skip
EXPERT_SETTINGS = frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"})
TOKENS = "tokenizer.ggml.tokens"
STOPS = ("eos", "eot", "eom")  # ends of a text, of a turn and of a message: an answer ends with each of them
# Llama 3 stretches wavelengths above 8192 tokens whole, below 8192 / 4 not at all.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def family_of(file: GgufFile) -> str:
    """The model's family. InputError for another architecture, for a part of a model, and for an adapter."""
    kind, parts = file.metadata.get("general.type", "model"), file.metadata.get("split.count", 1)
    if kind != "model":
        raise InputError(f"{file.path}: holds a GGUF {shown(kind)}, no model; name the file of the model")
    if parts not in (0, 1):
        raise InputError(f"{file.path}: is one of {shown(parts)} parts; join them with llama-gguf-split --merge")
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise InputError(
            f"{file.path}: architecture {shown(architecture)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture]


def config_values(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model. InputError for settings that are missing, wrong or not supported."""
    family, where, metadata = family_of(file), str(file.path), file.metadata
    prefix = metadata["general.architecture"] + "."
    known = SETTINGS | (EXPERT_SETTINGS if family == "qwen3_moe" else set())
    unknown = sorted(key for key in metadata if key.startswith(prefix) and key.removeprefix(prefix) not in known)
    unknown = [key for key in unknown if metadata[key] or key.removeprefix(prefix) not in EXPERT_SETTINGS]
    if unknown:
        raise InputError(f"{where}: {named(unknown[0])} = {shown(metadata[unknown[0]], 40)} is not supported")

    def number(key: str, default=None, kind: type = int) -> Any:
        return number_of(metadata, prefix + key, where, default, kind)

    width, heads, context = number("embedding_length"), number("attention.head_count"), number("context_length")
    head_width = number("attention.key_length", width // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_width) != head_width:
            raise InputError(
                f"{where}: {prefix}{key} {number(key)} is not supported, only {head_width}, a head's width"
            )
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_width,
        "num_hidden_layers": number("block_count"),
        "max_position_embeddings": context,
        "vocab_size": _vocabulary(file) or number("vocab_size"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", kind=float),
        "rope_theta": number("rope.freq_base", 10000.0, float),
        "tie_word_embeddings": HEAD not in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(stop_ids(file)) or None,
    }
    if family == "qwen3_moe":
        values |= {
            "num_experts": number("expert_count"),
            "num_experts_per_tok": number("expert_used_count"),
            "moe_intermediate_size": number("expert_feed_forward_length"),
            "norm_topk_prob": True,  # GGUF has no word for it, and every published model does so
        }
        if not 0 < values["num_experts"] <= MOST_EXPERTS:
            raise InputError(f"{where}: {prefix}expert_count must be from 1 to {MOST_EXPERTS}")
    values["intermediate_size"] = number("feed_forward_length", values.get("moe_intermediate_size"))
    values["rope_scaling"] = _rope_scaling(file, prefix, context, head_width, values["rope_theta"])
    return values


def _vocabulary(file: GgufFile) -> int:
    """The number of tokens; 0 if the file has no tokenizer."""
    tokens = file.metadata.get(TOKENS, [])
    if not isinstance(tokens, list):
        raise InputError(f"{file.path}: {TOKENS} must be a list, got {shown(tokens)}")
    return len(tokens)


def stop_ids(file: GgufFile) -> tuple[int, ...]:
    """Ids that end an answer, as the metadata names them."""
    found = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in STOPS)
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _rope_scaling(file: GgufFile, prefix: str, context: int, head_width: int, theta: float) -> dict[str, Any] | None:
    where, metadata = str(file.path), file.metadata
    kind = metadata.get(f"{prefix}rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise InputError(f"{where}: RoPE scaling {shown(kind)} is not supported; supported: none, linear, yarn")
    if FREQUENCIES in file.tensors:
        factors = _frequencies(file)
        if kind == "none" and (scaling := _as_llama3(factors, head_width, theta)) is not None:
            return scaling
        raise InputError(f"{where}: {FREQUENCIES} scales RoPE in another way than Llama 3; not supported")
    if kind == "none":
        return None
    values = {"rope_type": kind, "factor": number_of(metadata, f"{prefix}rope.scaling.factor", where, kind=float)}
    if kind == "yarn":
        original = f"{prefix}rope.scaling.original_context_length"
        values["original_max_position_embeddings"] = number_of(metadata, original, where, context)
    return values


def _frequencies(file: GgufFile) -> np.ndarray:
    if len(file.tensors[FREQUENCIES].shape) != 1:
        raise InputError(f"{file.path}: {FREQUENCIES} is {list(file.tensors[FREQUENCIES].shape)}, expected one axis")
    with opened_values(file) as stream:
        return values_of(file, stream, FREQUENCIES, dtype=np.float32)


def _as_llama3(factors: np.ndarray, head_width: int, theta: float) -> dict[str, Any] | None:
    """rope_scaling of Llama 3, whose factors these are; None if they are others. GGUF has the factors alone."""
    rotations = LLAMA3["original_max_position_embeddings"] * theta ** (-np.arange(0, head_width, 2) / head_width)
    low, high, factor = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"], float(factors[-1])
    share = np.clip((rotations / (2 * np.pi) - low) / (high - low), 0, 1)
    if factors.shape != share.shape or not factor > 0 or share[-1] > 0:
        return None
    same = np.allclose(factors, 1 / ((1 - share) / factor + share), rtol=1e-4)
    return {"rope_type": "llama3", "factor": factor, **LLAMA3} if same else None


class Source(NamedTuple):
    """What a tensor of a folder is made of: a tensor of the file, or one expert's part of it."""

    name: str
    shape: tuple[int, ...]
    part: int | None = None
    heads: int = 0  # whose rows have their rotary pairs side by side; 0: in the order of folders already


def sources(file: GgufFile) -> dict[str, Source]:
    """Every tensor by its Hugging Face key; one that has none keeps its name, and so is found to be unknown."""
    family, metadata, found = family_of(file), file.metadata, {}
    prefix = metadata["general.architecture"] + "."
    ours = {NAMES[name]: (name, key) for name, key in KEYS[family].items()}
    for name, info in file.tensors.items():
        if name == FREQUENCIES:  # part of the configuration
            continue
        layer = re.match(r"blk\.(0|[1-9][0-9]{0,8})\.", name)
        template = name if layer is None else name.replace(layer[0], "blk.{i}.", 1)
        if template not in ours:
            found[name] = Source(name, info.shape)
            continue
        our_name, key = ours[template]
        key = key.replace("{i}", layer[1] if layer else "")
        if our_name.startswith("experts."):
            experts = number_of(metadata, f"{prefix}expert_count", str(file.path))
            if len(info.shape) != 3 or info.shape[0] != experts:
                raise InputError(
                    f"{file.path}: {named(name)} is {list(info.shape)}, expected {experts} experts' matrices"
                )
            found |= {key.replace("{e}", str(e)): Source(name, info.shape[1:], e) for e in range(experts)}
            continue
        heads = 0
        if family == "llama" and our_name in INTERLEAVED:
            fallback = number_of(metadata, f"{prefix}attention.head_count", str(file.path))
            heads = number_of(metadata, prefix + INTERLEAVED[our_name], str(file.path), fallback)
            if heads < 1 or info.shape[0] % (2 * heads):
                raise InputError(f"{file.path}: {named(name)} is {list(info.shape)}, which {heads} heads do not divide")
        found[key] = Source(name, info.shape, heads=heads)
    return found


def name_in_file(key: str) -> str:
    """What GGUF calls a tensor of a folder: blk.1.ffn_up.weight for model.layers.1.mlp.up_proj.weight."""
    layer = re.search(r"(?<=layers\.)\d+", key)
    template = re.sub(r"(?<=layers\.)\d+", "{i}", re.sub(r"(?<=experts\.)\d+", "{e}", key))
    for table in KEYS.values():
        for name, each in table.items():
            if each == template:
                return NAMES[name].replace("{i}", layer[0] if layer else "")
    return key


class Tensors:
    """The tensors of an open file by Hugging Face key, in place of safetensors' own reader."""

    def __init__(self, file: GgufFile, stream: BinaryIO):
        self._file, self._stream, self._sources = file, stream, sources(file)

    def get_tensor(self, key: str) -> np.ndarray:
        """bfloat16, with the rows of queries and keys as folders have them: first halves of the pairs, then second."""
        source = self._sources[key]
        value = values_of(self._file, self._stream, source.name, source.part)
        if source.heads:
            value = value.reshape(source.heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        return value


@contextlib.contextmanager
def opened_tensors(file: GgufFile) -> Iterator[Tensors]:
    """The tensors of a file."""
    with opened_values(file) as stream:
        yield Tensors(file, stream)


def shapes(file: GgufFile) -> Mapping[str, tuple[int, ...]]:
    """The shape of every tensor, by Hugging Face key."""
    return {key: source.shape for key, source in sources(file).items()}
