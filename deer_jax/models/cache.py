"""Key/value cache: fixed capacity, written once per pass, never rolled back.

Invariant: a pass that starts at position p attends to slots 0..p-1 and to its own fresh block, nothing else. Whatever
lies in slot p and beyond (rejected drafts, padding of a prefill) is invisible and is overwritten by the next write
at p. Values are finite there (0 * NaN is NaN): caches start as zeros, and what a pass writes went through
`attention.with_finite_values`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.build import Build
from deer_jax.config import ModelConfig
from deer_jax.sharding import Axis, here, on_shards, shard_index

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


def write_rows(buffer, fresh, start, axes: Sequence[Axis], *, rows=None):
    """Write `fresh` row by row into `buffer`, each row at its own start.

    axes: the logical axes of both, among them "batch" for the rows and "slots". Row i of fresh goes to row rows[i]
    (default i) from slot start[i] on; a row that is none of the buffer's is not written. On a mesh row i of fresh must
    lie on the shard that has row rows[i]. `dynamic_update_slice` would silently move a write that runs over the end,
    so the caller keeps start + width <= slots.

      buffer  [[7 7 7 7]   fresh [[1 2]   start [0      ->  [[1 2 7 7]
               [7 7 7 7]]         [3 4]]         2]          [7 7 3 4]]
    """
    row_axis, slot_axis = axes.index("batch"), axes.index("slots")
    split = [None if axis == "slots" else axis for axis in axes]

    def local(buffer, fresh, start, *rows):
        count, slots = fresh.shape[row_axis], buffer.shape[row_axis]
        targets = rows[0] - shard_index("batch") * slots if rows else jnp.arange(count, dtype=start.dtype)

        def write(i, buffer):
            row = lax.dynamic_slice_in_dim(fresh, i, 1, row_axis)
            where = [jnp.zeros((), start.dtype)] * buffer.ndim
            where[row_axis], where[slot_axis] = targets[i], start[i]
            if rows:
                known = (targets[i] >= 0) & (targets[i] < slots)
                row = jnp.where(known, row, lax.dynamic_slice(buffer, where, row.shape))
            return lax.dynamic_update_slice(buffer, row, where)

        if count <= STATIC_ROWS:
            for i in range(count):
                buffer = write(i, buffer)
            return buffer
        return lax.fori_loop(0, count, write, buffer)

    row_spec = here(start.shape, "batch")
    specs = (here(buffer.shape, *split), here(fresh.shape, *split), row_spec, *([row_spec] if rows is not None else []))
    return on_shards(local, specs, specs[0])(buffer, fresh, start, *([rows] if rows is not None else []))


def write_cache(cache: KVCache, fresh: KVCache, start, rows=None) -> KVCache:
    """The cache with a pass's fresh keys and values [L, B, K, T, H] written at start [B]; rows: see `write_rows`."""
    with jax.named_scope("commit_cache"):
        axes = (None, "batch", "kv_heads", "slots", None)
        return KVCache(
            write_rows(cache.keys, fresh.keys, start, axes, rows=rows),
            write_rows(cache.values, fresh.values, start, axes, rows=rows),
            cache.block,
        )


def take_rows(buffer, rows, axes: Sequence[Axis]):
    """A copy of some rows, each of which lies on the shard that is to have it; one that is none holds anything.

    axes: the logical axes of both, among them "batch" for the rows.
    """
    at, split = axes.index("batch"), [None if axis == "slots" else axis for axis in axes]

    def local(buffer, rows):
        own = rows - shard_index("batch") * buffer.shape[at]
        return buffer.at[(slice(None),) * at + (own,)].get(mode="clip")

    shape = (*buffer.shape[:at], rows.shape[0], *buffer.shape[at + 1 :])
    return on_shards(local, (here(buffer.shape, *split), here(rows.shape, "batch")), here(shape, *split))(buffer, rows)


def rows_of(cache: KVCache, rows) -> KVCache:
    """A copy of some rows of a cache, see `take_rows`."""
    axes = (None, "batch", "kv_heads", None, None)
    return KVCache(take_rows(cache.keys, rows, axes), take_rows(cache.values, rows, axes), cache.block)
