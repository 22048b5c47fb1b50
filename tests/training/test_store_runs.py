"""Runs whose folder is on an object store: on a stand-in, each as the same run in a folder here."""

import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import deer_jax
from deer_jax import load_drafter, load_target, spools
from tests.training import runs


def align(values, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*2 prompts occur in training rows and are left out")
        return deer_jax.align(values, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("stores"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(spools, "SIGN", 0.1)
    monkeypatch.setattr(spools, "DEAD", 0.4)


@pytest.fixture(scope="module")
def local(folder):
    """The run in a folder here, never stopped."""
    evaluation = runs.recipe(folder)["evaluation"] | {"temperatures": [0]}
    values = runs.recipe(folder, "whole", stages=runs.averaged(folder), evaluation=evaluation)
    align(values)
    return values


def stop_after(count):
    """A `should_stop` that says so after so many steps."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= count


def brought_here(bucket, name: str, folder: Path) -> Path:
    """A copy of a folder of the bucket, as `gcloud storage cp` makes it."""
    for path, content in bucket.contents(f"{name}/").items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder / name


@pytest.mark.representative
def test_a_run_that_is_stopped_goes_on_and_ends_as_one_here(folder, local, bucket, tmp_path):
    bucket.put_tree(folder / "target", "in/target")
    for name in ("answers.jsonl", "held_out.jsonl"):
        bucket.put(f"in/{name}", (folder / name).read_bytes())
    evaluation = local["evaluation"] | {"prompts": f"{bucket.url}/in/held_out.jsonl"}
    values = local | {
        "target": f"{bucket.url}/in/target", "answers": [f"{bucket.url}/in/answers.jsonl"], "evaluation": evaluation,
        "output": f"{bucket.url}/run",
    }  # fmt: skip
    first = align(values, should_stop=stop_after(5))
    assert (str(first.output), first.step, first.finished) == (values["output"], 5, False)
    report = align(values)
    assert report.finished
    assert "run/.lock" not in bucket.names()
    here = brought_here(bucket, "run", tmp_path)
    runs.assert_same_run(runs.everything(values | {"output": str(here)}), runs.everything(local))
    target = load_target(values["target"])
    found = [load_drafter(each, target=target) for each in (values["output"], here, local["output"])]
    for other in found[:2]:
        for a, b in zip(jax.tree.leaves(other.params), jax.tree.leaves(found[2].params), strict=True):
            np.testing.assert_array_equal(a, b)
    assert found[0].name == "run"
