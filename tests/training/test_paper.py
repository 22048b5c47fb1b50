"""The paper's recipes: they parse, and at real size their steps trace in both attention modes, and their decoding."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from deer_jax.build import Build
from deer_jax.config import ModelConfig, Rope, Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.sampling import Kind, Knobs
from deer_jax.decoding.state import StateShape, abstract_state
from deer_jax.drafters.standalone import StandaloneMethod
from deer_jax.formats import read_yaml
from deer_jax.models.transformer import abstract_params, logical_axes
from deer_jax.sharding import MeshShape, bytes_per_device, factored, make_mesh, spec
from deer_jax.training import step
from deer_jax.training.objectives import CROSS_ENTROPY, Objective, drafter_loss
from deer_jax.training.recipe import Recipe, read_recipe, recipe_from, with_settings
from deer_jax.training.step import TrainState, make_optimizer, make_step
from tests.tiny import REAL

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
DEVICES = {"v5e 4x4": (16, 16), "v6e 2x4": (8, 32), "v5p 2x2x2": (8, 95), "8 GPUs": (8, 80)}  # and GB of each
SLICE = re.compile(r"^#   (.+?), (\d+) GB: +((?:--set \S+ ?)+) +texts (\d+), keeps ([\d.]+), makes ([\d.]+)$", re.M)


def with_entries(params, dtype):
    return params | {"special": jax.ShapeDtypeStruct((2, DRAFTER.width), dtype)}


def batch_of(recipe, corruption, cached):
    """The arrays of one batch, as shapes."""
    B, T, M, W = recipe.batch // recipe.accumulate, recipe.length, corruption.blocks, 32
    shapes = {"tokens": ("int32", (T,)), "length": ("int32", ()), "total": ("float32", ())}
    if cached:
        shapes |= {"anchor": ("int32", (M,)), "size": ("int32", (M,)), "masked": ("bool", (M, W)),
                   "weight": ("float32", (M, W)), "text_weight": ("float32", (T,))}  # fmt: skip
    else:
        shapes |= {"masked": ("bool", (T,)), "weight": ("float32", (T,))}
    return {name: jax.ShapeDtypeStruct((recipe.accumulate, B, *shape), kind) for name, (kind, shape) in shapes.items()}


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
    assert recipe.evaluation is not None
    answers, bench = (line for line in text.replace("\\\n#", "").split("\n") if "--target" in line)
    for command in (answers, bench):  # trained, watched and measured on prompts of one form
        assert ("--chat" in command) == recipe.evaluation.chat
        assert [f"--template {entry}" in command for entry in recipe.evaluation.template].count(False) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_segment_of_its_decoding_traces(name):
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    config, k, slots, capacity = TARGETS[recipe.target], 32, 16, 4096
    params = abstract_params(config, jnp.bfloat16)
    assert sum(x.size for x in jax.tree.leaves(params)) / 1e9 == pytest.approx(BILLIONS[recipe.target], abs=0.01)
    assert recipe.reading is not None
    method = StandaloneMethod(DRAFTER, recipe.reading, config.vocab_size)
    drafter = with_entries(abstract_params(DRAFTER, jnp.bfloat16), jnp.bfloat16)
    state = abstract_state(StateShape(config, method, slots, capacity, k, Build.of("tpu")), drafter, {})
    plan, number = loop.Plan(config, method, k, Kind.of(Sampling())), jax.ShapeDtypeStruct((), jnp.int32)
    stop_ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    after = jax.eval_shape(
        lambda *args: loop.run_segment(plan, *args),
        state,
        loop.Weights(params, drafter, {}),
        Knobs.of(Sampling(), 0),
        stop_ids,
        number,
        number,
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


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
        after, metrics = jax.eval_shape(run, state, batch_of(recipe, stage.corruption, method.cached), target_params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert metrics["loss"].shape == ()


def slices_of(name):
    """What a recipe's first comment says of each slice: its name, the settings, GB, texts, and the GB kept and made."""
    text = (FOLDER / f"{name}.yaml").read_text().split("\ntarget:")[0]
    for found, size, words, texts, kept, made in SLICE.findall(text):
        yield found, words.replace("--set", "").split(), float(size), int(texts), float(kept), float(made)


