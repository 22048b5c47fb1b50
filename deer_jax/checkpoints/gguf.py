"""GGUF files: what their metadata says, read within bounds, and their tensors, dequantised a piece at a time.

The package `gguf` knows the kinds of quantisation. Its own reader is not used: it believes every count in a file, so a
damaged one can make it read for ever.
"""

import contextlib
import functools
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from deer_jax.digests import Stamp
from deer_jax.errors import InputError, RunError, named
from deer_jax.formats import open_file, unreadable

SUFFIX, MAGIC = ".gguf", b"GGUF"
VERSIONS = (2, 3)  # the first had counts of another width, and no published file of a supported family has it
ALIGNMENT, DEFAULT_ALIGNMENT = "general.alignment", 32
# Bounds that a vocabulary of a million entries is far from; beyond them a file is damaged.
MOST_ENTRIES = 2**22  # of all lists together
MOST_BYTES = 2**27  # of all metadata
MOST_TEXT = 2**22
MOST_NAMES = 2**16  # of keys, and of tensors
MOST_DIMENSIONS = 4
PIECE = 2**22  # values that are dequantised at a time

# The kinds of values by their number: text and list are no fixed width.
TEXT, LIST = 8, 9
FLAG, SINGLE_FLOAT = 7, 6
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


class Info(NamedTuple):
    """Where a tensor is and how it is written; shape: as numpy has it, so rows are the last but one."""

    kind: int
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    row_bytes: int


class GgufFile(NamedTuple):
    """A GGUF file without its tensors' values; metadata: numbers, flags, texts and lists of them by key."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Info]


def is_gguf(path: Path | str) -> bool:
    """Whether a model's place names a GGUF file rather than a folder."""
    return Path(path).suffix.lower() == SUFFIX and not os.path.isdir(path)


def read_gguf(path: Path) -> GgufFile:
    """What stands before the tensors' values. InputError, one line, for a file that is damaged or of another kind."""
    return _read(Stamp.of(path))


@functools.lru_cache(maxsize=1)  # loading asks for the configuration, the tokenizer and the tensors, one by one
def _read(stamp: Stamp) -> GgufFile:
    with os.fdopen(open_file(stamp.path), "rb") as stream:
        try:
            return _Reader(stamp.path, stream).file()
        except OSError as error:
            raise unreadable(stamp.path, error) from None


class _Reader:
    """Reads a file from its start; every count is checked against what is left of the file before it is believed."""

    def __init__(self, path: Path, stream: BinaryIO):
        self._path, self._stream = path, stream
        self._size = os.fstat(stream.fileno()).st_size
        self._at, self._entries = 0, 0

    def damaged(self, what: str) -> InputError:
        return InputError(f"{self._path}: damaged or truncated GGUF file ({what}); download it again")

    def file(self) -> GgufFile:
        if self._size < len(MAGIC) or self.take(len(MAGIC)) != MAGIC:
            raise InputError(f"{self._path}: is no GGUF file: it does not begin with GGUF; check the path")
        version = self.number("I")
        if not version & 0xFFFF:
            raise InputError(f"{self._path}: is a GGUF file for big-endian machines; use the little-endian one")
        if version not in VERSIONS:
            raise InputError(f"{self._path}: is of GGUF version {version}; supported: 2 and 3; convert it anew")
        tensors, keys = self.number("Q"), self.number("Q")
        if max(tensors, keys) > MOST_NAMES:
            raise self.damaged(f"{tensors:,} tensors and {keys:,} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text()
            if key in metadata:
                raise self.damaged(f"the key {named(key)} stands twice")
            metadata[key] = self.value(self.number("I"), key)
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self.text()
            if name in found:
                raise self.damaged(f"the tensor {named(name)} stands twice")
            dimensions = self.number("I")
            if not 0 < dimensions <= MOST_DIMENSIONS:
                raise self.damaged(f"{named(name)} has {dimensions:,} dimensions")
            shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
            found[name] = (shape, self.number("I"), self.number("Q"))
        alignment = metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"{ALIGNMENT} is no power of two")
        start = -(-self._at // alignment) * alignment
        return GgufFile(
            self._path, metadata, {name: self.placed(name, *each, start, alignment) for name, each in found.items()}
        )

    def placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, alignment: int) -> Info:
        """The tensor's place, checked against the file's size."""
        block, width = _kind(kind, self._path, name)
        if 0 in shape or shape[-1] % block:
            raise self.damaged(f"{named(name)} is {list(shape)} in blocks of {block}")
        info = Info(kind, shape, start + offset, shape[-1] // block * width)
        if offset % alignment or info.start + math.prod(shape[:-1]) * info.row_bytes > self._size:
            raise self.damaged(f"{named(name)} is not where it should be among {self._size:,} bytes")
        return info

    def take(self, count: int) -> bytes:
        if self._at + count > min(self._size, MOST_BYTES):
            raise self.damaged(f"its metadata goes on behind byte {min(self._size, MOST_BYTES):,}")
        self._at += count
        content = self._stream.read(count)
        if len(content) < count:
            raise self.damaged("it became shorter while it was read")
        return content

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > MOST_TEXT:
            raise self.damaged(f"a text of {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.damaged("a text that is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            inner, count = self.number("I"), self.number("Q")
            self._entries += count
            if self._entries > MOST_ENTRIES:
                raise self.damaged(f"{named(key)} has {count:,} entries")
            if inner == TEXT:
                return [self.text() for _ in range(count)]
            return self.scalars(inner, count, key)
        return self.scalars(kind, 1, key)[0]

    def scalars(self, kind: int, count: int, key: str) -> list[Any]:
        if kind not in SCALARS:
            raise self.damaged(f"{named(key)} has values of kind {kind}")
        form = SCALARS[kind]
        found = struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(form)))
        if kind == FLAG:
            return [bool(value) for value in found]
        if kind == SINGLE_FLOAT:  # 1e-05 and not 9.99999974e-06: the number that was rounded to these 32 bits
            return [float(str(np.float32(value))) for value in found]
        return list(found)


