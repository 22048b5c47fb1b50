"""The record of a checkpoint, checkpoint.json: by it damage to the files of a checkpoint is noticed.

It has the checkpoint's step and score, the size and digest of every file of it and of the description of the model
beside it, and the SHA-256 of all this. Digests are SHA-256; on an object store `md5:...`, which it knows of what it
holds, so that nothing is read back. A run that was copied from one to the other keeps those that it was written with.
"""

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deer_jax.digests import sha256_of
from deer_jax.errors import InputError, RunError
from deer_jax.formats import json_bytes, parse_json
from deer_jax.stores import Entry, MissingError, is_store, listing, local_file, md5_of, read, write

RECORD = "checkpoint.json"
DRAFTER, TARGET = "drafter", "target"  # what a run trains, and the folder that describes it
FORMAT = 1  # of checkpoint.json; its own digest is made in the same way in every format
MD5 = "md5:"
THREADS = 4  # that read files for their digests


class DamagedError(RunError):
    """The files of a checkpoint are not those that were written. One line that names the first of them."""


def _describe(folder: Path) -> dict[str, list[Any]]:
    """Size and digest of every file but the record, by its path in the folder."""
    if is_store(folder):
        entries = listing(folder).items()
        return {name: [each.size, _digest(folder / name, MD5, each)] for name, each in entries if name != RECORD}
    names = _names(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: sha256_of(folder / name), names)
        return {name: [(folder / name).stat().st_size, digest] for name, digest in zip(names, digests, strict=True)}


def _description(run: Path) -> dict[str, list[Any]]:
    """Size and digest of the files that describe what a run trains, by their path in its folder."""
    return {f"{kind}/{name}": found for kind in (DRAFTER, TARGET) for name, found in _describe(run / kind).items()}


def verify_description(run: Path, record: Mapping[str, Any]) -> None:
    """RunError if the configuration or tokenizer is not the one that its checkpoint was written with."""
    before = record["description"]
    there = {f"{kind}/{name}" for kind in (DRAFTER, TARGET) for name in _names(run / kind)}
    for name in (*before, *sorted(there - before.keys())):
        size, digest = before.get(name, (None, ""))
        if name not in there or (run / name).stat().st_size != size or _digest(run / name, digest) != digest:
            raise RunError(
                f"{run / name}: is not what the run wrote; bring it back, or change what an export makes instead"
            )


def _names(folder: Path) -> list[str]:
    """Every file but the record, and whatever else is no folder."""
    found = []
    for where, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        found += [os.path.relpath(os.path.join(where, name), folder) for name in (*names, *links)]
    return sorted(name for name in found if name != RECORD)


def write_record(folder: Path, run: Path, *, step: int, score: float | None) -> None:
    """Write the record of a checkpoint in this folder, of a run, when everything else is in it."""
    record = {
        "format": FORMAT, "step": step, "score": score, "files": _describe(folder), "description": _description(run),
    }  # fmt: skip
    write(folder / RECORD, _record_bytes(record))


def _record_bytes(record: Mapping[str, Any]) -> bytes:
    """The content of checkpoint.json, whose last entry is the digest of the others."""
    digest = hashlib.sha256(json_bytes(record, indent=1)).hexdigest()
    return json_bytes({**record, "sha256": digest}, indent=1)


def read_record(folder: Path) -> dict[str, Any]:
    """The checkpoint.json of a checkpoint, `sha256` included.

    Raises DamagedError if it is not as it was written, and RunError if another version of this library wrote it.
    """
    path = folder / RECORD
    try:
        if not is_store(path) and not path.is_file():
            raise MissingError(path)
        content = read(path) if is_store(path) else path.read_bytes()
    except MissingError:
        raise DamagedError(f"{folder}: damaged: has no {RECORD}") from None
    except OSError as error:
        raise _not_now(path, error) from None
    try:
        record: Any = parse_json(content, str(path))
        sound = content == _record_bytes({name: value for name, value in record.items() if name != "sha256"})
    except (ValueError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise DamagedError(f"{path}: damaged: is not as it was written")
    if record.get("format") != FORMAT:
        raise RunError(f"{path}: has format {record.get('format')!r:.20}, this version reads {FORMAT}; update deer_jax")
    if str(record["step"]) != folder.name:
        raise DamagedError(f"{folder}: damaged: is the checkpoint of step {record['step']}")
    return record


def verify(folder: Path, record: Mapping[str, Any], *, only: str | None = None) -> None:
    """DamagedError if a file is not the one that was written; InputError if there is one that was not.

    only: of the parts, look at this one; the files that lie beside the parts always count.
    """
    expected: Mapping[str, Sequence[Any]] = record["files"]
    entries = listing(folder) if is_store(folder) else None
    there = set(_names(folder)) if entries is None else entries.keys() - {RECORD}
    if foreign := sorted(there - expected.keys()):
        raise InputError(f"{folder / foreign[0]}: was not written by the run; move it out of the checkpoint")
    names = [name for name in expected if only is None or "/" not in name or name.startswith(f"{only}/")]
    for name in names:
        regular, size = _size(folder / name) if entries is None else (True, _there(folder / name, entries, name).size)
        if not regular or size != expected[name][0]:
            raise DamagedError(f"{folder / name}: damaged: has {size:,} bytes, not {expected[name][0]:,}")

    def digest(name: str) -> str:
        return _digest(folder / name, expected[name][1], None if entries is None else entries[name])

    with ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(names, pool.map(digest, names), strict=True):
            if found != expected[name][1]:
                raise DamagedError(f"{folder / name}: damaged: its content is not what was written")


def damage(folder: Path) -> str:
    """What `verify` says is damaged in a checkpoint; empty if it is whole."""
    try:
        verify(folder, read_record(folder))
    except DamagedError as error:
        return str(error)
    return ""


def _size(path: Path) -> tuple[bool, int]:
    """Whether a file is a regular one, and its size."""
    try:
        found = path.stat()
    except OSError as error:
        raise _not_now(path, error) from None
    return stat.S_ISREG(found.st_mode), found.st_size


def _there(path: Path, entries: Mapping[str, Entry], name: str) -> Entry:
    if name not in entries:
        raise DamagedError(f"{path}: damaged: is missing")
    return entries[name]


def _digest(path: Path, like: str, entry: Entry | None = None) -> str:
    """The digest of a file, of the kind of another; entry: what a store says of it, if it is on one."""
    if like.startswith(MD5) and entry is not None and entry.md5:
        return MD5 + entry.md5
    try:
        local = Path(local_file(path))
        if not like.startswith(MD5):
            return sha256_of(local)
        return MD5 + md5_of(local)
    except OSError as error:
        raise _not_now(path, error) from None


def _not_now(path: Path, error: OSError) -> RunError:
    """What a checkpoint's file that cannot be read means: damage if it is not there, else perhaps a passing failure."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return DamagedError(f"{path}: damaged: is missing")
    return RunError(
        f"{path}: cannot be read: {error.strerror}; the same command goes on when it can, or, if the file is lost, "
        "when its checkpoint has been moved away"
    )
