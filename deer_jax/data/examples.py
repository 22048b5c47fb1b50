"""Training examples from files of answers: corrupted, batched, resumable. Never imports jax.

The randomness of an example is a function of (seed, epoch, record), so a resumed run sees what an uninterrupted one
would.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from deer_jax.data.answers import AnswerFiles
from deer_jax.data.batches import batches
from deer_jax.diffusion.corruption import Corruption, corrupt_blocks, corrupt_cut
from deer_jax.errors import InputError

GOLDEN = 0.6180339887498949  # multiples of it modulo 1 fill the unit interval evenly


@dataclasses.dataclass(frozen=True)
class _Prepare(grain.transforms.RandomMap):
    """One record, as the arrays of one corrupted example of `length` tokens."""

    corruption: Corruption
    bidirectional: bool
    length: int
    seed: int

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        """element: the example's number and its record."""
        number, record = element
        prompt, answer = record["prompt"], record["answer"]
        room = self.length - 1 if self.bidirectional else self.length  # for the separator
        if len(prompt) >= room:
            raise InputError(
                f"{record['where']}: a prompt of {len(prompt)} tokens leaves no room for its answer in length "
                f"{self.length}; raise length to at least {len(prompt) + 1 + self.length - room} or remove the line"
            )
        text = (prompt + answer)[:room]
        tokens = np.zeros(self.length, np.int32)
        tokens[: len(text)] = text
        if not self.bidirectional:
            blocks = corrupt_blocks(len(prompt), len(text), self.corruption, rng)
            text_weight = np.pad(blocks.text_weight, (0, self.length - len(text)))
            example = {"tokens": tokens, "length": np.int32(len(text))}
            return example | blocks._replace(text_weight=text_weight)._asdict()
        # Evenly spread over any run of examples, which is what a batch is: the variance of 1/t stays small. The seed
        # moves them by another irrational; any power of GOLDEN is a multiple of it modulo 1 and would only renumber.
        rate = 1 - (number * GOLDEN + self.seed * 2**0.5) % 1
        cut = corrupt_cut(len(prompt), len(text), self.corruption, rate, rng)
        pad = (0, self.length - len(text))
        return {
            "tokens": tokens,
            "length": cut.length,
            "masked": np.pad(cut.masked, pad),
            "weight": np.pad(cut.weight, pad),
            "total": cut.total,
        }


def example_batches(
    records: AnswerFiles,
    corruption: Corruption,
    *,
    bidirectional: bool,
    length: int,
    batch: int,
    seed: int,
    first: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of corrupted examples.

    Args:
      length: T, tokens per text; longer ones are cut, and those whose prompt alone fills it are an error.
      batch: examples per batch.
      first: the number of the batch to begin with; a resumed run names the one that it had not read yet.
      rows: of every batch only these, in this order; None is all of them.
    """
    if len(records) < batch:
        raise InputError(f"{records}: {len(records)} records are fewer than a batch of {batch}; lower batch")
    data = grain.MapDataset.source(records).seed(seed).shuffle().repeat()
    data = data.map_with_index(lambda number, record: (number, record))
    return batches(data.random_map(_Prepare(corruption, bidirectional, length, seed)), batch, first, rows)
