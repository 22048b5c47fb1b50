"""A target sharded over several devices says the same as on one."""

import dataclasses

import jax
import numpy as np
import pytest

import deer_jax
from deer_jax import DrafterConfig, InputError, drafter_from_target
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.config import Sampling
from deer_jax.decoding import engine as engine_module
from deer_jax.decoding.engine import Engine, bytes_per_device
from deer_jax.sharding import make_mesh
from tests.fast import representing
from tests.meshes import decoded, made, mesh_of
from tests.tiny import random_params, tiny


@pytest.mark.parametrize("family", representing(["llama", "qwen3_moe"], "llama"))
def test_the_same_tokens_on_a_mesh(family, tmp_path):
    config = tiny(family)
    save_folder(tmp_path / "target", config, random_params(config), stop_ids=[5])
    prompts = [[3, 9, 27], [1], [8, 7, 6, 5, 4, 3, 2, 1]]
    single = deer_jax.load_target(tmp_path / "target")
    plain = deer_jax.decode(single, prompts, max_new_tokens=20)
    target = deer_jax.load_target(tmp_path / "target", mesh=make_mesh(data=1, fsdp=2, tensor=2))
    assert len({shard.device for x in jax.tree.leaves(target.params) for shard in x.addressable_shards}) == 4
    drafter = deer_jax.load_drafter("from-target", target=target)
    result = deer_jax.decode(target, prompts, drafter=drafter, draft_length=3, max_new_tokens=20, batch_size=2)
    assert result.tokens == plain.tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("family", "shape"), [("qwen3", "2x2x2"), ("qwen3_moe", "2x1x4")])
def test_slots_heads_and_vocabulary_split_over_a_mesh_say_the_same(family, shape, temperature):
    """Greedy and sampled, with prompts of one and of several prefill passes, more of them than slots."""
    expected = decoded(family, None, temperature)
    assert decoded(family, mesh_of(shape), temperature) == expected
    assert decoded(family, None, temperature, scan=False) == expected


@pytest.mark.parametrize("auto_layouts", [False, True])
def test_every_device_holds_its_part_of_the_caches(auto_layouts):
    mesh = mesh_of("2x2x2")
    target = made("qwen3", mesh, scan=True)
    target = dataclasses.replace(target, build=dataclasses.replace(target.build, auto_layouts=auto_layouts))
    drafter = drafter_from_target(target, DrafterConfig(draft_length=3))
    engine = Engine(target, drafter, 3, Sampling(), 0, (), slots=3, capacity=64)
    assert engine.slots == 4  # as many for each of the four shards of rows
    before = bytes_per_device(engine.state.cache)
    assert before == sum(x.nbytes for x in jax.tree.leaves(engine.state.cache)) // 8
    places = jax.tree.map(lambda x: x.sharding, engine.state)
    engine.admit([[1, 2, 3], [4, 5]], [20, 20], [0, 1], engine.order[:2])
    assert jax.tree.map(lambda x: x.sharding, engine.state) == places
    engine.segment(max_rounds=2)
    assert jax.tree.map(lambda x: x.sharding, engine.state) == places


def test_the_memory_that_is_named_is_that_of_a_device(monkeypatch):
    target = made("qwen3", mesh_of("2x2x2"), scan=True)
    monkeypatch.setattr(engine_module, "free_bytes", lambda devices: 5000)
    with pytest.raises(InputError, match=r"need [\d,]+ bytes on each device, 5,000 are free"):
        deer_jax.decode(target, [[1, 2, 3]] * 4, max_new_tokens=50)


def test_checks_and_single_rows_on_a_mesh():
    """`Target.logits` and one draft pass of rows that the mesh does not divide."""
    alone, target = made("qwen3", None, scan=True), made("qwen3", mesh_of("2x2x2"), scan=True)
    tokens = np.arange(21).reshape(3, 7)
    np.testing.assert_allclose(target.logits(tokens), alone.logits(tokens), rtol=0, atol=1e-5)
    drafts = [
        drafter_from_target(each, DrafterConfig(draft_length=3)).draft_logits(each, tokens[:, :-1], tokens[:, -1])
        for each in (target, alone)
    ]
    np.testing.assert_allclose(*drafts, rtol=0, atol=1e-5)
