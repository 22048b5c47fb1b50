"""Object stores: gs://BUCKET/PATH wherever a folder or a file is named. The only module that knows of them.

An object is there whole or not at all, and nothing is appended to it or renamed; a folder is no more than what names of
objects begin with. So what is read is copied here once, and everything else works on the copy (`local_file`,
`local_folder`); what is written is made here and put up (`Spool`). Local paths pass through.
"""

import base64
import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath
from typing import Any, NamedTuple

from deer_jax import files
from deer_jax.errors import InputError, RunError, one_line
from deer_jax.files import STORE, new_folder

GS = re.compile(r"gs:/{1,2}([a-z0-9][a-z0-9._-]+)((?:/[^/\x00-\x1f]+)*)/?")
INSTALL = "pip install 'deer_jax[gcs]'"
NO_RIGHT = "log in (gcloud auth application-default login) as who is Storage Object Admin of the bucket"


class MissingError(InputError):
    """There is no such object, or no such bucket."""


class StorePath(PosixPath):
    """A path on a store: it keeps its second slash, and is absolute. What asks the local disk finds nothing there."""

    def __str__(self) -> str:
        return "gs://" + "/".join(self.parts[1:])

    __fspath__ = __str__

    def absolute(self) -> "StorePath":
        return self

    def resolve(self, strict: bool = False) -> "StorePath":
        return self


class Entry(NamedTuple):
    """An object as it is listed; md5: hexadecimal, empty where the store knows none."""

    size: int
    md5: str
    generation: str


Wanted = Callable[[Mapping[str, Entry]], Mapping[str, Entry]]  # some of the objects in a folder, by their path there


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, of whatever store."""
    return STORE.match(os.fspath(path)) is not None


def place(path: str | os.PathLike[str]) -> Path:
    """The path, local or on a store. InputError for a store that is not known, and for what cannot be a name there."""
    if not is_store(path):
        return Path(path)
    bucket_and_name(path)
    return StorePath(path)


def bucket_and_name(path: str | os.PathLike[str]) -> tuple[str, str]:
    found = GS.fullmatch(os.fspath(path))
    if found is None or {".", ".."} & set(found[2].split("/")):
        raise InputError(f"{path}: cannot be a place on an object store; the one that is known is gs://BUCKET/PATH")
    return found[1], found[2].removeprefix("/")


# ------------------------------------------------------------------------------------------------------------- asking


@functools.cache
def _system() -> Any:
    try:
        from gcsfs.core import GCSFileSystem
    except ImportError:
        raise InputError(f"gs:// needs gcsfs: {INSTALL}") from None
    for name in ("gcsfs", "google.auth"):  # they log what they raise, with tracebacks; what they raise is enough
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return GCSFileSystem(use_listings_cache=False, skip_instance_cache=True)


def look_anew(path: Path) -> None:
    """To be called before Orbax uses a path: on a store the gcsfs that it has keeps what it once has seen there."""
    if is_store(path):
        import fsspec

        fsspec.filesystem("gcs", finalize_on_close=True).invalidate_cache()  # as etils asks for it: the same object


def ask(path: Path, method: str, *arguments: Any, **options: Any) -> Any:
    """What a method of gcsfs returns; FileExistsError where what is there is not what `options` say."""
    try:
        return getattr(_system(), method)(*arguments, **options)
    except (FileExistsError, InputError):
        raise
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file or folder, or no such bucket") from None
    except Exception as error:  # of any kind: gcsfs, aiohttp and google.auth have no common one
        text = one_line(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{path}: cannot be copied here: {error.strerror}; make room") from None
        if "Forbidden" in text or getattr(error, "code", None) in (401, 403) or "google.auth" in type(error).__module__:
            raise InputError(f"{path}: permission denied ({text}); {NO_RIGHT}") from None
        raise RunError(f"{path}: the store cannot be used: {text}; the same command goes on when it can") from None


def entry_of(values: Mapping[str, Any]) -> Entry:
    return Entry(int(values["size"]), base64.b64decode(values.get("md5Hash", "")).hex(), values["generation"])


def about(path: Path) -> dict[str, Any]:
    """What the store says of an object."""
    bucket, name = bucket_and_name(path)
    return ask(path, "call", "GET", "b/{}/o/{}", bucket, name, json_out=True)


def _list(folder: Path, **options: str) -> list[dict[str, Any]]:
    """The pages of a listing."""
    bucket, name = bucket_and_name(folder)
    options |= {"prefix": f"{name}/"} if name else {}
    pages = [ask(folder, "call", "GET", "b/{}/o", bucket, json_out=True, **options)]
    while token := pages[-1].get("nextPageToken"):
        pages.append(ask(folder, "call", "GET", "b/{}/o", bucket, json_out=True, pageToken=token, **options))
    return pages


def listing(folder: Path) -> dict[str, Entry]:
    """All objects in a folder on a store and the folders in it, by their path there."""
    start = len(bucket_and_name(folder)[1])
    found = {}
    for page in _list(folder):
        for values in page.get("items", ()):
            name = values["name"][start:].removeprefix("/")
            if name and not name.endswith("/"):  # a mark that makes an empty folder
                found[name] = entry_of(values)
    return found


def names(folder: Path) -> list[str]:
    """What is in a folder, local or on a store, sorted; OSError where a local one cannot be read."""
    if not is_store(folder):
        return sorted(os.listdir(folder))
    pages = _list(folder, delimiter="/")
    found = [values["name"] for page in pages for values in page.get("items", ())]
    found += [prefix.rstrip("/") for page in pages for prefix in page.get("prefixes", ())]
    return sorted({name.rpartition("/")[2] for name in found} - {""})


def exists(path: Path) -> bool:
    """Whether there is such a file or folder, local or on a store."""
    return path.name in names(path.parent) if is_store(path) else path.exists()


def folder_bytes(folder: Path) -> int:
    """How large the files of a folder, local or on a store, are together."""
    if is_store(folder):
        return sum(entry.size for entry in listing(folder).values())
    return sum(path.stat().st_size for path in folder.iterdir())


def read(path: Path) -> bytes:
    """The content of an object."""
    return ask(path, "cat_file", "/".join(bucket_and_name(path)))


def remove_tree(folder: Path, *, first: str = "") -> None:
    """Remove all of a folder on a store, this file before the others."""
    for name in sorted(listing(folder), key=lambda name: name != first):
        delete(folder / name)


def delete(path: Path, **options: str) -> None:
    bucket, name = bucket_and_name(path)
    with contextlib.suppress(MissingError, FileExistsError):  # another was quicker
        ask(path, "call", "DELETE", "b/{}/o/{}", bucket, name, **options)


def copy(folder: Path, other: Path) -> None:
    """Copy all of a folder on a store to another name there."""
    for name in listing(folder):
        source, goal = ("/".join(bucket_and_name(each / name)) for each in (folder, other))
        ask(other, "cp_file", source, goal)


# ------------------------------------------------------------------------------------------------------------- inputs


def local_file(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The file itself, or a copy here of one on a store; MissingError where there is none on it."""
    if not is_store(path):
        return path
    found = place(path)
    entry = entry_of(about(found))
    return _copied(found.parent, {found.name: entry}) / found.name


