"""Runs of two processes: they are those of one, and whatever happens to one of them, the next start goes on."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import deer_jax
from deer_jax import InputError, RunError, processes
from deer_jax.sharding import batch_placement, make_mesh
from tests.fast import soak
from tests.training import runs

LIMIT = 120  # seconds, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("processes"))


def recipe(folder, output, **changes):
    """Twelve steps on two devices."""
    stages = [stage | {"loss": {"ce": 1, "kl": 1}} for stage in runs.averaged(folder)]
    common = {"mesh": {"data": 2}, "stages": stages, "keep_states": 1, "evaluation": None}
    return runs.recipe(folder, output, **(common | changes))


def evaluated(folder, output):
    """The same with an evaluation at the start and at the end of each stage, which no step depends on."""
    evaluation = runs.recipe(folder)["evaluation"] | {"every": 100, "temperatures": [0]}
    return recipe(folder, output, evaluation=evaluation)


def steps_of(run):
    """A run without its evaluations."""
    return run | {"lines": [line for line in run["lines"] if "loss" in line]}


def align(values, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*2 prompts occur in training rows and are left out")
        return deer_jax.align(values, **options)


def address() -> str:
    """A free one."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


def start(path, environment, number, where, *more, count=2):
    """Process `number` of an align run of two, with one device each."""
    command = [sys.executable, "-m", "deer_jax.cli.main", "align", "--recipe", str(path), "--coordinator", where]
    one_device = {"JAX_NUM_CPU_DEVICES": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    return subprocess.Popen(
        [*command, "--processes", str(count), "--process", str(number), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | one_device,
    )  # fmt: skip


@contextlib.contextmanager
def two(values, environment, *more):
    """Both processes of a run; they are gone when the block ends."""
    path, where = runs.write(values), address()
    started = [start(path, environment, number, where, *more) for number in (0, 1)]
    try:
        yield started
    finally:
        for each in started:
            each.kill()
            each.communicate()


def ended(started):
    """Exit statuses, and what was said by each on stderr, when all have ended."""
    said = [each.communicate(timeout=LIMIT)[1] for each in started]
    print("\n\n".join(said))  # whole where a test fails; an assertion shows the ends only
    return [each.returncode for each in started], said


def wait_for(values, started, steps):
    metrics = Path(values["output"]) / "metrics.jsonl"
    while all(each.poll() is None for each in started):
        if metrics.exists() and metrics.read_text().count('"loss"') >= steps:
            return
        time.sleep(0.01)


def assert_close(one, other):
    for a, b in zip(one["lines"], other["lines"], strict=True):
        assert a.keys() == b.keys()
        assert a["tokens"] == b["tokens"]
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        else:
            assert a == b
    for a, b in zip(one["arrays"], other["arrays"], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(folder):
    """What one process makes of it."""
    values = evaluated(folder, "alone")
    align(values)
    return runs.everything(values)


@pytest.fixture(scope="module")
def together(folder, environment):
    """What two processes make of it, and what they said."""
    values = evaluated(folder, "together")
    with two(values, environment) as started:
        codes, said = ended(started)
    assert codes == [0, 0], said
    return runs.everything(values), said


def test_two_processes_are_one_run(alone, together):
    found, (lead, other) = together
    assert_close(found, alone)
    assert "together: 12 steps done" in lead
    own = [line for line in other.splitlines() if line.startswith("deer-jax")]
    assert own
    assert all(line.startswith("deer-jax: process 1: warning: ") for line in own)


def test_one_that_is_killed_ends_the_other_and_the_next_start_goes_on(folder, together, environment):
    values = recipe(folder, "killed")
    with two(values, environment) as started:
        wait_for(values, started, 3)
        started[1].send_signal(signal.SIGKILL)
        codes, said = ended(started)
    assert codes == [1, -signal.SIGKILL], said
    assert re.search(r"^deer-jax: error: another process has ended[^\n]*; start all again", said[0], re.MULTILINE)
    with two(values, environment) as started:
        codes, said = ended(started)
    assert codes == [0, 0], said
    runs.assert_same_run(runs.everything(values), steps_of(together[0]))


def test_sigterm_at_one_ends_both_with_a_checkpoint_that_one_process_goes_on_from(folder, alone, environment):
    values = recipe(folder, "stopped", checkpoint_every=100)
    with two(values, environment) as started:
        wait_for(values, started, 1)
        started[1].send_signal(signal.SIGTERM)
        codes, said = ended(started)
    steps = sorted(int(path.name) for path in (folder / "stopped" / "checkpoints").iterdir())
    assert codes == [143, 143], said
    assert all(f"terminated: step {steps[-1]} of 12 is written to" in each for each in said)
    assert align(values).finished
    assert_close(runs.everything(values), steps_of(alone))


@soak
def test_two_processes_write_a_run_on_an_object_store_together(folder, together, environment, bucket, tmp_path):
    """SIGTERM at one, and the next start goes on; the inputs are on the store too."""
    bucket.put_tree(folder / "target", "in/target")
    bucket.put("in/answers.jsonl", (folder / "answers.jsonl").read_bytes())
    changes = {"target": "in/target", "answers": "in/answers.jsonl", "output": "run"}
    more = [f"--set={name}={bucket.url}/{value}" for name, value in changes.items()]
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "HOME")
    environment = environment | {name: os.environ[name] for name in names}
    values = recipe(folder, "on_store", checkpoint_every=1)  # each takes so long that the signal comes in between
    with two(values, environment, *more) as started:
        while "run/checkpoints/1/checkpoint.json" not in bucket.names() and started[0].poll() is None:
            time.sleep(0.01)
        started[1].send_signal(signal.SIGTERM)
        codes, said = ended(started)
    assert codes == [143, 143], said
    assert all(f"is written to {bucket.url}/run; the same command goes on from it" in each for each in said)
    with two(values, environment, *more, "--set=checkpoint_every=6") as started:
        codes, said = ended(started)
    assert codes == [0, 0], said
    found = values | {"output": str(bucket.get_tree("run", tmp_path))}
    runs.assert_same_run(runs.everything(found), steps_of(together[0]))


def test_processes_with_different_recipes_are_refused(folder, environment, tmp_path):
    where, found = address(), []
    for number in (0, 1):
        found.append(start(runs.write(recipe(folder, f"run{number}", seed=number)), environment, number, where))
    codes, said = ended(found)
    assert codes == [2, 2], said
    for each in said:
        line = r"^deer-jax: (process 1: )?error: process 1 was started differently from process 0: recipe\.output was "
        assert re.search(line, each, re.MULTILINE), each
    assert not (folder / "run0").exists()


@pytest.mark.parametrize("wrong", [0, 1])
def test_what_one_process_cannot_read_ends_both_with_its_line(folder, environment, tmp_path, wrong):
    """A recipe that is not there; the other one's is."""
    paths, where = [runs.write(recipe(folder, "never")), tmp_path / "missing.yaml"], address()
    codes, said = ended([start(paths[number == wrong], environment, number, where) for number in (0, 1)])
    assert codes == [2, 2], said
    for each in said:
        assert re.search(r"error: \S+missing\.yaml: [^\n]+$", each, re.MULTILINE), each
    assert not (folder / "never").exists()


def test_one_that_does_not_come_is_named(folder, environment):
    path = runs.write(recipe(folder, "none"))
    where = address()
    found = [
        start(path, environment, 0, where, "--wait", "8", count=3),
        start(path, environment, 1, where, "--wait", "8", count=3),
        start(path, environment, 1, address(), "--wait", "1"),
    ]
    codes, (lead, other, lonely) = ended(found)
    assert codes == [1, 1, 1]
    line = rf"\Adeer-jax: error: process 2 did not come to the coordinator {where} within 8 s; start all of them\n\Z"
    assert re.search(line, lead), lead
    assert other == lead
    line = r"\Adeer-jax: error: the coordinator localhost:\d+ did not come within 1 s \([^\n]*\); start process 0"
    assert re.search(line, lonely), lonely
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", None, 0), "several processes need --coordinator HOST:PORT, --processes N and --process I to"),
        (("localhost:1", 2, 2), "process 2 of 2: they are numbered from 0 to 1"),
        (("localhost", 2, 0), "coordinator 'localhost' must be HOST:PORT, as in "),
        (("localhost:0", 2, 0), "coordinator 'localhost:0' must be HOST:PORT, as in "),
    ],
)
def test_numbers_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        processes.start(*arguments)


