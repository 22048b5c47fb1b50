"""What the target says of the texts, kept between epochs: the same as when it is computed in every step."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deer_jax
from deer_jax.errors import InputError
from deer_jax.processes import Share
from deer_jax.sharding import batch_placement, make_mesh
from deer_jax.training.metrics import read_metrics
from deer_jax.training.target_states import GIB, TargetStates
from tests.training import runs

MASK, T = runs.V - 1, 24
BYTES = T * 3 * runs.MODEL.width * 4  # of a text: the final states and two taps, float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight texts without the mask: of two steps each is met again in the next two."""
    folder = runs.prepare(tmp_path_factory.mktemp("states"))
    rows = [{"prompt": [i, i + 1], "answer": [(i + 2 + j) % MASK for j in range(20)], "ended": False} for i in range(8)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def losses(folder: Path, output: str, **changes) -> list[float]:
    """Of eight steps of two stages; the second one needs the target's distributions."""
    stage = {"steps": 4, "stage": "continuation", "least_rate": 1.0, "blocks": 4, "learning_rate": 1e-2}
    conditioned = {"drafter": "random:1", "reading": None, "conditioned": {"taps": [0, 1], "mask": MASK,
                   "draft_length": 4}}  # fmt: skip
    stages = {"stages": [stage, stage | {"loss": {"kl": 1}}], "evaluation": None}
    values = runs.recipe(folder, output, **(conditioned | stages | changes))
    deer_jax.align(values)
    return [line["loss"] for line in read_metrics(Path(values["output"]))]


@pytest.fixture(scope="module")
def computed(folder) -> list[float]:
    return losses(folder, "computed")


def test_training_is_the_same(folder, computed):
    found = losses(folder, "kept", keep_states=1, mesh={"data": 2})
    assert len(found) == 8
    assert found == pytest.approx(computed, abs=2e-5)


def test_what_is_kept_changes_no_bit(folder, computed):
    with pytest.warns(UserWarning, match=r"keep_states has room for the states of 5 texts, of 0\.0 MiB each"):
        bounded = losses(folder, "bounded", keep_states=5.5 * BYTES / GIB)
    assert bounded == losses(folder, "all", keep_states=1)
    assert bounded == pytest.approx(computed, abs=2e-5)


@pytest.mark.parametrize("mesh", [None, make_mesh(data=2)])
def test_a_text_that_is_kept_is_not_read_again(folder, mesh):
    target = deer_jax.load_target(folder / "target", mesh=mesh)
    states = TargetStates(target, (0,), hidden=True, gib=1.0)
    share = Share(batch_placement(mesh or make_mesh()), 2, 4)
    batch = {"tokens": np.arange(4 * T, dtype=np.int32).reshape(4, T) % runs.V, "length": np.full(4, T)}
    found = states.add(batch, share, hidden=True)
    assert np.isfinite(found["hidden"]).all()
    states.target = dataclasses.replace(target, params=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), target.params))
    shuffled = {name: value[::-1] for name, value in batch.items()}
    again = states.add(shuffled, share, hidden=True)
    for name in ("hidden", "tapped"):
        np.testing.assert_array_equal(again[name], found[name][::-1])
    other = states.add(batch | {"tokens": batch["tokens"] * 0}, share, hidden=True)
    assert np.isnan(other["hidden"]).all()


def test_where_nothing_reads_the_target_there_is_nothing_to_keep(folder):
    with pytest.raises(InputError, match="keep_states: no stage reads the target's states"):
        deer_jax.align(runs.recipe(folder, "nothing", keep_states=1))
    with pytest.raises(InputError, match="keep_states must be above 0"):
        deer_jax.align(runs.recipe(folder, "nothing", keep_states=0))