def on_slice(name, settings) -> Recipe:
    return recipe_from(with_settings(read_yaml(FOLDER / f"{name}.yaml"), settings), name)


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    """The factored mesh of a slice that is not there."""
    part = factored(make_mesh(tensor=shape.tensor))
    return AbstractMesh((shape.data, shape.fsdp, *part.devices.shape[2:]), part.axis_names)


def placed(mesh, params, config):
    """Shapes with their places; InputError for what does not divide."""
    axes = logical_axes(config) | ({"special": (None, "width")} if "special" in params else {})

    def one(path, x, names):
        where = NamedSharding(mesh, spec(mesh, x.shape, names, jax.tree_util.keystr(path)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(one, params, axes)


def placed_drafter(mesh, dtype):
    return placed(mesh, with_entries(abstract_params(DRAFTER, dtype), dtype), DRAFTER)


@pytest.mark.parametrize("name", NAMES)
def test_its_slices_hold_what_it_keeps_and_makes(name):
    assert [found for found, *_ in slices_of(name)] == list(DEVICES)
    shapes = []
    for found, settings, size, texts, kept, made in slices_of(name):
        recipe = on_slice(name, settings)
        shapes.append(recipe.mesh)
        assert (math.prod(dataclasses.astuple(recipe.mesh)), size) == DEVICES[found]
        assert recipe.batch == texts * recipe.accumulate * recipe.mesh.batch_ways
        mesh, config = abstract_mesh(recipe.mesh), TARGETS[recipe.target]
        target = placed(mesh, abstract_params(config, jnp.bfloat16), config)
        # In float32: what is trained, its two moments, and what it started from.
        held = bytes_per_device(target) + 4 * bytes_per_device(placed_drafter(mesh, jnp.float32))
        assert kept == pytest.approx(held / 1e9, abs=0.06)
        assert kept + made < 0.9 * size
    assert read_recipe(FOLDER / f"{name}.yaml").mesh in shapes[1:]


@functools.cache
def trace_step(recipe: Recipe):
    """Of the last stage, on the recipe's mesh."""
    assert recipe.reading is not None
    mesh, stage, build = abstract_mesh(recipe.mesh), recipe.stages[-1], Build.of("tpu")
    method = StandaloneMethod(DRAFTER, recipe.reading, DRAFTER.vocab_size)
    state = step.abstract_state(placed_drafter(mesh, jnp.float32), stage.optimizer, stage.steps)
    run = make_step(drafter_loss(method, remat=recipe.remat or build.remat), stage.optimizer, stage.steps, build=build)
    with jax.sharding.use_abstract_mesh(mesh):
        after, metrics = jax.eval_shape(run, state, batch_of(recipe, stage.corruption, method.cached), {})
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name", NAMES)
def test_its_steps_and_rounds_trace_on_its_slices(name):
    for settings in {tuple(settings): 0 for _, settings, *_ in slices_of(name)}:
        recipe = on_slice(name, settings)
        assert recipe.reading is not None
        assert recipe.evaluation is not None
        # Most recipes have the same step, which knows nothing of these.
        trace_step(dataclasses.replace(recipe, target="-", drafter="-", answers=("-",), output="-", evaluation=None))
        # Its evaluation decodes on the same mesh.
        mesh, config = abstract_mesh(recipe.mesh), TARGETS[recipe.target]
        method = StandaloneMethod(DRAFTER, recipe.reading, config.vocab_size)
        params = placed(mesh, abstract_params(config, jnp.bfloat16), config)
        k, slots = recipe.reading.draft_length, recipe.evaluation.batch_size
        assert slots % recipe.mesh.batch_ways == 0
        drafter = placed_drafter(mesh, jnp.bfloat16)
        state = abstract_state(StateShape(config, method, slots, 2048, k, Build.of("tpu")), drafter, {})
        plan, number = loop.Plan(config, method, k, Kind.of(Sampling())), jax.ShapeDtypeStruct((), jnp.int32)
        stop_ids, knobs = jax.ShapeDtypeStruct((2,), jnp.int32), Knobs.of(Sampling(), 0)
        with jax.sharding.use_abstract_mesh(mesh):
            after = jax.eval_shape(
                lambda *args, plan=plan: loop.run_segment(plan, *args),
                state, loop.Weights(params, drafter, {}), knobs, stop_ids, number, number,
            )  # fmt: skip
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
