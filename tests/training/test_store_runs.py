"""Runs whose folder is on an object store: on a stand-in, each as the same run in a folder here."""

import os
import warnings

import jax
import numpy as np
import pytest

import deer_jax
from deer_jax import export, load_drafter, load_target, pretrain, spools
from deer_jax.bench.curves import read_curves
from deer_jax.checkpoints.export import is_exported
from deer_jax.errors import InputError, RunError
from deer_jax.stores import place
from tests.training import pretraining, runs


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
    here = bucket.get_tree("run", tmp_path)
    runs.assert_same_run(runs.everything(values | {"output": str(here)}), runs.everything(local))
    target = load_target(values["target"])
    found = [load_drafter(each, target=target) for each in (values["output"], here, local["output"])]
    for other in found[:2]:
        for a, b in zip(jax.tree.leaves(other.params), jax.tree.leaves(found[2].params), strict=True):
            np.testing.assert_array_equal(a, b)
    assert found[0].name == "run"
    curves, expected = read_curves([values["output"]]), read_curves([local["output"]])
    assert [(each.steps, each.acceptance_length) for each in curves] == [
        (each.steps, each.acceptance_length) for each in expected
    ]


@pytest.fixture(scope="module")
def stopped(folder, object_store):
    """What a run on the store holds that was stopped at step 5, by name, to be put into other buckets."""
    bucket = object_store.new_bucket()
    align(short(folder, bucket), should_stop=stop_after(5))
    return bucket.contents("run/")


def short(folder, bucket, **changes) -> dict:
    """A recipe of one stage without evaluations, whose run is on the store."""
    stages = runs.averaged(folder)[:1]
    return runs.recipe(folder, stages=stages, evaluation=None, **changes) | {"output": f"{bucket.url}/run"}


@pytest.fixture
def left(bucket, stopped):
    """The bucket with the run that was stopped."""
    for name, content in stopped.items():
        bucket.put(name, content)
    return bucket


def steps(bucket) -> list[str]:
    return sorted({name.split("/")[2] for name in bucket.names("run/checkpoints/")}, key=int)


def test_what_a_kill_left_is_swept_and_old_checkpoints_go(folder, left):
    assert steps(left) == ["4", "5"]
    del left.objects["run/checkpoints/5/checkpoint.json"]  # it was still being written
    left.put("run/checkpoints/6/params/d/half", b"half")
    shown = []
    report = align(short(folder, left), progress=lambda step, steps, note: shown.append((step, note)))
    assert report.finished
    assert (4, "going on from step 4") in shown
    assert steps(left) == ["4", "6"]  # keep: 2
    assert all(f"run/checkpoints/{step}/checkpoint.json" in left.names() for step in steps(left))


def test_a_damaged_checkpoint_is_set_aside(folder, left):
    files = {name.removeprefix("run/checkpoints/5/") for name in left.names("run/checkpoints/5/")}
    file = max(left.names("run/checkpoints/5/params"), key=lambda name: len(left.read(name)))
    before = left.read(file)
    left.put(file, before[:-1] + bytes([before[-1] ^ 1]))
    message = r"step 5 is damaged \(.*: its content is not what was written\) .*/damaged-5-1; that of step 4 is taken"
    with pytest.warns(UserWarning, match=message):
        assert align(short(folder, left)).finished
    assert {name.removeprefix("run/damaged-5-1/") for name in left.names("run/damaged-5-1/")} == files
    assert steps(left) == ["4", "6"]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_was_copied_to_a_store_goes_on_there(folder, bucket, tmp_path, damaged):
    values = short(folder, bucket)
    align(values | {"output": str(tmp_path / "run")}, should_stop=stop_after(5))
    bucket.put_tree(tmp_path / "run", "run")
    if not damaged:
        assert align(values).finished
        return
    file = "run/checkpoints/5/params/_METADATA"
    bucket.put(file, bucket.read(file)[:-1] + b" ")
    with pytest.warns(UserWarning, match="the checkpoint of step 5 is damaged"):
        align(values, should_stop=stop_after(1))


