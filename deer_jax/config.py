"""Configuration: small frozen dataclasses, their validation.

Everything here is hashable, so a configuration can be a static argument of a jitted function. A function takes the
smallest of these that it reads.
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from deer_jax.errors import InputError

LEAST_TEMPERATURE = 1e-6


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint naming the closest valid spelling, or all of them: ``did you mean 'top_p'?``"""
    valid = sorted(valid)
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{match[0]}'?" if match else f"valid: {', '.join(valid)}"


RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: base frequency and the scaling that stretches them to longer contexts.

    Fields beyond `theta` are read by some kinds only; the names are those of Hugging Face configurations, except
    `original_context` (original_max_position_embeddings).
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a transformer. Llama-3, Qwen2, Qwen3 and Qwen3-MoE differ by these fields only.

    Attributes:
      family: name of the Hugging Face model type whose layout a folder has.
      context: positions the model was made for; a prompt and its answer must fit.
      tied: the output head is the embedding.
      qkv_bias: biases on the query, key and value projections (Qwen2).
      qk_norm: RMS norm over each head of queries and keys (Qwen3).
      experts: number of experts per layer; 0 means one dense MLP.
      normalise_router: the chosen experts' weights are divided by their sum.
    """

    family: Literal["llama", "qwen2", "qwen3", "qwen3_moe"]
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    context: int
    norm_eps: float = 1e-6
    rope: Rope = Rope()
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    normalise_router: bool = True

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "context"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise InputError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_width % 2:
            raise InputError(f"head_width must be even for rotary positions, got {self.head_width}")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise InputError(f"experts_per_token must be in 1..{self.experts}, got {self.experts_per_token}")
        if self.experts and self.expert_width < 1:
            raise InputError(f"expert_width must be at least 1, got {self.expert_width}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """How a standalone drafter reads and is read.

    Attributes:
      attention: `block_causal`: the prefix is causal and cached, masks see the prefix and each other;
        `bidirectional`: everything sees everything and is read again every round (the paper, open-dCoder).
      head: `shifted`: the distribution of position p is read at p-1; `in_place`: at p.
      separator: a separator entry follows the masks.
      draft_length: k the drafter was trained for, and the default when decoding.
      differing_ids: ids that mean something else to the target; never proposed, and read as masks.
    """

    attention: Literal["block_causal", "bidirectional"] = "block_causal"
    head: Literal["shifted", "in_place"] = "shifted"
    separator: bool = True
    draft_length: int = 8
    differing_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, valid in (("attention", ("block_causal", "bidirectional")), ("head", ("shifted", "in_place"))):
            if getattr(self, name) not in valid:
                raise InputError(f"{name} must be one of {', '.join(valid)}, got {getattr(self, name)!r}")
        if type(self.draft_length) is not int or self.draft_length < 1:
            raise InputError(f"draft_length must be a whole number of at least 1, got {self.draft_length!r}")
        if type(self.separator) is not bool:
            raise InputError(f"separator must be true or false, got {self.separator!r}")
        ids = self.differing_ids
        if not isinstance(ids, tuple) or not all(type(token) is int and token >= 0 for token in ids):
            raise InputError(f"differing_ids must be token ids, got {ids!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: temperature, then top-k, then top-p, for target and drafter alike.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens up to this mass; 1 keeps all.
      draft_temperature: the drafter's own; None is the target's, 0 drafts the argmax. Any value is exact.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    draft_temperature: float | None = None

    def __post_init__(self):
        for name in ("temperature", "draft_temperature"):
            value = getattr(self, name)
            if value is None and name == "draft_temperature":
                continue
            if not _is_number(value) or not 0 <= value < math.inf:
                raise InputError(f"{name} must be 0 (greedy) or positive, got {value!r}")
            if 0 < value < LEAST_TEMPERATURE:
                raise InputError(f"{name} {value} is too small to divide by in float32: 0 is greedy")
        whole = isinstance(self.top_k, numbers.Integral) and not isinstance(self.top_k, bool)
        if not whole or not 0 <= self.top_k < 2**31:  # int32 on the device
            raise InputError(f"top_k must be 0 (all tokens) or a positive whole number below 2**31, got {self.top_k!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def from_mapping(cls, values: Mapping[str, Any], where: str):
    """A dataclass from a mapping; an unknown key is an error that names the nearest valid one. Errors name `where`."""
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise InputError(f"{where}: unknown key '{key}', {nearest(str(key), fields)}")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
