"""Runs as Hugging Face folders: the drafter of an alignment run, the checkpoint that is taken, and what is refused.

Exported targets are tested where they are trained, in tests/training/test_pretrain.py.
"""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deer_jax
from deer_jax import InputError
from deer_jax.checkpoints.huggingface import load_params, read_config
from deer_jax.checkpoints.runs import DRAFTER, TARGET, Checkpoint, Checkpoints, best_of, is_run
from deer_jax.files import Lock
from deer_jax.models.target import full_logits
from deer_jax.models.transformer import stack_layers
from tests.training import runs

READING = {"attention": "bidirectional", "separator": False, "draft_length": 4, "differing_ids": [3, 9]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of tests.training.runs, and in it a run of two steps."""
    folder = runs.prepare(tmp_path_factory.mktemp("export"))
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
    assert dataclasses.asdict(again.method.config).items() >= (READING | {"differing_ids": (3, 9)}).items()
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
    extra = {"deer_jax.mask_and_separator": (2, config.width)}
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
        extra={"deer_jax.mask_and_separator": (2, config.width)},
    )  # fmt: skip
    assert {float(x) for leaf in leaves(params) for x in leaf.reshape(-1)} == {-3.0}


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
    refused(folder / "run", tmp_path / "model", "dtype must be bfloat16 or float32, got 'int8'", dtype="int8")
    new = shutil.copytree(folder / "run", tmp_path / "new", ignore=shutil.ignore_patterns("checkpoints"))
    refused(new, tmp_path / "model", "new: the run has no checkpoint yet; training writes the first one later")
    assert not (tmp_path / "model").exists()
    (tmp_path / "empty").mkdir()
    assert deer_jax.export(folder / "run", tmp_path / "empty") == tmp_path / "empty"
