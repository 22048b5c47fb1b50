"""Configuration: small frozen dataclasses, their validation.

Everything here is hashable, so a configuration can be a static argument of a jitted function. A function takes the
smallest of these that it reads.
"""

import dataclasses
import difflib
import functools
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from deer_jax.errors import InputError, named, shown

LEAST_TEMPERATURE = 1e-6
MOST_TEMPERATURE = 1e38  # float32 ends there
MOST_DRAFT_LENGTH = 4096
MOST_IDS = 1024  # of a set of token ids that programs are compiled with: stop ids, ids that differ
TOKEN_IDS = 2**31  # int32 on the device


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint naming the closest valid spelling, or all of them: ``did you mean 'top_p'?``"""
    valid = sorted(valid)
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{match[0]}'?" if match else f"valid: {', '.join(valid)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int, most: int) -> None:
    """InputError unless the value is a whole number in least..most."""
    if type(value) is not int:
        raise InputError(f"{name} must be a whole number, got {shown(value)}")
    if not least <= value <= most:
        wanted = f"a whole number of at least {least:,}" if value < least else f"at most {most:,}"
        raise InputError(f"{name} must be {wanted}, got {shown(value)}")


def check_number(name: str, value: Any, least: float, most: float, *, above: bool = False) -> None:
    """InputError unless the value is a number in least..most; above: and not `least` itself."""
    if not _is_number(value):
        raise InputError(f"{name} must be a number, got {shown(value)}")
    if not least <= value <= most or (above and value == least):
        wanted = f"above {least:g} and at most {most:g}" if above else f"in {least:g}..{most:g}"
        raise InputError(f"{name} must be {wanted}, got {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    """InputError unless the value is true or false."""
    if type(value) is not bool:
        raise InputError(f"{name} must be true or false, got {shown(value)}")


def check_choice(name: str, value: Any, valid: Iterable[str]) -> None:
    """InputError unless the value is one of the valid texts."""
    valid = tuple(valid)
    if value not in valid:
        raise InputError(f"{name} must be one of {', '.join(valid)}, got {shown(value)}")


RopeKind = Literal["default", "linear", "llama3", "yarn"]
Verification = Literal["token", "block"]
Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]

# More than any published model has, and little enough that nothing loops or allocates for a mistake.
MOST = {
    "vocab_size": TOKEN_IDS - 1, "width": 2**20, "layers": 10_000, "heads": 2**14, "kv_heads": 2**14,
    "head_width": 2**14, "mlp_width": 2**22, "context": 2**31 - 1,
    "experts": 100_000, "experts_per_token": 100_000, "expert_width": 2**22,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: base frequency and the scaling that stretches them to longer contexts.

    Fields beyond `theta` are read by some kinds only; the names are those of Hugging Face configurations, except
    `original_context` (original_max_position_embeddings).

    Attributes:
      theta: base frequency.
      kind: `default`, `linear`, `llama3` or `yarn`.
      factor: by how much the context is stretched. original_context: what the model was made for before.
      low_freq_factor, high_freq_factor: of `llama3`.
      beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate: of `yarn`.
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

    def __post_init__(self):
        check_choice("RoPE kind", self.kind, get_args(RopeKind))
        check_number("RoPE theta", self.theta, 1, 1e15, above=self.kind == "yarn")  # yarn divides by its logarithm
        check_number("RoPE factor", self.factor, 1, 1e6)
        needed = 1 if self.kind in ("llama3", "yarn") else 0
        check_whole("RoPE original_context", self.original_context, needed, MOST["context"])
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            check_number(f"RoPE {name}", getattr(self, name), 0, 1e6, above=True)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise InputError(
                    f"RoPE {low} must be below {high}, got {shown(getattr(self, low))} and {shown(getattr(self, high))}"
                )
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_number(f"RoPE {name}", getattr(self, name), 0, 100, above=name == "attention_factor")
        check_flag("RoPE truncate", self.truncate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a transformer. Llama-3, Qwen2, Qwen3 and Qwen3-MoE differ by these fields only.

    Attributes:
      family: name of the Hugging Face model type whose layout a folder has.
      vocab_size, width, layers, heads, kv_heads, head_width, mlp_width: the sizes.
      context: positions the model was made for; a prompt and its answer must fit.
      norm_eps: added to the mean square in norms.
      rope: rotary positions.
      tied: the output head is the embedding.
      qkv_bias: biases on the query, key and value projections (Qwen2).
      qk_norm: RMS norm over each head of queries and keys (Qwen3).
      experts: number of experts per layer; 0 means one dense MLP.
      experts_per_token, expert_width: how many of them a token reaches, and the width of each.
      normalise_router: the chosen experts' weights are divided by their sum.
    """

    family: Family
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
        check_choice("family", self.family, get_args(Family))
        for name, most in MOST.items():
            check_whole(name, getattr(self, name), 0 if name.startswith("expert") else 1, most)
        check_number("norm_eps", self.norm_eps, 0, 0.1, above=True)
        if not isinstance(self.rope, Rope):
            raise InputError(f"rope must be a Rope, got {shown(self.rope)}")
        for name in ("tied", "qkv_bias", "qk_norm", "normalise_router"):
            check_flag(name, getattr(self, name))
        if self.heads % self.kv_heads:
            raise InputError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_width % 2:
            raise InputError(f"head_width must be even for rotary positions, got {self.head_width}")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise InputError(f"experts_per_token must be in 1..{self.experts}, got {self.experts_per_token}")
        if self.experts and self.expert_width < 1:
            raise InputError(f"expert_width must be at least 1, got {self.expert_width}")

    def described(self) -> str:
        """In a few words: ``llama, 5 layers of width 64, 512 tokens, context 512``."""
        experts = f", {self.experts} experts" if self.experts else ""
        return (
            f"{self.family}, {self.layers} layers of width {self.width}{experts}, {self.vocab_size} tokens, "
            f"context {self.context}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionedConfig(ModelConfig):
    """Shape of a conditioned drafter's backbone: a model's, with what its layers make of the target's hidden states.

    Embedding and head are the target's, so `vocab_size` is too, and `tied` says nothing.

    Attributes:
      tapped_width: of the tapped layers' outputs side by side: their number times the target's width.
      windows: for each layer how far its rows see; 0 sees everything.
      window_from: `row`: a row sees what is less than the window away from it, rows of its block included (dflash);
        `anchor`: all rows see the last so many positions before the anchor, and all of their block (speculators).
      causal: for each layer whether a row sees only those of its block that are not behind it.
      o_bias: a bias on attention's output projection.
      conv_kernel: rows that a layer's convolutions (DFlash 2) sum, each with itself; 0 has none.
      conv_group: channels that share a kernel's dynamic part.
    """

    tapped_width: int
    windows: tuple[int, ...]
    causal: tuple[bool, ...]
    window_from: Literal["row", "anchor"] = "row"
    o_bias: bool = False
    conv_kernel: int = 0
    conv_group: int = 16

    def __post_init__(self):
        super().__post_init__()
        if self.experts:
            raise InputError(f"a conditioned drafter has one MLP per layer, got experts {self.experts}")
        check_whole("tapped_width", self.tapped_width, 1, MOST["width"] * MOST["layers"])
        for name, check in (("windows", functools.partial(check_whole, least=0, most=MOST["context"])),
                            ("causal", check_flag)):  # fmt: skip
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != self.layers:
                raise InputError(
                    f"{name} must have one entry for each of the {self.layers} layers, got {shown(values)}"
                )
            for i, value in enumerate(values):
                check(f"{name} of layer {i}", value)
        check_choice("window_from", self.window_from, ("row", "anchor"))
        check_flag("o_bias", self.o_bias)
        check_whole("conv_kernel", self.conv_kernel, 0, MOST_DRAFT_LENGTH)
        check_whole("conv_group", self.conv_group, 1, MOST["width"])
        if self.conv_kernel and self.width % self.conv_group:
            raise InputError(f"width ({self.width}) must be a multiple of conv_group ({self.conv_group})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3Config(ModelConfig):
    """Shape of EAGLE-3's one layer, which reads a token's embedding and a state of the text before it side by side.

    Embedding and head are the target's, so `vocab_size` and `width` are too, and `tied` says nothing.

    Attributes:
      tapped_width: of the tapped layers' outputs side by side: their number times the target's width.
      norm_tapped: these are normalised before they are projected.
      norm_residual: the layer adds to the normalised state, not to the state itself.
      norm_output: the state of a drafted token is handed on as it predicts, behind the final norm.
    """

    tapped_width: int
    norm_tapped: bool = False
    norm_residual: bool = False
    norm_output: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.layers != 1 or self.experts:
            raise InputError(
                f"EAGLE-3 has one layer with one MLP, got {self.layers} layers and {self.experts} experts: deeper "
                "drafters of its kind are not supported"
            )
        check_whole("tapped_width", self.tapped_width, 1, MOST["width"] * MOST["layers"])
        for name in ("norm_tapped", "norm_residual", "norm_output"):
            check_flag(name, getattr(self, name))


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
        check_choice("attention", self.attention, ("block_causal", "bidirectional"))
        check_choice("head", self.head, ("shifted", "in_place"))
        check_whole("draft_length", self.draft_length, 1, MOST_DRAFT_LENGTH)
        check_flag("separator", self.separator)
        check_token_ids("differing_ids", self.differing_ids)


def check_token_ids(name: str, ids: Any) -> None:
    """InputError unless the value is a tuple of token ids, at most MOST_IDS of them."""
    if not isinstance(ids, tuple) or not all(type(token) is int and 0 <= token < TOKEN_IDS for token in ids):
        raise InputError(f"{name} must be token ids, got {shown(ids)}")
    if len(ids) > MOST_IDS:
        raise InputError(f"{name} must be at most {MOST_IDS:,} token ids, got {len(ids):,}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: temperature, then top-k, then top-p, for target and drafter alike.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens up to this mass; 1 keeps all.
      draft_temperature: the drafter's own; None is the target's, 0 drafts the argmax. Any value is exact.
      verification: of sampled drafts, `token`: each token by itself, up to the first that is rejected; `block`: the
        whole block at once, which keeps as many tokens on average, or more. Both are exact; greedy they are the same.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    draft_temperature: float | None = None
    verification: Verification = "token"

    def __post_init__(self):
        check_choice("verification", self.verification, get_args(Verification))
        for name in ("temperature", "draft_temperature"):
            value = getattr(self, name)
            if value is None and name == "draft_temperature":
                continue
            if not _is_number(value) or not 0 <= value <= MOST_TEMPERATURE:
                raise InputError(f"{name} must be 0 (greedy) or positive, got {shown(value)}")
            if 0 < value < LEAST_TEMPERATURE:
                raise InputError(f"{name} {value} is too small to divide by in float32: 0 is greedy")
        whole = isinstance(self.top_k, numbers.Integral) and not isinstance(self.top_k, bool)
        if not whole or not 0 <= self.top_k < 2**31:  # int32 on the device
            raise InputError(
                f"top_k must be 0 (all tokens) or a positive whole number below 2**31, got {shown(self.top_k)}"
            )
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {shown(self.top_p)}")


def from_mapping(cls, values: Mapping[str, Any], where: str):
    """A dataclass from a mapping; an unknown key is an error that names the nearest valid one. Errors name `where`."""
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise InputError(f"{where}: unknown key '{named(key)}', {nearest(named(key), fields)}")
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
