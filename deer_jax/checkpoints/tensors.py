"""The tensors of a model, in safetensors files or one GGUF file: which there are, unread, and whether they fit."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from safetensors import SafetensorError, safe_open

from deer_jax.checkpoints.gguf import is_gguf, read_gguf
from deer_jax.checkpoints.gguf_models import name_in_file, opened_tensors, shapes
from deer_jax.digests import hub_blob
from deer_jax.errors import InputError, named, one_line, shown
from deer_jax.formats import open_file, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_INDEX_BYTES = 2**25  # a hundred thousand tensors have a fifth of it
FLOATS = ("F32", "F16", "BF16")
BUFFERS = re.compile(r".*\brotary_emb\.\w+")  # constants that old versions saved with the weights
NAMED = 4  # a report of wrong tensors names this many of each kind


class Shaped(Protocol):
    """What says the shape of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Header(NamedTuple):
    """What a file says about one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, ...; of a GGUF file what its values become


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, as its own reader gives it, or a GGUF file, whose tensors are asked for alike."""
    if is_gguf(file):
        with opened_tensors(read_gguf(file)) as tensors:
            yield tensors
        return
    os.close(open_file(file))  # a pipe would be waited for
    try:
        tensors = safe_open(file, framework="numpy")  # checks that the header covers the whole file
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: damaged or truncated safetensors file ({one_line(error)}); download it again"
        ) from None
    with tensors:
        yield tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or those that its index names."""
    if os.path.lexists(folder / SINGLE):
        return [folder / SINGLE]
    index = folder / INDEX
    if not os.path.lexists(index):
        if any(folder.glob("*.bin")):
            raise InputError(
                f"{folder}: holds only PyTorch .bin weights; convert them with save_pretrained to safetensors"
            )
        raise InputError(f"{folder}: no {SINGLE} and no {INDEX}")
    where = read_json(index, most=MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise InputError(f"{index}: no weight_map from keys to files")
    return [_inside(folder, name) for name in sorted(set(where.values()))]


def _inside(folder: Path, name: str) -> Path:
    """The file of this name in the folder itself, or in the hub's cache that the folder is part of."""
    file = folder / name if name.isprintable() else folder
    if file.name != name or name == ".." or len(name) > 255:
        raise InputError(f"{folder / INDEX}: {shown(name)} is no name of a file in this folder")
    if not os.path.lexists(file):
        raise InputError(f"{file}: no such file, though the index names it; download it again")
    inside = Path(os.path.realpath(file)).parent == Path(os.path.realpath(folder))
    if not inside and hub_blob(file) is None:
        raise InputError(f"{file}: is a link out of its folder; put the file itself there")
    return file


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor of a folder or a GGUF file, by key; nothing but the files' headers is read."""
    if is_gguf(folder):
        return {key: Header(folder, shape, "BF16") for key, shape in shapes(read_gguf(folder)).items()}
    headers: dict[str, Header] = {}
    for file in weight_files(Path(folder)):
        with opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                if key in headers:
                    raise InputError(f"{file}: {named(key)} stands in {headers[key].file.name} too")
                piece = tensors.get_slice(key)
                headers[key] = Header(file, tuple(piece.get_shape()), str(piece.get_dtype()))
    return headers


def _config_of(where: str) -> str:
    return "its metadata" if is_gguf(where) else "config.json"


def check_count(headers: Mapping[str, Header], count: int, layers: int, experts: int, where: str) -> None:
    """InputError if far more tensors are expected than there are: a list of them would help nobody, or never end."""
    if count > 2 * len(headers):
        of = f" of {experts:,} experts" if experts else ""
        says = f"{_config_of(where)} says {layers:,} layers{of}, {count:,} tensors"
        raise InputError(f"{where}: {says}; the files hold {len(headers):,}")


def check_headers(
    headers: Mapping[str, Header], expected: Mapping[str, Shaped], where: str, ignored: Sequence[str] = ()
) -> None:
    """One InputError with all missing, unknown and wrong tensors; nothing if they are exactly those expected."""
    written = name_in_file if is_gguf(where) else str
    found = {key for key in headers if key not in ignored and not BUFFERS.fullmatch(key)}
    wrong = []
    for key in expected.keys() & found:
        header, shape = headers[key], tuple(expected[key].shape)
        if header.shape != shape:
            wrong.append(f"{written(key)} is {shown(list(header.shape), 40)}, expected {list(shape)}")
        elif header.dtype not in FLOATS:
            wrong.append(f"{key} is {header.dtype}, expected one of {', '.join(FLOATS)}")
    missing, unknown = ({written(key) for key in keys} for keys in (expected.keys() - found, found - expected.keys()))
    kinds = {"missing": missing, "unknown": unknown, "wrong": wrong}
    if not any(kinds.values()):
        return
    parts = []
    for kind, names in kinds.items():
        if names:
            more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
            parts.append(f"{kind}: {', '.join(named(name, 120) for name in sorted(names)[:NAMED])}{more}")
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items() if names)
    raise InputError(f"{where}: the tensors do not fit {_config_of(where)} ({counts}); {'; '.join(parts)}")
