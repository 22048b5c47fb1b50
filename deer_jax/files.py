"""What this library writes: whole or not at all, by one process at a time, and never over what is not its own.

A file or folder is made beside its place under a name that nobody can guess, `.NAME.partial-1f2e3d4c`, and renamed
when it is on the disk. Its maker holds a lock on it, so what a process that was killed has left is known by its free
lock, and removed by the next one that writes NAME.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from deer_jax.errors import InputError, RunError

# The path is wrong, or not ours; anything else the system says is a failure of the run.
STORE = re.compile(r"[a-z][a-z0-9+.-]*:/")  # a URL; as a path, its second slash is gone
WRONG_PATH = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
     errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY, errno.EINVAL}
)  # fmt: skip
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL})
IN_PLACE = ("/dev/std", "/dev/fd/", "/proc/")  # the system's, links included: /dev/stdout, /dev/fd/63
NAME_LENGTH = 200  # bytes that a hidden name keeps of its output's, of the 255 that file systems allow


def disk_error(path: Path | str, error: OSError | ValueError, remedy: str = "") -> InputError | RunError:
    """One line for what the system says about writing a path: InputError for a wrong path, RunError otherwise."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = f"{path}: cannot be written: {reason}" + (f"; {remedy}" if remedy else "")
    wrong = not isinstance(error, OSError) or error.errno in WRONG_PATH
    return InputError(line) if wrong else RunError(line)


def write_file(path: Path, content: bytes) -> None:
    """Write a file: all of it, or nothing. Over a file only: a device or pipe is written to, a link refused."""
    with replacing(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content takes the place of the file when the block ends; nothing is left of it if it fails."""
    try:
        before = replaceable(path)
        if before == "special":
            with os.fdopen(_open_special(path), "wb") as stream:
                yield stream
            return
        sweep(path)
        partial, descriptor = _new_partial(path)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                if before == "file":
                    os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
                yield stream
                stream.flush()
                os.fsync(descriptor)
                partial.replace(path)  # while it is locked, so that nobody sweeps it before
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        if _is_about(path, error):
            raise disk_error(path, error) from None
        raise
    except ValueError as error:
        if "null byte" not in str(error) and "null character" not in str(error):
            raise
        raise disk_error(path, error) from None


def _is_about(path: Path, error: OSError) -> bool:
    """Whether writing `path` is what failed, and not reading something else meanwhile."""
    names = [Path(os.path.abspath(os.fsdecode(name))) for name in (error.filename, error.filename2) if name is not None]
    ours, beside = Path(os.path.abspath(path)), f".{_short(path.name)}."
    return not names or any(
        name in (ours, ours.parent) or (name.parent == ours.parent and name.name.startswith(beside)) for name in names
    )


def check_file(path: Path) -> None:
    """InputError or RunError, before any work, where `write_file` would fail; nothing is left of the trial."""
    try:
        before = replaceable(path)
        if before == "special":
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        if before == "file":  # one that is protected is not replaced, although its folder would allow it
            os.close(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
        partial, descriptor = _new_partial(path)
        partial.unlink()
        os.close(descriptor)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise disk_error(path, error) from None


def _open_special(path: Path) -> int:
    """A device or pipe, to be written to behind what is there. Our own standard streams are not opened once more: what
    is printed later would be written over it."""
    found = os.stat(path)
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(found, os.fstat(number)):
                return os.dup(number)
    return os.open(path, os.O_WRONLY | os.O_APPEND)


def _check_local(path: Path) -> None:
    """InputError for a place on an object store, in what is written to folders only."""
    if STORE.match(os.fspath(path)):
        raise InputError(f"{path}: this output is written to a folder only, not to an object store: name one here")


def replaceable(path: Path) -> str:
    """What stands where a file is to be written: "nothing", "file", or "special", which is written to in place.

    InputError for a folder and for a link, whose end may be anybody's.
    """
    _check_local(path)
    absolute = os.path.abspath(path)
    if absolute.startswith(IN_PLACE):
        return "special"
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return "nothing"
    if stat.S_ISLNK(found.st_mode):
        raise InputError(f"{path}: is a link to {os.readlink(path)}; name the file itself")
    if stat.S_ISDIR(found.st_mode) or stat.S_ISSOCK(found.st_mode) or stat.S_ISBLK(found.st_mode):
        raise InputError(f"{path}: is a {'folder' if stat.S_ISDIR(found.st_mode) else 'socket or disk'}; name a file")
    return "file" if stat.S_ISREG(found.st_mode) else "special"


def _new_partial(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, locked."""
    while True:
        partial = _hidden(path, f"partial-{secrets.token_hex(4)}")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        except FileExistsError:
            continue
        _flock(descriptor)
        if _is_at(partial, descriptor):  # and not swept before it was locked
            return partial, descriptor
        os.close(descriptor)


def _hidden(path: Path, suffix: str) -> Path:
    return path.absolute().with_name(f".{_short(path.name)}.{suffix}")


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:NAME_LENGTH])


