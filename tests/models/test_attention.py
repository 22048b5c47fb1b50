"""Two-part attention against a loop over queries and keys."""

import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.models.attention import attend
from deer_jax.models.cache import KVCache
from tests import reference
from tests.fast import representing

B, T, N, K, S, H = 3, 4, 6, 2, 7, 8


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def qkv():
    return normal(B, T, N, H, seed=0), normal(B, T, K, H, seed=1), normal(B, T, K, H, seed=2)


@pytest.mark.representative
def test_causal(qkv):
    visible = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    np.testing.assert_allclose(attend(*qkv), reference.attention(*qkv, visible), rtol=0, atol=1e-5)


# block: the whole cache at once; by pieces that do not divide it (the last one is moved back); one slot at a time
@pytest.mark.parametrize(
    ("shared", "block", "windows"),
    representing(
        [
            (True, None, False), (False, None, True), (False, 3, False), (False, 3, True), (True, 1, True),
            (False, 99, False),
        ],
        (False, 3, True),
    ),
)  # fmt: skip
def test_any_visibility_over_a_ragged_cache(qkv, shared, block, windows):
    q, k, v = qkv
    rng = np.random.default_rng(3)
    visible = rng.random((1 if shared else B, T, T)) < 0.5
    visible |= np.eye(T, dtype=bool)[None]
    start = np.array([0, 7, 3], np.int32)
    keys, values = normal(B, K, S, H, seed=4), normal(B, K, S, H, seed=5)
    everything = np.broadcast_to(visible, (B, T, T))
    exists = np.broadcast_to((np.arange(S) < start[:, None])[:, None], (B, T, S))
    begin = np.array([[0, 0, 0, 0], [5, 3, 6, 4], [2, 3, 2, 1]], np.int32) if windows else None
    if begin is not None:  # no slot of the first row, and none for one query of the last
        exists = exists & (np.arange(S)[None, None] >= begin[..., None])
    expected = reference.attention(
        q,
        np.concatenate([np.swapaxes(keys, 1, 2), k], axis=1),
        np.concatenate([np.swapaxes(values, 1, 2), v], axis=1),
        np.concatenate([exists, everything], axis=2),
    )
    for row, length in enumerate(start):  # whatever lies beyond start must not matter
        keys[row, :, length:], values[row, :, length:] = 1e4, -1e4
    layers = (jnp.stack([jnp.full_like(side, 7.0), side]) for side in (keys, values))  # the other layer is not read
    cache = KVCache(*layers, block)
    out = attend(q, k, v, visible=jnp.asarray(visible), cache=cache, layer=1, start=jnp.asarray(start), begin=begin)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_large_scores_stay_finite(qkv):
    q, k, v = qkv
    out = attend(q * 1e3, k * 1e3, v)
    assert np.isfinite(out).all()
    visible = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    np.testing.assert_allclose(out, reference.attention(q * 1e3, k * 1e3, v, visible), rtol=0, atol=1e-4)


def test_bfloat16_keeps_its_dtype_and_is_close(qkv):
    half = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    out = attend(*half)
    assert out.dtype == jnp.bfloat16
    wide = [np.asarray(x, np.float32) for x in half]
    visible = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    np.testing.assert_allclose(np.asarray(out, np.float32), reference.attention(*wide, visible), rtol=0, atol=0.03)
