"""The rows of benchmarks/comparison: recipes that are read, and what its tables say of the texts they train on."""

import argparse
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparison import rows
from deer_jax.data import examples
from deer_jax.data.answers import AnswerFiles
from deer_jax.diffusion.corruption import Corruption, corrupt_blocks
from deer_jax.training import align
from deer_jax.training.recipe import recipe_from
from tests.conftest import ROOT


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "comparison"))
    return importlib.import_module("benchmarks.comparison.run")  # benchmarks/gpu has a module run too


def trained(plan: rows.Plan) -> list[str]:
    return [name for name, row in plan.rows.items() if row.stages]


@pytest.mark.parametrize("plan", rows.PLANS)
def test_every_row_is_a_recipe(plan: str, program, tmp_path: Path):
    of = program.PLANS[plan]
    args = argparse.Namespace(target="target", data=tmp_path, work=tmp_path, output=tmp_path)
    for name in trained(of):
        if of.rows[name].after:
            before = program.folder_of(of.rows[name].after, 0)
            (tmp_path / before).mkdir(exist_ok=True)
            if not (tmp_path / f"{before}.json").exists():  # that run is not finished
                with pytest.raises(SystemExit, match="run that row first"):
                    program.recipe(of, name, 0, args)
            (tmp_path / f"{before}.json").touch()
        recipe_from(program.recipe(of, name, 0, args), name)


def order_of(name: str, records: AnswerFiles) -> list[int]:
    """The texts that a row of smollm2 reads, one after the other."""
    plan, met = rows.PLANS["smollm2"], []
    with rows.patched(plan, plan.rows[name]):
        for number, stage in enumerate(plan.rows[name].stages):
            settings = Corruption(stage=stage["stage"], width=4, blocks=1)
            found = align.example_batches(
                records, settings, bidirectional=False, length=4, batch=plan.common["batch"], seed=number
            )
            met += [next(found)["tokens"][:, 1] for _ in range(stage["steps"])]
    return np.concatenate(met).tolist()


def test_rows_of_smollm2_read_each_text_once_and_in_one_order(tmp_path: Path):
    path, count = tmp_path / "answers.jsonl", rows.SMOL_STEPS * rows.PLANS["smollm2"].common["batch"]
    path.write_text("".join(json.dumps({"prompt": [1], "answer": [2 + i, 1]}) + "\n" for i in range(count)))
    records = AnswerFiles([path], vocab_size=count + 2)
    one_stage, two_stages = order_of("EAGLE-3", records), order_of("DFlash I+II", records)
    assert sorted(one_stage) == list(range(2, count + 2))
    assert one_stage == two_stages


def test_masks_and_weights_that_no_recipe_says():
    rng, settings = np.random.default_rng(0), Corruption(stage="continuation", width=8, blocks=6)
    with rows.patched(rows.PLANS["ablations"], rows.ABLATIONS["suffix masks"]):
        blocks = corrupt_blocks(4, 60, settings, rng)
    assert all((np.diff(masked.astype(int)) >= 0).all() and masked[-1] for masked in blocks.masked)
    refinement = Corruption(stage="refinement", width=8, blocks=6, alpha=1.5)
    with rows.patched(rows.PLANS["ablations"], rows.ABLATIONS["alpha 1.05, raw"]):
        raw = examples.corrupt_blocks(4, 60, refinement, np.random.default_rng(0))
    normalised = corrupt_blocks(4, 60, refinement, np.random.default_rng(0))
    assert raw.total == normalised.masked.sum() < normalised.total
    np.testing.assert_array_equal(raw.weight, normalised.weight)
    assert raw.text_weight.sum() == pytest.approx(raw.total)


def test_states_of_a_text_outlive_the_process_that_read_them(tmp_path: Path):
    key, states = np.arange(3).tobytes(), {"hidden": np.ones((3, 2), np.float32), "tapped": np.zeros((3, 4))}
    assert key not in rows.StateFiles(tmp_path)
    rows.StateFiles(tmp_path)[key] = states
    again = rows.StateFiles(tmp_path)
    assert key in again
    assert np.arange(4).tobytes() not in again
    assert again[key].keys() == states.keys()
    for name, value in states.items():
        np.testing.assert_array_equal(again[key][name], value)
