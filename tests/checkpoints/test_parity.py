"""Folders written by transformers give the logits of transformers, and folders written here go back the same way."""

import dataclasses
import functools
import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import tree_util

from deer_jax.checkpoints.huggingface import load_params, read_config, save_folder
from deer_jax.checkpoints.load import load_target
from deer_jax.config import Rope
from deer_jax.models.target import full_logits
from deer_jax.models.transformer import abstract_params, stack_layers, unstack_layers
from deer_jax.sharding import Heads, make_mesh, placement
from tests.fast import representing
from tests.tiny import random_params, tiny, torch_model

YARN = Rope(theta=10000.0, kind="yarn", factor=4.0, original_context=64)
CASES = {
    "llama": tiny("llama", rope=Rope(theta=10000.0), tied=False),
    "llama3": tiny("llama"),
    "linear": tiny("llama", rope=Rope(theta=10000.0, kind="linear", factor=4.0)),
    "qwen2": tiny("qwen2"),
    "qwen2-yarn": tiny("qwen2", rope=dataclasses.replace(YARN, truncate=False), tied=False),
    "qwen3": tiny("qwen3"),
    "qwen3-yarn": tiny("qwen3", rope=dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=0.5, beta_fast=16.0)),
    "qwen3_moe": tiny("qwen3_moe", rope=dataclasses.replace(YARN, attention_factor=1.1)),
    "qwen3_moe-raw": tiny("qwen3_moe", normalise_router=False, tied=True),
}


@functools.cache
def model_of(case):
    return torch_model(CASES[case])


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """case -> a folder saved by transformers; in several files for half of the cases."""

    @functools.cache
    def make(case):
        folder = tmp_path_factory.mktemp(case)
        size = "20KB" if list(CASES).index(case) % 2 else "1GB"
        model_of(case).save_pretrained(folder, max_shard_size=size)
        return folder

    return make


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


def tokens_for(config, shape, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int32)


@pytest.mark.parametrize("case", representing(CASES, "llama3"))
def test_logits_equal_those_of_transformers(case, folder_of):
    folder, config = folder_of(case), CASES[case]
    assert read_config(folder) == config
    scan = "yarn" in case or case == "qwen3_moe-raw"
    params, extras = load_params(folder, config, jnp.float32, scan=scan)
    assert extras == {}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_params(config, scan=scan)
    )
    # Scaled positions reach far beyond the original context; 2 x 15 rows take the experts' loop, 320 their tiles.
    tokens = tokens_for(config, (2, 160))
    expected = torch_logits(model_of(case), tokens)
    np.testing.assert_allclose(full_logits(params, tokens, config), expected, rtol=0, atol=1e-4)
    if config.experts:
        few = full_logits(params, tokens[:, :15], config)
        np.testing.assert_allclose(few, expected[:, :15], rtol=0, atol=1e-4)


def test_stacked_and_unrolled_loading_agree(folder_of):
    for case in ("llama3", "qwen3_moe"):
        config = CASES[case]
        unrolled, _ = load_params(folder_of(case), config, jnp.float32, scan=False)
        stacked, _ = load_params(folder_of(case), config, jnp.float32, scan=True)
        assert_same(unstack_layers(stacked, config.layers), unrolled)
        assert_same(stack_layers(unrolled), stacked)


def assert_same(left, right):
    left, right = tree_util.tree_leaves_with_path(left), tree_util.tree_leaves_with_path(right)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@pytest.mark.parametrize("case", representing(["llama3", "qwen3_moe"], "llama3"))
