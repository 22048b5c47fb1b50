"""The backbone of conditioned drafters: against plain NumPy, over a cache, in training, on a mesh, in cost."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.build import Build
from deer_jax.config import ConditionedConfig
from deer_jax.errors import InputError
from deer_jax.models import piecewise
from deer_jax.models.blocks import Blocks
from deer_jax.models.cache import KVCache, empty_cache, write_cache
from deer_jax.models.conditioned import context_kv, draft_block, read_blocks
from deer_jax.models.transformer import abstract_params, bind, init_params, logical_axes, stack_layers, unstack_layers
from deer_jax.sharding import make_mesh, on_mesh, placement, placements
from tests import reference
from tests.fast import representing
from tests.tiny import random_params, tiny

B, W, S, TAPPED = 2, 5, 14, 48
WINDOW = 4  # smaller than a block and than the context
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": (True, False)},
    "row": {"windows": (WINDOW, 0)},
    "row causal": {"windows": (0, WINDOW), "causal": (False, True)},
    "anchor": {"windows": (WINDOW, 0), "window_from": "anchor"},
    "anchor causal": {"windows": (WINDOW, WINDOW), "causal": (True, True), "window_from": "anchor"},
    "biases": {"qkv_bias": True, "o_bias": True},
    "convolutions": {"windows": (0, WINDOW), "causal": (False, True), "conv_kernel": 3, "conv_group": 8},
}


def conditioned(kind: str = "full", **changes) -> ConditionedConfig:
    shape = {field.name: getattr(tiny("qwen3"), field.name) for field in dataclasses.fields(tiny("qwen3"))}
    own = {"tapped_width": TAPPED, "windows": (0, 0), "causal": (False, False)}
    return ConditionedConfig(**(shape | own | KINDS[kind] | changes))


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params_of(config, scan=True, seed=1):
    params = random_params(config, seed)
    return params if scan else unstack_layers(params, config.layers)


def draft(config, params, x, tapped, start, *, block: int | None = 4, garbage=0.0):
    """A pass over blocks [R, W, D] behind contexts read in two chunks; slots behind these hold garbage.

    block: slots of the cache that are read at a time.
    """
    model = bind(config, params)
    build = dataclasses.replace(Build.of("cpu"), dtype=x.dtype)
    cache = empty_cache(config, len(x), S + W, build)
    cache = KVCache(cache.keys + jnp.asarray(garbage, x.dtype), cache.values - jnp.asarray(garbage, x.dtype), block)
    for first, last in ((0, 5), (5, S)):
        at = jnp.full(len(x), first, jnp.int32)
        cache = write_cache(cache, context_kv(model, tapped[:, first:last], at), at)
    return draft_block(model, x, cache, start)


def example(config, rows=B):
    """Blocks of texts: sorted anchors, one twice, one without context, one behind the last position."""
    anchor = np.array([[0, 6, 6, 13], [2, 7, 11, S]], np.int32)[np.arange(rows) % B]
    return anchor, normal(rows, anchor.shape[1] * W, config.width, seed=4), normal(rows, S, TAPPED, seed=5)


def drafts(config, params, x, tapped, anchor, **options):
    """All blocks of `example` drafted, each as a row of its own: [B, M*W, D]."""
    rows = x.reshape(-1, W, config.width)
    return draft(
        config, params, rows, jnp.repeat(tapped, anchor.shape[1], axis=0), anchor.reshape(-1), **options
    ).reshape(x.shape)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 8 rows and 4 keys, one row of the batch at a time."""
    monkeypatch.setattr(piecewise, "ROWS", 8)
    monkeypatch.setattr(piecewise, "KEYS", 4)
    monkeypatch.setattr(piecewise, "SCORES", 1)


@pytest.mark.parametrize(
    ("kind", "scan"),
    representing(
        [
            ("full", False), ("causal", True), ("row", False), ("row causal", True), ("anchor", True),
            ("anchor causal", False), ("biases", True), ("convolutions", True), ("convolutions", False),
        ],
        ("row causal", True),
    ),
)  # fmt: skip
def test_drafts_and_blocks_in_training_equal_plain_numpy(kind, scan, small_pieces):
    """What was read at the start and behind it, and garbage behind that, change nothing."""
    config = conditioned(kind)
    params, (anchor, x, tapped) = params_of(config), example(config)

    @jax.jit
    def run(params, x, tapped, anchor):
        blocks = read_blocks(bind(config, params), x, tapped, Blocks(anchor, W))
        return blocks, drafts(config, params, x, tapped, anchor, garbage=1e4)

    form = params if scan else unstack_layers(params, config.layers)
    blocks, drafted = run(form, x, tapped, anchor)
    for row, m in np.ndindex(anchor.shape):
        rows = slice(m * W, (m + 1) * W)
        expected = reference.conditioned(config, params, x[row, rows], tapped[row, : anchor[row, m]])
        np.testing.assert_allclose(drafted[row, rows], expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(blocks[row, rows], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "scan", "remat"),
    representing(
        [("row", True, "none"), ("anchor causal", True, "layers"), ("convolutions", False, "cheap")],
        ("convolutions", False, "cheap"),
    ),
)
def test_gradients_equal_those_of_whole_scores(kind, scan, remat, small_pieces):
    """Of the drafts, whose attention JAX differentiates by itself."""
    config = conditioned(kind)
    params, (anchor, x, tapped) = params_of(config, scan), example(config)
    to_out = normal(*x.shape, seed=6)

    def by_pieces(params, x, tapped):
        return jnp.sum(read_blocks(bind(config, params), x, tapped, Blocks(anchor, W), remat) * to_out)

    def plainly(params, x, tapped):
        return jnp.sum(drafts(config, params, x, tapped, anchor, block=None) * to_out)

    found, expected = (jax.jit(jax.grad(of, (0, 1, 2)))(params, x, tapped) for of in (by_pieces, plainly))
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.max(jnp.abs(other)))
        assert scale > 0, path
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(scale, 1), err_msg=str(path))


