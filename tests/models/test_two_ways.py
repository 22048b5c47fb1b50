"""Weights that lie both ways, for passes over a few rows on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.config import Sampling
from deer_jax.decoding.engine import Engine
from deer_jax.models.layers import FEW_ROWS, TwoWays, product
from tests.decoding.test_sampling_exact import make_target


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS - 1, FEW_ROWS])
def test_a_product_is_the_same_both_ways(rows):
    x = jax.random.normal(jax.random.key(0), (rows, 24))
    weight = jax.random.normal(jax.random.key(1), (40, 24))
    both = product(x, TwoWays(weight, weight.T), jnp.float32)
    np.testing.assert_allclose(both, np.asarray(x) @ np.asarray(weight).T, rtol=1e-5, atol=1e-5)


def weights_of(k: int, slots: int):
    target = make_target(16)
    return Engine(target, None, k, Sampling(), 0, (), slots, 64).weights.target["layers"][0]["q"]


def test_rounds_of_a_few_rows_read_them_and_no_others():
    assert isinstance(weights_of(4, 1), TwoWays)
    assert isinstance(weights_of(0, 2), TwoWays)
    assert not isinstance(weights_of(0, 1), TwoWays)
    assert not isinstance(weights_of(7, 8), TwoWays)
