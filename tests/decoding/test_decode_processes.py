"""Decoding and answers over two processes of two devices each: they say what one process does, in shards that any
number of processes goes on from."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import deer_jax
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.data.answer_writer import AnswerWriter
from deer_jax.data.answers import AnswerFiles
from tests.fast import soak
from tests.tiny import random_params, tiny

LIMIT = 120  # seconds, on a busy machine
MESH = "data=2,tensor=2"
DECODE = {"draft_length": 3, "max_new_tokens": 20, "batch_size": 3, "seed": 4}
ANSWERS = {"max_new_tokens": 120, "temperatures": (0.0, 1.0, 1.0), "samples": 2, "batch_size": 4, "seed": 3}

# Run by each of the two processes: what `decode` says greedily and sampled, with an untrained and a saved drafter.
DECODING = """
import json, sys
import deer_jax
from deer_jax import processes
folder, options, prompts, where, number = map(json.loads, sys.argv[1:])
processes.start(where, 2, number, 60)
target = deer_jax.load_target(folder + "/target", mesh=deer_jax.make_mesh(data=2, tensor=2))
found = []
for source, temperature in (("from-target:0", 0.0), (folder + "/drafter", 1.0)):
    drafter = deer_jax.load_drafter(source, target=target)
    found.append(deer_jax.decode(target, prompts, drafter=drafter, temperature=temperature, **options))
for _ in range(2):  # the second finds it done
    found.append(deer_jax.decode(target, prompts[:1], drafter=drafter, output=folder + "/one.jsonl", **options))
blocks = list(deer_jax.stream_blocks(target, prompts[:1], drafter=drafter, draft_length=3, max_new_tokens=20))
def one_has_no_room():
    if number == 1:
        raise deer_jax.InputError("no room here")
refused = []
for attempt in (
    lambda: deer_jax.decode(deer_jax.load_target(folder + "/target"), prompts),
    lambda: deer_jax.load_target(folder + "/target", mesh=deer_jax.make_mesh(data=2)),
    lambda: deer_jax.decode(target, prompts[number:], max_new_tokens=4),
    lambda: deer_jax.answers(target, prompts, folder + "/locked.jsonl", max_new_tokens=4),
    lambda: processes.every(one_has_no_room),
):
    try:
        attempt()
    except deer_jax.InputError as error:
        refused.append(str(error))
print(json.dumps({
    "tokens": [each.tokens for each in found], "blocks": blocks, "refused": refused,
    "resumed": found[3].stats.resumed_tokens,
    "least": processes.least(7 - number),
}))
processes.leave()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("processes")
    config = tiny("qwen3")
    save_folder(found / "target", config, random_params(config), stop_ids=[5])
    target = deer_jax.load_target(found / "target")
    deer_jax.save_drafter(found / "drafter", deer_jax.load_drafter("from-target:1", target=target))
    return found


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(6, 96, n).tolist() for n in (3, 1, 8, 17, 5)]


def address() -> str:
    """A free one."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


@contextlib.contextmanager
def two(environment, command):
    """Both processes of a command, which is given the address and the number; they are gone when the block ends."""
    two_devices = {"JAX_NUM_CPU_DEVICES": "2", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    where = address()
    started = [
        subprocess.Popen(
            [sys.executable, *command(where, number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment | two_devices,
        )
        for number in (0, 1)
    ]  # fmt: skip
    try:
        yield started
    finally:
        for each in started:
            each.kill()
            each.communicate()


def ended(started):
    """Exit statuses, and what was said by each on stdout and on stderr, when both have ended."""
    said = [each.communicate(timeout=LIMIT) for each in started]
    return [each.returncode for each in started], *zip(*said, strict=True)


def verb(name, folder, *more):
    argv = ["-m", "deer_jax.cli.main", name, "--target", str(folder / "target"), "--mesh", MESH, *more]
    return lambda where, number: [*argv, "--coordinator", where, "--processes", "2", "--process", str(number)]


def test_two_processes_decode_what_one_does(folder, prompts, environment):
    """Greedy and sampled, drafted, more prompts than slots; the file of a decode is the lead's."""
    given = [json.dumps(each) for each in (str(folder), DECODE, prompts)]
    started = two(environment, lambda where, i: ["-c", DECODING, *given, json.dumps(where), str(i)])
    with AnswerWriter(folder / "locked.shard-1.jsonl"), started as processes:
        codes, out, err = ended(processes)
    assert codes == [0, 0], err
    lead, other = (json.loads(each.splitlines()[-1]) for each in out)
    assert lead == other
    target = deer_jax.load_target(folder / "target")
    one, saved = (deer_jax.load_drafter(each, target=target) for each in ("from-target:0", folder / "drafter"))
    greedy = deer_jax.decode(target, prompts, drafter=one, **DECODE)
    sampled = deer_jax.decode(target, prompts, drafter=saved, temperature=1.0, **DECODE)
    assert lead["tokens"][:2] == [greedy.tokens, sampled.tokens]
    assert lead["tokens"][2:] == [greedy.tokens[:1]] * 2
    assert lead["resumed"] == len(greedy.tokens[0])
    assert [token for block in lead["blocks"] for token in block] == greedy.tokens[0]
    assert lead["least"] == 6
    line = "2 processes run this, and the target is on devices of 1 of them; give a mesh of all 4 devices, as in data=4"
    *mesh, others, locked, room = lead["refused"]
    assert mesh == [line, line]
    assert others.startswith("process 1 was started differently from process 0: prompts and settings was ")
    assert f"locked.shard-1.jsonl: is being written by process {os.getpid()} on " in locked
    assert not list(folder.glob("locked*"))
    assert room == "no room here"
    line = json.loads((folder / "one.jsonl").read_text())
    assert line["tokens"] == greedy.tokens[0]
    assert sorted(path.name for path in folder.glob("*one*")) == ["one.jsonl", "one.jsonl.state.json"]


