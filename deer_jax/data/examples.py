"""Training examples from a file of answers: read by offset, corrupted, batched, resumable. Never imports jax.

A line of the file is one answer: {"prompt": [ids], "answer": [ids], ...}, as the `answers` verb writes them. The
randomness of an example is a function of (seed, epoch, record), so a resumed run sees what an uninterrupted one would.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from deer_jax.config import InputError
from deer_jax.diffusion.corruption import Corruption, corrupt_blocks, corrupt_cut

GOLDEN = 0.6180339887498949  # multiples of it modulo 1 fill the unit interval evenly


class AnswerFile:
    """Random access to the lines of an answers file, by byte offsets found once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
        if len(data) and (not len(ends) or ends[-1] != len(data)):
            ends = np.append(ends, len(data))
        self._starts, self._ends = np.concatenate([[0], ends[:-1]]).astype(np.int64), ends.astype(np.int64)
        if not len(ends):
            raise InputError(f"{path}: is empty; let a target answer prompts first")
        self[0]  # a wrong file is noticed before anything is compiled

    def __len__(self) -> int:
        return len(self._ends)

    def __repr__(self) -> str:  # part of what grain checks when it resumes
        return f"AnswerFile({self.path.name}, {len(self)})"

    def __getitem__(self, index) -> dict[str, Any]:
        """The record, and under "where" its file and line."""
        index, where = int(index), f"{self.path}:{int(index) + 1}"
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.read(self._ends[index] - self._starts[index])
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object with 'prompt' and 'answer', found {type(record).__name__}")
        missing = [name for name in ("prompt", "answer") if name not in record]
        if missing:
            raise InputError(f"{where}: missing {', '.join(missing)}; found: {', '.join(record) or 'nothing'}")
        for name in ("prompt", "answer"):
            ids = record[name]
            if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
                raise InputError(f"{where}: '{name}' must be a list of one or more token ids")
        return record | {"where": where}


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
            return {"tokens": tokens} | corrupt_blocks(len(prompt), len(text), self.corruption, rng)._asdict()
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
    records: AnswerFile, corruption: Corruption, *, bidirectional: bool, length: int, batch: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of corrupted examples; a grain iterator, so its position can be saved and restored.

    Args:
      length: T, tokens per text; longer ones are cut, and those whose prompt alone fills it are an error.
      batch: examples per batch.
    """
    if len(records) < batch:
        raise InputError(f"{records.path}: {len(records)} records are fewer than a batch of {batch}")
    data = grain.MapDataset.source(records).seed(seed).shuffle().repeat()
    data = data.map_with_index(lambda number, record: (number, record))
    data = data.random_map(_Prepare(corruption, bidirectional, length, seed)).batch(batch)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
