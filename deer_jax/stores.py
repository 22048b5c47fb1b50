"""Object stores: gs://BUCKET/PATH wherever a folder or a file is named. The only module that knows of them.

An object is there whole or not at all, and nothing is appended to it or renamed; a folder is no more than what names of
objects begin with. So what is read is copied here once, and everything else works on the copy (`local_file`,
`local_folder`); what is written is made here and put up (`Spool`). Local paths pass through.
"""

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath
from typing import Any, NamedTuple

from deer_jax import files
from deer_jax.errors import InputError, RunError, one_line
from deer_jax.files import STORE, Lock, new_folder

GS = re.compile(r"gs:/{1,2}([a-z0-9][a-z0-9._-]+)((?:/[^/\x00-\x1f]+)*)/?")
SIGN = 10.0  # seconds between two signs of life of who holds a lease
DEAD = 40.0  # without one, after which it is taken over
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
    _bucket_and_name(path)
    return StorePath(path)


def _bucket_and_name(path: str | os.PathLike[str]) -> tuple[str, str]:
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
    return GCSFileSystem(use_listings_cache=False, skip_instance_cache=True)


def _ask(path: Path, method: str, *arguments: Any, **options: Any) -> Any:
    """What a method of gcsfs returns; FileExistsError where what is there is not what `options` say."""
    try:
        return getattr(_system(), method)(*arguments, **options)
    except (FileExistsError, InputError):
        raise
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file or folder, or no such bucket") from None
    except Exception as error:  # of any kind: gcsfs, aiohttp and google.auth have no common one
        text = one_line(error)
        if "Forbidden" in text or getattr(error, "code", None) in (401, 403) or "google.auth" in type(error).__module__:
            raise InputError(f"{path}: permission denied ({text}); {NO_RIGHT}") from None
        raise RunError(f"{path}: the store cannot be used: {text}; the same command goes on when it can") from None


def _entry(values: Mapping[str, Any]) -> Entry:
    return Entry(int(values["size"]), base64.b64decode(values.get("md5Hash", "")).hex(), values["generation"])


def _about(path: Path) -> dict[str, Any]:
    """What the store says of an object."""
    bucket, name = _bucket_and_name(path)
    return _ask(path, "call", "GET", "b/{}/o/{}", bucket, name, json_out=True)


def _list(folder: Path, **options: str) -> list[dict[str, Any]]:
    """The pages of a listing."""
    bucket, name = _bucket_and_name(folder)
    options |= {"prefix": f"{name}/"} if name else {}
    pages = [_ask(folder, "call", "GET", "b/{}/o", bucket, json_out=True, **options)]
    while token := pages[-1].get("nextPageToken"):
        pages.append(_ask(folder, "call", "GET", "b/{}/o", bucket, json_out=True, pageToken=token, **options))
    return pages


def listing(folder: Path) -> dict[str, Entry]:
    """All objects in a folder on a store and the folders in it, by their path there."""
    start = len(_bucket_and_name(folder)[1])
    found = {}
    for page in _list(folder):
        for values in page.get("items", ()):
            name = values["name"][start:].removeprefix("/")
            if not name.endswith("/"):  # a mark that makes an empty folder
                found[name] = _entry(values)
    return found


def names(folder: Path) -> list[str]:
    """What is in a folder, local or on a store, sorted; OSError where a local one cannot be read."""
    if not is_store(folder):
        return sorted(os.listdir(folder))
    pages = _list(folder, delimiter="/")
    found = [values["name"] for page in pages for values in page.get("items", ())]
    found += [prefix.rstrip("/") for page in pages for prefix in page.get("prefixes", ())]
    return sorted({name.rpartition("/")[2] for name in found} - {""})


def read(path: Path) -> bytes:
    """The content of an object."""
    return _ask(path, "cat_file", "/".join(_bucket_and_name(path)))


def remove_tree(folder: Path, *, first: str = "") -> None:
    """Remove all of a folder on a store, this file before the others."""
    for name in sorted(listing(folder), key=lambda name: name != first):
        _delete(folder / name)


def _delete(path: Path, **options: str) -> None:
    bucket, name = _bucket_and_name(path)
    with contextlib.suppress(MissingError, FileExistsError):  # another was quicker
        _ask(path, "call", "DELETE", "b/{}/o/{}", bucket, name, **options)


def copy(folder: Path, other: Path) -> None:
    """Copy all of a folder on a store to another name there."""
    for name in listing(folder):
        source, goal = ("/".join(_bucket_and_name(each / name)) for each in (folder, other))
        _ask(other, "cp_file", source, goal)


# ------------------------------------------------------------------------------------------------------------- inputs


