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
from deer_jax.decoding import programs
from deer_jax.decoding.engine import Engine
from deer_jax.planning.hlo import Program
from deer_jax.sharding import bytes_per_device, make_mesh
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


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_round_moves_activations_and_nothing_else(family):
    """Summed over `tensor`: each layer's two outputs and each look-up, once. Never a weight, a cache or logits."""
    mesh, k, L = mesh_of("2x1x4"), 3, 2
    target = made(family, mesh, scan=True)
    drafter = drafter_from_target(target, DrafterConfig(draft_length=k), layers=(0,))
    engine = Engine(target, drafter, k, Sampling(), 0, (1,), slots=4, capacity=64)
    programs._compiled.clear()  # of what other tests have compiled nothing is meant
    engine.admit([[1, 2, 3], [4, 5]], [20, 20], [0, 1], engine.order[:2])
    engine.segment(max_rounds=1)
    moved = {key[0].__name__: Program(program.as_text()) for key, program in programs._compiled.items()}
    row = 2 * target.config.width * 4  # bytes of one position of the two slots on a shard, float32
    target_rows, drafter_rows = k + 1, 2 * k + 2
    expected = row * ((2 * L + 1) * target_rows + 2 * drafter_rows + (k + 1))
    found = moved["run_segment"].per_round().by_kind()
    assert set(found) == {"all-reduce", "all-gather"}
    assert expected <= found["all-reduce"].bytes < 1.01 * expected  # and the largest logits, a number per position
    assert found["all-gather"].bytes < 16 * (2 * k + 1) * 2 * mesh.shape["tensor"]  # of argmax: value and place
    found = moved["prefill"].whole().by_kind()
    assert set(found) == {"all-reduce"}
    assert found["all-reduce"].bytes <= (1 / 2) * row * 16 * ((2 * L + 1) + 3)  # a chunk of 16 of one row a shard
    assert all(total.bytes < 1000 for total in moved["admit"].whole().by_kind().values())
