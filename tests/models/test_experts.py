"""Both ways of running experts against a loop over rows and their chosen experts."""

import dataclasses

import jax
import numpy as np
import pytest

from deer_jax.models import experts
from tests import reference
from tests.tiny import tiny

CONFIG = tiny("qwen3_moe")


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)

    L, E, D, F = CONFIG.layers, CONFIG.experts, CONFIG.width, CONFIG.expert_width
    stacks = {"gate": normal(L, E, F, D), "up": normal(L, E, F, D), "down": normal(L, E, D, F)}
    return normal(E, D) * 3, stacks, normal(5, 20, D) * 6


@pytest.mark.parametrize("rows", [1, 7, experts.LOOP_ROWS, experts.LOOP_ROWS + 1, 100])
@pytest.mark.parametrize("normalise", [True, False])
def test_experts(rows, normalise, weights):
    config = dataclasses.replace(CONFIG, normalise_router=normalise)
    router, stacks, x = weights
    x = x.reshape(1, 100, -1)[:, :rows]
    layer = 1
    one = [stacks[name][layer] for name in ("gate", "up", "down")]
    expected = reference.experts(x[0], router, *one, config.experts_per_token, normalise)
    run = jax.jit(lambda x, layer: experts.mix(x, router, stacks, layer, config))
    np.testing.assert_allclose(run(x, np.int32(layer))[0], expected, rtol=0, atol=1e-5)


def test_rows_that_share_one_expert(weights):
    """All rows equal: most experts get nothing, in either form."""
    router, stacks, x = weights
    for rows in (8, 80):
        same = np.broadcast_to(x[:1, :1], (1, rows, CONFIG.width))
        out = np.asarray(experts.mix(same, router, stacks, 0, CONFIG))
        one = [stacks[name][0] for name in ("gate", "up", "down")]
        expected = reference.experts(same[0, :1], router, *one, CONFIG.experts_per_token, True)
        np.testing.assert_allclose(out[0], np.broadcast_to(expected, (rows, CONFIG.width)), rtol=0, atol=1e-5)


def test_batch_layout_does_not_matter(weights):
    router, stacks, x = weights
    out = experts.mix(x, router, stacks, 0, CONFIG)
    flat = experts.mix(x.reshape(1, 100, -1), router, stacks, 0, CONFIG)
    np.testing.assert_allclose(np.asarray(out).reshape(1, 100, -1), flat, rtol=0, atol=1e-6)
