"""Runs as Hugging Face folders: the drafter of an alignment run, the checkpoint that is taken, and what is refused.

Exported targets are tested where they are trained, in tests/training/test_pretrain.py.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deer_jax
from deer_jax import InputError
from deer_jax.checkpoints.huggingface import load_params, read_config, read_stop_ids
from deer_jax.checkpoints.records import DRAFTER, TARGET
from deer_jax.checkpoints.runs import Checkpoint, Checkpoints, best_of, is_run
from deer_jax.cli import export as cli
from deer_jax.errors import RunError
from deer_jax.files import Lock
from deer_jax.models.target import full_logits
from deer_jax.models.transformer import stack_layers
from deer_jax.models.weights import Weight
from tests.training import runs

READING = {"attention": "bidirectional", "separator": False, "draft_length": 4, "differing_ids": [3, 9]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of tests.training.runs, and in it a run of two steps."""
    folder = runs.prepare(tmp_path_factory.mktemp("export"))
    (folder / "target" / "generation_config.json").write_text('{"eos_token_id": [30, 31]}')
    stage = runs.recipe(folder)["stages"][0] | {"steps": 2}
    deer_jax.align(runs.recipe(folder, evaluation=None, stages=[stage], reading=READING))
    return folder


@pytest.fixture(scope="module")
def target(folder):
    return deer_jax.load_target(folder / "target")


@pytest.fixture(scope="module")
def exported(folder):
    return deer_jax.export(folder / "run", folder / "model")


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_exported_run_is_its_drafter_with_rounded_values(folder, target, tmp_path, dtype):
    output = tmp_path / "models" / "mine"
    assert deer_jax.export(str(folder / "run"), str(output), dtype=dtype) == output
    drafter = deer_jax.load_drafter(folder / "run", target=target)
    again = deer_jax.load_drafter(output, target=target)
    assert again.method == drafter.method
    assert dataclasses.asdict(again.method.reading).items() >= (READING | {"differing_ids": (3, 9)}).items()
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), drafter.params)
    assert jax.tree.structure(again.params) == jax.tree.structure(rounded)
    for a, b in zip(leaves(again.params), leaves(rounded), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(leaves(again.params), leaves(drafter.params), strict=True)) == (
        dtype == "bfloat16"
    )
    names = {path.name for path in output.iterdir()}
    assert names == {"config.json", "export.json", "generation_config.json", "model.safetensors"}


def test_transformers_reads_the_backbone(folder, exported):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager", dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, runs.V, (2, 20)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    config = read_config(exported)
    extra = {"deer_jax.mask_and_separator": Weight((2, config.width), (None, None))}
    params, found = load_params(exported, config, jnp.float32, scan=True, extra=extra)
    assert found.keys() == extra.keys()
    np.testing.assert_allclose(full_logits(params, tokens, config), expected, rtol=0, atol=1e-4)


