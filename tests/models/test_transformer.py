"""The whole backbone: against plain NumPy, scanned and unrolled, and block by block over a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.errors import InputError
from deer_jax.models.cache import KVCache, write_cache
from deer_jax.models.layers import rms_norm
from deer_jax.models.target import Target, full_logits
from deer_jax.models.transformer import bind, is_stacked, unstack_layers
from tests import reference
from tests.fast import representing
from tests.tiny import random_params, tiny


def tokens_for(config, shape, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int32)


@pytest.mark.parametrize("family", representing(["llama", "qwen2", "qwen3", "qwen3_moe"], "qwen2"))
def test_forward_equals_plain_numpy(family):
    config = tiny(family)
    params = random_params(config, 1)
    unrolled = unstack_layers(params, config.layers)
    assert is_stacked(params)
    assert not is_stacked(unrolled)
    tokens = tokens_for(config, (2, 7))
    expected = reference.forward(config, unrolled, tokens)
    for form in (params, unrolled):
        np.testing.assert_allclose(full_logits(form, tokens, config), expected, rtol=0, atol=1e-4)


def test_a_visibility_and_positions_of_ones_own():
    """Not causal, positions with gaps: what a block drafter asks for."""
    config = tiny("qwen2")
    params = random_params(config, 1)
    rng = np.random.default_rng(0)
    visible = (rng.random((2, 6, 6)) < 0.5) | np.eye(6, dtype=bool)
    positions = np.array([[0, 1, 2, 2, 3, 4], [5, 6, 9, 9, 10, 11]], np.int32)
    tokens = tokens_for(config, (2, 6))

    @jax.jit
    def run(params, tokens, positions, visible):
        model = bind(config, params)
        hidden, *_ = model(model.lookup(tokens), positions, visible=visible)
        return model.logits(hidden)

    expected = reference.forward(config, unstack_layers(params, 2), tokens, positions, visible)
    np.testing.assert_allclose(run(params, tokens, positions, visible), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scan", [True, False])
def test_taps_are_the_outputs_of_their_layers(scan):
    """Of the first n layers: what a model of these alone gives, but for the final norm; of the last one with it."""
    config = dataclasses.replace(tiny("qwen3"), layers=4)
    params, tokens = random_params(config, 3), tokens_for(config, (2, 7))
    positions = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))

    def read(config, params, taps=()):
        model = bind(config, params if scan else unstack_layers(params, config.layers))
        return model(model.lookup(tokens), positions, taps=taps)

    whole = jax.jit(lambda params: read(config, params, (2, 0, 3)))(params)
    third, first, last = np.split(np.asarray(whole.tapped), 3, axis=-1)
    np.testing.assert_array_equal(last, whole.hidden)
    for layers, tapped in ((3, third), (1, first)):
        fewer = params | {"layers": {name: w[:layers] for name, w in params["layers"].items()}}
        expected = read(dataclasses.replace(config, layers=layers), fewer).hidden
        np.testing.assert_allclose(rms_norm(tapped, params["norm"], config.norm_eps), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "scan"), representing([("llama", False), ("qwen3", True), ("qwen3_moe", True)], ("llama", False))
)
def test_blocks_over_a_cache_equal_the_full_forward(family, scan):
    """Rows advance by different amounts; slots from start on hold garbage, rejected tokens among it."""
    config, rows, width, length = tiny(family), 3, 5, 24
    params = random_params(config, 2, scan=scan)
    tokens = tokens_for(config, (rows, length + width))
    expected = np.asarray(full_logits(params, tokens, config))

    @jax.jit
    def read(params, block, cache, start):
        model = bind(config, params)
        positions = start[:, None] + jnp.arange(block.shape[1], dtype=start.dtype)[None]
        hidden, fresh, _ = model(model.lookup(block), positions, cache=cache, start=start)
        return model.logits(hidden), write_cache(cache, fresh, start)

    shape = (config.layers, rows, config.kv_heads, length + width, config.head_width)
    garbage = 1e4 * np.random.default_rng(0).choice([-1.0, 1.0], shape).astype(np.float32)
    cache = KVCache(jnp.asarray(garbage), jnp.asarray(-garbage))
    start, seen = np.zeros(rows, np.int32), 0
    steps = np.random.default_rng(1)
    while (start < length).any():
        kept = np.where(start < length, steps.integers(1, width + 1, rows), 0)
        block = np.stack([tokens[row, start[row] : start[row] + width] for row in range(rows)])
        for row in range(rows):  # what will be rejected is another token than the text has
            block[row, kept[row] :] = (block[row, kept[row] :] + 1) % config.vocab_size
        logits, cache = read(params, block, cache, start)
        for row in range(rows):
            span = slice(start[row], start[row] + kept[row])
            np.testing.assert_allclose(logits[row, : kept[row]], expected[row, span], rtol=0, atol=1e-4)
            seen += kept[row]
        start = np.minimum(start + kept, length).astype(np.int32)
    assert seen >= rows * length


def test_tokens_are_checked():
    config = tiny("llama")
    target = Target(config=config, params=random_params(config, 0))
    for wrong in ([], [1, 2], [[0.5]], [[96]], [[-1]]):
        with pytest.raises(InputError, match=r"tokens must be|outside the vocabulary of 96"):
            target.logits(wrong)
    assert target.logits([[0, 95]]).shape == (1, 2, 96)


def test_bfloat16_stays_close_to_float32():
    config = tiny("qwen3")
    half = random_params(config, 3, jnp.bfloat16)
    tokens = tokens_for(config, (1, 12))
    wide = full_logits(jax.tree.map(lambda x: x.astype(jnp.float32), half), tokens, config)
    narrow = full_logits(half, tokens, config)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=0.1)
