"""Norm, projections and rotary positions against plain NumPy, and the rotary scalings against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.config import Rope
from deer_jax.models import layers
from tests import reference
from tests.tiny import REAL, hf_config

ROPES = {
    "default": Rope(theta=1e6),
    "linear": Rope(theta=10000.0, kind="linear", factor=8.0),
    "llama3": Rope(theta=500000.0, kind="llama3", factor=32.0, original_context=8192),
    "yarn": Rope(theta=1e6, kind="yarn", factor=4.0, original_context=32768),
    "yarn-free": Rope(
        theta=1e6, kind="yarn", factor=4.0, original_context=32768, truncate=False, beta_fast=24.0, beta_slow=2.0,
        mscale=1.0, mscale_all_dim=0.7,
    ),
    "yarn-fixed": Rope(theta=10000.0, kind="yarn", factor=2.0, original_context=4096, attention_factor=1.3),
}  # fmt: skip


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm():
    x, scale = normal(2, 3, 16) * 5, normal(16, seed=1)
    expected = reference.rms_norm(x, scale, 1e-5)
    np.testing.assert_allclose(layers.rms_norm(x, scale, 1e-5), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_rounds_before_the_scale():
    x, scale = jnp.asarray(normal(4, 64), jnp.bfloat16), jnp.asarray(normal(64, seed=1), jnp.bfloat16)
    unscaled = layers.rms_norm(x, jnp.ones_like(scale), 1e-6)
    assert unscaled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(layers.rms_norm(x, scale, 1e-6), unscaled * scale[None])


def test_linear_logits_and_gated_mlp():
    x, weight, bias = normal(2, 3, 8), normal(5, 8, seed=1), normal(5, seed=2)
    np.testing.assert_allclose(layers.linear(x, weight, bias), x @ weight.T + bias, rtol=1e-5, atol=1e-5)
    half = layers.logits(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16))
    assert half.dtype == jnp.float32
    gate, up, down = normal(6, 8, seed=3), normal(6, 8, seed=4), normal(8, 6, seed=5)
    expected = np.array([[reference.gated_mlp(v, gate, up, down) for v in row] for row in x])
    np.testing.assert_allclose(layers.gated_mlp(x, gate, up, down), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROPES)
def test_frequencies(name):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = ROPES[name]
    steps, factor = layers.inverse_frequencies(rope, 128)
    expected, expected_factor = reference.frequencies(rope, 128)
    np.testing.assert_allclose(steps, expected, rtol=1e-6)
    assert factor == pytest.approx(expected_factor)
    if rope.kind != "default":
        theirs = hf_config(dataclasses.replace(REAL["qwen3"], rope=rope))
        expected, expected_factor = ROPE_INIT_FUNCTIONS[rope.kind](theirs, "cpu")
        np.testing.assert_allclose(steps, expected.numpy(), rtol=1e-6)
        assert factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("name", ["default", "llama3", "yarn"])
def test_rotation(name):
    rope = dataclasses.replace(ROPES[name], theta=10000.0, original_context=64)
    x, positions = normal(2, 3, 2, 16), np.array([[0, 1, 2], [500, 70, 255]], np.int32)
    cos_sin = layers.rotary(jnp.asarray(positions), rope, 16, jnp.float32)
    expected = reference.rotate(x, positions, rope)
    np.testing.assert_allclose(layers.rotate(jnp.asarray(x), cos_sin), expected, rtol=0, atol=2e-4)


def test_rotation_depends_on_distance_only():
    q, k = jnp.asarray(normal(1, 1, 1, 32)), jnp.asarray(normal(1, 1, 1, 32, seed=1))

    def score(a, b):
        def turned(x, position):
            return layers.rotate(x, layers.rotary(jnp.full((1, 1), position), Rope(), 32, jnp.float32))

        return float(jnp.sum(turned(q, a) * turned(k, b)))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)


def test_precision_is_highest_for_float32_alone():
    assert layers.precision(jnp.float32) == jax.lax.Precision.HIGHEST
    assert layers.precision(jnp.bfloat16) is None