def test_a_batch_that_the_devices_do_not_share_evenly_is_refused(folder):
    with pytest.raises(InputError, match="a micro-batch of 3 texts cannot be split over 2 devices"):
        align(recipe(folder, "uneven", batch=6))


class Device:
    """Of another process."""

    def __init__(self, process_index):
        self.process_index = process_index


class Places:
    """A placement whose devices belong to processes as they say."""

    def __init__(self, placement, owners):
        self.placement, self.owners = placement, owners

    def devices_indices_map(self, shape):
        found = self.placement.devices_indices_map(shape).values()
        return {Device(owner): index for owner, index in zip(self.owners, found, strict=True)}


@pytest.mark.parametrize(
    ("mesh", "owners", "rows"),
    [
        ({"data": 4}, (0, 0, 1, 1), ([0, 1, 4, 5], [2, 3, 6, 7])),
        ({"data": 2, "tensor": 2}, (0, 1, 0, 1), (list(range(8)), list(range(8)))),  # both feed both halves
        ({"fsdp": 4}, (1, 0, 0, 1), ([1, 2, 5, 6], [0, 3, 4, 7])),
        ({"tensor": 4}, (0, 0, 1, 1), (list(range(8)), list(range(8)))),
    ],
)
def test_the_rows_of_each_process_follow_from_its_devices(monkeypatch, mesh, owners, rows):
    """Two parts of four rows each: 0..3 and 4..7."""
    counted = []
    for process, expected in enumerate(rows):
        monkeypatch.setattr(processes, "number", lambda process=process: process)
        share = processes.Share(Places(batch_placement(make_mesh(**mesh)), owners), 2, 8)
        assert share.rows.tolist() == expected
        counted += share.rows[share.own].tolist()
    assert sorted(counted) == list(range(8))  # each once


