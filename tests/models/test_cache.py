"""Row-wise writes at ragged starts, and the cache built of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.build import Build
from deer_jax.models.cache import STATIC_ROWS, KVCache, empty_cache, write_cache, write_rows
from tests.tiny import tiny


@pytest.mark.representative
def test_the_example_of_the_docstring():
    buffer, fresh = jnp.full((2, 4), 7), jnp.array([[1, 2], [3, 4]])
    out = write_rows(buffer, fresh, jnp.array([0, 2]), ("batch", "slots"))
    np.testing.assert_array_equal(out, [[1, 2, 7, 7], [7, 7, 3, 4]])


@pytest.mark.parametrize("count", [3, STATIC_ROWS, STATIC_ROWS + 4])
def test_rows_go_where_they_are_sent(count):
    rng = np.random.default_rng(count)
    buffer = rng.normal(size=(2, count + 2, 3, 9, 4)).astype(np.float32)
    fresh = rng.normal(size=(2, count, 3, 2, 4)).astype(np.float32)
    start = rng.integers(0, 8, count).astype(np.int32)
    rows = rng.permutation(count + 2)[:count].astype(np.int32)
    expected = buffer.copy()
    for i in range(count):
        for t in range(2):
            expected[:, rows[i], :, start[i] + t] = fresh[:, i, :, t]
    write = jax.jit(lambda *a: write_rows(*a[:3], (None, "batch", None, "slots"), rows=a[3]))
    np.testing.assert_array_equal(write(buffer, fresh, start, rows), expected)
    expected[:, rows[1]] = buffer[:, rows[1]]
    rows[1] = count + 2  # a row that is none
    np.testing.assert_array_equal(write(buffer, fresh, start, rows), expected)


def test_a_cache_starts_as_zeros_and_holds_what_is_written():
    config = tiny("llama")
    cache = empty_cache(config, 2, 10, Build.of("tpu"))
    assert cache.capacity == 10
    fresh = KVCache(jnp.ones((2, 2, 2, 3, 8), jnp.bfloat16), jnp.full((2, 2, 2, 3, 8), 2, jnp.bfloat16))
    cache = write_cache(cache, fresh, jnp.array([0, 7]))
    for side, value in ((cache.keys, 1), (cache.values, 2)):
        filled = np.asarray(side, np.float32)
        assert (filled[:, 0, :, :3] == value).all()
        assert (filled[:, 1, :, 7:] == value).all()
        assert filled.sum() == value * 2 * 2 * 2 * 3 * 8
