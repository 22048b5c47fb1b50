"""Runs of a standalone drafter with a head: begun, gone on with, evaluated, loaded, exported; and what is refused."""

import shutil

import jax
import numpy as np
import pytest

import deer_jax
from deer_jax import InputError
from deer_jax.checkpoints.runs import CHECKPOINTS
from deer_jax.drafters.heads import HEAD, Markov
from tests.kinds import CONDITIONED, conditioned
from tests.training import runs

BEGUN = {"kind": "markov", "rank": 4, "form": "rnn", "confidence": True}


def recipe(folder, **changes):
    """Four steps, of tokens and of the confidence."""
    stage = runs.recipe(folder)["stages"][0] | {"steps": 4, "loss": {"ce": 1, "confidence": 0.5}}
    evaluation = {"prompts": str(folder / "held_out.jsonl"), "max_new_tokens": 8, "temperatures": [0]}
    return runs.recipe(folder, stages=[stage], evaluation=evaluation, draft_head=BEGUN) | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of tests.training.runs, and in it a run that was stopped on its way and gone on with."""
    folder = runs.prepare(tmp_path_factory.mktemp("heads"))
    unseen = (folder / "held_out.jsonl").read_text().splitlines(keepends=True)[2:]
    (folder / "held_out.jsonl").write_text("".join(unseen))
    asked = []
    deer_jax.align(recipe(folder), should_stop=lambda: asked.append(1) or len(asked) == 2)
    report = deer_jax.align(recipe(folder))
    assert (report.step, report.finished, len(asked)) == (4, True, 2)
    assert list(report.evaluations) == [4]
    shutil.rmtree(folder / "run" / CHECKPOINTS / "0")  # the best so early, and not trained
    return folder


def test_a_run_trains_its_head(folder):
    drafter = deer_jax.load_drafter(folder / "run", target=deer_jax.load_target(folder / "target"))
    assert drafter.method.head == Markov(rank=4, form="rnn", has_confidence=True)
    assert drafter.draft_length == 4
    for name in ("w2", "joint_bias", "confidence_bias"):  # which begin with zeros
        assert np.abs(drafter.params[HEAD][name]).max() > 0, name


def test_a_run_is_exported_with_its_head(folder, tmp_path):
    target = deer_jax.load_target(folder / "target")
    trained = deer_jax.load_drafter(folder / "run", target=target)
    again = deer_jax.load_drafter(deer_jax.export(folder / "run", tmp_path / "model", dtype="float32"), target=target)
    assert again.method == trained.method
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_head": {"kind": "eagle"}}, "recipe: draft_head: kind must be one of none, selector, markov, got 'eag"),
        ({"draft_head": {"rank": 4}}, "recipe: draft_head: missing kind"),
        ({"draft_head": BEGUN | {"rank": 0}}, "recipe: draft_head: rank must be a whole number"),
        ({"draft_head": BEGUN | {"candidates": 3}}, "recipe: draft_head: a head of kind markov has no candidates; lea"),
        ({"draft_head": {"kind": "none", "rank": 3}}, "recipe: draft_head: a head of kind none has no rank; leave it"),
        ({"draft_head": {"kind": "markov", "rank": 4}}, "loss: confidence is for drafters that have a confidence head"),
        (
            {"stages": [{"steps": 4, "stage": "continuation"}]},
            "confidence: true begins a head that no stage trains; give `confidence` a weight in the loss of a stage",
        ),
        ({"draft_head": BEGUN | {"from": "rnn"}}, "recipe: draft_head: unknown key 'from', did you mean 'form'?"),
        (
            {"draft_head": {"kind": "selector", "candidates": 33, "confidence": True}},
            "the selector chooses among 33 ids, more than the vocabulary of 32",
        ),
        (
            {"reading": {"attention": "bidirectional"}},
            "a drafter whose attention is bidirectional is not trained on blocks, so it cannot have a head; set",
        ),
        (
            {"reading": {"differing_ids": [3]}},
            "a head reads and proposes the target's 32 ids, and this drafter, of 32, does not have the same ones",
        ),
        (
            {"reading": None, "conditioned": {"mask": 31}},
            "recipe: draft_head is for a standalone drafter; say which head a conditioned one has by conditioned.head",
        ),
        ({"reading": None, "drafter": "{folder}/run"}, "{folder}/run: has a head already, which is trained on; leave"),
        ({"reading": None, "drafter": "{folder}/reads"}, "reads: is no standalone drafter, whose head draft_head beg"),
    ],
)
def test_heads_that_a_drafter_cannot_have_are_refused_in_one_line(folder, tmp_path, changes, message):
    if changes.get("drafter") == "{folder}/reads" and not (folder / "reads").exists():
        target = deer_jax.load_target(folder / "target")
        deer_jax.save_drafter(folder / "reads", conditioned(target, CONDITIONED["vanilla"], ids=range(32)))
    values = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(InputError) as error:
        deer_jax.align(recipe(folder, **values) | {"output": str(tmp_path / "run")})
    assert str(error.value).removeprefix(f"{folder}/").startswith(message.removeprefix("{folder}/"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
