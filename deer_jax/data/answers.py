"""Files of answers: what a target said to prompts, one JSON object per line, as the `answers` verb writes them.

    {"prompt": [ids], "answer": [ids], "ended": true, "tokenizer": "3f2a9c1b07de", ...}

`ended`: the answer ends with a stop token; otherwise a length limit cut it. `tokenizer`: fingerprint of the vocabulary
that the ids belong to, see `Tokenizer.fingerprint`; files made elsewhere may lack it.
"""

import bisect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deer_jax.errors import InputError


class AnswerFiles:
    """Random access to the lines of one or several answer files, by byte offsets found once."""

    def __init__(self, paths: Sequence[str | Path], *, vocab_size: int, tokenizer: str | None = None):
        """Args:
        vocab_size: of the target; ids beyond it are refused.
        tokenizer: fingerprint of the target's; records that carry another are refused.
        """
        self.paths = [Path(path) for path in paths]
        self._vocab_size, self._tokenizer = vocab_size, tokenizer
        self._lines = [_line_ends(path) for path in self.paths]
        self._first = np.cumsum([0, *(len(ends) for ends in self._lines)]).tolist()  # number of each file's first line
        self._kept = np.arange(self._first[-1])  # line, of all files, by number
        for first in self._first[:-1]:
            self[first]  # a wrong file is noticed before anything is compiled

    def leave_out(self, numbers: Sequence[int]) -> None:
        """Drop these rows; the ones behind them move up."""
        self._kept = np.delete(self._kept, numbers)

    def __len__(self) -> int:
        return len(self._kept)

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    def __repr__(self) -> str:  # part of what grain checks when it resumes
        return f"AnswerFiles({', '.join(path.name for path in self.paths)}, {len(self)})"

    def __getitem__(self, index) -> dict[str, Any]:
        """The record, and under "where" its file and line."""
        index = int(self._kept[index])
        file = bisect.bisect_right(self._first, index) - 1
        line = index - self._first[file]
        path, ends = self.paths[file], self._lines[file]
        start = int(ends[line - 1]) if line else 0
        with path.open("rb") as stream:
            stream.seek(start)
            content = stream.read(int(ends[line]) - start)
        return self._checked(content, f"{path}:{line + 1}")

    def _checked(self, line: bytes, where: str) -> dict[str, Any]:
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
            if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
                raise InputError(f"{where}: '{name}' must be a list of one or more token ids")
            if max(ids) >= self._vocab_size:
                raise InputError(
                    f"{where}: token id {max(ids)} in '{name}' is outside the target's vocabulary of "
                    f"{self._vocab_size}; the answers are another model's"
                )
        theirs = record.get("tokenizer")
        if theirs and self._tokenizer and theirs != self._tokenizer:
            raise InputError(
                f"{where}: the answers were made with another tokenizer ({theirs}) than the target's "
                f"({self._tokenizer}); let this target answer"
            )
        return record | {"where": where}


def _line_ends(path: Path) -> np.ndarray:
    """Offset behind each line, a last one without newline included."""
    found, size = [], 0
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(2**24):
                found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + 1 + size)
                size += len(chunk)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not size:
        raise InputError(f"{path}: is empty; let a target answer prompts first")
    ends = np.concatenate(found)
    return ends if len(ends) and ends[-1] == size else np.append(ends, size)


class AnswerWriter:
    """An answer file that grows, so that the run that makes it can be stopped at any moment and go on.

    What is finished is appended. What runs is kept in a second file beside it, FILE.state.json, with the settings of
    the run; a run with other settings is refused, and so is a file that has no such companion. A line that was being
    written when the run was stopped is dropped.

    Attributes:
      items: numbers of the items that the file answers.
      running: tokens so far of the others that were begun, by item.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        """settings: what the answers depend on, as JSON values."""
        self.path = Path(path)
        self.state = self.path.with_name(f"{self.path.name}.state.json")
        self._settings = json.loads(json.dumps(settings))  # as they are read back
        self.items: set[int] = set()
        self.running: dict[int, list[int]] = {}
        with _disk(self.state):
            begun = self.state.exists()
        if begun:
            self._resume()
        elif self.path.exists():
            raise InputError(
                f"{self.path}: exists without {self.state.name}, so it is no run that can go on; write to another "
                "output, or remove it"
            )
        self.save([], {})
        with _disk(self.path):
            self.path.open("ab").close()  # after its state, without which it would be refused

    def save(self, records: Sequence[Mapping[str, Any]], running: Mapping[int, list[int]]) -> None:
        """Append finished records, each with its "item", and replace what is known of those that run.

        Both are on the disk when this returns. An error of the disk leaves what was saved before.
        """
        finished = {record["item"] for record in records}
        self.items |= finished
        self.running = {item: tokens for item, tokens in {**self.running, **running}.items() if item not in finished}
        if records:
            with _disk(self.path), self.path.open("ab") as stream:
                stream.write("".join(json.dumps(record) + "\n" for record in records).encode())
                stream.flush()
                os.fsync(stream.fileno())
        partial = self.state.with_name(f"{self.state.name}.partial")
        with _disk(self.state):
            with partial.open("w", encoding="ascii") as stream:
                stream.write(json.dumps({"settings": self._settings, "running": self.running}))
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(self.state)

    def _resume(self) -> None:
        remedy = f"write to another output, or remove {self.path} and {self.state.name}"
        try:
            state = json.loads(self.state.read_bytes())
            theirs, running = state["settings"], {int(item): list(tokens) for item, tokens in state["running"].items()}
        except OSError as error:
            raise InputError(f"{self.state}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{self.state}: is not the state of a run; {remedy}") from None
        names = [name for name in {**theirs, **self._settings} if theirs.get(name) != self._settings.get(name)]
        if names:
            differ = ", ".join(f"{name} {theirs.get(name)} (now {self._settings.get(name)})" for name in names)
            raise InputError(f"{self.path}: was begun with other settings: {differ}; {remedy}")
        if self.path.exists():
            with _disk(self.path), self.path.open("r+b") as stream:
                self._read(stream, remedy)
        self.running = {item: tokens for item, tokens in running.items() if item not in self.items}

    def _read(self, stream, remedy: str) -> None:
        """Collect the items of whole lines and cut what follows the last of them."""
        whole = 0
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self.items.add(int(json.loads(line)["item"]))
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.path}:{number}: is no answer of this run; {remedy}") from None
            whole += len(line)
        stream.truncate(whole)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror}; what was written before is kept, and the same run goes on "
            "from there"
        ) from None
