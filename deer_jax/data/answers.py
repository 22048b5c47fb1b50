"""Files of answers: what a target said to prompts, one JSON object per line, as the `answers` verb writes them.

    {"prompt": [ids], "answer": [ids], "ended": true, "tokenizer": "3f2a9c1b07de", ...}

`ended`: the answer ends with a stop token; otherwise a length limit cut it. `tokenizer`: fingerprint of the vocabulary
that the ids belong to, see `Tokenizer.fingerprint`; files made elsewhere may lack it.
"""

import bisect
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deer_jax.digests import Stamp
from deer_jax.errors import InputError, RunError
from deer_jax.formats import open_file, parse_json, unreadable
from deer_jax.stores import local_file, names, place

MOST_LINE = 2**26  # bytes; an answer that fills a context of a million tokens has some eight million
# How a line of `answers` begins; no text in it can look like this, as its quotes would be escaped.
ITEM = re.compile(rb'^\{"id": "(?:[^"\\\n]|\\.)*+", "item": ([0-9]{1,12}),', re.MULTILINE)


def shard_path(output: Path, number: int) -> Path:
    """The file of process `number` of those that make an output; that of process 0 is the output itself.

    a/answers.jsonl, 2 -> a/answers.shard-2.jsonl
    """
    return output.with_name(f"{output.stem}.shard-{number}{output.suffix}") if number else output


def shard_numbers(output: Path, ending: str = "") -> list[int]:
    """The shards beside an output that are there, the output itself not among them; or what is kept of them in files
    whose names go on with `ending`."""
    name = re.compile(f"{re.escape(output.stem)}\\.shard-([1-9][0-9]{{0,5}}){re.escape(output.suffix + ending)}")
    try:
        found = [name.fullmatch(each) for each in names(output.absolute().parent)]
    except (OSError, ValueError):  # who reads or writes the output will say so
        return []
    return sorted(int(each[1]) for each in found if each)