def local_file(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The file itself, or a copy here of one on a store; MissingError where there is none on it."""
    if not is_store(path):
        return path
    found = place(path)
    entry = _entry(_about(found))
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
                _fetch(folder, entries, partial)
        except InputError:
            if not copy.is_dir():  # otherwise another process has made it meanwhile
                raise
    return copy


def _fetch(folder: Path, entries: Mapping[str, Entry], here: Path) -> None:
    """Copy objects of a folder on a store into one here. RunError where one is no longer what was listed."""
    for name in entries:
        place(folder / name)  # no `..` leads out of it
        (here / name).parent.mkdir(parents=True, exist_ok=True)
    sources = ["/".join(_bucket_and_name(folder / name)) for name in entries]
    try:
        _ask(folder, "get", sources, [str(here / name) for name in entries])
    except MissingError:
        raise RunError(f"{folder}: was changed while it was read; start again") from None
    for name, entry in entries.items():
        with open(here / name, "rb") as stream:
            if entry.md5 and hashlib.file_digest(stream, "md5").hexdigest() != entry.md5:
                raise RunError(f"{folder / name}: was changed while it was read; start again")


# ------------------------------------------------------------------------------------------------------------ outputs


def write(path: Path, content: bytes) -> None:
    """Write a file, local or on a store: all of it, or nothing."""
    if is_store(path):
        _ask(path, "pipe_file", "/".join(_bucket_and_name(path)), content, consistency="md5")
    else:
        files.write_file(path, content)


def check_file(path: Path) -> None:
    """InputError or RunError, before any work, where `write` would fail; nothing is left of the trial."""
    if not is_store(path):
        return files.check_file(path)
    trial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    write(trial, b"")
    _delete(trial)


class Spool:
    """Where the files of an output folder are written: in it, or, of one on a store, in a folder here from where they
    are put up.

    Attributes:
      folder: as it is named. path: where to write.
    """

    def __init__(self, folder: Path, wanted: Wanted):
        """wanted: which files of a folder on a store are to be here from the beginning."""
        self.folder, self.path, self._wanted = folder, folder, wanted
        self._put: dict[Path, tuple[int, int, int]] = {}
        self._last = time.monotonic()
        if is_store(folder):
            self.path = Path(tempfile.mkdtemp(prefix="deer_jax-"))
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
            self.pull()

    def pull(self) -> None:
        """Bring here what is on the store."""
        if is_store(self.folder):
            entries = self._wanted(listing(self.folder))
            _fetch(self.folder, entries, self.path)
            self._put |= {self.path / name: _state(self.path / name) for name in entries}

    def put(self, *names: str, every: float = 0.0) -> None:
        """Put up what has changed of these files, and of all in these folders, in this order.

        every: do nothing within so many seconds of the last time; an object takes about one change a second.
        """
        if not is_store(self.folder) or time.monotonic() - self._last < every:
            return
        for name in names:
            found = self.path / name
            for file in sorted(each for each in found.rglob("*") if each.is_file()) if found.is_dir() else [found]:
                if file.exists() and self._put.get(file) != (now := _state(file)):
                    goal = self.folder / file.relative_to(self.path)
                    options = {"consistency": "md5", "content_type": "application/octet-stream"}
                    _ask(goal, "put_file", str(file), "/".join(_bucket_and_name(goal)), **options)
                    self._put[file] = now
        self._last = time.monotonic()


def _state(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def lock(output: Path, *, inside: bool = False) -> "Guard":
    """The right to write an output, for the time of a `with` block; inside: see `Lock`."""
    return Lease(output, inside=inside) if is_store(output) else Lock(output, inside=inside)


class Lease:
    """A `Lock` on a store: an object that its holder has made, which nobody else can, and gives a sign of life every
    SIGN seconds. One that has given none for DEAD seconds, by the clock of who waits, is taken over."""

    def __init__(self, output: Path, *, inside: bool = False):
        self.output = output
        self.path = output / ".lock" if inside else output.with_name(f".{output.name}.lock")
        self._bucket, self._name = _bucket_and_name(self.path)
        self._generation, self._lost, self._alive = "", False, 0.0
        self._over = threading.Event()

    def __enter__(self) -> "Lease":
        who = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        content = json.dumps(who | {"token": secrets.token_hex(8)}).encode()
        while not self._generation:
            try:
                _ask(self.path, "pipe_file", f"{self._bucket}/{self._name}", content, mode="create")
            except FileExistsError:
                if read(self.path) != content:  # otherwise gcsfs has asked twice
                    self._wait()
                    continue
            self._generation = _about(self.path)["generation"]
        self._alive = time.monotonic()
        threading.Thread(target=self._work, name="lease", daemon=True).start()
        return self

    def _wait(self) -> None:
        """Until the lease of another is gone. InputError if it gives a sign of life."""
        try:
            first, holder = _about(self.path), read(self.path)
            end = time.monotonic() + DEAD
            while time.monotonic() < end:
                time.sleep(SIGN / 10)
                if _about(self.path)["etag"] != first["etag"]:
                    raise files.taken(self.output, holder)
        except MissingError:
            return
        _delete(self.path, ifGenerationMatch=first["generation"])

    def _work(self) -> None:
        while not self._over.wait(SIGN):
            try:
                self._sign()
            except (InputError, RunError):
                continue  # `check` says so, if it lasts

    def _sign(self) -> None:
        try:
            _ask(
                self.path, "call", "PATCH", "b/{}/o/{}", self._bucket, self._name, ifGenerationMatch=self._generation,
                json={"metadata": {"sign": secrets.token_hex(4)}},
            )  # fmt: skip
            self._alive = time.monotonic()
        except (FileExistsError, MissingError):
            self._lost = True

    def check(self) -> None:
        """RunError if the output was removed, or taken over by another, while it was being written."""
        if not self._lost and time.monotonic() - self._alive > 2 * SIGN:
            self._sign()
        if self._lost:
            raise RunError(f"{self.output}: was removed, or taken over by another process, while it was being written")

    def __exit__(self, *error: object) -> None:
        self._over.set()
        with contextlib.suppress(InputError, RunError):  # otherwise it will be taken for dead
            _delete(self.path, ifGenerationMatch=self._generation)


Guard = Lock | Lease