def _kind(kind: int, path: Path, name: str) -> tuple[int, int]:
    """Values and bytes of a block of this kind of quantisation; InputError if `gguf` cannot read it."""
    try:
        return _block(kind)
    except (ValueError, NotImplementedError) as error:
        what = kind if isinstance(error, ValueError) else error
        raise InputError(
            f"{path}: {named(name)} has the quantisation type {what}, which the package gguf does not read; use a file "
            "of another type, such as Q8_0, Q4_K_M or BF16"
        ) from None


@functools.cache
def _block(kind: int) -> tuple[int, int]:
    """ValueError if `gguf` does not know the number, NotImplementedError with its name if it cannot dequantise it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize  # slow to import

    known = GGMLQuantizationType(kind)
    block, width = GGML_QUANT_SIZES[known]
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, width), np.uint8), known)
    except NotImplementedError:
        raise NotImplementedError(known.name) from None
    return block, width


def values_of(file: GgufFile, stream: BinaryIO, name: str, part: int | None = None, *, dtype=ml_dtypes.bfloat16):
    """A tensor's values, dequantised and rounded; part: one entry along the first axis. Host memory holds it once.

    RunError if the file has become shorter.
    """
    from gguf import GGMLQuantizationType, dequantize

    info = file.tensors[name]
    shape, start = info.shape, info.start
    if part is not None:
        shape = shape[1:]
        start += part * math.prod(shape[:-1]) * info.row_bytes
    rows, width = math.prod(shape[:-1]), shape[-1]
    found, step = np.empty((rows, width), dtype), max(PIECE // width, 1)
    stream.seek(start)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        content = np.frombuffer(stream.read(count * info.row_bytes), np.uint8)
        if content.size != count * info.row_bytes:
            raise RunError(f"{file.path}: was changed or removed while it was in use; start again")
        with np.errstate(all="ignore"):  # values that are not finite are found where they do harm
            piece = dequantize(content.reshape(count, info.row_bytes), GGMLQuantizationType(info.kind))
            found[first : first + count] = piece.astype(np.float32).astype(dtype)
    return found.reshape(shape)


@contextlib.contextmanager
def opened_values(file: GgufFile) -> Iterator[BinaryIO]:
    """The open file, for `values_of`."""
    with os.fdopen(open_file(file.path), "rb") as stream:
        try:
            yield stream
        except OSError as error:
            raise unreadable(file.path, error) from None
