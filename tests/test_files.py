"""Files and folders are written whole or not at all, by one process at a time, and never over what is not ours."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

import deer_jax
from deer_jax import files
from deer_jax.errors import InputError, RunError
from deer_jax.files import Lock, check_new_folder, disk_error, new_folder, replaceable, replacing, sweep, write_file

# A program that uses this module alone, and so starts at once.
PROGRAM = f"""
import signal, sys, time, types
package = types.ModuleType("deer_jax")
package.__path__ = [{str(Path(deer_jax.__file__).parent)!r}]
sys.modules["deer_jax"] = package
from pathlib import Path
from deer_jax.files import Lock, new_folder, replacing, write_file
"""


def start(program: str, *arguments: object) -> subprocess.Popen:
    """A program that runs beside the test, after it has said something."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def refused(words: str, kind: type[Exception] = InputError):
    return pytest.raises(kind, match=rf"\A(?=[^\n]{{1,999}}\Z)[^\n]*{words}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WAIT = "print('ready', flush=True)\ntime.sleep(60)\n"
BEGIN_FILE = "with replacing(Path(sys.argv[1])) as stream:\n    stream.write(b'half')\n    stream.flush()\n    " + (
    WAIT.replace("\n", "\n    ")
)
BEGIN_FOLDER = "with new_folder(Path(sys.argv[1])) as folder:\n    (folder / 'half').touch()\n    " + (
    WAIT.replace("\n", "\n    ")
)
HOLD = "with Lock(Path(sys.argv[1]), inside=sys.argv[2] == 'inside'):\n    " + WAIT.replace("\n", "\n    ")


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"first")
    os.chmod(path, 0o640)

    def fail():
        with replacing(path) as stream:
            stream.write(b"second")
            stream.flush()
            assert path.read_bytes() == b"first"
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"first"
    write_file(path, b"third")
    assert path.read_bytes() == b"third"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == ["file"]


def test_links_are_not_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("link", "dangling"):
        with refused(f"{name}: is a link to {tmp_path}"):
            write_file(tmp_path / name, b"new")
        with refused(f"{name}: exists and is not an empty folder"), new_folder(tmp_path / name):
            pass
    assert mine.read_bytes() == b"mine"
    assert names(tmp_path) == ["dangling", "link", "mine"]