def test_what_follows_an_anchor_and_other_blocks_change_nothing():
    """Neither the value nor the gradient: of the first block, by all that is not its own."""
    config = conditioned("anchor causal")
    params, (anchor, x, tapped) = params_of(config), example(config)
    m = 1

    @jax.jit
    def of_block(x, tapped):
        out = read_blocks(bind(config, params), x, tapped, Blocks(anchor, W))[:, m * W : (m + 1) * W]
        return jnp.sum(out**2), out

    (_, out), (to_x, to_tapped) = jax.value_and_grad(of_block, (0, 1), has_aux=True)(x, tapped)
    own = np.zeros(x.shape[1], bool)
    own[m * W : (m + 1) * W] = True
    np.testing.assert_array_equal(to_x[:, ~own], 0)
    other_x, other_tapped = x + 5.0 * ~own[None, :, None], tapped.copy()
    for row in range(B):
        np.testing.assert_array_equal(to_tapped[row, anchor[row, m] :], 0)
        assert np.abs(to_tapped[row, : anchor[row, m]]).sum() > 0
        other_tapped[row, anchor[row, m] :] = -7
    np.testing.assert_array_equal(of_block(other_x, other_tapped)[1], out)


def test_fresh_convolutions_are_the_identity():
    config, without = conditioned("convolutions"), conditioned("row causal")
    params = init_params(config, 0)
    less = params | {"layers": {name: w for name, w in params["layers"].items() if "conv" not in name}}
    x, tapped, start = normal(B, W, config.width, seed=2), normal(B, S, TAPPED, seed=3), np.array([9, 12], np.int32)
    found, expected = (
        jax.jit(functools.partial(draft, shape))(params, x, tapped, start)
        for shape, params in ((config, params), (without, less))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_parameters_are_declared_as_a_models():
    config = conditioned("convolutions")
    params = abstract_params(config)
    assert set(params) == {"fc", "hidden_norm", "norm", "layers"}
    assert params["fc"].shape == (config.width, TAPPED)
    assert params["layers"]["mlp_conv_base"].shape == (2, 2, 3, config.width)
    assert params["layers"]["attention_conv_projection"].shape == (2, 2 * 3 * config.width // 8, config.width)
    axes = jax.tree.map(lambda _, names: len(names), params, logical_axes(config))
    assert axes == jax.tree.map(lambda x: x.ndim, params)
    unrolled = abstract_params(config, scan=False)
    assert jax.tree.map(jnp.shape, unrolled) == jax.tree.map(jnp.shape, unstack_layers(params_of(config), 2))
    assert jax.tree.map(jnp.shape, stack_layers(params_of(config, scan=False))) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("scan", [True, False])
def test_a_draft_costs_one_pass_of_the_block_at_any_context_length(scan):
    config = conditioned("row")
    params = params_of(config, scan)

    def flops(capacity):
        shape = (config.layers, B, config.kv_heads, capacity, config.head_width)
        cache = KVCache(*[jax.ShapeDtypeStruct(shape, jnp.float32)] * 2)
        arguments = jax.ShapeDtypeStruct((B, W, config.width), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32)
        program = jax.jit(lambda x, start, cache: draft_block(bind(config, params), x, cache, start))
        found: Any = program.lower(*arguments, cache).compile().cost_analysis()
        return found["flops"]

    short, long, slots = flops(512), flops(4096), 4096 - 512
    layers = 1 if scan else config.layers  # a loop's body counts once
    scores = B * config.heads * W * slots * layers
    # Two products of each score with a head's width; what else is done for a score is little more than its softmax.
    assert 0 < long - short <= scores * (2 * 2 * config.head_width + 20)


def test_windowed_layers_read_the_cache_from_the_first_block_that_a_row_sees():
    """Were blocks before it read, a weight of 0 times a value of NaN would be NaN."""
    config = conditioned("anchor causal", layers=1, windows=(WINDOW,), causal=(True,))
    params, x, tapped = params_of(config), normal(B, W, config.width, seed=2), normal(B, S, TAPPED, seed=3)

    @jax.jit
    def run(broken):
        model, at = bind(config, params), jnp.zeros(B, jnp.int32)
        fresh = context_kv(model, tapped, at)
        values = jnp.where((jnp.arange(S) < broken)[None, None, None, :, None], jnp.nan, fresh.values)
        return draft_block(model, x, KVCache(fresh.keys, values, 2), np.array([13, 12], np.int32))

    whole = run(0)
    np.testing.assert_array_equal(run(8), whole)  # what is seen begins at slots 9 and 8
    assert not np.isfinite(run(9)).all()


def test_bfloat16_stays_close_to_float32():
    config = conditioned("convolutions")
    params, (anchor, x, tapped) = params_of(config), example(config)

    # Kernels near the identity, as they are trained from there; random ones multiply every rounding.
    params["layers"] |= {name: 0.1 * w for name, w in params["layers"].items() if name.endswith("projection")}
    half = jax.tree.map(lambda y: jnp.asarray(y, jnp.bfloat16), (params, x, tapped))

    @jax.jit
    def run(params, x, tapped):
        blocks = read_blocks(bind(config, params), x, tapped, Blocks(anchor, W))
        return blocks, draft(config, params, x[:, :W], tapped, anchor[:, 0])

    wide = run(*jax.tree.map(lambda y: y.astype(jnp.float32), half))
    for one, other in zip(run(*half), wide, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("mesh", "kind"), representing([((2, 2, 2), "convolutions"), ((1, 1, 8), "row")], ((2, 2, 2), "convolutions"))
)
def test_a_mesh_gives_the_same(mesh, kind):
    config = conditioned(kind, heads=8, kv_heads=4, mlp_width=64, width=64)
    params, (anchor, x, tapped) = params_of(config), example(config, rows=4)

    def run(params, x, tapped, anchor):
        def loss(params, x, tapped):
            out = read_blocks(bind(config, params), x, tapped, Blocks(anchor, W), "layers")
            return jnp.sum(out * jnp.cos(jnp.arange(config.width, dtype=jnp.float32))[None, None]), out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(params, x, tapped)
        return out, gradients, draft(config, params, x[:, :W], tapped, anchor[:, 0])

    alone = jax.jit(run)(params, x, tapped, anchor)
    mesh = make_mesh(*mesh)
    placed = jax.device_put(params, placements(mesh, params, logical_axes(config)))
    rows = [jax.device_put(y, placement(mesh, y.shape, ("batch", None, None)[: y.ndim])) for y in (x, tapped, anchor)]
    with on_mesh(mesh):
        spread = jax.jit(run)(placed, *rows)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(spread), jax.tree.leaves(alone), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(other))))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale, err_msg=str(path))


