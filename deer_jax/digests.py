"""SHA-256 of files, each read once: what a run depends on is known by its content, in full."""

import hashlib
import os
import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from deer_jax.errors import RunError
from deer_jax.formats import open_file, unreadable

CHUNK = 2**24
HUB_BLOB = re.compile(r"[0-9a-f]{64}")  # the hub's cache names large files by their SHA-256


class Stamp(NamedTuple):
    """A file as it was at one moment."""

    path: Path  # absolute
    size: int
    changed: int  # ns

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The file as it is now. InputError if there is none."""
        try:
            found = path.stat()
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        return cls(path.absolute(), found.st_size, found.st_mtime_ns)


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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="digests")
        self._guard = threading.Lock()
        self.read = 0

    def know(self, known: Any) -> None:
        """Add records of an earlier time, where there are none yet."""
        with self._guard:
            self._known = {path: tuple(record) for path, record in _usable(known).items()} | self._known

    def begin(self, stamp: Stamp) -> None:
        """See to it that the digest will be there."""
        with self._guard:
            if stamp not in self._found:
                known = None if self._verify else self._known_digest(stamp)
                if known is None:
                    self._found[stamp] = self._pool.submit(self._compute, stamp)
                else:
                    self._found[stamp] = Future()
                    self._found[stamp].set_result(known)

    def of(self, stamp: Stamp) -> str:
        """The digest, hexadecimal. RunError if the file is no longer what it was at the stamp's moment."""
        self.begin(stamp)
        return self._found[stamp].result()

    def records(self) -> dict[str, list[Any]]:
        """What to keep for the next time: path -> [size, time of change, digest]."""
        with self._guard:
            done = {stamp: future.result() for stamp, future in self._found.items() if future.done()}
        return {str(stamp.path): [stamp.size, stamp.changed, digest] for stamp, digest in done.items()}

    def _known_digest(self, stamp: Stamp) -> str | None:
        size, changed, digest = self._known.get(str(stamp.path), (None, None, None))
        if (size, changed) == (stamp.size, stamp.changed):
            return digest
        real = Path(os.path.realpath(stamp.path))
        return real.name if real.parent.name == "blobs" and HUB_BLOB.fullmatch(real.name) else None

    def _compute(self, stamp: Stamp) -> str:
        found = hashlib.sha256()
        with os.fdopen(open_file(stamp.path), "rb", buffering=0) as stream:
            while True:
                try:
                    chunk = stream.read(CHUNK)
                except OSError as error:
                    raise unreadable(stamp.path, error) from None
                if not chunk:
                    break
                found.update(chunk)
                self.read += len(chunk)
        if Stamp.of(stamp.path) != stamp:
            raise RunError(f"{stamp.path}: was changed while it was in use; start again")
        return found.hexdigest()


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
    }


def combined(parts: Mapping[str, Any]) -> str:
    """One digest of several named values, hexadecimal: of their names and what they print as."""
    found = hashlib.sha256()
    for name, value in sorted(parts.items()):
        found.update(f"{name}\0{value}\0".encode(errors="surrogatepass"))
    return found.hexdigest()
