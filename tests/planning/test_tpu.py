"""The programs for TPU slices keep to what they may move: a few of the cases of `benchmarks/tpu_programs.py`, compiled.

libtpu lies beside the environment (`make test` installs it); without it these tests are skipped.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBTPU = Path(os.environ.get("DEER_JAX_LIBTPU") or ROOT / ".cache" / "libtpu" / "libtpu" / "libtpu.so")

pytestmark = pytest.mark.skipif(
    not LIBTPU.is_file(), reason=f"no {LIBTPU}: make test installs it on Linux x86_64, or set DEER_JAX_LIBTPU"
)


@functools.cache
def figures(case: str, *options: str) -> dict[str, Any]:
    """What the command says of a case; it runs in a process of its own, as this one has looked for a TPU already."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tpu_programs.py"), "--case", case, *options]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        done = subprocess.run(
            [*command, "--json", str(file)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "DEER_JAX_LIBTPU": str(LIBTPU)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (found,) = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert "error" not in found, found["error"]
    return found


def count(found: dict[str, Any]) -> float:
    return sum(total["count"] for total in found["collectives"].values())


ROUND = "8b-drafter-b1-4k-v5e"  # Qwen3-8B and the 0.5 B drafter on 8 devices, tensor = 8
CONDITIONED = "8b-dflash2-b1-4k-v5e"  # and a drafter that reads the target, with convolutions and a path selector
EXPERTS = "30b-fixed-b1-4k-v5e"  # Qwen3-30B-A3B on the same
STEP = "train-2x2x1"  # the drafter's step on 4 devices, data = 2, fsdp = 2


@pytest.mark.parametrize("case", [ROUND, CONDITIONED])
def test_a_round_reads_weights_and_caches_once(case):
    found = figures(case)
    assert found["ratio"] <= 1.02
    assert found["round_copies_gb"] == 0
    assert count(found) <= 150
    assert len(found["unresolved"]) == 1  # the rounds


@pytest.mark.parametrize("case", [ROUND, CONDITIONED])
def test_a_call_of_rounds_copies_nothing(case):
    found = figures(case)
    assert found["not_aliased_gb"] == 0
    assert found["once_gb"] <= 0.001


def test_a_round_reads_active_experts_alone():
    found = figures(EXPERTS)
    assert found["ratio"] <= 1.05
    assert count(found) <= 250


def test_a_training_step_computes_nothing_twice_but_what_it_made_again():
    assert figures(STEP, "--quick")["flops_ratio"] <= 1.3


def test_a_training_step_gathers_weights_and_reduces_gradients_alone():
    found = figures(STEP, "--quick")
    assert found["collectives_gb"] <= 1.1 * found["allowed_gb"]
