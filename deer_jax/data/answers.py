"""Files of answers: what a target said to prompts, one JSON object per line, as the `answers` verb writes them.

    {"prompt": [ids], "answer": [ids], "ended": true, "tokenizer": "3f2a9c1b07de", ...}

`ended`: the answer ends with a stop token; otherwise a length limit cut it. `tokenizer`: fingerprint of the vocabulary
that the ids belong to, see `Tokenizer.fingerprint`; files made elsewhere may lack it.
"""

import bisect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deer_jax.config import InputError


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
        for first in self._first[:-1]:
            self[first]  # a wrong file is noticed before anything is compiled

    def __len__(self) -> int:
        return self._first[-1]

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    def __repr__(self) -> str:  # part of what grain checks when it resumes
        return f"AnswerFiles({', '.join(path.name for path in self.paths)}, {len(self)})"

    def __getitem__(self, index) -> dict[str, Any]:
        """The record, and under "where" its file and line."""
        index = int(index)
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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not data:
        raise InputError(f"{path}: is empty; let a target answer prompts first")
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    return ends if len(ends) and ends[-1] == len(data) else np.append(ends, len(data))
