"""The recipes of conditioned drafters: they parse, and at real size their steps and their decoding trace."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.build import Build
from deer_jax.config import ModelConfig, Rope
from deer_jax.decoding import loop
from deer_jax.drafters.conditioned import ConditionedMethod, default_taps
from deer_jax.drafters.eagle3 import Eagle3Method
from deer_jax.drafters.heads import Independent, Markov, PathSelector
from deer_jax.drafters.start import Eagle3Start
from deer_jax.models.target import Target
from deer_jax.models.transformer import abstract_params, logical_axes
from deer_jax.sharding import bytes_per_device
from deer_jax.training.objectives import drafter_loss, fixed_params
from deer_jax.training.recipe import read_recipe
from tests.tiny import REAL
from tests.training.sizes import (
    abstract_mesh,
    batch_of,
    check_commands,
    check_slices,
    placed,
    slices_of,
    trace_segment,
    trace_step,
)

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "conditioned"
LLAMA = ModelConfig(
    family="llama", vocab_size=128256, width=4096, layers=32, heads=32, kv_heads=8, head_width=128, mlp_width=14336,
    context=131072, norm_eps=1e-5, rope=Rope(theta=5e5, kind="llama3", factor=8.0, original_context=8192),
)  # fmt: skip
TARGETS = {
    "Qwen/Qwen3-8B": REAL["qwen3"],
    "Qwen/Qwen3-30B-A3B": REAL["qwen3_moe"],
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA,
}
BILLIONS = dict(zip(TARGETS, (8.19, 30.53, 8.03), strict=True))
# Head, layers, block and ids that are proposed: as published where somebody has published such a drafter.
DRAFTERS = {
    "qwen3_8b": (Independent, 5, 16, 151936),
    "qwen3_30b_a3b": (PathSelector, 8, 16, 151936),
    "llama3_1_8b": (Markov, 5, 10, 32000),
}
# Ids without a text: the rows of Qwen3's table behind its last token, and Llama's first reserved ones.
UNUSED = {"qwen3_8b": range(151669, 151936), "qwen3_30b_a3b": range(151669, 151936), "llama3_1_8b": (128002, 128003)}


@functools.cache
def begun(name: str, eagle3: bool = False):
    """What its drafter, or EAGLE-3 for its target, begins as, of a target that is not there: method, and shapes of
    parameters and shared arrays."""
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    config, start, found = TARGETS[recipe.target], recipe.conditioned, []
    layers = int(recipe.drafter.removeprefix("random:"))
    if eagle3:
        start, layers = Eagle3Start(draft_vocab=32000), 1
    assert start is not None

    def begin(params):
        target = Target(config=config, params=params, build=Build.of("tpu"))
        drafter = start.begin(target, layers, np.zeros(config.vocab_size, np.int64), recipe.seed)
        found.append(drafter.method)
        return drafter.params, drafter.shared

    params, shared = jax.eval_shape(begin, abstract_params(config, jnp.bfloat16))
    (method,) = found
    assert isinstance(method, Eagle3Method if eagle3 else ConditionedMethod)
    return method, params, shared


def weights_on(mesh, name: str, dtype, eagle3: bool = False) -> loop.Weights:
    """Target, drafter in a dtype and what it shares, with their places."""
    config = TARGETS[read_recipe(FOLDER / f"{name}.yaml").target]
    method, params, shared = begun(name, eagle3)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    axes = {"embed": ("vocab", "width"), "head": ("vocab", "width"), "ids": (None,)}
    return loop.Weights(
        placed(mesh, abstract_params(config, jnp.bfloat16), logical_axes(config)),
        placed(mesh, params, method.axes()),
        placed(mesh, shared, {key: axes[key] for key in shared}),
    )


def test_every_recipe_is_there():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(DRAFTERS)


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_recipe_says_how_it_is_run_and_what_it_makes(name):
    recipe, (head, layers, block, ids) = read_recipe(FOLDER / f"{name}.yaml"), DRAFTERS[name]
    text = (FOLDER / f"{name}.yaml").read_text()
    comment = text.split("\ntarget:")[0]
    for part in (f"deer-jax align --recipe configs/conditioned/{name}.yaml", recipe.target, "Hardware: ", "Expected",
                 "Not yet run here", "Run on none"):  # fmt: skip
        assert part in comment
    check_commands(recipe, FOLDER / f"{name}.yaml")
    method, params, _ = begun(name)
    config = TARGETS[recipe.target]
    assert type(method.head) is head
    assert (method.shape.layers, method.draft_length + method.reading.first, method.draft_vocab) == (layers, block, ids)
    assert method.taps == default_taps(config.layers, 5)
    assert method.reading.mask in UNUSED[name]
    assert method.shapes().keys() == params.keys()
    (billions,) = re.findall(r"([\d.]+) B parameters of its own", comment)
    assert float(billions) == pytest.approx(sum(x.size for x in jax.tree.leaves(params)) / 1e9, abs=0.005)
    target = sum(x.size for x in jax.tree.leaves(abstract_params(config)))
    assert target / 1e9 == pytest.approx(BILLIONS[recipe.target], abs=0.01)


@pytest.mark.parametrize("name", DRAFTERS)
def test_its_slices_hold_what_it_keeps_and_makes(name):
    def held(recipe, mesh):
        weights = weights_on(mesh, name, jnp.float32)
        # In float32: what is trained, its two moments, and what it started from. A reduced head is a copy.
        copied = bytes_per_device(weights.shared["head"]) if "ids" in weights.shared else 0
        return bytes_per_device(weights.target) + 4 * bytes_per_device(weights.drafter) + copied

    check_slices(FOLDER / f"{name}.yaml", held)


@pytest.mark.parametrize(("name", "eagle3"), [*((name, False) for name in DRAFTERS), ("qwen3_30b_a3b", True)])
def test_its_steps_and_rounds_trace_on_its_slices(name, eagle3):
    """And those of EAGLE-3 for the largest target."""
    method = begun(name, eagle3)[0]
    for recipe in {each.recipe.mesh: each.recipe for each in slices_of(FOLDER / f"{name}.yaml")}.values():
        assert recipe.evaluation is not None
        mesh, config, slots = abstract_mesh(recipe.mesh), TARGETS[recipe.target], recipe.evaluation.batch_size
        weights = weights_on(mesh, name, jnp.float32, eagle3)
        for stage in recipe.stages:
            method.check(stage.corruption)
            loss = drafter_loss(method, config, stage.loss, recipe.remat or Build.of("tpu").remat)
            batch = batch_of(recipe, stage, method.draft_length)
            fixed = fixed_params(method, config, stage.loss, weights.target, weights.shared)
            trace_step(mesh, stage, weights.drafter, loss, batch, fixed)
        assert slots % recipe.mesh.batch_ways == 0
        trace_segment(
            mesh, config, method, method.draft_length, slots, 2048, weights_on(mesh, name, jnp.bfloat16, eagle3)
        )
