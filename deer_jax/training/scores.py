"""Scores over a vocabulary as a sum of products, and their gradients, on one shard and for a few rows at a time."""

import dataclasses
import functools
from typing import Any, cast

import jax.numpy as jnp

from deer_jax.drafters.protocol import Term
from deer_jax.models.layers import logits, precision
from deer_jax.sharding import gathered, here, shard_index, total


def table_axes(table) -> Any:
    """Where a table lies, for `sharding.on_shards`."""
    return here(table.shape, "batch", "vocab", None) if table.ndim == 3 else here(table.shape, "vocab", "width")


def table_here(table):
    """A shard's rows of a table, all of their width, inside `sharding.on_shards`."""
    return table[0] if table.ndim == 3 else gathered(table, "width", 1)


def term_axes(term: Term) -> Any:
    """Where a term lies, for `sharding.on_shards`."""
    features: Any = here(term.features.shape, "batch", None, None)
    return dataclasses.replace(term, features=features, table=table_axes(term.table))


def gradient_like(term: Term) -> Any:
    """A term's like with what has a gradient: all but a frozen table."""
    return term if term.trained else dataclasses.replace(term, table=cast(Any, None))


def at_ids(slope, at, width: int):
    """float32 [r, width]: slope [r, K] at these places int32 [r, K] of each row, 0 elsewhere; others are dropped."""
    rows = jnp.arange(at.shape[0])[:, None]
    return jnp.zeros((at.shape[0], width)).at[rows, jnp.where(at < 0, width, at)].add(slope, mode="drop")


class OnShard:
    """A term's features and table on one shard, and their gradients, a chunk of rows at a time."""

    def __init__(self, term: Term):
        self.term, (B, R, d) = term, term.features.shape
        self.table, self.count = table_here(term.table), B * R
        self.padded = jnp.pad(term.features.reshape(B * R, d), ((0, 1), (0, 0)))  # and a row of zeros
        self.exact = precision(term.features.dtype)

    def zeros(self):
        """Gradients to begin with: of features [N + 1, d] and, where it is trained, of the table, float32 [V, d]."""
        return jnp.zeros_like(self.padded), jnp.zeros(self.table.shape, jnp.float32) if self.term.trained else None

    def scores(self, rows):
        """float32 [r, V]"""
        scores, cap = logits(self.padded[rows], self.table), self.term.softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    def add(self, carry, rows, scores, slope):
        """The gradients with those of these rows, of slope float32 [r, V] by their scores float32 [r, V]."""
        (to_features, to_table), dtype = carry, self.padded.dtype
        if self.term.softcap is not None:
            slope = slope * (1 - jnp.square(scores / self.term.softcap))  # of tanh
        slope, product = slope.astype(dtype), functools.partial(jnp.einsum, precision=self.exact)
        to_x = product("rv,vd->rd", slope, self.table, preferred_element_type=jnp.float32)
        to_features = to_features.at[rows].set(total(to_x.astype(dtype), "vocab"))
        if to_table is not None:
            x = self.padded[rows]
            to_table = to_table + product("rv,rd->vd", slope, x, preferred_element_type=jnp.float32)
        return to_features, to_table

    def _mine(self, ids):
        """Places int32 [r, K] of ids in this shard's part of the table, and whether they are there."""
        at = ids - shard_index("vocab") * self.table.shape[0]
        return at, (at >= 0) & (at < self.table.shape[0])

    def scores_of(self, rows, ids):
        """float32 [r, K]: of some ids only, int32 [r, K]; of a term without a cap, as `add_of`."""
        at, mine = self._mine(ids)
        found = self.table.at[at].get(mode="clip")
        one = jnp.einsum(
            "rkd,rd->rk", found, self.padded[rows], precision=self.exact, preferred_element_type=jnp.float32
        )
        return total(jnp.where(mine, one, 0), "vocab")

    def add_of(self, carry, rows, ids, slope):
        """`add` for the slope [r, K] of `scores_of`."""
        (to_features, to_table), (at, mine) = carry, self._mine(ids)
        slope, dtype = jnp.where(mine, slope, 0).astype(self.padded.dtype), self.padded.dtype
        found = self.table.at[at].get(mode="clip")
        to_x = jnp.einsum("rk,rkd->rd", slope, found, precision=self.exact, preferred_element_type=jnp.float32)
        to_features = to_features.at[rows].set(total(to_x.astype(dtype), "vocab"))
        if to_table is not None:
            step = slope.astype(jnp.float32)[..., None] * self.padded[rows].astype(jnp.float32)[:, None]
            to_table = to_table.at[jnp.where(mine, at, self.table.shape[0])].add(step, mode="drop")
        return to_features, to_table

    def done(self, carry) -> Term:
        """The gradients in the term's own shapes and dtypes."""
        to_features, to_table = carry
        if to_table is not None:
            to_table = to_table.astype(self.term.table.dtype).reshape(self.term.table.shape)
        features = to_features[: self.count].reshape(self.term.features.shape)
        return dataclasses.replace(self.term, features=features, table=to_table)