def test_temporary_names_cannot_be_guessed(tmp_path, monkeypatch):
    """Whoever guesses one anyway, and puts a link there, is not followed."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    guesses = iter(["00000000", "11111111", "22222222", "33333333"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: next(guesses))
    (tmp_path / ".file.partial-00000000").symlink_to(victim)
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    (tmp_path / ".folder.partial-22222222").symlink_to(tmp_path)
    with pytest.raises(InputError), new_folder(tmp_path / "folder"):  # refused rather than followed
        pass
    assert victim.read_bytes() == b"precious"


def test_pipes_and_devices_are_written_in_place(tmp_path):
    # Asked first: a mistake would not cost this test alone, but the machine its device.
    for name in ("/dev/null", "/dev/full", "/dev/stdout", "/dev/stderr", "/dev/fd/1", "/proc/self/fd/1"):
        assert replaceable(Path(name)) == "special"
    write_file(Path("/dev/null"), b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    content = b"through" * 30_000  # more than a pipe holds
    write_file(pipe, content)
    reader.join()
    assert found == [content]
    assert names(tmp_path) == ["pipe"]
    with refused("/dev/full: cannot be written: No space left on device", RunError):
        write_file(Path("/dev/full"), b"x")


def test_standard_output_is_written_in_place(tmp_path):
    assert replaceable(Path("/dev/stdout")) == "special"
    program = PROGRAM + "write_file(Path('/dev/stdout'), b'one\\n')\nwrite_file(Path('/dev/stdout'), b'two\\n')\n"
    run = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    assert run.stdout == b"one\ntwo\n"
    with (tmp_path / "out").open("wb") as stream:
        subprocess.run([sys.executable, "-c", program], stdout=stream, check=True)
    assert (tmp_path / "out").read_bytes() == b"one\ntwo\n"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_files_in_shared_memory_are_files():
    folder = Path("/dev/shm") / f"deer-jax-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "link").symlink_to("/dev/null")
        with refused("is a link to"):
            write_file(folder / "link", b"x")
        for content in (b"one", b"two"):
            write_file(folder / "file", content)
            assert (folder / "file").read_bytes() == content
    finally:
        files.remove(folder)


def test_wrong_paths_and_full_disks(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (
        ("no/such/file", "no/such/file: cannot be written: No such file or directory"),
        ("file/below", "below: cannot be written: Not a directory"),
        (".", "is a folder; name a file"),
        ("loop/file", "cannot be written: Too many levels of symbolic links"),
        ("x" * 300, "cannot be written: File name too long"),
        ("a\0b", "cannot be written: .*null"),
    ):
        with refused(words):
            write_file(tmp_path / name, b"x")
    for name in ("file/below", "loop/folder", "x" * 300, "a\0b"):
        with refused("cannot be written"), new_folder(tmp_path / name):
            pass
    assert type(disk_error("x", OSError(28, "No space left on device"))) is RunError
    assert type(disk_error("x", OSError(5, "Input/output error"))) is RunError
    assert type(disk_error("x", OSError(13, "Permission denied"))) is InputError
    assert str(disk_error("x", OSError(28, "full"), "make room")) == "x: cannot be written: full; make room"


def test_what_fails_meanwhile_is_not_blamed_on_the_file(tmp_path):
    for writing in (replacing, new_folder):
        with pytest.raises(FileNotFoundError), writing(tmp_path / "out"):
            Path("/no/such/source").read_bytes()
        with refused("out: cannot be written: No space", RunError), writing(tmp_path / "out"):
            raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 230, "é" * 120, "𝄞" * 60])
def test_long_names(tmp_path, name):
    path = tmp_path / name
    write_file(path, b"x")
    with Lock(path):
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("begin", [BEGIN_FILE, BEGIN_FOLDER])
def test_what_the_dead_leave_is_swept_and_what_the_living_make_is_not(tmp_path, begin):
    path = tmp_path / "out"
    living, dead = start(begin, path), start(begin, path)
    try:
        assert len(names(tmp_path)) == 2
        kill(dead)
        assert len(names(tmp_path)) == 2
        for other in (".out.partial-mine", ".out.partial-123", "out.partial-0123abcd", ".other.partial-0123abcd"):
            (tmp_path / other).touch()
        sweep(path)
        assert len(names(tmp_path)) == 5
        write_file(path, b"x")
        assert len(names(tmp_path)) == 6
    finally:
        kill(living)
    sweep(path)
    assert names(tmp_path) == [".other.partial-0123abcd", ".out.partial-123", ".out.partial-mine", "out",
                               "out.partial-0123abcd"]  # fmt: skip


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "folder"
    with new_folder(path) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("x")
        assert not path.exists()
        assert partial.parent == path.parent
    assert (path / "inner" / "file").read_text() == "x"
    with pytest.raises(KeyError), new_folder(tmp_path / "failed"):
        raise KeyError("x")
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["folder"]


def test_a_folder_never_replaces_another(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").touch()
    for name in ("full", "file", "full/mine"):
        with refused("exists and is not an empty folder"), new_folder(tmp_path / name):
            raise AssertionError
    late = tmp_path / "late"
    with refused("late: exists and is not an empty folder"), new_folder(late) as partial:
        (partial / "file").touch()
        late.mkdir()
        (late / "other").touch()
    assert names(late) == ["other"]
    (tmp_path / "empty").mkdir()
    check_new_folder(tmp_path / "empty")
    with new_folder(tmp_path / "empty") as partial:
        (partial / "file").touch()
    assert names(tmp_path / "empty") == ["file"]
    assert names(tmp_path) == ["empty", "file", "full", "late"]


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_a_lock_has_one_holder(tmp_path, where):
    path, inside = tmp_path / "out", where == "inside"
    holder = start(HOLD, path, where)
    try:
        words = (
            f"out: is being written by process {holder.pid} on {socket.gethostname()} since 20..-.*; wait for it, or"
        )
        with refused(words), Lock(path, inside=inside):
            raise AssertionError
        with Lock(tmp_path / "another"):  # is nobody's
            pass
    finally:
        kill(holder)
    with Lock(path, inside=inside) as lock:  # a dead one's is taken over
        lock.check()
        with refused(f"by process {os.getpid()} on"), Lock(path, inside=inside):
            raise AssertionError
    assert names(tmp_path) == ["out"] * inside  # nothing is left


def test_a_lock_notices_that_its_folder_is_gone(tmp_path):
    path = tmp_path / "run"

    def hold(change) -> None:
        with Lock(path, inside=True) as lock:
            lock.check()
            change()
            with refused("run: was removed or replaced while it was being written", RunError):
                lock.check()

    hold(lambda: files.remove(path))
    assert not path.exists()
    hold(lambda: (path.rename(tmp_path / "moved"), path.mkdir()))
    assert path.exists()
    with Lock(path) as lock:
        (tmp_path / ".run.lock").unlink()
        with refused("was removed or replaced", RunError):
            lock.check()


def test_locks_follow_no_links_and_take_no_pipes(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".out.lock").symlink_to(victim)
    with refused("out: cannot be written"), Lock(tmp_path / "out"):
        raise AssertionError
    assert victim.read_text() == "precious"
    (tmp_path / ".out.lock").unlink()
    os.mkfifo(tmp_path / ".out.lock")
    with refused(r"\.out\.lock: is no file; remove it"), Lock(tmp_path / "out"):
        raise AssertionError
    with refused("cannot be written: No such file or directory"), Lock(tmp_path / "no" / "folder"):
        raise AssertionError


def test_a_damaged_lock_file_is_no_obstacle(tmp_path):
    (tmp_path / ".out.lock").write_bytes(b"\xff{")
    with Lock(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch):
    """As on some network file systems; then nothing is swept either."""
    monkeypatch.setattr(files, "_flock", lambda descriptor: None)
    with pytest.warns(UserWarning, match=r"out: its file system has no locks"), Lock(tmp_path / "out"):
        pass
    (tmp_path / ".out.partial-0123abcd").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_file(tmp_path / "out", b"x")
    assert names(tmp_path) == [".out.partial-0123abcd", "out"]