def test_a_run_on_a_store_is_its_own(folder, left):
    before = left.contents()

    def refused(kind, match, **changes):
        with pytest.raises(kind, match=match) as caught:
            align(short(folder, left, **changes))
        assert "\n" not in str(caught.value)
        assert left.contents() == before

    refused(InputError, f"{left.url}/run: holds another run: seed was 0, is 1. Name another output", seed=1)
    with spools.lock(place(f"{left.url}/run"), inside=True):
        before = left.contents()
        refused(InputError, f"{left.url}/run: is being written by process {os.getpid()} on")
    before = left.contents()
    left.forbidden = 403
    refused(InputError, rf"{left.url}/run/.lock: permission denied \(.*; log in")
    left.forbidden = 0
    for name in ("identity.json", "recipe.yaml"):
        del left.objects[f"run/{name}"]
    before = left.contents()
    refused(InputError, f"{left.url}/run: is no run but holds checkpoints, drafter, metrics.jsonl, ...; name another")


def test_a_beginning_that_was_killed_becomes_another_run(folder, left):
    for name in left.names("run/"):
        if not name.startswith(("run/identity.json", "run/drafter/")):
            del left.objects[name]
    left.put("run/drafter/leftover.json", b"{}")
    assert align(short(folder, left, seed=3)).finished
    assert "run/drafter/leftover.json" not in left.names()


def test_a_store_that_takes_no_checkpoint_ends_a_run_with_its_line(folder, left, object_store, monkeypatch):
    def stop(asked: str) -> None:
        if asked.startswith("POST") and len(left.names("run/checkpoints/6")) > 2:
            left.forbidden = 403

    with monkeypatch.context() as patch:
        patch.setattr(object_store, "before", stop)
        with pytest.raises(RunError, match=f"{left.url}/run/checkpoints/6: cannot be written: .*") as caught:
            align(short(folder, left))
    assert "\n" not in str(caught.value)
    left.forbidden = 0
    assert align(short(folder, left)).finished


def test_an_export_goes_to_a_store_and_comes_from_one(folder, left, tmp_path):
    here = left.get_tree("run", tmp_path)
    export(here, tmp_path / "local", dtype="float32")
    url = f"{left.url}/models/mine"
    assert str(export(f"{left.url}/run", url, dtype="float32")) == url
    expected = {f"models/mine/{path.name}": path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert left.contents("models/") == expected
    assert is_exported(here, url, dtype="float32")
    target = load_target(folder / "target")
    one, other = (load_drafter(each, target=target) for each in (url, tmp_path / "local"))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(a, b)
    generation = left.objects["models/mine/config.json"].generation
    export(f"{left.url}/run", url, dtype="float32")  # is there already
    assert left.objects["models/mine/config.json"].generation == generation
    with pytest.raises(InputError, match=f"{url}: exists and is not an empty folder; remove it or choose another"):
        export(here, url, dtype="bfloat16")
    del left.objects["models/mine/export.json"]  # as a kill leaves it
    left.put("models/mine/.unfinished", b"")
    left.put("models/mine/rest", b"")
    export(here, url, dtype="float32")
    assert left.contents("models/") == expected


def test_a_pretrained_target_and_its_openings_are_on_the_store(bucket, tmp_path):
    folder = pretraining.prepare(tmp_path)
    bucket.put_tree(folder / "texts", "texts")
    changes = {"steps": 3, "accumulate": 1}
    local = pretraining.recipe(folder, "local", **changes)
    values = local | {"texts": f"{bucket.url}/texts", "output": f"{bucket.url}/run"}
    pretrain(local)
    assert not pretrain(values, should_stop=stop_after(1)).finished
    generation = bucket.objects["run/prompts.jsonl"].generation
    assert pretrain(values).finished
    assert bucket.objects["run/prompts.jsonl"].generation == generation
    for name in ("prompts.jsonl", "held_out.jsonl", "target/tokenizer.json"):
        assert bucket.read(f"run/{name}") == (folder / "local" / name).read_bytes()
    export(values["output"], tmp_path / "model", dtype="float32")
    export(local["output"], tmp_path / "expected", dtype="float32")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "expected")]
    assert weights[0] == weights[1]
