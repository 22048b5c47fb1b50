"""Norm, projection and rotary positions: the parts every layer shares, with their numerics in one place."""

import dataclasses
import math
from types import EllipsisType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deer_jax.config import Rope
from deer_jax.sharding import constrain, gathered, here, on_shards, shard_index, total

FEW_ROWS = 48  # from so many rows on, XLA's product on a CPU is as fast with a weight [out, in]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoWays:
    """A weight that lies in memory both ways, for products on a CPU.

    One row is multiplied fastest with [out, in], at the rate of memory; for a few rows XLA would transpose that whole
    weight in each pass, which takes longer than their product with [in, out].
    """

    rows: jax.Array  # [out, in]
    columns: jax.Array  # [in, out]

    @property
    def dtype(self) -> jnp.dtype:
        return self.rows.dtype

    def __getitem__(self, everything: EllipsisType) -> "TwoWays":
        return self  # as modules ask an array for its value


def precision(dtype) -> lax.Precision | None:
    """Highest for float32, so that exactness claims hold without a global setting; the default otherwise."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def rms_norm(x, scale, eps: float):
    """x / rms(x) * scale over the last axis, in float32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    # Rounding before the scale, as the Hugging Face models do: in bfloat16 the order is visible.
    return wide.astype(x.dtype) * lax.expand_dims(scale, range(x.ndim - 1))


def linear(x, weight, bias=None):
    """x [..., in] times weight [out, in] plus bias [out]."""
    y = product(x, weight, x.dtype)
    return y if bias is None else y + lax.expand_dims(bias, range(x.ndim - 1))


def product(x, weight, dtype):
    """x [..., in] times weight [out, in], accumulated and returned in `dtype`: [..., out]."""
    equation = "...i,oi->...o"
    if isinstance(weight, TwoWays):
        few = 1 < math.prod(x.shape[:-1]) < FEW_ROWS
        equation, weight = ("...i,io->...o", weight.columns) if few else (equation, weight.rows)
    return jnp.einsum(equation, x, weight, precision=precision(x.dtype), preferred_element_type=dtype)


def look_up(table, tokens):
    """Rows [B, .., D] of an embedding [V, D], or of what `sharding.spread` made of it, for tokens int [B, ..].

    A token that is none of the table's has a row of zeros.
    """

    def local(table, tokens):
        rows = table[0] if is_spread else gathered(table, "width", 1)
        at = tokens - shard_index("vocab") * rows.shape[0]
        known = (at >= 0) & (at < rows.shape[0])
        return total(jnp.where(known[..., None], rows.at[at].get(mode="clip"), 0), "vocab")

    is_spread = table.ndim == 3
    split = here(table.shape, "batch", "vocab", None) if is_spread else here(table.shape, "vocab", "width")
    rows = "batch", *[None] * (tokens.ndim - 1)
    out = here((*tokens.shape, table.shape[-1]), *rows, None)
    return on_shards(local, (split, here(tokens.shape, *rows)), out)(table, tokens)


def logits(x, head):
    """x [..., D] against head [V, D], accumulated and returned in float32."""
    return product(x, head, jnp.float32)


def inverse_frequencies(rope: Rope, head_width: int) -> tuple[np.ndarray, float]:
    """float32 [H/2] angular step of each pair, and the factor on cos and sin (1 unless yarn).

    The scalings are those of Hugging Face `rope_parameters`: linear divides every frequency by `factor`; llama3 (Llama
    3.1) divides the low ones and blends in between; yarn (arXiv 2309.00071) blends by number of turns.
    """
    half = np.arange(0, head_width, 2, dtype=np.float64) / head_width
    base = rope.theta**-half
    if rope.kind == "default":
        return base.astype(np.float32), 1.0
    if rope.kind == "linear":
        return (base / rope.factor).astype(np.float32), 1.0
    if rope.kind == "llama3":
        turns = rope.original_context * base / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return (keep * base + (1 - keep) * base / rope.factor).astype(np.float32), 1.0

    # yarn: pairs that turn more than beta_fast times within the original context keep their frequency, pairs that turn
    # less than beta_slow times are divided by the factor, a ramp between.
    def pair_that_turns(turns: float) -> float:
        return head_width * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    ramp = np.clip((np.arange(head_width // 2) - low) / max(high - low, 0.001), 0.0, 1.0)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    attention_factor = rope.attention_factor
    if attention_factor is None:
        if rope.mscale and rope.mscale_all_dim:
            attention_factor = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
        else:
            attention_factor = magnitude(1.0)
    return (base / rope.factor * ramp + base * (1 - ramp)).astype(np.float32), attention_factor


def rotary(positions, rope: Rope, head_width: int, dtype):
    """cos and sin [B, T, 1, H] for positions int[B, T]; the two halves of a head rotate together."""
    frequencies, factor = inverse_frequencies(rope, head_width)
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)[None, None]
    angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None]
    return (jnp.cos(angle) * factor).astype(dtype), (jnp.sin(angle) * factor).astype(dtype)


def rotate(x, cos_sin):
    """Apply `rotary` to x [B, T, heads, H]."""
    cos, sin = cos_sin
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def gated_mlp(x, gate, up, down):
    """down(silu(gate(x)) * up(x)), the MLP of every supported family."""
    hidden = jax.nn.silu(linear(x, gate)) * linear(x, up)
    return linear(constrain(hidden, "batch", *[None] * (x.ndim - 2), "mlp"), down)


def convolve(x, base, dynamic, rows: int):
    """Each row of x [B, M*rows, D] summed with those before it in its block of `rows`, by kernels that rows choose.

      out[j] = sum over i of (base[i] + dynamic[j, i, group of the channel]) * x[j - i]; what lies before a block is 0

    base: [kernel, D]; dynamic: [B, M*rows, kernel, groups], a group being D / groups neighbouring channels (DFlash 2).
    """
    B, T, D = x.shape
    kernel, groups = dynamic.shape[2:]
    blocks = x.reshape(B, T // rows, rows, groups, D // groups)
    dynamic = dynamic.reshape(B, T // rows, rows, kernel, groups, 1)
    out = jnp.zeros_like(blocks)
    for i in range(min(kernel, rows)):
        earlier = jnp.pad(blocks, ((0, 0), (0, 0), (i, 0), (0, 0), (0, 0)))[:, :, :rows]
        out = out + (base[i].reshape(1, 1, 1, groups, -1) + dynamic[:, :, :, i]) * earlier
    return out.reshape(x.shape)