def test_what_several_exchange_costs_one_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", refuse)
    assert processes.agree(True)
    assert not processes.agree(False)
    assert processes.share("text") == "text"
    assert processes.total(3, 4) == [3, 4]
    assert processes.led(lambda: None) == ""
    assert processes.every(lambda: "text") == ["text"]
    assert processes.least(5) == 5
    processes.same({"recipe": 1})
    asked = []
    stop = processes.agreed(lambda: bool(asked.append(1)) or len(asked) > 2)
    assert [stop(), stop(), stop()] == [False, False, True]
    with pytest.raises(RunError, match="full"):
        processes.led(lambda: (_ for _ in ()).throw(RunError("full")))


def test_an_environment_says_whether_there_are_several():
    from deer_jax.cli.processes import said

    assert not said({})
    assert not said({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"})
    assert not said({"TPU_WORKER_HOSTNAMES": "localhost", "OMPI_COMM_WORLD_SIZE": "1"})
    for name, value in (
        ("SLURM_STEP_NUM_TASKS", "2"), ("OMPI_COMM_WORLD_SIZE", "4"), ("TPU_WORKER_HOSTNAMES", "a,b"),
        ("MEGASCALE_NUM_SLICES", "2"),
    ):  # fmt: skip
        assert said(os.environ | {name: value})
