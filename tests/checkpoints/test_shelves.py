"""A run's folder on an object store, cut off at every request that changes something there; on a stand-in."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax import spools
from deer_jax.checkpoints.claims import claimed
from deer_jax.checkpoints.records import DRAFTER
from deer_jax.checkpoints.runs import Checkpoints
from deer_jax.errors import InputError, RunError
from deer_jax.stores import place
from tests.fast import soak

PARAMS = {"a": jnp.arange(24.0).reshape(4, 6), "b": jnp.ones((3,))}
INPUTS = {"dtype": "float32"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(spools, "SIGN", 0.02)
    monkeypatch.setattr(spools, "DEAD", 0.2)


@pytest.fixture
def cut_off(bucket, object_store, monkeypatch):
    """Makes the bucket take no more than so many requests that change something, beside signs of life; as a kill, which
    cleans up nothing. Returns how many were made, whatever became of them."""
    made = []

    def after(most: int) -> list[str]:
        made.clear()

        def count(asked: str) -> None:
            if asked.startswith(("POST", "DELETE")):
                made.append(asked)
                if len(made) > most:
                    bucket.forbidden = 403

        monkeypatch.setattr(object_store, "before", count)
        bucket.forbidden = 0
        return made

    yield after
    monkeypatch.undo()


def begin(bucket, seed: int) -> None:
    def describe(folder):
        for name in ("config.json", "tokenizer.json", f"of-{seed}.json"):
            (folder / name).write_text(str(seed))

    output = place(f"{bucket.url}/run")
    with claimed(output, {"seed": seed}, kind=DRAFTER, essential=lambda values, _: dict(values)) as claim:
        claim.settle(INPUTS, describe)


def test_a_start_that_is_cut_off_anywhere_becomes_any_run(bucket, cut_off):
    expected = {"identity.json", "recipe.yaml", *(f"drafter/{n}.json" for n in ("config", "tokenizer", "of-1"))}
    begun = 0
    for most in range(30):
        bucket.objects.clear()
        made = cut_off(most)
        with contextlib.suppress(InputError):
            begin(bucket, 0)
        if len(made) <= most:  # all moments have been seen
            break
        cut_off(1000)
        if "run/recipe.yaml" in bucket.names():  # the last of it: a run has begun
            begin(bucket, 0)
            begun += 1
            continue
        begin(bucket, 1)
        assert bucket.names() == sorted(f"run/{name}" for name in expected)
        assert bucket.read("run/recipe.yaml") == b"seed: 1\n"
    assert begun


def save(bucket, *steps: int) -> None:
    output = place(f"{bucket.url}/run")
    with spools.lock(output, inside=True) as lock:
        checkpoints = Checkpoints(output, keep=1, lock=lock)
        for step in steps:
            checkpoints.save(step, {"params": {name: value * step for name, value in PARAMS.items()}}, None)


def newest(bucket) -> tuple[list[int], float]:
    """Steps that are whole, and how the parameters of the newest are scaled."""
    output = place(f"{bucket.url}/run")
    with spools.lock(output, inside=True) as lock:
        checkpoints = Checkpoints(output, keep=1, lock=lock)
        steps = [found.step for found in checkpoints.newest_first()]
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), PARAMS)
        found = checkpoints.restore(steps[0], {"params": like})["params"]
    for name, value in PARAMS.items():
        np.testing.assert_array_equal(found[name], value * steps[0])
    return steps, steps[0]


@soak
def test_a_save_that_is_cut_off_anywhere_leaves_a_whole_checkpoint(bucket, cut_off):
    """In writing the new one, at its record, in removing the old one, which is 11 files."""
    begin(bucket, 0)
    save(bucket, 1)
    before = {name: bucket.objects[name] for name in bucket.names()}
    made = cut_off(1000)
    save(bucket, 2)
    count = len(made)
    after = bucket.names()
    seen = set()
    for most in (1, count // 3, *range(count - 14, count - 9), count - 1):
        bucket.objects.clear()
        bucket.objects |= before
        cut_off(most)
        with contextlib.suppress(InputError, RunError):
            save(bucket, 2)
        cut_off(1000)
        steps, best = newest(bucket)
        seen.add((tuple(steps), best))
        if steps[0] == 1:
            save(bucket, 2)  # nothing stands in its way
        assert {name for name in bucket.names() if name.startswith("run/checkpoints/2/")} >= {
            name for name in after if name.endswith(("checkpoint.json", "_METADATA"))
        }
    assert seen == {((1,), 1), ((2, 1), 2), ((2,), 2)}
