"""Steps on a mesh are those of one device, what lies where is as the rules say, and only what must move moves."""

import functools

import jax
import numpy as np
import pytest

from deer_jax.decoding.engine import bytes_per_device
from tests.meshes import mesh_of, trained

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
