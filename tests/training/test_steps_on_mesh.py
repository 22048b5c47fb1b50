"""Steps on a mesh are those of one device, what lies where is as the rules say, and only what must move moves."""

import functools

import jax
import numpy as np
import pytest

from deer_jax.planning.hlo import Program
from deer_jax.sharding import bytes_per_device
from tests.meshes import BATCH, T, W, compiled_step, mesh_of, trained

STEPS = 20
CASES = [
    ("qwen3", "2x2x2", "block_causal", "continuation", "tokens"),
    ("qwen3_moe", "2x1x4", "block_causal", "refinement", "target"),
]


@functools.cache
def run(family, mesh, attention, stage, labels):
    return trained(family, mesh_of(mesh), attention, stage, labels, STEPS)


@pytest.mark.parametrize(("family", "mesh", "attention", "stage", "labels"), CASES)
def test_a_mesh_trains_what_one_device_trains(family, mesh, attention, stage, labels):
    found, state = run(family, mesh, attention, stage, labels)
    expected, alone = run(family, "1x1x1", attention, stage, labels)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found["params"]), jax.tree.leaves(expected["params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    # Parameters, average and both moments are split over fsdp x tensor alike; a few vectors are repeated.
    ways = mesh_of(mesh).size // mesh_of(mesh).shape["data"]
    parts = [state.params, state.average, state.optimizer]
    for part, whole in zip(parts, [alone.params, alone.average, alone.optimizer], strict=True):
        assert bytes_per_device(part) < 1.1 * bytes_per_device(whole) / ways


@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
@pytest.mark.parametrize("shape", ["8x1x1", "1x8x1", "2x1x4"])
def test_a_step_gathers_weights_reduces_gradients_and_sums_activations(shape, attention):
    """The collectives of the compiled step by kind and bytes; never logits, the batch, or a weight twice in a pass."""
    mesh = mesh_of(shape)
    program, drafter = compiled_step("qwen3", mesh, attention)
    found = Program(program.as_text()).whole().by_kind()
    data, fsdp, tensor = mesh.devices.shape
    sizes = {name: sum(x.nbytes for x in jax.tree.leaves(part)) for name, part in drafter.params.items()}
    layers, tables, all_of = sizes["layers"], sizes["embed"] + sizes["head"], sum(sizes.values())
    rows = T + (3 * (W + 1) if attention == "block_causal" else 0)
    activations = BATCH // (data * fsdp) * rows * drafter.method.shape.width * 4
    layer_sums = drafter.method.shape.layers * (
        2 + 1 + 2 + 3
    )  # forward, again, and of inputs: MLP's two, attention's three
    sums = activations * (layer_sums + 2 + 2) if tensor > 1 else 0  # the look-up, and the loss to its rows
    small = 8_000  # vectors, entries of the drafter, numbers
    gradients = all_of / tensor if data > 1 else 0
    if fsdp == 1:
        assert set(found) == {"all-reduce"}
        assert found["all-reduce"].bytes <= gradients + sums + small
    else:
        # Each layer's weights twice, for the forward and the backward pass, the tables once; their gradients once.
        assert found["all-gather"].bytes <= 2 * layers + tables + small
        reduced = found["all-reduce"].bytes + found["reduce-scatter"].bytes
        assert reduced <= all_of + small
        assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
