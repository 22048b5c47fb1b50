"""Folders of text: what a small target is trained on, and the part of it that is kept apart.

folder/a.py  folder/b.py  folder/old/b.py (a copy)      -> documents a.py, b.py; one duplicate left out
held_out: ["b.py"]                                      -> trained on: a.py; kept apart: b.py
"""

import dataclasses
import fnmatch
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from deer_jax.data.batches import batches
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.errors import InputError
from deer_jax.files import write_file
from deer_jax.formats import json_bytes
from deer_jax.stores import local_folder

STDLIB = "stdlib"
REPEATED = 0.5  # a document of which more lines than this share stand in earlier ones is a duplicate
SHORT_LINE = 16  # characters; shorter lines (`else:`, `return x`) recur by chance and do not count


@dataclasses.dataclass(frozen=True)
class Document:
    """One file: its path below the source it was found in, and its text."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents kept apart.

    Attributes:
      duplicates: names of those left out because others hold them already.
    """

    training: list[Document]
    held_out: list[Document]
    duplicates: list[str]


def read_corpus(
    sources: Sequence[str], *, files: Sequence[str] = ("*",), exclude: Sequence[str] = (), held_out: Sequence[str] = ()
) -> Corpus:
    """Every text file of some folders, in the order of their names, without duplicates.

    Patterns are those of a shell, over paths below the source; * also matches slashes.

    Args:
      sources: folders, files, or `stdlib`: the standard library of the Python that runs this.
      files: patterns of the file names to read; exclude: of the paths to leave out; held_out: of those to keep apart.

    Raises InputError for a source that is not there, is no UTF-8, or holds nothing; for a held-out pattern that
    matches nothing.
    """
    kept_apart, rest = [], []
    unmatched = set(held_out)
    for source in sources:
        for name, path in _files(source):
            if not _matches(Path(name).name, files) or _matches(name, exclude):
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{path}: not UTF-8; name it in exclude, or what is to be read in files") from None
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from None
            if not text.strip():
                continue
            patterns = [pattern for pattern in held_out if _matches(name, [pattern])]
            unmatched -= set(patterns)
            (kept_apart if patterns else rest).append(Document(name, text))
    if unmatched:
        raise InputError(f"held_out: {', '.join(sorted(unmatched))} matches no text of {', '.join(sources)}")
    if not rest:
        raise InputError(f"{', '.join(sources)}: no text to train on; check files, exclude and held_out")
    # What is kept apart comes first, so that a training text that repeats it is the one that goes.
    kept_apart, first = _without_duplicates(kept_apart, set())
    training, more = _without_duplicates(rest, {line for each in kept_apart for line in _lines(each)})
    if not training:
        raise InputError(f"{', '.join(sources)}: every text to train on repeats one of held_out; keep fewer apart")
    return Corpus(training, kept_apart, first + more)


def _files(source: str) -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib")) if source == STDLIB else local_folder(source).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise InputError(f"{source}: no such folder or file, and not '{STDLIB}'")
    found = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*") if path.is_file()]
    if source == STDLIB:  # installed packages may lie inside
        found = [entry for entry in found if "site-packages/" not in entry[0]]
    return sorted(found)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _lines(document: Document) -> list[str]:
    return [line for raw in document.text.splitlines() if len(line := raw.strip()) >= SHORT_LINE]


def _without_duplicates(documents: Sequence[Document], seen: set[str]) -> tuple[list[Document], list[str]]:
    """The documents whose lines are mostly new; `seen` grows by theirs."""
    kept, left_out = [], []
    for document in documents:
        lines = _lines(document)
        if lines and sum(line in seen for line in lines) > REPEATED * len(lines):
            left_out.append(document.name)
            continue
        seen.update(lines)
        kept.append(document)
    return kept, left_out


def tokens_of(documents: Sequence[Document], tokenizer: Tokenizer, end: int) -> np.ndarray:
    """int32 [N]: the documents one after the other, each followed by the id `end`."""
    return np.concatenate([np.asarray([*tokenizer.plain(each.text), end], np.int32) for each in documents])


class Windows:
    """Stretches of a long text as training examples: BOS, then `length` - 1 tokens of it, without overlap.

    The last one may be shorter than its array. A record is {"tokens": int32 [T], "length": how many
    are real, "total": how many of them are predicted}.
    """

    def __init__(self, tokens: np.ndarray, length: int, bos: int):
        self._tokens, self._step, self._bos = tokens, length - 1, bos

    def __len__(self) -> int:
        return -(-len(self._tokens) // self._step)

    def __getitem__(self, index) -> dict[str, Any]:
        piece = self._tokens[int(index) * self._step : (int(index) + 1) * self._step]
        row = np.full(self._step + 1, self._bos, np.int32)
        row[1 : 1 + len(piece)] = piece
        return {"tokens": row, "length": np.int32(1 + len(piece)), "total": np.float32(len(piece))}


def window_batches(
    windows: Windows, *, batch: int, seed: int, first: int = 0, rows: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Endless shuffled batches of windows; first, rows: see `example_batches`."""
    if len(windows) < batch:
        raise InputError(f"the text fills {len(windows)} windows, fewer than a batch of {batch}; lower batch or length")
    return batches(grain.MapDataset.source(windows).seed(seed).shuffle().repeat(), batch, first, rows)


def passages(
    documents: Sequence[Document], *, count: int, most: int, seed: int, fits: Callable[[str], bool] = lambda _: True
) -> list[str]:
    """`count` beginnings of paragraphs, for prompts: one to `most` lines each; those that do not fit are left out.

    A paragraph follows an empty line. A passage ends without a newline: a tokenizer joins it with the indentation that
    follows, so alone it would read as something else. Documents have a share of the passages in proportion to their
    paragraphs; fewer than `count` come back if there are no more.
    """
    starts = []
    for document in documents:
        lines = document.text.splitlines(keepends=True)
        for i, line in enumerate(lines):
            if line.strip() and (i == 0 or not lines[i - 1].strip()):
                starts.append((lines, i))
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    for at in rng.permutation(len(starts)):
        lines, first = starts[at]
        piece = "".join(lines[first : first + int(rng.integers(1, most + 1))]).rstrip()
        if len(piece) >= SHORT_LINE and fits(piece):
            found[piece] = None
        if len(found) == count:
            break
    return list(found)


def write_prompts(path: Path, texts: Sequence[str]) -> None:
    """A prompt file that every verb reads: all of it, or nothing."""
    write_file(path, b"".join(json_bytes({"id": i, "prompt": text}) for i, text in enumerate(texts)))
