"""launch/local_pod.sh: several processes end together, whatever happens to one of them, and leave nothing behind."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

# What a verb does with the options of local_pod.sh, without its libraries.
JOB = """
import argparse, os, signal, subprocess, sys, time

parser = argparse.ArgumentParser()
for option in ("--coordinator", "--processes", "--process", "--how"):
    parser.add_argument(option)
job = parser.parse_args()


def stop(number, frame):
    print("saving", flush=True)
    time.sleep(0.1)
    print("saved", flush=True)
    sys.exit(128 + number)


signal.signal(signal.SIGTERM, signal.SIG_IGN if job.how == "deaf" else stop)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
print(job.coordinator, job.processes, os.environ["JAX_PLATFORMS"], os.environ["JAX_NUM_CPU_DEVICES"], file=sys.stderr)
sys.stderr.flush()
if job.how == "child":  # one that nobody waits for
    subprocess.Popen(["sleep", "60"])
if job.how in ("well", "child"):
    print("no newline", end="")
    sys.exit(0)
open(f"ready/{job.process}", "w").close()
if job.process == "1":
    while len(os.listdir("ready")) < int(job.processes):
        time.sleep(0.01)
    if job.how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.how == "told":
        open("told", "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    if job.how in ("fails", "deaf"):
        sys.exit(3)
if job.how == "told":  # hears of it from process 1, saves, and ends by itself
    while "told" not in os.listdir():
        time.sleep(0.01)
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(143)
time.sleep(60)
"""

SUM = """
import argparse
import jax

parser = argparse.ArgumentParser()
parser.add_argument("--coordinator")
parser.add_argument("--processes", type=int)
parser.add_argument("--process", type=int)
job = parser.parse_args()
jax.distributed.initialize(job.coordinator, job.processes, job.process)
print(f"{jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of {jax.device_count()} devices")
jax.distributed.shutdown()
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    """The script of a process. After the test, no process that was started with it may be there."""
    path = tmp_path / "job.py"
    path.write_text(JOB)
    (tmp_path / "ready").mkdir()
    yield path
    left = [process for process in processes() if str(tmp_path) in process]
    assert left == []
    assert {entry.name for entry in tmp_path.iterdir()} <= {"job.py", "ready", "told"}


def processes() -> list[str]:
    """The command line of everything that runs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append((folder / "cmdline").read_text().replace("\0", " ") + str((folder / "cwd").readlink()))
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script in an empty folder, which is where its processes then are."""

    started = []

    def start_(*words: str | Path) -> subprocess.Popen[str]:
        command = [ROOT / "launch" / "local_pod.sh", *words]
        started.append(
            subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
        return started[-1]

    yield start_
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def ready(process: subprocess.Popen[str], count: int) -> None:
    """Waits until so many processes have said that they are ready."""
    for _ in range(count):
        assert process.stdout is not None
        assert process.stdout.readline().endswith("ready\n")


def test_all_end_well(start, job: Path):
    process = start("--devices", "2", "3", sys.executable, job, "--how", "well")
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    lines = ["no newline", "ready", "[1] no newline", "[1] ready", "[2] no newline", "[2] ready"]
    assert sorted(stdout.splitlines()) == sorted(lines)
    line = min(stderr.splitlines())
    assert re.fullmatch(r"127\.0\.0\.1:\d+ 3 cpu 2", line)
    assert sorted(stderr.splitlines()) == sorted([line, f"[1] {line}", f"[2] {line}"])


@pytest.mark.parametrize(
    ("how", "status", "lines"),
    [
        ("fails", 3, ["saving", "saved", "[2] saving", "[2] saved"]),
        ("killed", 137, ["saving", "saved", "[2] saving", "[2] saved"]),
        ("deaf", 3, []),  # killed after the grace
        ("told", 143, ["[1] saving", "[1] saved", "saved", "[2] saved"]),  # no second signal to those that are saving
    ],
)
def test_one_ends_and_the_others_with_it(start, job: Path, how: str, status: int, lines: list[str]):
    process = start("--grace", "1" if how == "deaf" else "20", "3", sys.executable, job, "--how", how)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == status
    assert sorted(line for line in stdout.splitlines() if "ready" not in line) == sorted(lines)
    said = [] if how == "told" else [f"local_pod: process 1 ended with status {status}; ending the others"]
    assert [line for line in stderr.splitlines() if "127.0.0.1" not in line] == said
    again = start("2", sys.executable, job, "--how", "well")
    again.communicate(timeout=30)
    assert again.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_and_is_waited_for(start, job: Path, number: signal.Signals):
    process = start("3", sys.executable, job)
    ready(process, 3)
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    said = [f"{before}{word}" for before in ("", "[1] ", "[2] ") for word in ("saving", "saved")]
    assert sorted(stdout.splitlines()) == sorted(said)


def test_ctrl_c_at_a_terminal(job: Path, tmp_path: Path):
    """It goes to the script and its helpers; the processes get it once, since a second one ends them at once."""
    master, slave = pty.openpty()
    command = ["setsid", "--ctty", "--wait", ROOT / "launch" / "local_pod.sh", "3", sys.executable, job]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    text = b""
    while text.count(b"ready") < 3:
        text += os.read(master, 4096)
    os.write(master, b"\x03")
    with contextlib.suppress(OSError):  # how the end of a terminal is read
        while piece := os.read(master, 4096):
            text += piece
    os.close(master)
    assert process.wait(timeout=10) == 130
    assert (text.count(b"saving"), text.count(b"saved")) == (3, 3)


def test_what_a_process_leaves_behind_is_ended(start, job: Path):
    process = start("2", sys.executable, job, "--how", "child")
    process.communicate(timeout=30)
    assert process.returncode == 0
    time.sleep(0.1)  # the system needs a moment


def test_processes_of_jax_find_each_other(start, tmp_path: Path):
    (tmp_path / "sum.py").write_text(SUM)
    process = start("--devices", "2", "2", sys.executable, "sum.py")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert sorted(stdout.splitlines()) == ["0 of 2: 2 of 4 devices", "[1] 1 of 2: 2 of 4 devices"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "the number of processes and the command are missing; see --help"),
        (["2"], "the number of processes and the command are missing; see --help"),
        (["two", "true"], "N two: not a whole number from 1"),
        (["0", "true"], "N 0: not a whole number from 1"),
        (["--devices", "0", "2", "true"], "--devices 0: not a whole number from 1"),
        (["--grace"], "--grace: no value"),
        (["--speed", "2", "true"], "--speed: unknown option; see --help"),
        (["2", "no-such-program"], "no-such-program: no such command"),
    ],
)
def test_wrong_words_are_one_line(start, words: list[str], line: str):
    process = start(*words)
    assert process.communicate(timeout=10) == ("", f"local_pod: {line}\n")
    assert process.returncode == 2
