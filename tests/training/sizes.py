"""Recipes at real size: the slices that their first comment names, and programs traced on these without devices."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from deer_jax.build import Build
from deer_jax.config import ModelConfig, Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.sampling import Kind, Knobs
from deer_jax.decoding.state import StateShape, abstract_state
from deer_jax.drafters.protocol import Method
from deer_jax.formats import read_yaml
from deer_jax.sharding import MeshShape, factored, make_mesh, spec
from deer_jax.training import step
from deer_jax.training.objectives import Loss
from deer_jax.training.recipe import Recipe, Stage, read_recipe, recipe_from, with_settings
from deer_jax.training.step import make_step

DEVICES = {"v5e 4x4": (16, 16), "v6e 2x4": (8, 32), "v5p 2x2x2": (8, 95), "8 GPUs": (8, 80)}  # and GB of each
SLICE = re.compile(r"^#   (.+?), (\d+) GB: +((?:--set \S+ ?)+) +texts (\d+), keeps ([\d.]+), makes ([\d.]+)$", re.M)


class Slice(NamedTuple):
    """A recipe on one of its slices, and what its first comment says of that."""

    name: str
    recipe: Recipe
    size: float  # GB of each device
    texts: int  # of each device and micro-batch
    kept: float  # GB
    made: float  # GB


def slices_of(file: Path) -> Iterator[Slice]:
    """Those of a recipe's first comment."""
    text, values = file.read_text().split("\ntarget:")[0], read_yaml(file)
    for name, size, words, texts, kept, made in SLICE.findall(text):
        recipe = recipe_from(with_settings(values, words.replace("--set", "").split()), file.stem)
        yield Slice(name, recipe, float(size), int(texts), float(kept), float(made))


def check_commands(recipe: Recipe, file: Path) -> None:
    """The first comment's commands: trained, watched and measured on prompts of one form."""
    assert recipe.evaluation is not None
    comment = file.read_text().split("\ntarget:")[0].replace("\\\n#", "")
    answers, bench = (line for line in comment.split("\n") if "--target" in line)
    for command in (answers, bench):
        assert ("--chat" in command) == recipe.evaluation.chat
        assert all(f"--template {entry}" in command for entry in recipe.evaluation.template)


def check_slices(file: Path, held: Callable[[Recipe, AbstractMesh], float]) -> None:
    """The slices of a recipe's first comment: which they are, that its batch is theirs, and that it fits on them.

    held: bytes that the recipe keeps on each device of a mesh.
    """
    found = list(slices_of(file))
    assert [each.name for each in found] == list(DEVICES)
    for each in found:
        recipe = each.recipe
        assert (math.prod(dataclasses.astuple(recipe.mesh)), each.size) == DEVICES[each.name]
        assert recipe.batch == each.texts * recipe.accumulate * recipe.mesh.batch_ways
        assert each.kept == pytest.approx(held(recipe, abstract_mesh(recipe.mesh)) / 1e9, abs=0.06)
        assert each.kept + each.made < 0.9 * each.size
    assert read_recipe(file).mesh in [each.recipe.mesh for each in found[1:]]


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    """The factored mesh of a slice that is not there."""
    part = factored(make_mesh(tensor=shape.tensor))
    return AbstractMesh((shape.data, shape.fsdp, *part.devices.shape[2:]), part.axis_names)


def placed(mesh, params, axes):
    """Shapes with their places; InputError for what does not divide."""

    def one(path, x, names):
        where = NamedSharding(mesh, spec(mesh, x.shape, names, jax.tree_util.keystr(path)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(one, params, axes)


def batch_of(recipe: Recipe, stage: Stage, width: int | None) -> dict[str, Any]:
    """The arrays of one batch, as shapes; width: of its blocks, None for texts that are cut."""
    B, T, M = recipe.batch // recipe.accumulate, recipe.length, stage.corruption.blocks
    shapes: dict[str, Any] = {"tokens": ("int32", (T,)), "length": ("int32", ()), "total": ("float32", ())}
    if width is None:
        shapes |= {"masked": ("bool", (T,)), "weight": ("float32", (T,))}
    else:
        shapes |= {"anchor": ("int32", (M,)), "size": ("int32", (M,)), "masked": ("bool", (M, width)),
                   "weight": ("float32", (M, width)), "text_weight": ("float32", (T,))}  # fmt: skip
    return {name: jax.ShapeDtypeStruct((recipe.accumulate, B, *shape), kind) for name, (kind, shape) in shapes.items()}


def alike(one, other) -> bool:
    """Whether two trees have the same shapes and dtypes."""
    one, other = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (one, other))
    return one == other


def trace_step(mesh, stage: Stage, params, loss: Loss, batch, fixed) -> None:
    """Trace a training step on a mesh; it gives a state like the one it takes, and a loss."""
    state = step.abstract_state(params, stage.optimizer, stage.steps)
    run = make_step(loss, stage.optimizer, stage.steps, build=Build.of("tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        after, metrics = jax.eval_shape(run, state, batch, fixed)
    assert alike(after, state)
    assert metrics["loss"].shape == ()


def trace_segment(mesh, config: ModelConfig, method: Method, k: int, slots: int, capacity: int, weights) -> None:
    """Trace a segment of decoding on a mesh, or None; it gives a state like the one it takes."""
    state = abstract_state(
        StateShape(config, method, slots, capacity, k, Build.of("tpu")), weights.drafter, weights.shared
    )
    plan, number = loop.Plan(config, method, k, Kind.of(Sampling())), jax.ShapeDtypeStruct((), jnp.int32)
    stop_ids = jax.ShapeDtypeStruct((2,), jnp.int32)

    def run(*args):
        return loop.run_segment(plan, *args)

    args = (state, weights, Knobs.of(Sampling(), 0), stop_ids, number, number)
    if mesh is None:
        after = jax.eval_shape(run, *args)
    else:
        with jax.sharding.use_abstract_mesh(mesh):
            after = jax.eval_shape(run, *args)
    assert alike(after, state)
