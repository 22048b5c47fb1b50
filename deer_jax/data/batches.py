"""Batches of a stream of examples, known by their number, of which a process may read its own rows only.

    examples   0 1 2 3 4 5 6 7 8 ...
    batch 4    batch 0: 0 1 2 3    batch 1: 4 5 6 7    rows [2, 3] of batch 1: 6 7

Batch n is the same whatever was read before and whoever reads which rows of it, so a position in a stream is a number.
"""

import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

READ_AHEAD = 4  # batches


class _Batches:
    """A source for grain: item n has the wanted rows of the batch `first` + n, stacked."""

    def __init__(self, examples: grain.MapDataset, batch: int, first: int, rows: np.ndarray):
        self._examples, self._batch, self._first, self._rows = examples, batch, first, rows

    def __len__(self) -> int:
        return sys.maxsize // self._batch - self._first

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        start = (int(index) + self._first) * self._batch
        found: list[Any] = [self._examples[start + int(row)] for row in self._rows]
        return {name: np.stack([each[name] for each in found]) for name in found[0]}


def batches(
    examples: grain.MapDataset, batch: int, first: int, rows: np.ndarray | None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of an endless data set from number `first` on, read ahead by a thread; rows: None is all of them."""
    wanted = np.arange(batch) if rows is None else rows
    data = grain.MapDataset.source(_Batches(examples, batch, first, wanted))
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)))