def answering(folder, output):
    options = "--max-new-tokens 120 --temperatures 0,1,1 --samples 2 --batch-size 4 --seed 3"
    return verb(
        "answers", folder, "--prompts", str(folder / "prompts.jsonl"), "--output", str(output), *options.split()
    )


def records(output):
    """The lines of all shards by item, each once."""
    found = [json.loads(line) for path in output.parent.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len({record["item"] for record in found}) == len(found)
    return {record["item"]: record for record in found}


def wait_for_lines(output, started, count):
    while all(each.poll() is None for each in started):
        if sum(path.read_bytes().count(b"\n") for path in output.parent.glob("*.jsonl")) >= count:
            return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(folder, prompts, tmp_path_factory):
    """What one process answers, uninterrupted; the prompts are in a file too."""
    many = [*prompts, *([token, *prompt] for token in (7, 8, 9) for prompt in prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"tokens": each}) + "\n" for each in many))
    output = tmp_path_factory.mktemp("whole") / "a.jsonl"
    deer_jax.answers(deer_jax.load_target(folder / "target"), many, output, **ANSWERS)
    return output, many


@soak
def test_answers_stopped_and_killed_on_two_processes_are_those_of_one(folder, whole, environment, tmp_path):
    """SIGTERM of one ends both; then kill -9 of one; then a single process goes on from all shards."""
    output, (uninterrupted, prompts) = tmp_path / "a.jsonl", whole
    expected = records(uninterrupted)
    with two(environment, answering(folder, output)) as started:
        wait_for_lines(output, started, 5)
        started[1].send_signal(signal.SIGTERM)
        codes, _, err = ended(started)
    assert codes == [143, 143], err
    line = f"terminated: {output} keeps what is done; the same command goes on from there"
    assert [each.splitlines()[-1] for each in err] == [f"deer-jax: {line}", f"deer-jax: process 1: {line}"]
    stopped = records(output)
    assert {item % 2 for item in stopped} == {0, 1}
    with two(environment, answering(folder, output)) as started:
        wait_for_lines(output, started, len(stopped) + 5)
        started[1].kill()
        codes, _, err = ended(started)
    assert codes == [1, -signal.SIGKILL], err
    assert err[0].splitlines()[-1].startswith("deer-jax: error: another process has ended, so this one cannot go on")
    killed = records(output)
    assert stopped.items() <= killed.items()
    assert len(stopped) < len(killed) < len(expected)
    for number in (0, 1):
        lines = (output if number == 0 else tmp_path / "a.shard-1.jsonl").read_text().splitlines()
        assert {json.loads(each)["item"] % 2 for each in lines} == {number}
    report = deer_jax.answers(deer_jax.load_target(folder / "target"), prompts, output, **ANSWERS)
    assert (report.resumed, report.written) == (len(killed), len(expected) - len(killed))
    assert records(output) == expected
    files = [AnswerFiles([path], vocab_size=96) for path in (uninterrupted, output)]
    rows = [[{**each[i], "where": ""} for i in range(len(each))] for each in files]
    assert rows[0] == rows[1]
    assert [row["item"] for row in rows[0]] == sorted(expected)


def test_a_pipeline_of_two_processes(folder, whole, environment, tmp_path):
    """Its steps are run by both: answers in shards, then a measurement; results are shown once."""
    common = {"target": str(folder / "target"), "prompts": str(folder / "prompts.jsonl"), "limit": 4,
              "mesh": MESH, "max_new_tokens": 9}  # fmt: skip
    measured = {"drafter": str(folder / "drafter"), "repeats": 1, "draft_lengths": 3, "json": "{output}/report.json"}
    steps = [{"answers": common | {"output": "{output}/a.jsonl"}}, {"bench": common | measured}]
    (tmp_path / "steps.yaml").write_text(json.dumps({"steps": steps}))
    argv = ["-m", "deer_jax.cli.main", "pipeline", "--steps", str(tmp_path / "steps.yaml"), "--processes", "2"]
    output = tmp_path / "out"
    argv += ["--output", str(output)]
    with two(environment, lambda where, i: [*argv, "--coordinator", where, "--process", str(i)]) as started:
        codes, (out, silence), (said, other) = ended(started)
    assert codes == [0, 0], (said, other)
    assert [said.count(f"step {i} of 2") for i in (1, 2)] == [1, 1]
    assert "together" in out
    assert not [line for line in silence.splitlines() if "[Gloo]" not in line and "peer ranks" not in line]
    assert "deer-jax" not in other
    assert sorted(records(output / "a.jsonl")) == [0, 1, 2, 3]
    assert (output / "a.shard-1.jsonl").read_text().count("\n") == 2
    found = json.loads((output / "report.json").read_text())["methods"]
    assert [method["exact_match"] for method in found.values()] == [1.0, 1.0]
