"""SHA-256 of files, each read once: what a run depends on is known by its content, in full."""

import hashlib
import os
import re
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from deer_jax.errors import InputError, RunError
from deer_jax.formats import unreadable

SHA256 = re.compile(r"[0-9a-f]{64}")  # the hub's cache names large files so


class Stamp(NamedTuple):
    """A file as it was at one moment."""

    path: Path  # absolute
    size: int
    changed: int  # ns; of its status (ctime), which nobody can set back, as one can the time of modification

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The file as it is now. InputError if there is none."""
        try:
            found = path.stat()
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        return cls(path.absolute(), found.st_size, found.st_ctime_ns)

    def is_of(self, descriptor: int) -> bool:
        """Whether an open file has this size and time of change."""
        found = os.fstat(descriptor)
        return (found.st_size, found.st_ctime_ns) == (self.size, self.changed)


def hub_blob(path: Path) -> Path | None:
    """The file of the hub's cache that a link in a snapshot of the same repository leads to; None for any other path.

    models--owner--name/snapshots/REVISION/model.safetensors -> models--owner--name/blobs/DIGEST
    """
    try:
        snapshot, real = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    except (OSError, ValueError):
        return None
    blobs = snapshot.parent.parent / "blobs"
    return real if snapshot.parent.name == "snapshots" and real.parent == blobs else None


class Digests:
    """Digests of files, known from an earlier time or computed now.

    A file whose size and time of change are those of its record is not read again; one in the hub's cache brings its
    digest along. What has to be read is read in a thread, so that it can begin while the file is loaded and the system
    reads it from the disk once.

    Attributes:
      read: bytes that were read so far.
    """

    def __init__(self, known: Any = None, *, verify: bool = False):
        """known: what `records` returned, as JSON brought it back; whatever it is. verify: read every file anyway."""
        self._verify = verify
        self._known = {path: tuple(record) for path, record in _usable(known).items()}
        self._found: dict[Stamp, Future[str]] = {}
        self._waiting: deque[Stamp] = deque()
        self._working = False
        self._guard = threading.Lock()
        self.read = 0

    def know(self, known: Any) -> None:
        """Add records of an earlier time, where there are none yet."""
        with self._guard:
            self._known = {path: tuple(record) for path, record in _usable(known).items()} | self._known

    def begin(self, stamp: Stamp) -> None:
        """See to it that the digest will be there."""
        with self._guard:
            if stamp in self._found:
                return
            self._found[stamp] = Future()
            known = None if self._verify else self._known_digest(stamp)
            if known is not None:
                self._found[stamp].set_result(known)
                return
            self._waiting.append(stamp)
            if not self._working:
                self._working = True
                # A daemon: a program that ends does not wait for digests that nobody asks for any more.
                threading.Thread(target=self._work, name="digests", daemon=True).start()

    def of(self, stamp: Stamp) -> str:
        """The digest, hexadecimal. RunError if the file is no longer what it was at the stamp's moment."""
        self.begin(stamp)
        return self._found[stamp].result()

    def records(self) -> dict[str, list[Any]]:
        """What to keep for the next time: path -> [size, time of change, digest]."""
        with self._guard:
            done = {stamp: future for stamp, future in self._found.items() if future.done() and not future.exception()}
        return {str(stamp.path): [stamp.size, stamp.changed, future.result()] for stamp, future in done.items()}

    def _known_digest(self, stamp: Stamp) -> str | None:
        size, changed, digest = self._known.get(str(stamp.path), (None, None, None))
        if (size, changed) == (stamp.size, stamp.changed):
            return digest
        blob = hub_blob(stamp.path)
        return blob.name if blob is not None and SHA256.fullmatch(blob.name) else None

    def _work(self) -> None:
        """Compute what waits, in turn."""
        while True:
            with self._guard:
                if not self._waiting:
                    self._working = False
                    return
                stamp = self._waiting.popleft()
                future = self._found[stamp]
            try:
                future.set_result(self._compute(stamp))
            except BaseException as error:  # whatever it is, it is for who asks, and who asks must not wait for ever
                future.set_exception(error)

    def _compute(self, stamp: Stamp) -> str:
        check_unchanged(stamp)
        try:
            found = sha256_of(stamp.path)
        except OSError as error:
            raise unreadable(stamp.path, error) from None
        self.read += stamp.size
        check_unchanged(stamp)
        return found


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file's content, hexadecimal; OSError where it cannot be read to its end."""
    # A pipe has no end to wait for: opened like this it is empty.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_unchanged(stamp: Stamp) -> None:
    """RunError if a file is no longer what it was, or is gone."""
    try:
        same = Stamp.of(stamp.path) == stamp
    except InputError:
        same = False
    if not same:
        raise RunError(f"{stamp.path}: was changed or removed while it was in use; start again")


def _usable(known: Any) -> dict[str, Any]:
    """The records of a file that anybody may have edited."""
    if not isinstance(known, Mapping):
        return {}
    return {
        path: record
        for path, record in known.items()
        if isinstance(record, list | tuple)
        and len(record) == 3
        and all(type(number) is int for number in record[:2])
        and isinstance(record[2], str)
        and SHA256.fullmatch(record[2])
    }


def combined(parts: Mapping[str, Any]) -> str:
    """One digest of several named values, hexadecimal: of their names and what they print as."""
    found = hashlib.sha256()
    for name, value in sorted(parts.items()):
        found.update(f"{name}\0{value}\0".encode(errors="surrogatepass"))
    return found.hexdigest()
