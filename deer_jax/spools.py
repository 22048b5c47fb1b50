"""Outputs in a folder or on an object store: whose they are, and how what is made here gets there. See `stores`."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from deer_jax import files
from deer_jax.errors import InputError, RunError
from deer_jax.files import Lock
from deer_jax.stores import (
    Entry,
    MissingError,
    about,
    ask,
    bucket_and_name,
    delete,
    entry_of,
    fetch,
    is_store,
    listing,
    names,
    read,
    remove_tree,
    write,
)

UNFINISHED = ".unfinished"  # in a folder that is being put up
SIGN = 10.0  # seconds between two signs of life of who holds a lease
SHARE = 20  # as many times as long as putting up has taken passes until the next time
DEAD = 40.0  # without one, after which it is taken over


class Spool:
    """Where the files of an output folder are written: in it, or, of one on a store, in a folder here from where they
    are put up, for as long as `lock` is ours.

    Attributes:
      folder: as it is named. path: where to write.
    """

    def __init__(self, folder: Path, lock: "Guard"):
        self.folder, self.path, self._lock = folder, folder, lock
        self._put: dict[Path, tuple[int, int, int]] = {}
        self._last, self._took = time.monotonic(), 0.0
        if is_store(folder):
            self.path = Path(tempfile.mkdtemp(prefix="deer_jax-"))
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def pull(self, *names: str) -> None:
        """Bring these files here, and all in these folders, as far as they are there."""
        if not is_store(self.folder):
            return
        entries: dict[str, Entry] = {}
        for name in names:
            entries |= {f"{name}/{inner}": entry for inner, entry in listing(self.folder / name).items()}
            with contextlib.suppress(MissingError):
                entries[name] = entry_of(about(self.folder / name))
        fetch(self.folder, entries, self.path)
        self._put |= {self.path / name: _state(self.path / name) for name in entries}

    def put(self, *names: str, every: float = 0.0) -> None:
        """Put up what has changed of these files, and of all in these folders, in this order.

        every: do nothing within so many seconds of the last time, of a large file within longer: it is to take a small
        part of the time only.
        """
        begin = time.monotonic()
        if not is_store(self.folder) or (every and begin - self._last < max(every, SHARE * self._took)):
            return
        self._lock.check()
        for name in names:
            found = self.path / name
            for file in sorted(each for each in found.rglob("*") if each.is_file()) if found.is_dir() else [found]:
                if file.exists() and self._put.get(file) != (now := _state(file)):
                    goal = self.folder / file.relative_to(self.path)
                    ask(goal, "put_file", str(file), "/".join(bucket_and_name(goal)), consistency="md5")
                    self._put[file] = now
        self._last, self._took = time.monotonic(), time.monotonic() - begin


@contextlib.contextmanager
def new_tree(folder: Path, lock: "Guard", *, last: str) -> Iterator[Path]:
    """A name here for a folder that the block is to make. One on a store is then put up, its file `last` behind the
    others: without it, it is not whole, and whoever makes it again begins anew.

    Raises InputError if `folder` on a store holds anything else.
    """
    if not is_store(folder):
        yield folder
        return
    if (found := names(folder)) and UNFINISHED not in found:
        raise InputError(f"{folder}: exists and is not an empty folder; remove it or choose another")
    spool = Spool(folder, lock)
    try:
        made = spool.path / "made"
        yield made
        remove_tree(folder)
        write(folder / UNFINISHED, b"")
        for path in made.iterdir():
            path.rename(spool.path / path.name)
        made.rmdir()
        spool.put(*(name for name in names(spool.path) if name != last), last)
        delete(folder / UNFINISHED)
    finally:
        shutil.rmtree(spool.path, ignore_errors=True)


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
        self._bucket, self._name = bucket_and_name(self.path)
        self._generation, self._lost, self._alive = "", False, 0.0
        self._over = threading.Event()

    def __enter__(self) -> "Lease":
        who = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        content = json.dumps(who | {"token": secrets.token_hex(8)}).encode()
        while not self._generation:
            with contextlib.suppress(FileExistsError):
                ask(self.path, "pipe_file", f"{self._bucket}/{self._name}", content, mode="create")
            self._generation = self._ours(content)
        self._alive = time.monotonic()
        threading.Thread(target=self._work, name="lease", daemon=True).start()
        return self

    def _ours(self, content: bytes) -> str:
        """The generation of the object if it is ours; empty if it was another's, and is gone. InputError if that one
        gives a sign of life."""
        try:
            first, holder = about(self.path), read(self.path)
            if holder == content:
                return first["generation"]
            end = time.monotonic() + DEAD
            while time.monotonic() < end:
                time.sleep(SIGN / 10)
                if about(self.path)["etag"] != first["etag"]:
                    raise files.taken(self.output, holder)
        except MissingError:
            return ""
        delete(self.path, ifGenerationMatch=first["generation"])
        return ""

    def _work(self) -> None:
        while not self._over.wait(SIGN):
            try:
                self._sign()
            except (InputError, RunError):
                continue  # `check` says so, if it lasts

    def _sign(self) -> None:
        try:
            ask(
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
            delete(self.path, ifGenerationMatch=self._generation)


Guard = Lock | Lease
