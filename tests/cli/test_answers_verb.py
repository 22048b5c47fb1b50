"""`deer-jax answers`: the file it makes, a kill in the middle, and its one-line errors."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from deer_jax.build import compiling
from deer_jax.cli import answers as verb
from deer_jax.cli import main as cli
from deer_jax.cli import progress
from deer_jax.cli.options import parse
from deer_jax.cli.progress import Reporter, duration
from tests.stamps import keep_stamp


@pytest.fixture
def ids(tmp_path):
    path = tmp_path / "ids.jsonl"
    rows = '{"id": "a", "tokens": [1, 2, 3]}\n{"id": "b", "tokens": []}\n{"id": "c", "prompt": [4], "answer": [5, 6]}\n'
    path.write_text(rows + json.dumps({"tokens": [1] * 510}) + "\n", encoding="utf-8")
    return str(path)


def read(path) -> dict[int, dict]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({record["item"] for record in found}) == len(found)
    return {record["item"]: record for record in found}


def test_answers(run, tmp_path, folder, ids):
    output = tmp_path / "answers.jsonl"
    argv = ["answers", "--target", folder, "--prompts", ids, "--output", str(output), "--max-new-tokens", "7"]
    status, out, err = run(*argv, "--samples", "2", "--temperatures", "0,1")
    assert (status, out) == (0, "")
    last = err.splitlines()[-1]  # a slow machine shows progress before it
    assert last.startswith(f"deer-jax: {output}: 4 answers, ")
    assert err.endswith(
        "0% ended with a stop token, 2 skipped: empty prompts, 2 skipped: the prompt and 7 new tokens exceed the "
        "context of 512\n"
    )
    found = read(output)
    assert [(found[item]["id"], found[item]["prompt"]) for item in sorted(found)] == [
        ("a", [1, 2, 3]), ("a", [1, 2, 3]), ("c", [4]), ("c", [4])
    ]  # fmt: skip
    assert [found[item]["temperature"] for item in sorted(found)] == [0, 1, 0, 1]
    status, out, err = run(*argv, "--samples", "2", "--temperatures", "0", "--temperatures", "1")
    assert (status, out) == (0, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"deer-jax: {output}: is complete, 4 answers, nothing to do, 2 skipped: empty")
    status, out, err = run(*argv, "--seed", "3")
    assert (status, out) == (2, "")
    assert "was begun with other settings: temperatures [0.0, 1.0] (now [0.0]), samples 2 (now 1), seed 0 (now" in err


def test_prefixes_of_answers(run, tmp_path, folder, ids):
    argv = ["answers", "--target", folder, "--prompts", ids, "--max-new-tokens", "2", "--output"]
    assert run(*argv, str(tmp_path / "a"), "--prefix", "2,2")[0] == 0
    assert [found["prompt"] for _, found in sorted(read(tmp_path / "a").items())] == [[1, 2], [4, 5], [1, 1]]


def test_options_from_a_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "target: t\noutput: o\ntemperatures: [1, 0.6]\nprefix: [4, 32]\nfrom_bos: true\n", encoding="utf-8"
    )
    options = parse(verb.Options, "answers", ["--config", str(config)], "")
    assert (options.temperatures, options.prefix, options.from_bos) == ((1.0, 0.6), (4, 32), True)
    options = parse(verb.Options, "answers", ["--config", str(config), "--temperatures", "0,0,1e-1"], "")
    assert options.temperatures == (0.0, 0.0, 0.1)


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["answers", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "usage: deer-jax answers [options]" in out
    assert "(default: 0.0)" in out
    assert "--draft" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--target T --prompts P", "--output is missing"),
        ("--target T --output o", "give prompts either with --prompt TEXT or with --prompts FILE"),
        ("--target T --prompts P --output P", "is read or written under another option too"),
        ("--target T --prompts P --output none/o", "none/o: no folder"),
        ("--target T --prompts P --output o --temperatures 0,warm", "--temperatures: invalid comma-separated numbers"),
        ("--target T --prompts P --output o --temperatures=-1", "temperature must be 0 (greedy) or positive, got -1.0"),
        ("--target T --prompts P --output o --prefix 3", "prefix must be two whole numbers, MIN,MAX with"),
        ("--target T --prompts P --output o --samples 0", "samples must be a whole number of at least 1, got 0"),
        (
            "--target T --prompts P --output o --samples 4294967296",
            "are more than 10,000,000 answers: give",
        ),
        ("--target T --prompts P --output /dev/stdout", "/dev/stdout: is no regular file, and what is appended there"),
        ("--target T --prompts P --output o --template a=1", "--template has no effect on plain text: add --chat"),
        ("--target T --from-bos --prompts P --output o", "--from-bos continues from BOS alone: without options about"),
        ("--target T --from-bos --output o", "tiny has no tokenizer, so its BOS is not known"),
        ("--target T --prompts P --output o --drafter from-target", "unknown option '--drafter'"),
        ("--target T --prompts P --output foreign", "foreign: exists without foreign.state.json"),
    ],
)
def test_wrong_arguments_are_one_line(run, monkeypatch, tmp_path, folder, ids, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign").write_text("mine\n", encoding="utf-8")
    arguments = [{"P": ids, "T": folder}.get(word, word) for word in argv.split()]
    status, out, err = run("answers", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("deer-jax: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "ids.jsonl"]


def test_verify_reads_the_target_again(run, tmp_path, folder, ids, monkeypatch):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    argv = [
        "answers",
        "--target",
        str(copy),
        "--prompts",
        ids,
        "--max-new-tokens",
        "2",
        "--output",
        str(tmp_path / "o"),
    ]
    assert run(*argv)[0] == 0
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    keep_stamp(monkeypatch, weights)
    weights.write_bytes(content)
    assert run(*argv)[0] == 0  # of the same size and time of change
    status, _, err = run(*argv, "--verify")
    assert status == 2
    assert "was begun with other settings: the target's weights, configuration, tokenizer or dtype changed;" in err


def test_interrupted(run, monkeypatch, tmp_path, folder, ids):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "answers", interrupted)
    output = tmp_path / "o"
    status, _, err = run("answers", "--target", folder, "--prompts", ids, "--output", str(output))
    assert status == 130
    line = f"deer-jax: interrupted: {output} keeps what is done; the same command goes on from there"
    assert err.splitlines()[-1] == line


def test_killed_and_started_again(run, environment, folder, tmp_path):
    (tmp_path / "ids").write_text("".join(f'{{"tokens": [{i}, 7]}}\n' for i in range(12)), encoding="utf-8")
    options = "answers --samples 2 --batch-size 4 --temperatures 0,1,1 --max-new-tokens 300"
    argv = [*options.split(), "--target", folder, "--prompts", str(tmp_path / "ids"), "--output"]
    status, out, err = run(*argv, str(tmp_path / "whole"))
    assert (status, out) == (0, "")
    assert "from before" not in err

    command = [sys.executable, "-m", "deer_jax.cli.main", *argv, tmp_path / "killed"]
    killed, state = tmp_path / "killed", tmp_path / "killed.state.json"
    running = {}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while not running or len(killed.read_bytes().splitlines()) < 5:
            assert process.poll() is None
            time.sleep(0.005)
            running = json.loads(state.read_bytes())["running"] if state.exists() else {}
        process.kill()
    assert len(killed.read_bytes().splitlines()) < 24
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "from before" in done.stderr
    assert read(killed) == read(tmp_path / "whole")
    assert sorted(read(killed)) == list(range(24))


def test_what_compiles_for_long_is_said(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False)
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.1)
    with Reporter("answering"):
        with compiling():
            pass  # too short to be said
        with compiling():
            time.sleep(0.5)
    with compiling():
        time.sleep(0.2)  # of which nobody is told
    line = "deer-jax: answering: compiling, which may take minutes the first time"
    assert capsys.readouterr().err.splitlines() == [line]


def test_lines_of_progress_say_what_is_left(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False)
    with Reporter("answering") as reporter:
        reporter.show(10, 100, "0 tokens/s")
        for clock[0], done in ((106.0, 10), (108.0, 20), (130.0, 40), (190.0, 100)):
            reporter.show(done, 100, f"{done} tokens/s")
        clock[0] = 200.0
        reporter.show(3, 7)
    assert capsys.readouterr().err.splitlines() == [
        "deer-jax: answering: 10 of 100, 10 tokens/s",
        "deer-jax: answering: 40 of 100, 40 tokens/s, about 60 s left",
        "deer-jax: answering: 100 of 100, 100 tokens/s",
        "deer-jax: answering: 3 of 7",
    ]
    assert [duration(seconds) for seconds in (0.1, 60, 61, 3600, 3601, 7300)] == [
        "1 s", "60 s", "2 min", "60 min", "2 h", "3 h"
    ]  # fmt: skip
