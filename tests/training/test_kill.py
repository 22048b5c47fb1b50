"""kill -9 at random moments: a run goes on and ends bit for bit like one that was never killed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

import deer_jax
from tests.training import runs

KILLS = int(os.environ.get("DEER_JAX_KILLS", "2"))  # `make soak` asks for twenty
STEPS = 60


@pytest.mark.filterwarnings("ignore:.*2 prompts occur in training rows:UserWarning")
def test_kill_9(tmp_path, environment):
    folder = runs.prepare(tmp_path)
    evaluation = runs.recipe(folder)["evaluation"] | {"every": 10}
    changes = {"stages": runs.long(folder), "evaluation": evaluation, "checkpoint_every": 2}
    whole, killed = (runs.recipe(folder, name, **changes) for name in ("whole", "killed"))
    deer_jax.align(whole)

    command = [sys.executable, "-m", "deer_jax.cli.main", "align", "--recipe", str(runs.write(killed))]
    metrics, kills, rng = folder / "killed" / "metrics.jsonl", 0, random.Random(0)
    # Kills are spread over the run, each a little after the step it waits for: in a step, an evaluation or a save.
    for number in range(1, KILLS + 1):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        wanted = number * (STEPS - 2) // (KILLS + 1)
        while process.poll() is None and steps_logged(metrics) < wanted:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said
        kills += process.returncode != 0
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert kills >= (KILLS + 1) // 2  # a quick machine may finish first
    runs.assert_same_run(runs.everything(killed, STEPS), runs.everything(whole, STEPS))


def steps_logged(path) -> int:
    return path.read_text().count('"loss"') if path.exists() else 0
