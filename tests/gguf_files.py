"""GGUF files of tiny models, written with the package's own writer and its own names, beside folders of the same."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file, save_file

from deer_jax.checkpoints.families import write_config
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.config import ModelConfig
from tests.tiny import random_params, tiny

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
PLAIN: dict[str, Any] = {"mlp_width": 64}  # rows are whole blocks of 32


def tiny_gguf(family: str, **changes) -> ModelConfig:
    """A tiny configuration that a GGUF file can say."""
    from deer_jax.config import Rope

    expert = {"expert_width": 32} if family == "qwen3_moe" else {}
    return tiny(family, **(PLAIN | expert | {"rope": Rope(theta=10000.0)} | changes))


def mixed(key: str) -> Kind:
    """A kind for each tensor, as published files have them: norms and routers are never quantised."""
    if "norm" in key or key.endswith((".bias", "mlp.gate.weight")):
        return Kind.F32
    kinds = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.F16, Kind.BF16]
    return kinds[sum(key.encode()) % len(kinds)]


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes, without the tokenizer's."""
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size, "context_length": config.context, "embedding_length": config.width,
        "block_count": config.layers, "feed_forward_length": config.mlp_width, "rope.freq_base": config.rope.theta,
        "attention.head_count": config.heads, "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps, "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
    }  # fmt: skip
    if config.experts:
        values |= {
            "expert_count": config.experts, "expert_used_count": config.experts_per_token,
            "expert_feed_forward_length": config.expert_width,
        }  # fmt: skip
    return {f"{ARCHITECTURES[config.family]}.{key}": value for key, value in values.items()}


def write_gguf(
    path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, Kind]]
) -> Path:
    """A file of these tensors by GGUF name; metadata that is None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}.get(type(value))
        if kind is not None:
            getattr(writer, f"add_{kind}")(key, value)
    for name, (value, kind) in tensors.items():
        writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_pair(
    folder: Path, config: ModelConfig, kind: Callable[[str], Kind] = mixed, metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[np.ndarray, Kind] | None] | None = None, seed: int = 0,
) -> tuple[Path, Path]:  # fmt: skip
    """folder/model.gguf and folder/hf, of the same values; metadata, tensors: changes of the file alone."""
    folder.mkdir(exist_ok=True)
    save_folder(folder / "exact", config, random_params(config, seed))
    exact = load_file(folder / "exact" / "model.safetensors")
    rounded, in_file, experts = {}, {}, {}
    architecture = ARCHITECTURES[config.family]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.layers)
    for key, value in exact.items():
        merged = key
        if ".experts." in key:
            before, _, behind = key.partition(".experts.")
            merged = f"{before}.experts.{behind.partition('.')[2]}"
        each = kind(merged)
        rounded[key] = gguf.dequantize(gguf.quantize(value, each), each).astype(ml_dtypes.bfloat16)
        name = names.get_name(merged, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        if config.family == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.heads if "q_proj" in key else config.kv_heads
            value = value.reshape(heads, 2, -1, config.width).swapaxes(1, 2).reshape(value.shape)  # as llama.cpp does
        if merged != key:
            experts.setdefault(name, []).append((int(key.split(".experts.")[1].split(".")[0]), value))
        in_file[name] = (value, each)
    for name, parts in experts.items():
        in_file[name] = (np.stack([value for _, value in sorted(parts, key=lambda x: x[0])]), in_file[name][1])
    in_file = {name: each for name, each in (in_file | dict(tensors or {})).items() if each is not None}
    file = write_gguf(folder / "model.gguf", architecture, metadata_of(config) | dict(metadata or {}), in_file)
    (folder / "hf").mkdir()
    save_file(rounded, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    (folder / "hf" / "config.json").write_text(json.dumps(write_config(config, ml_dtypes.bfloat16)))
    return file, folder / "hf"


def tokenizer_metadata(folder: Path, pre: str) -> dict[str, Any]:
    """The metadata of the tokenizer in a folder with a tokenizer.json of byte-level BPE."""
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, kinds = dict(values["model"]["vocab"]), {}
    for added in values["added_tokens"]:
        vocabulary[added["content"]] = added["id"]
        kinds[added["id"]] = 3 if added["special"] else 4
    tokens = [f"[PAD{number}]" for number in range(max(vocabulary.values()) + 1)]
    for token, number in vocabulary.items():
        tokens[number] = token
    known = set(vocabulary.values())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    found = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(i, 1) if i in known else 5 for i in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
    }  # fmt: skip
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if isinstance(config.get("chat_template"), str):
        found["tokenizer.chat_template"] = config["chat_template"]
    for ours, theirs in {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}.items():
        token = config.get(ours)
        if token is not None:
            text = token if isinstance(token, str) else token["content"]
            found[f"tokenizer.ggml.{theirs}_token_id"] = vocabulary[text]
    return found