def test_sharded_loading_gives_the_same_values_in_place(case, folder_of):
    config, mesh = CASES[case], make_mesh(fsdp=2, tensor=2)
    for scan in (True, False):
        sharded, _ = load_params(folder_of(case), config, jnp.bfloat16, scan=scan, mesh=mesh)
        plain, _ = load_params(folder_of(case), config, jnp.bfloat16, scan=scan)
        assert_same(sharded, plain)
    sharded, _ = load_params(folder_of(case), config, jnp.float32, scan=True, mesh=mesh)
    name, axes = ("gate", (None, "mlp", "width")) if not config.experts else ("q", (None, Heads(2, 2), "width"))
    weight = sharded["layers"][name]
    assert weight.sharding == placement(mesh, weight.shape, axes)
    assert weight.addressable_shards[0].data.shape == (config.layers, weight.shape[1] // 2, weight.shape[2] // 2)
    if config.experts:
        stack = sharded["experts"]["down"]
        assert stack.addressable_shards[0].data.shape == (2, config.experts // 2, config.width // 2, 24)


def test_writing_into_a_sharded_stack_moves_no_stack():
    from deer_jax.checkpoints.huggingface import _traced, _write

    mesh = make_mesh(fsdp=2, tensor=2)
    sharding = placement(mesh, (2, 6, 24, 32), (None, "experts", None, "width"))
    stack = jax.ShapeDtypeStruct((2, 6, 24, 32), jnp.float32, sharding=sharding)
    piece = jax.ShapeDtypeStruct((24, 32), jnp.float32, sharding=placement(mesh, (24, 32), (None, "width")))
    text = _write(sharding).lower(stack, piece, _traced((1, 3))).compile().as_text()
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in text


@pytest.mark.parametrize("case", ["linear", "qwen2-yarn", "qwen3", "qwen3_moe"])
def test_transformers_loads_what_we_save(case, tmp_path, folder_of, caplog, monkeypatch):
    from transformers import AutoModelForCausalLM

    config = CASES[case]
    params, _ = load_params(folder_of(case), config, jnp.float32, scan=case != "linear")
    save_folder(tmp_path / "out", config, params, stop_ids=(3, 5), max_shard_bytes=20000 if case == "qwen3" else 5e9)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # for caplog
    with caplog.at_level(logging.WARNING, logger="transformers"):
        model, report = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", attn_implementation="eager", output_loading_info=True
        )
    assert not caplog.records
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.generation_config.eos_token_id == [3, 5]
    tokens = tokens_for(config, (1, 100))
    np.testing.assert_array_equal(torch_logits(model.eval(), tokens), torch_logits(model_of(case), tokens))
    assert read_config(tmp_path / "out") == config


@pytest.mark.parametrize(("case", "dtype"), [("qwen2", jnp.float32), ("qwen3_moe", jnp.bfloat16)])
def test_saving_and_loading_is_exact(case, dtype, tmp_path):
    config = CASES[case]
    params = random_params(config, 0, dtype)
    save_folder(tmp_path / "a", config, params, max_shard_bytes=30000)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]  # nothing temporary is left
    loaded, _ = load_params(tmp_path / "a", config, dtype, scan=True)
    assert_same(params, loaded)
    unrolled, _ = load_params(tmp_path / "a", config, dtype, scan=False)
    save_folder(tmp_path / "b", config, unrolled, max_shard_bytes=30000)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("source", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_sources_are_converted(source, tmp_path):
    config = CASES["llama3"]
    params = jax.tree.map(lambda x: np.asarray(x).astype(source), random_params(config, 0))
    save_folder(tmp_path / "half", config, params)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == np.dtype(source).name
    for scan in (True, False):
        loaded, _ = load_params(tmp_path / "half", config, jnp.float32, scan=scan)
        expected = jax.tree.map(lambda x: x.astype(np.float32), params)
        assert_same(loaded, expected if scan else unstack_layers(expected, config.layers))


def test_a_real_target_equals_transformers(stories_dir):
    from transformers import AutoModelForCausalLM

    seen = []
    target = load_target(stories_dir, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)
    assert (target.name, target.stop_ids, target.config.tied) == ("stories260k", (2,), True)
    tokens = np.array([target.tokenizer.encode("Once upon a time, there was a little girl named Lily.")])
    model = AutoModelForCausalLM.from_pretrained(stories_dir, attn_implementation="eager").eval()
    expected = torch_logits(model, tokens)
    np.testing.assert_allclose(target.logits(tokens), expected, rtol=0, atol=1e-4)
    assert target.tokenizer.decode(np.argmax(expected[0], axis=-1)[-1:].tolist()).strip() in ("She", "One", "He")
