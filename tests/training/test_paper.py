"""The paper's recipes: they parse, and at real size their steps trace in both attention modes, and their decoding."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from deer_jax.build import Build
from deer_jax.config import ModelConfig, Rope
from deer_jax.decoding import loop
from deer_jax.drafters.standalone import StandaloneMethod
from deer_jax.models.transformer import abstract_params, logical_axes
from deer_jax.sharding import bytes_per_device
from deer_jax.training.objectives import CROSS_ENTROPY, Objective, drafter_loss
from deer_jax.training.recipe import Recipe, read_recipe
from deer_jax.training.step import TrainState, make_optimizer, make_step
from tests.tiny import REAL
from tests.training.sizes import (
    abstract_mesh,
    alike,
    batch_of,
    check_commands,
    check_slices,
    placed,
    slices_of,
    trace_segment,
    trace_step,
)

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "paper"
QWEN3 = REAL["qwen3"]
TARGETS = {
    "Qwen/Qwen3-4B": dataclasses.replace(QWEN3, width=2560, mlp_width=9728, tied=True),
    "Qwen/Qwen3-8B": QWEN3,
    "Qwen/Qwen3-14B": dataclasses.replace(QWEN3, width=5120, layers=40, heads=40, mlp_width=17408),
    "Qwen/Qwen3-30B-A3B": REAL["qwen3_moe"],
    "Qwen/Qwen2-7B-Instruct": ModelConfig(
        family="qwen2", vocab_size=152064, width=3584, layers=28, heads=28, kv_heads=4, head_width=128,
        mlp_width=18944, context=32768, rope=Rope(theta=1e6), qkv_bias=True,
    ),
}  # fmt: skip
BILLIONS = dict(zip(TARGETS, (4.02, 8.19, 14.77, 30.53, 7.62), strict=True))
DRAFTER = REAL["qwen2"]  # open-dCoder and Qwen2.5-0.5B
NAMES = ("math", "qwen2_7b", "qwen3_14b", "qwen3_30b_a3b", "qwen3_4b", "qwen3_8b")
WIDTH = 32  # of blocks: the draft length


def with_entries(params, dtype):
    return params | {"special": jax.ShapeDtypeStruct((2, DRAFTER.width), dtype)}


def test_every_recipe_is_there():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_it_is_run(name):
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    text = (FOLDER / f"{name}.yaml").read_text()
    for part in (
        f"deer-jax align --recipe configs/paper/{name}.yaml",
        recipe.target,
        "# Hardware: ",
        "Expected, by the",
    ):
        assert part in text.split("\ntarget:")[0]
    assert recipe.target in TARGETS
    one, two = recipe.stages
    assert (one.corruption.stage, two.corruption.stage) == ("continuation", "refinement")
    assert one.optimizer.learning_rate == 1e-4
    assert (two.corruption.max_masked, two.corruption.alpha) == (96, 1.01)
    assert two.optimizer.learning_rate == (1e-4 if name == "math" else 5e-5)
    assert recipe.reading is not None
    assert recipe.reading.draft_length == 32
    assert one.corruption.width is two.corruption.width is None  # the draft length
    check_commands(recipe, FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_a_segment_of_its_decoding_traces(name):
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    config, k, slots, capacity = TARGETS[recipe.target], 32, 16, 4096
    params = abstract_params(config, jnp.bfloat16)
    assert sum(x.size for x in jax.tree.leaves(params)) / 1e9 == pytest.approx(BILLIONS[recipe.target], abs=0.01)
    assert recipe.reading is not None
    method = StandaloneMethod(DRAFTER, recipe.reading, config.vocab_size)
    drafter = with_entries(abstract_params(DRAFTER, jnp.bfloat16), jnp.bfloat16)
    trace_segment(None, config, method, k, slots, capacity, loop.Weights(params, drafter, {}))


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
@pytest.mark.parametrize("labels", ["tokens", "target"])
def test_its_steps_trace(attention, labels):
    recipe = read_recipe(FOLDER / "qwen3_30b_a3b.yaml")
    target = TARGETS[recipe.target]
    assert recipe.reading is not None
    method = StandaloneMethod(DRAFTER, dataclasses.replace(recipe.reading, attention=attention), target.vocab_size)
    params = with_entries(abstract_params(DRAFTER), jnp.float32)
    loss = drafter_loss(method, target, Objective(ce=0, kl=1) if labels == "target" else CROSS_ENTROPY)
    target_params = {"target": abstract_params(target, jnp.bfloat16)} if labels == "target" else {}
    for stage in recipe.stages:
        optimizer = jax.eval_shape(make_optimizer(stage.optimizer, stage.steps).init, params)
        state = TrainState(params=params, average={}, optimizer=optimizer)
        run = make_step(loss, stage.optimizer, stage.steps, build=Build.of("tpu"))
        batch = batch_of(recipe, stage, WIDTH if method.cached else None)
        after, metrics = jax.eval_shape(run, state, batch, target_params)
        assert alike(after, state)
        assert metrics["loss"].shape == ()


def placed_target(mesh, config):
    return placed(mesh, abstract_params(config, jnp.bfloat16), logical_axes(config))


def placed_drafter(mesh, dtype):
    axes = logical_axes(DRAFTER) | {"special": (None, "width")}
    return placed(mesh, with_entries(abstract_params(DRAFTER, dtype), dtype), axes)


@pytest.mark.parametrize("name", NAMES)
def test_its_slices_hold_what_it_keeps_and_makes(name):
    def held(recipe, mesh):
        target = bytes_per_device(placed_target(mesh, TARGETS[recipe.target]))
        # In float32: what is trained, its two moments, and what it started from.
        return target + 4 * bytes_per_device(placed_drafter(mesh, jnp.float32))

    check_slices(FOLDER / f"{name}.yaml", held)


@functools.cache
def trace_last_step(recipe: Recipe):
    """Of the last stage, on the recipe's mesh."""
    assert recipe.reading is not None
    mesh, stage = abstract_mesh(recipe.mesh), recipe.stages[-1]
    method = StandaloneMethod(DRAFTER, recipe.reading, DRAFTER.vocab_size)
    loss = drafter_loss(method, remat=recipe.remat or Build.of("tpu").remat)
    batch = batch_of(recipe, stage, WIDTH if method.cached else None)
    trace_step(mesh, stage, placed_drafter(mesh, jnp.float32), loss, batch, {})


@pytest.mark.parametrize("name", NAMES)
def test_its_steps_and_rounds_trace_on_its_slices(name):
    for recipe in {each.recipe.mesh: each.recipe for each in slices_of(FOLDER / f"{name}.yaml")}.values():
        assert recipe.reading is not None
        assert recipe.evaluation is not None
        # Most recipes have the same step, which knows nothing of these.
        trace_last_step(
            dataclasses.replace(recipe, target="-", drafter="-", answers=("-",), output="-", evaluation=None)
        )
        # Its evaluation decodes on the same mesh.
        mesh, config = abstract_mesh(recipe.mesh), TARGETS[recipe.target]
        method = StandaloneMethod(DRAFTER, recipe.reading, config.vocab_size)
        k, slots = recipe.reading.draft_length, recipe.evaluation.batch_size
        assert slots % recipe.mesh.batch_ways == 0
        weights = loop.Weights(placed_target(mesh, config), placed_drafter(mesh, jnp.bfloat16), {})
        trace_segment(mesh, config, method, k, slots, 2048, weights)