def test_the_best_checkpoint_is_exported_and_of_that_its_average(folder, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    drafter = deer_jax.load_drafter(run, target=deer_jax.load_target(folder / "target"))
    stacked = stack_layers(drafter.params)
    values = {3: (0.5, 1.0), 4: (2.0, 2.0), 5: (2.0, 3.0), 6: (1.0, 4.0), 7: (None, 5.0)}
    with Lock(run, inside=True) as lock:
        checkpoints = Checkpoints(run, keep=9, lock=lock)
        for step, (score, value) in values.items():
            filled = jax.tree.map(lambda x, value=value: jnp.full_like(x, value), stacked)
            checkpoints.save(step, {"params": filled, "average": jax.tree.map(jnp.negative, filled)}, score)
        found = checkpoints.newest_first()
    assert [each.step for each in found][:5] == [7, 6, 5, 4, 3]
    assert best_of(found) == Checkpoint(5, 2.0)
    config = read_config(run / "drafter")
    params, _ = load_params(
        deer_jax.export(run, tmp_path / "model"), config, jnp.float32, scan=True,
        extra={"deer_jax.mask_and_separator": Weight((2, config.width), (None, None))},
    )  # fmt: skip
    assert {float(x) for leaf in leaves(params) for x in leaf.reshape(-1)} == {-3.0}


def state_of(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_the_same_export_again_is_done(folder, tmp_path, capsys):
    output = tmp_path / "model"
    deer_jax.export(folder / "run", output)
    before = state_of(output)
    said = json.loads((output / "export.json").read_text())
    assert {"source": "run", "kind": "drafter", "step": 2, "dtype": "bfloat16"}.items() <= said.items()
    digests = {name: hashlib.sha256(content).hexdigest() for name, (_, content) in before.items()}
    del digests["export.json"]
    assert {name: each["sha256"] for name, each in said["files"].items()} == digests

    assert deer_jax.export(folder / "run", output) == output
    moved = shutil.copytree(folder / "run", tmp_path / "moved")
    assert deer_jax.export(moved, output) == output
    argv = ["--source", str(folder / "run"), "--output", str(output)]
    cli.run(argv)
    assert f"{output}: is complete, nothing to do" in capsys.readouterr().err
    assert state_of(output) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_not_the_same_export_is_not_taken_for_it(folder, tmp_path):
    def refused(source, output, **options):
        before = state_of(output)
        with pytest.raises(InputError, match="exists and is not an empty folder; remove it or choose another"):
            deer_jax.export(source, output, **options)
        assert state_of(output) == before

    whole = deer_jax.export(folder / "run", tmp_path / "whole")
    refused(folder / "run", whole, dtype="float32")
    for number, spoil in enumerate((
        lambda path: (path / "model.safetensors").unlink(),
        lambda path: (path / "model.safetensors").write_bytes(b"short"),
        lambda path: (path / "export.json").write_text("{"),
        lambda path: (path / "export.json").write_text('{"files": 3}'),
        lambda path: (path / "export.json").unlink(),
    )):  # fmt: skip
        spoiled = Path(shutil.copytree(whole, tmp_path / str(number)))
        spoil(spoiled)
        refused(folder / "run", spoiled)
    run = shutil.copytree(folder / "run", tmp_path / "run")
    drafter = deer_jax.load_drafter(run, target=deer_jax.load_target(folder / "target"))
    with Lock(run, inside=True) as lock:
        Checkpoints(run, keep=9, lock=lock).save(3, {"params": stack_layers(drafter.params)}, 1.0)
    refused(run, whole)  # of a later checkpoint


def test_values_that_are_not_finite_are_not_exported(folder, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    drafter = deer_jax.load_drafter(run, target=deer_jax.load_target(folder / "target"))
    params = stack_layers(drafter.params)
    params["layers"]["q"] = params["layers"]["q"].at[1, 0, 0].set(jnp.inf)
    with Lock(run, inside=True) as lock:
        Checkpoints(run, keep=9, lock=lock).save(3, {"params": params}, 1.0)
    with pytest.raises(RunError, match=r"\Amodel.layers.1.self_attn.q_proj.weight has values that are not finite"):
        deer_jax.export(run, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_one_export_at_a_time(folder, tmp_path):
    output = tmp_path / "model"
    with Lock(output), pytest.raises(InputError, match=rf"model: is being written by process {os.getpid()} on "):
        deer_jax.export(folder / "run", output)
    (tmp_path / ".model.partial-0123abcd").mkdir()  # of a process that was killed
    deer_jax.export(folder / "run", output)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_exported_drafter_stops_where_its_target_does(exported):
    assert read_stop_ids(exported) == (30, 31)


def test_best_of():
    assert best_of([]) is None
    assert best_of([Checkpoint(1, None), Checkpoint(2, None)]) is None
    assert best_of([Checkpoint(3, None), Checkpoint(2, -1.5), Checkpoint(1, -2.0)]) == Checkpoint(2, -1.5)
    assert best_of([Checkpoint(3, 1.0), Checkpoint(1, 1.0), Checkpoint(2, 1.0)]) == Checkpoint(3, 1.0)


def test_what_a_run_is(folder):
    assert is_run(folder / "run", DRAFTER)
    assert not is_run(folder / "run", TARGET)
    assert not is_run(folder, TARGET)  # has target/, but no recipe
    assert not is_run(folder / "none", DRAFTER)


def test_what_cannot_be_exported(folder, exported, tmp_path):
    def refused(source, output, message, **options):
        with pytest.raises(InputError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
            deer_jax.export(source, output, **options)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("everything")
    refused(folder / "run", tmp_path / "mine", "mine: exists and is not an empty folder; remove it or choose another")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    for source in (folder / "none", folder, folder / "target", exported):
        refused(source, tmp_path / "model", f"{source}: is no folder of a pretrain or align run; give the `output` of")
    for source, words in (("", "is no folder of"), ("x" * 5000, "File name too long"), ("a\0b", "null byte")):
        refused(source, tmp_path / "model", words)
    refused(folder / "run", "", "output is empty: name the folder to make")
    refused(folder / "run", tmp_path / "mine" / "thesis.txt" / "model", "model: cannot be written: ")
    refused(folder / "run", "~nobody-of-this-name/x", "no such home folder")
    refused(folder / "run", tmp_path / "model", "dtype must be bfloat16 or float32, got 'int8'", dtype="int8")
    new = shutil.copytree(folder / "run", tmp_path / "new", ignore=shutil.ignore_patterns("checkpoints"))
    refused(new, tmp_path / "model", "new: the run has no checkpoint yet; training writes the first one later")
    assert not (tmp_path / "model").exists()
    (tmp_path / "empty").mkdir()
    assert deer_jax.export(folder / "run", tmp_path / "empty") == tmp_path / "empty"
