"""kill -9 at random moments: the same command, given again, ends with what an uninterrupted run would have made.

`make soak` kills every verb twenty times; the ordinary suite kills align, answers and decode once, elsewhere.
"""

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import deer_jax
from tests.fast import KILLS, soak
from tests.training import pretraining, runs

COMMAND = [sys.executable, "-m", "deer_jax.cli.main"]
STEPS = 60
TIMES = ("seconds", "speedup", "per_second", "date", "machine", "command", "round", "step")  # parts of names of numbers


class Killer:
    """Starts a command over and over, and kills it, each time a little after a mark that is drawn over its life."""

    def __init__(self, argv: list[str], folder: Path, environment: dict[str, str], kills: int):
        self.argv, self.folder, self.environment, self.kills = [*COMMAND, *argv], folder, environment, kills
        self.killed = self.finished = 0

    def run(self, reached: Callable[[float], bool], restart: Callable[[], None] | None = None) -> None:
        """Kill it so often, then let it end.

        reached: whether the run is as far as this share of its life.
        restart: removes what a run has made that ended before it was killed; without it, that is what remains.
        """
        rng, starts = random.Random(0), 0
        # One that begins anew each time is started until it was killed so often; one that goes on ends some day.
        while starts < self.kills or (restart is not None and self.killed < self.kills and starts < 3 * self.kills):
            starts += 1
            share = starts / (self.kills + 1) if restart is None else rng.random()
            with subprocess.Popen(
                self.argv, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ) as process:
                while process.poll() is None and not reached(share):
                    time.sleep(0.01)
                time.sleep(rng.random() * 0.3)
                process.send_signal(signal.SIGKILL)
                said, _ = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), said.decode()
            self.killed += process.returncode != 0
            if process.returncode == 0:
                self.finished += 1
                if restart is not None:
                    restart()
        done = subprocess.run(
            self.argv, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert self.killed >= (self.kills + 1) // 2  # a quick machine may finish first
        assert leftovers(self.folder) == []

    def summary(self) -> None:
        verb = self.argv[len(COMMAND)]
        print(f"\n{verb}: {self.killed} kills, {self.finished} times done before one; ends as if uninterrupted")


def leftovers(folder: Path) -> list[str]:
    """What no run may leave: hidden files and folders, such as locks, and partial ones."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name for name in names if name.rpartition("/")[2].startswith(".") or "partial" in name)


def clock(seconds: float) -> Callable[[float], bool]:
    """Whether a run that was started just now is that far, for runs whose life is known from one that was let alone."""
    begun: dict[float, float] = {}

    def reached(share: float) -> bool:
        return time.monotonic() - begun.setdefault(share, time.monotonic()) > share * seconds

    return reached


def lines(pattern: str, folder: Path, wanted: int) -> Callable[[float], bool]:
    """Whether files hold that share of the lines that are wanted."""

    def reached(share: float) -> bool:
        found = [path.read_bytes().count(b"\n") for path in folder.glob(pattern) if path.is_file()]
        return max(found, default=0) >= share * wanted

    return reached


def whole(argv: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Run a command to its end; the seconds it took."""
    start = time.monotonic()
    folder.mkdir(exist_ok=True)
    done = subprocess.run([*COMMAND, *argv], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - start


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A target, its answers, held-out prompts, and a finished run."""
    return runs.prepare(tmp_path_factory.mktemp("soak"))


@pytest.fixture(scope="module")
def finished(model, environment) -> Path:
    values = runs.recipe(model, "finished", evaluation=None)
    whole(["align", "--recipe", str(runs.write(values))], model, environment)
    return model / "finished"


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    """Two folders to run the same relative command in."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    return tmp_path / "whole", tmp_path / "killed"


def prompts(model: Path) -> list[str]:
    """What to decode."""
    return ["--target", str(model / "target"), "--prompts", str(model / "held_out.jsonl")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def timeless(value):
    """A report without what a clock has said."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(part in k for part in TIMES)}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def rows(path: Path, *ignored: str) -> list[str]:
    """The lines of a file of JSON objects, in an order of their own."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(json.dumps({k: v for k, v in row.items() if k not in ignored}, sort_keys=True) for row in found)


@soak
@pytest.mark.filterwarnings("ignore:.*2 prompts occur in training rows:UserWarning")
def test_align(tmp_path, environment):
    folder = runs.prepare(tmp_path)
    evaluation = runs.recipe(folder)["evaluation"] | {"every": 10}
    changes = {"stages": runs.long(folder), "evaluation": evaluation, "checkpoint_every": 2}
    one, other = (runs.recipe(folder, name, **changes) for name in ("whole", "killed"))
    deer_jax.align(one)
    killer = Killer(["align", "--recipe", str(runs.write(other))], folder, environment, KILLS)
    killer.run(steps(folder / "killed"))
    runs.assert_same_run(runs.everything(other, STEPS), runs.everything(one, STEPS))
    killer.summary()


@soak
def test_pretrain(tmp_path, environment):
    folder = pretraining.prepare(tmp_path)
    one, other = (pretraining.recipe(folder, name, steps=STEPS, evaluate_every=10) for name in ("whole", "killed"))
    deer_jax.pretrain(one)
    killer = Killer(["pretrain", "--recipe", str(runs.write(other))], folder, environment, KILLS)
    killer.run(steps(folder / "killed"))
    runs.assert_same_run(runs.everything(other, STEPS), runs.everything(one, STEPS))
    killer.summary()


def steps(folder: Path) -> Callable[[float], bool]:
    metrics = folder / "metrics.jsonl"
    return lambda share: metrics.exists() and metrics.read_text().count('"loss"') >= share * (STEPS - 2)


@soak
def test_answers(model, places, environment):
    options = "--samples 8 --batch-size 4 --temperatures 0,1,1 --max-new-tokens 40 --output a.jsonl"
    argv = ["answers", *prompts(model), *shlex.split(options)]
    one, other = places
    whole(argv, one, environment)
    killer = Killer(argv, other, environment, KILLS)
    killer.run(lines("a.jsonl", other, 80))
    assert rows(one / "a.jsonl") == rows(other / "a.jsonl")
    killer.summary()


@soak
def test_decode(model, places, environment):
    options = "--drafter from-target:0 --draft-length 3 --batch-size 1 --max-new-tokens 40 --output d.jsonl"
    argv = ["decode", *prompts(model), *shlex.split(options)]
    one, other = places
    whole(argv, one, environment)
    killer = Killer(argv, other, environment, KILLS)
    killer.run(lines("*d.jsonl*", other, 9), restart=lambda: (other / "d.jsonl").unlink())
    assert rows(one / "d.jsonl") == rows(other / "d.jsonl")
    killer.summary()


@soak
def test_export(finished, places, environment):
    argv, (one, other) = ["export", "--source", str(finished), "--output", "model"], places
    seconds = whole(argv, one, environment)
    killer = Killer(argv, other, environment, KILLS)
    killer.run(clock(seconds), restart=lambda: shutil.rmtree(other / "model"))
    assert contents(one) == contents(other)
    killer.summary()


@soak
def test_bench(model, places, environment):
    options = "--drafter from-target:0 --draft-lengths 2 --repeats 2 --max-new-tokens 8 --json r.json"
    argv = ["bench", *prompts(model), *shlex.split(options)]
    one, other = places
    seconds = whole(argv, one, environment)
    killer = Killer(argv, other, environment, KILLS)
    killer.run(clock(seconds), restart=lambda: (other / "r.json").unlink())
    found = [timeless(json.loads((place / "r.json").read_text())) for place in places]
    assert found[0] == found[1]
    killer.summary()


@soak
def test_pipeline(tmp_path, model, places, environment):
    target = str(model / "target")
    stages = [stage | {"steps": 6} for stage in runs.recipe(model)["stages"]]
    held = str(model / "held_out.jsonl")
    align = runs.recipe(model, stages=stages) | {"answers": ["{output}/a.jsonl"], "output": "{output}/run"}
    found = [
        {"answers": {"target": target, "prompts": str(model / "answers.jsonl"), "output": "{output}/a.jsonl",
                     "max_new_tokens": 20}},
        {"align": align},
        {"export": {"source": "{output}/run", "output": "{output}/model"}},
        {"bench": {"target": target, "drafter": "{output}/model", "prompts": held, "max_new_tokens": 8, "repeats": 1,
                   "json": "{output}/report.json"}},
    ]  # fmt: skip
    steps_file = tmp_path / "steps.yaml"
    steps_file.write_text(yaml.safe_dump({"steps": found}))
    argv, (one, other) = ["pipeline", "--steps", str(steps_file), "--output", "out"], places
    seconds = whole(argv, one, environment)
    killer = Killer(argv, other, environment, KILLS)
    # Each start goes on with what the ones before have done.
    killer.run(clock(seconds / 2), restart=lambda: shutil.rmtree(other / "out"))
    one, other = one / "out", other / "out"
    assert rows(one / "a.jsonl") == rows(other / "a.jsonl")
    models = [contents(place / "model") for place in (one, other)]
    said = [json.loads(model.pop("export.json")) for model in models]
    for each in said:
        del each["checkpoint_sha256"]  # Orbax writes the time into its files
    assert said[0] == said[1]
    assert models[0] == models[1]
    reports = [timeless(json.loads((place / "report.json").read_text())) for place in (one, other)]
    assert reports[0] == reports[1]
    runs.assert_same_run(*(runs.everything({"output": str(place / "run")}) for place in (one, other)))
    killer.summary()
