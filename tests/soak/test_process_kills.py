"""kill -9 of one of four processes at random moments, restarts with as many and with half as many: `make soak`."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.fast import KILLS, soak
from tests.training import runs
from tests.training.test_processes import address

STEPS = 60

pytestmark = soak


def run(values, environment, count, devices, kill_at=None):
    """So many processes of so many devices each, of which one is killed when that many steps are done."""
    where, path, rng = address(), runs.write(values), random.Random(kill_at)
    command = [sys.executable, "-m", "deer_jax.cli.main", "align", "--recipe", str(path)]
    several = ["--coordinator", where, "--processes", str(count), "--process"]
    kept = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    started = [
        subprocess.Popen(
            command + [*several, str(i)] * (count > 1), env=environment | kept, text=True, stderr=subprocess.PIPE
        )
        for i in range(count)
    ]
    metrics = Path(values["output"]) / "metrics.jsonl"
    while kill_at is not None and all(each.poll() is None for each in started):
        if metrics.exists() and metrics.read_text().count('"loss"') >= kill_at:
            time.sleep(rng.random() * 0.3)
            rng.choice(started).send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    said = [each.communicate()[1] for each in started]
    return [each.returncode for each in started], said


@pytest.mark.parametrize("half", [False, True])
def test_four_processes_of_two_devices(tmp_path, environment, half):
    folder = runs.prepare(tmp_path)
    changes = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "batch": 8, "stages": runs.long(folder), "evaluation": None}
    alone, whole, killed = (runs.recipe(folder, name, **changes) for name in ("alone", "whole", "killed"))
    for values, count in ((alone, 1), (whole, 4)):
        codes, said = run(values, environment, count, 8 // count)
        assert codes == [0] * count, said
    kills = 0
    for number in range(KILLS):
        count = 2 if half and number % 2 else 4
        codes, said = run(killed, environment, count, 8 // count, kill_at=(number + 1) * STEPS // (KILLS + 1))
        kills += -signal.SIGKILL in codes
    codes, said = run(killed, environment, 4, 2)
    assert codes == [0] * 4, said
    one, all_four, found = (runs.everything(values, STEPS) for values in (alone, whole, killed))
    if not half:
        runs.assert_same_run(found, all_four)
    furthest = 0.0
    for other in (all_four, found):
        for a, b in zip(other["arrays"], one["arrays"], strict=True):
            furthest = max(furthest, float(np.abs(a - b).max()))
    print(f"\n4 x 2 devices, half as many: {half}: {kills} kills, at most {furthest:.1e} from one process")
    assert furthest < 1e-5
    assert kills > KILLS // 2