def test_devices_that_share_a_draft_sum_twice_per_layer_and_once_per_context():
    config = conditioned("row causal", heads=8, kv_heads=4, mlp_width=64, width=64)
    mesh = make_mesh(tensor=4)

    def of(shape, axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement(mesh, shape, axes))

    params = abstract_params(config, scan=False)
    stacked = logical_axes(config)
    axes = stacked | {"layers": {i: {k: v[1:] for k, v in stacked["layers"].items()} for i in range(config.layers)}}
    params = jax.tree.map(lambda x, names: of(x.shape, names), params, axes)
    side = of((config.layers, B, config.kv_heads, S + W, config.head_width), (None, "batch", "kv_heads", None, None))
    rows, at = of((B, W, config.width), ("batch", None, None)), of((B,), ("batch",), jnp.int32)

    def talk(run, *arguments):
        with on_mesh(mesh):
            text = str(jax.jit(run).lower(params, *arguments, at).compile().as_text())
        return re.findall(r"= .* (all-[a-z]+|reduce-scatter|collective-[a-z]+)(?:-start)?\(", text)

    drafting = talk(lambda *a: draft_block(bind(config, a[0]), a[1], KVCache(*a[2:4]), a[4]), rows, side, side)
    assert drafting == ["all-reduce"] * 2 * config.layers
    tapped = of((B, W, TAPPED), ("batch", None, None))
    assert talk(lambda *a: context_kv(bind(config, a[0]), *a[1:]), tapped) == ["all-reduce"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": (4,)}, r"windows must have one entry for each of the 2 layers, got \(4,\)"),
        ({"windows": (4, -1)}, "windows of layer 1 must be a whole number of at least 0, got -1"),
        ({"causal": (True, 1)}, "causal of layer 1 must be true or false, got 1"),
        ({"tapped_width": 0}, "tapped_width must be a whole number of at least 1, got 0"),
        ({"window_from": "end"}, "window_from must be one of row, anchor, got 'end'"),
        ({"conv_kernel": 2, "conv_group": 5}, r"width \(32\) must be a multiple of conv_group \(5\)"),
        ({"experts": 4, "experts_per_token": 1, "expert_width": 8}, "one MLP per layer, got experts 4"),
    ],
)
def test_a_wrong_shape_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        conditioned(**changes)