def local_folder(path: str | os.PathLike[str], wanted: Wanted = dict) -> Path:
    """The folder itself, or a copy here of what is `wanted` of one on a store; MissingError where it holds nothing.

    A copy is known by names, sizes and generations: what has changed there is copied again, and only that.
    """
    found = place(path)
    if not is_store(found):
        return found
    entries = listing(found)
    if not entries:
        raise MissingError(f"{found}: no such folder on the store, or it is empty")
    return _copied(found, wanted(entries))


def _copied(folder: Path, entries: Mapping[str, Entry]) -> Path:
    known = hashlib.sha256(repr((str(folder), sorted(entries.items()))).encode()).hexdigest()[:16]
    copy = Path.home() / ".cache" / "deer_jax" / "gs" / f"{folder.name}-{known}"
    if not copy.is_dir():
        try:
            with new_folder(copy) as partial:
                fetch(folder, entries, partial)
        except InputError:
            if not copy.is_dir():  # otherwise another process has made it meanwhile
                raise
    return copy


def fetch(folder: Path, entries: Mapping[str, Entry], here: Path) -> None:
    """Copy objects of a folder on a store into one here. RunError where one is no longer what was listed."""
    for name in entries:
        place(folder / name)  # no `..` leads out of it
        (here / name).parent.mkdir(parents=True, exist_ok=True)
    sources = ["/".join(bucket_and_name(folder / name)) for name in entries]
    try:
        ask(folder, "get", sources, [str(here / name) for name in entries])
    except MissingError:
        raise RunError(f"{folder}: was changed while it was read; start again") from None
    for name, entry in entries.items():
        if entry.md5 and md5_of(here / name) != entry.md5:
            raise RunError(f"{folder / name}: was changed while it was read; start again")


def md5_of(file: Path) -> str:
    """What stores know their objects by, hexadecimal; it shows damage, and is no proof against malice."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# ------------------------------------------------------------------------------------------------------------ outputs


def write(path: Path, content: bytes) -> None:
    """Write a file, local or on a store: all of it, or nothing."""
    if is_store(path):
        ask(path, "pipe_file", "/".join(bucket_and_name(path)), content, consistency="md5")
    else:
        files.write_file(path, content)


def check_file(path: Path) -> None:
    """InputError or RunError, before any work, where `write` would fail; nothing is left of the trial."""
    if not is_store(path):
        return files.check_file(path)
    trial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    write(trial, b"")
    delete(trial)
