"""Key/value cache: fixed capacity, written once per pass, never rolled back.

Invariant: a pass that starts at position p attends to slots 0..p-1 and to its own fresh block, nothing else. Whatever
lies in slot p and beyond (rejected drafts, padding of a prefill) is invisible and is overwritten by the next write
at p. Values are finite there (0 * NaN is NaN): caches start as zeros, and what a pass writes went through
`attention.with_finite_values`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.build import Build
from deer_jax.config import ModelConfig

STATIC_ROWS = 16  # up to here rows are written by unrolled updates, beyond by a loop: bounds program size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, two separate arrays so that both can be donated.

    block: attention reads so many slots at a time, up to the longest row; None reads the whole capacity at once.
    """

    keys: jax.Array  # [L, B, K, S, H]
    values: jax.Array  # [L, B, K, S, H]
    block: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def axes(self) -> "KVCache":
        """The logical axes of both, in their places."""
        axes: Any = (None, "batch", "kv_heads", None, None)
        return KVCache(axes, axes, self.block)


def empty_cache(config: ModelConfig, batch: int, capacity: int, build: Build) -> KVCache:
    """A cache of zeros with `capacity` slots per row, in the build's dtype."""
    shape = (config.layers, batch, config.kv_heads, capacity, config.head_width)
    return KVCache(jnp.zeros(shape, build.dtype), jnp.zeros(shape, build.dtype), build.block_of(capacity))


def write_rows(buffer, fresh, start, *, rows=None, axis: int = 0, slot_axis: int = 1):
    """Write `fresh` row by row into `buffer`, each row at its own start.

    buffer has rows on `axis` and slots on `slot_axis`; fresh has the same rank. Row i of fresh goes to row rows[i]
    (default i) from slot start[i] on. `dynamic_update_slice` would silently move a write that runs over the end, so
    the caller keeps start + width <= slots.

      buffer  [[7 7 7 7]   fresh [[1 2]   start [0      ->  [[1 2 7 7]
               [7 7 7 7]]         [3 4]]         2]          [7 7 3 4]]
    """
    count = fresh.shape[axis]
    if rows is None:
        rows = jnp.arange(count, dtype=start.dtype)

    def write(i, buffer):
        row = lax.dynamic_slice_in_dim(fresh, i, 1, axis)
        zero = jnp.zeros((), start.dtype)
        where = [zero] * buffer.ndim
        where[axis], where[slot_axis] = rows[i], start[i]
        return lax.dynamic_update_slice(buffer, row, where)

    if count <= STATIC_ROWS:
        for i in range(count):
            buffer = write(i, buffer)
        return buffer
    return lax.fori_loop(0, count, write, buffer)


def write_cache(cache: KVCache, fresh: KVCache, start, rows=None) -> KVCache:
    """The cache with a pass's fresh keys and values [L, B, K, T, H] written at start [B]."""
    with jax.named_scope("commit_cache"):
        return KVCache(
            write_rows(cache.keys, fresh.keys, start, rows=rows, axis=1, slot_axis=3),
            write_rows(cache.values, fresh.values, start, rows=rows, axis=1, slot_axis=3),
            cache.block,
        )
