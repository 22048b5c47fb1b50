"""Runs of EAGLE-3, and of the third stage: trained, exported, and refused where they cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest

import deer_jax
from deer_jax.drafters.eagle3 import Eagle3Method
from deer_jax.errors import InputError
from deer_jax.training.metrics import read_metrics
from tests.training import runs

STAGE = {"steps": 3, "learning_rate": 1e-2, "warmup": 1, "blocks": 4}
EAGLE = {
    "drafter": "random:1", "reading": None, "eagle3": {"taps": [0], "draft_length": 3, "draft_vocab": 20},
    "stages": [STAGE | {"stage": "continuation", "least_rate": 1.0, "loss": {"kl": 1}}], "evaluation": None,
}  # fmt: skip
MARKOV = {"mask": runs.V - 1, "draft_length": 3, "head": "markov", "rank": 4, "layout": "next_token"}
OWN = [STAGE | {"stage": "continuation", "least_rate": 1.0, "loss": {"tv": 1}}, STAGE | {"stage": "acceptance"}]
THIRD = {"drafter": "random:1", "reading": None, "conditioned": MARKOV, "stages": OWN, "evaluation": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = runs.prepare(tmp_path_factory.mktemp("runs"))
    rows = [json.loads(line) for line in (found / "answers.jsonl").read_text().splitlines()]
    for row in rows:  # the mask stands in no text
        row |= {name: [token % (runs.V - 1) for token in row[name]] for name in ("prompt", "answer")}
    (found / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def train(folder: Path, output: str, **changes):
    return deer_jax.align(runs.recipe(folder, output, **changes))


def draft_of(drafter, target) -> np.ndarray:
    return np.asarray(drafter.draft_logits(target, [[1, 2, 3]], [4], draft_length=3))


def test_eagle3_is_trained_and_goes_into_every_layout_that_can_say_it(folder, tmp_path):
    train(folder, "eagle", **EAGLE)
    target = deer_jax.load_target(folder / "target")
    drafter = deer_jax.load_drafter(folder / "eagle", target=target)
    assert isinstance(drafter.method, Eagle3Method)
    assert drafter.method.draft_vocab == 20
    for layout in ("deer_jax", "speculators"):
        output = deer_jax.export(
            folder / "eagle", tmp_path / layout, dtype="float32", layout=layout, target=folder / "target"
        )
        again = deer_jax.load_drafter(output, target=target)
        np.testing.assert_array_equal(draft_of(again, target), draft_of(drafter, target))
    with pytest.raises(InputError, match=r"layout eagle3: taps \[0\] cannot be said in this layout"):
        deer_jax.export(folder / "eagle", tmp_path / "eagle3", layout="eagle3", target=folder / "target")


def test_the_third_stage_is_trained(folder):
    report = train(folder, "third", **THIRD)
    assert report.steps == 6
    losses = [line["loss"] for line in read_metrics(folder / "third") if "loss" in line]
    assert len(losses) == 6
    assert all(loss > 0 for loss in losses)  # what is not accepted of each place, weighted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (EAGLE | {"conditioned": MARKOV}, "conditioned and eagle3 begin drafters of two kinds"),
        (EAGLE | {"reading": {"draft_length": 3}}, "reading is for a standalone drafter, and eagle3 begins one"),
        (EAGLE | {"drafter": "random:2"}, "EAGLE-3 has one layer, which begins with random weights: say drafter"),
        (EAGLE | {"drafter": "from-target:0"}, "EAGLE-3 has one layer, which begins with random weights"),
        (EAGLE | {"eagle3": {}}, r"too few for the usual taps: name them \(eagle3.taps\)"),
        (EAGLE | {"eagle3": {"tap": [0]}}, "unknown key 'tap', did you mean 'taps'"),
        (EAGLE | {"stages": [STAGE | {"stage": "acceptance"}]}, "the stage acceptance is for block drafters"),
        (THIRD | {"stages": [OWN[1] | {"loss": {"kl": 1}}]}, "acceptance has a loss of its own: leave loss out"),
        (
            THIRD | {"conditioned": MARKOV | {"head": "selector", "candidates": 4}, "stages": OWN[1:]},
            "the stage acceptance is for block drafters .* with no head or a Markov head",
        ),
        (
            {"reading": {"attention": "bidirectional", "draft_length": 3}, "stages": OWN[1:], "evaluation": None},
            "the stage acceptance is for block drafters",
        ),
    ],
)  # fmt: skip
def test_what_a_recipe_cannot_have_is_one_line(folder, changes, message):
    with pytest.raises(InputError, match=message):
        train(folder, "refused", **changes)
    assert not (folder / "refused").exists()
