"""deer-jax align as a user meets it: messages of one line, interruptions, a full disk."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import pytest

from deer_jax.cli.docstrings import NAMES, recipe_help
from deer_jax.cli.main import main
from deer_jax.config import DrafterConfig
from deer_jax.diffusion.corruption import Corruption
from deer_jax.drafters.start import ConditionedStart
from deer_jax.training.objectives import Objective
from deer_jax.training.recipe import Evaluation, PretrainRecipe, Recipe, Stage
from deer_jax.training.step import OptimizerConfig
from tests.training import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("verb"))


def endless(folder, output, **changes):
    """A recipe of more steps than a test waits for."""
    stages = [runs.recipe(folder)["stages"][0] | {"steps": 5000}]
    return runs.recipe(folder, output, stages=stages, evaluation=None, **changes)


def command(path, *options):
    return [sys.executable, "-m", "deer_jax.cli.main", "align", "--recipe", str(path), *options]


@pytest.mark.filterwarnings("ignore:.*2 prompts occur in training rows:UserWarning")
def test_a_run_prints_its_table_and_goes_on_with_nothing_to_do(folder, capsys):
    values = runs.recipe(folder, "cli")
    report = folder / "report.json"
    assert main(["align", "--recipe", str(runs.write(values)), "--set", "seed=5", "--json", str(report)]) == 0
    said = capsys.readouterr()
    assert re.search(r"^ *12( best)? .*\[", said.out, re.MULTILINE)
    assert "τ on 8 held-out prompts" in said.out
    assert re.search(
        r"cli: 12 steps done, [\d,]+ tokens/s, [\d.]+ % of the time waiting for examples; the best", said.err
    )
    assert json.loads(report.read_text())["evaluations"]["12"][0]["draft_length"] == 4
    lines = [line.removeprefix("deer-jax: ") for line in said.err.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("step 0: τ "))
    before = "\n".join(lines[:first])
    for line in (
        r"the drafter has [\d,]+ parameters, its target [\d,]+: [\d.]+ % of them",
        r"memory: [\d.]+ [MG]B for target, .*, [\d.]+ [MG]B are free; disk: [\d.]+ MB for 4 checkpoints, .* free",
        r"12 steps of 4 texts are 1.2 epochs of 40 rows",
        r"5 evaluations, each decodes 8 held-out prompts at 1 x 2 \(draft lengths x temperatures\): up to 128 tokens",
        r"a round of 4 drafts takes [\d.]+ plain steps here \(8 prompts at once, 1 x cpu\): decoding gets faster",
    ):
        assert re.search(f"^{line}", before, re.MULTILINE), (line, before)
    told = [line for line in lines if re.match(r"step \d+: τ [\d.]+ \[.*\] at k = 4, T = 0, [\d.]+ .* T = 1", line)]
    assert [line.split(":")[0] for line in told] == ["step 0", "step 4", "step 6", "step 8", "step 12"]
    assert re.search(r"; [\d.e-]+ s a step, about \d+ (s|min) left$", told[1])
    assert not told[-1].endswith("left")
    assert main(["align", "--recipe", values["output"] + ".yaml", "--set", "seed=5"]) == 0
    said = capsys.readouterr()
    assert re.findall(r"^ *(\d+)(?: best)? .*\[", said.out, re.MULTILINE) == ["0", "4", "6", "8", "12"]
    assert "τ " not in said.err  # nothing is evaluated, nor said of what is to come
    assert "12 steps done, nothing was left to do; the best checkpoint is that of step" in said.err
    assert main(["align", "--recipe", values["output"] + ".yaml"]) == 2
    assert "holds another run: seed was 5, is 0. Name another output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--recipe is missing; see deer-jax align --help"),
        (["--recipe", "none.yaml"], "none.yaml: no such file"),
        (
            ["--recipe", "{recipe}", "--set", "stages.0.learning_rat=1"],
            "{recipe}: stages[0]: unknown key 'learning_rat', ",
        ),
        (["--recipe", "{recipe}", "--set", "batch"], "expected KEY=VALUE, as in stages.0.steps=100, got 'batch'"),
        (["--recipe", "{recipe}", "--mesh", "tensor=16"], "a 1x1x16 mesh needs 16 devices, 8 are there"),
        (["--recipe", "{recipe}", "--json", "{recipe}"], "{recipe}: is read or written under another option too"),
    ],
)
def test_bad_options(folder, capsys, options, message):
    path = str(runs.write(runs.recipe(folder, "bad")))
    assert main(["align", *(option.format(recipe=path) for option in options)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"deer-jax: error: {message.format(recipe=path)}")
    assert said.err.count("\n") == 1


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["align", "--help"])
    said = capsys.readouterr().out
    assert "the same command goes on," in said
    for kind in (Recipe, Stage, Corruption, OptimizerConfig, Evaluation, Objective, DrafterConfig, ConditionedStart):
        for field in dataclasses.fields(kind):
            if kind is not Stage or field.name not in ("corruption", "optimizer"):
                assert re.search(rf"^ +([a-z_0-9]+, )*{field.name}(, [a-z_0-9]+)*( |$)", said, re.MULTILINE), field.name


@pytest.mark.parametrize("recipe", [Recipe, PretrainRecipe])
def test_every_key_has_a_meaning(recipe):
    lines = recipe_help(recipe).splitlines()[1:]
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        name, meaning = line[:NAMES].rstrip(), line[NAMES:]
        if name:
            text = meaning if line[:NAMES] != line else after[NAMES:]
            assert text.strip(), line
            assert not text.strip().startswith("(default"), line


def test_ctrl_c_writes_a_checkpoint_and_the_same_command_goes_on(folder, environment):
    path = runs.write(endless(folder, "stopped", checkpoint_every=1))  # mostly in a save
    kept = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}  # the next test reads what is compiled here
    process = subprocess.Popen(command(path), stderr=subprocess.PIPE, text=True, env=environment | kept)
    metrics = folder / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    found = re.search(
        r"interrupted: step ([\d,]+) of 5,000 is written to .*stopped; the same command goes on from it", said
    )
    assert found, said
    kept = [int(each.name) for each in (folder / "stopped" / "checkpoints").iterdir()]
    assert max(kept) == int(found[1])


def test_no_room_for_the_metrics_is_one_line(folder, environment):
    values = endless(folder, "no_room", checkpoint_every=1000)
    little_room = ["sh", "-c", 'ulimit -f 16 && exec "$@"', "sh"]
    done = subprocess.run(
        little_room + command(runs.write(values)),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=90,
    )
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors == done.stderr.splitlines()[-1:]
    assert re.search(r"error: .*no_room/metrics.jsonl: cannot be written: File too large; the same command", errors[0])


def test_a_full_disk_is_one_line_too_and_the_run_goes_on_when_there_is_room(folder, environment):
    values = runs.recipe(folder, "full", evaluation=None)
    path = runs.write(values)

    little_room = ["sh", "-c", 'ulimit -f 20 && exec "$@"', "sh"]
    done = subprocess.run(little_room + command(path), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "deer-jax: error" in line]
    assert re.search(r"full/checkpoints/2: cannot be written: File too large; earlier checkpoints are whole", line)
    assert "Traceback" not in done.stderr
    done = subprocess.run(command(path), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