class AnswerFiles:
    """Random access to the lines of one or several outputs of `answers`, by byte offsets found once.

    The rows of an output, its shards included, are in the order of their items, so however many processes made it, and
    in whatever order they were finished, they are the same. Where a line has no item, as in files made elsewhere, an
    output's rows are in the order of its lines.

    Attributes:
      vocab_size: of the target; all ids are below it.
      paths: of the files as they are named, an output's shards behind it.
      stamps: the files, or the copies here of those on a store, as they were when the offsets were found;
        a file that has changed since is a RunError.
    """

    def __init__(self, paths: Sequence[str | Path], *, vocab_size: int, tokenizer: str | None = None):
        """Args:
        paths: of the outputs; their shards are found beside them.
        vocab_size: of the target; ids beyond it are refused.
        tokenizer: fingerprint of the target's; records that carry another are refused.
        """
        outputs = [[path, *(shard_path(path, i) for i in shard_numbers(path))] for path in map(place, paths)]
        self.paths = [path for output in outputs for path in output]
        self._output = [number for number, output in enumerate(outputs) for _ in output]  # of each file
        self.vocab_size, self._tokenizer = vocab_size, tokenizer
        local = [Path(local_file(path)) for path in self.paths]
        _check_distinct(local)
        self.stamps = [Stamp.of(path) for path in local]
        self._lines, items = zip(*map(_scan, self.paths), strict=True) if self.paths else ((), ())
        self._first = np.cumsum([0, *(len(ends) for ends in self._lines)]).tolist()  # number of each file's first line
        self._kept = np.concatenate([np.zeros(0, int), *self._orders(items)])  # line, of all files, by number
        self._seen: list[dict[int, int]] = [{} for _ in outputs]  # line, of all files, of every item read so far
        for first, ends in zip(self._first, self._lines, strict=False):
            if len(ends):
                self._read(first)  # a wrong file is noticed before anything is compiled

    def _orders(self, items: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """The lines of each output, of all files, in order."""
        orders = []
        for number in dict.fromkeys(self._output):
            files = [i for i, output in enumerate(self._output) if output == number]
            lines = np.arange(self._first[files[0]], self._first[files[-1] + 1])
            if not len(lines):
                raise InputError(f"{self.paths[files[0]]}: is empty; let a target answer prompts first")
            known = [found for i in files if (found := items[i]) is not None]
            if len(known) == len(files):
                lines = lines[np.argsort(np.concatenate(known), kind="stable")]
            orders.append(lines)
        return orders

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
        """The record, and under "where" its file and line. InputError for one that is none, or whose item another line
        that was read has too."""
        return self._read(int(self._kept[index]))

    def _read(self, index: int) -> dict[str, Any]:
        """The record in a line, of all files."""
        file, line, where = self._place(index)
        path, ends = self.paths[file], self._lines[file]
        start = int(ends[line - 1]) if line else 0
        if ends[line] - start > MOST_LINE:
            raise InputError(f"{where}: a line of {ends[line] - start:,} bytes is no answer")
        try:
            with os.fdopen(open_file(self.stamps[file].path), "rb") as stream:
                if not self.stamps[file].is_of(stream.fileno()):
                    raise RunError(f"{path}: was changed while it was in use; start again")
                stream.seek(start)
                content = stream.read(int(ends[line]) - start)
        except OSError as error:
            raise unreadable(path, error) from None
        record = self._checked(content, where)
        item = record.get("item")
        if type(item) is int and (other := self._seen[self._output[file]].setdefault(item, index)) != index:
            (one, first, before), (two, _, behind) = (self._place(each) for each in sorted((other, index)))
            there = f"line {first + 1}" if one == two else before
            raise InputError(f"{behind}: item {item} stands in {there} already; remove one of the lines")
        return record

    def _place(self, index: int) -> tuple[int, int, str]:
        """File and line of a line, of all files, and how to name it."""
        file = bisect.bisect_right(self._first, index) - 1
        line = index - self._first[file]
        return file, line, f"{self.paths[file]}:{line + 1}"

    def _checked(self, line: bytes, where: str) -> dict[str, Any]:
        record = parse_json(line, where)
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object with 'prompt' and 'answer', found {type(record).__name__}")
        missing = [name for name in ("prompt", "answer") if name not in record]
        if missing:
            names = ascii(", ".join(record))[1:-1][:200] or "nothing"
            raise InputError(f"{where}: missing {', '.join(missing)}; found: {names}")
        for name in ("prompt", "answer"):
            ids = record[name]
            if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
                raise InputError(f"{where}: '{name}' must be a list of one or more token ids")
            if max(ids) >= self.vocab_size:
                raise InputError(
                    f"{where}: token id {max(ids)!s:.40} in '{name}' is outside the target's vocabulary of "
                    f"{self.vocab_size}; the answers are another model's"
                )
        theirs = record.get("tokenizer")
        if theirs and self._tokenizer and theirs != self._tokenizer:
            raise InputError(
                f"{where}: the answers were made with another tokenizer ({theirs!r:.40}) than the target's "
                f"({self._tokenizer}); let this target answer"
            )
        return record | {"where": where}


def _check_distinct(paths: Sequence[Path]) -> None:
    """InputError for a file that is named twice, whatever it is called: its rows would count twice."""
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            found = path.stat()
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        if (first := seen.setdefault((found.st_dev, found.st_ino), path)) is not path:
            raise InputError(f"{path}: is the same file as {first}; name it once")


def _scan(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Offset behind each line, a last one without newline included; and the item of each, None unless all have one."""
    found, items, size, rest = [], [np.zeros(0, int)], 0, b""
    whole = True
    try:
        with os.fdopen(open_file(path), "rb") as stream:
            while chunk := stream.read(2**24):
                found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + 1 + size)
                size += len(chunk)
                if whole:
                    lines, newline, rest = (rest + chunk).rpartition(b"\n")
                    items.append(np.array(ITEM.findall(lines + newline), int))
                    whole = len(rest) <= MOST_LINE and sum(map(len, items)) == sum(map(len, found))
    except OSError as error:
        raise unreadable(path, error) from None
    ends = np.concatenate([np.zeros(0, int), *found])
    ended = not size or (len(ends) and ends[-1] == size)
    return ends if ended else np.append(ends, size), np.concatenate(items) if whole and ended else None
