"""Rows of a JSON file from elsewhere, read within bounds: JSON lines or one array, compressed or not."""

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deer_jax.errors import InputError, one_line
from deer_jax.formats import open_file, parse_json, unreadable

# Of what is read, after decompression.
MOST_OF_LINE = 2**26
MOST_OF_ARRAY = 2**28
MOST_BYTES = 2**32
MOST_LINES = 10_000_000


def read_rows(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Where each row stands, its number from 1, and the row.

    a.jsonl   lines, the blank ones counted and left out        -> ("a.jsonl:2", 2, {...})
    a.json    one array; its [ is the first character           -> ("a.json: entry 2", 2, {...})

    A pipe is read as well as a file. InputError with the row's place for what is no object or exceeds the bounds.
    """
    with os.fdopen(open_file(path, regular=False), "rb") as raw:
        compressed = path.suffix == ".gz" or _read(raw.peek, 2, path)[:2] == b"\x1f\x8b"
        stream = gzip.GzipFile(fileobj=raw) if compressed else raw
        total = number = 0
        opened = False  # a line that is not blank was seen
        while line := _read(stream.readline, MOST_OF_LINE + 1, path):
            number += 1
            total += len(line)
            where = f"{path}:{number}"
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
            if text.startswith(b"[") and not opened:
                yield from _entries(path, text + b"\n" + _read(stream.read, MOST_OF_ARRAY, path))
                return
            if len(line) > MOST_OF_LINE:
                raise InputError(f"{where}: the line has more than {MOST_OF_LINE:,} bytes, too many for a row")
            if total > MOST_BYTES or number > MOST_LINES:
                raise InputError(f"{path}: has more than {MOST_BYTES:,} bytes or {MOST_LINES:,} lines; split it")
            if text:
                opened = True
                yield where, number, _row(parse_json(text, where), where)


def _entries(path: Path, content: bytes) -> Iterator[tuple[str, int, dict[str, Any]]]:
    if len(content) > MOST_OF_ARRAY:
        raise InputError(
            f"{path}: an array of more than {MOST_OF_ARRAY:,} bytes, which is read as a whole; write JSON lines "
            "instead, jq -c '.[]' does"
        )
    for number, entry in enumerate(parse_json(content, str(path)), 1):
        where = f"{path}: entry {number}"
        yield where, number, _row(entry, where)


def _row(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _read(read: Callable[[int], bytes], most: int, path: Path) -> bytes:
    try:
        return read(most)
    except OSError as error:
        raise unreadable(path, error) from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from None