def _flock(descriptor: int) -> bool | None:
    """Lock an open file; False if another holds it, None where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path, not followed, still is this open file."""
    try:
        found, ours = os.lstat(path), os.fstat(descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)


def sweep(path: Path) -> None:
    """Remove what processes that are gone have left of their writing `path`."""
    ours = re.compile(re.escape(f".{_short(path.name)}.partial-") + "[0-9a-f]{8}")
    try:
        found = [entry.path for entry in os.scandir(path.absolute().parent) if ours.fullmatch(entry.name)]
    except OSError:
        return  # writing will say what is wrong
    for name in found:
        with contextlib.suppress(OSError):
            mode = os.lstat(name).st_mode
            way = os.O_RDONLY if stat.S_ISDIR(mode) else os.O_RDWR  # NFS locks only what may be written
            descriptor = os.open(name, way | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _flock(descriptor) and _is_at(Path(name), descriptor):
                    remove(Path(name))
            finally:
                os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder of ours; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` when the block ends; nothing is left of it if the block fails.

    Raises InputError if `path` exists and is not an empty folder.
    """
    try:
        check_new_folder(path)
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        while True:
            partial = _hidden(path, f"partial-{secrets.token_hex(4)}")
            partial.mkdir()
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            _flock(descriptor)
            if _is_at(partial, descriptor):
                break
            os.close(descriptor)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise disk_error(path, error) from None
    try:
        yield partial
        sync_tree(partial)
        check_new_folder(path)
        partial.replace(path)
        sync_folder(path.absolute().parent)
    except OSError as error:
        if _is_about(path, error):
            raise disk_error(path, error) from None
        raise
    finally:
        if _is_at(partial, descriptor):
            shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


def check_new_folder(path: Path) -> None:
    """InputError if something stands where a folder is to be made; an empty folder may."""
    _check_local(path)
    try:
        if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
            return
    except (OSError, ValueError) as error:
        raise disk_error(path, error) from None
    raise InputError(f"{path}: exists and is not an empty folder; remove it or choose another")


def sync_folder(folder: Path) -> None:
    """What was renamed in a folder outlives a power cut from now on, where the file system can promise that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """The same for everything in a folder."""
    for where, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(where, name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(where))


class Lock:
    """The right to write an output, for the time of a `with` block; one process has it, on whatever host.

    The system gives it back when the process ends, however it ends, so a dead one's is simply taken over.
    """

    def __init__(self, output: Path, *, inside: bool = False):
        """inside: the output is a folder that exists, or is made now, and the lock lies in it, so that it goes with it;
        otherwise it lies beside the output."""
        _check_local(output)
        self.output = output
        self.path = output.absolute() / ".lock" if inside else _hidden(output, "lock")
        self._inside = inside
        self._descriptor: int | None = None

    def __enter__(self) -> "Lock":
        try:
            if self._inside:
                self.output.mkdir(parents=True, exist_ok=True)
            while self._descriptor is None:
                self._descriptor = self._try()
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise disk_error(self.output, error) from None
        return self

    def _try(self) -> int | None:
        """The locked file, or None if its holder has removed it just now."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(f"{self.path}: is no file; remove it")
            locked = _flock(descriptor)
            if locked is False:
                raise taken(self.output, os.pread(descriptor, 4096, 0))
            if locked is None:
                warnings.warn(
                    f"{self.output}: its file system has no locks; see to it that nobody else writes there",
                    stacklevel=4,
                )
            if not _is_at(self.path, descriptor):
                os.close(descriptor)
                return None
            who = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(who) + "\n").encode(), 0)
            return descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise

    def check(self) -> None:
        """RunError if the output was removed or replaced while it was being written."""
        if self._descriptor is None or not _is_at(self.path, self._descriptor):
            raise RunError(f"{self.output}: was removed or replaced while it was being written; what it held is gone")

    def __exit__(self, *error) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if _is_at(self.path, descriptor):
                    self.path.unlink()
            os.close(descriptor)


def taken(output: Path, holder: bytes) -> InputError:
    """The line for an output that another process writes; holder: what it has written into its lock."""
    try:
        who = json.loads(holder)
        name = f"process {who['process']} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError):
        name = "another process"
    return InputError(f"{output}: is being written by {name}; wait for it, or name another output")
