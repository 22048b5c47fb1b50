"""The backbone of conditioned drafters: against plain NumPy, over a cache, in training, on a mesh, in cost."""

import dataclasses
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


def over_context(config, params, x, tapped, start, garbage=0.0):
    """A block's pass over a cache that was filled in chunks; slots behind the context hold garbage."""
    model = bind(config, params)
    build = dataclasses.replace(Build.of("cpu"), cache_block=4)
    cache = empty_cache(config, len(x), S + W, build)
    cache = KVCache(cache.keys + garbage, cache.values - garbage, cache.block)
    for first, last in ((0, 3), (3, 9), (9, S)):
        at = jnp.full(len(x), first, jnp.int32)
        cache = write_cache(cache, context_kv(model, tapped[:, first:last], at), at)
    return draft_block(model, x, cache, start)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", representing(KINDS, "row causal"))
def test_a_draft_equals_plain_numpy(kind, scan):
    """What was written at the start and behind it, garbage too, changes nothing."""
    config = conditioned(kind)
    params, x, tapped = params_of(config, scan), normal(B, W, config.width, seed=2), normal(B, S, TAPPED, seed=3)
    start = np.array([0 if kind == "full" else S - 3, 9], np.int32)
    for row in range(B):
        tapped[row, start[row] :] = 1e6
    found = jax.jit(lambda *arguments: over_context(config, *arguments, garbage=1e4))(params, x, tapped, start)
    for row in range(B):
        expected = reference.conditioned(config, params_of(config), x[row], tapped[row, : start[row]])
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-4)


def train_example(config):
    """Blocks of two texts: sorted anchors, the same one twice, one without context, one behind the last position."""
    anchor = np.array([[0, 6, 6, 13], [2, 7, 11, S]], np.int32)
    x = normal(B, anchor.shape[1] * W, config.width, seed=4)
    return anchor, x, normal(B, S, TAPPED, seed=5)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 8 rows and 4 keys, one row of the batch at a time."""
    monkeypatch.setattr(piecewise, "ROWS", 8)
    monkeypatch.setattr(piecewise, "KEYS", 4)
    monkeypatch.setattr(piecewise, "SCORES", 1)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", representing(KINDS, "row causal"))
def test_blocks_in_training_equal_their_drafts(kind, scan, small_pieces):
    config = conditioned(kind)
    params, (anchor, x, tapped) = params_of(config, scan), train_example(config)

    @jax.jit
    def run(params, x, tapped, anchor):
        blocks = read_blocks(bind(config, params), x, tapped, Blocks(anchor, W))
        each = x.reshape(B, -1, W, config.width)
        drafts = [over_context(config, params, each[:, m], tapped, anchor[:, m]) for m in range(anchor.shape[1])]
        return blocks, jnp.concatenate(drafts, axis=1)

    blocks, drafts = run(params, x, tapped, anchor)
    np.testing.assert_allclose(blocks, drafts, rtol=0, atol=1e-4)


def plain_blocks(config, params, x, tapped, anchor):
    """The training form from whole scores, in plain `jax.numpy`, for gradients."""
    exact = jax.lax.Precision.HIGHEST
    D, K, G, H = config.width, config.kv_heads, config.heads // config.kv_heads, config.head_width

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * scale

    def times(x, w):
        return jnp.matmul(x, w.T, precision=exact)

    def one(x, tapped, anchor):  # of a text
        M = len(anchor)
        place = np.concatenate([np.arange(S), (anchor[:, None] + np.arange(W)).reshape(-1)])
        block = np.concatenate([np.full(S, -1), np.repeat(np.arange(M), W)])
        angle = place[:, None] * config.rope.theta ** (-np.arange(0, H, 2) / H)
        cos, sin = (np.tile(f(angle), 2)[:, None].astype(np.float32) for f in (np.cos, np.sin))

        def turned(y):
            first, second = jnp.split(y, 2, axis=-1)
            return y * cos[-len(y) :] + jnp.concatenate([-second, first], axis=-1) * sin[-len(y) :]

        c = norm(times(tapped, params["fc"]), params["hidden_norm"])
        for i in range(config.layers):
            w = {name: stack[i] for name, stack in params["layers"].items()}

            def convolved(y, base, dynamic):
                dynamic = jnp.repeat(dynamic, config.conv_group, axis=-1)  # [M*W, kernel, D]
                out = 0.0
                for tap in range(config.conv_kernel):
                    before = jnp.pad(y.reshape(M, W, D), ((0, 0), (tap, 0), (0, 0)))[:, :W].reshape(M * W, D)
                    out = out + (base[tap] + dynamic[:, tap]) * before
                return out

            def sublayer(name, h, run):
                if not config.conv_kernel:
                    return run(h)
                dynamic = times(h, w[f"{name}_projection"]).reshape(M * W, 2, config.conv_kernel, -1)
                base = w[f"{name}_base"]
                return convolved(run(convolved(h, base[0], dynamic[:, 0])), base[1], dynamic[:, 1])

            def attention(h):
                both = jnp.concatenate([c, h])
                q = turned(norm(times(h, w["q"]).reshape(-1, K * G, H), w["q_norm"]))
                k = turned(norm(times(both, w["k"]).reshape(-1, K, H), w["k_norm"]))
                v = times(both, w["v"]).reshape(-1, K, H)
                k, v = (jnp.repeat(side, G, axis=1) for side in (k, v))
                window = config.windows[i] or 10**6
                row, key = np.ix_(np.arange(S, len(place)), np.arange(len(place)))
                from_row, from_anchor = place[row] - place[key], np.repeat(anchor, W)[:, None] - place[key]
                seen = (block[key] == -1) & (place[key] < np.repeat(anchor, W)[:, None])
                seen = seen & ((from_row if config.window_from == "row" else from_anchor - 1) < window)
                own = block[key] == block[row]
                own = own & ((from_row >= 0) | (not config.causal[i]))
                own = own & ((abs(from_row) < window) | (config.window_from == "anchor"))
                scores = jnp.einsum("tnh,snh->nts", q, k, precision=exact) * H**-0.5
                weights = jax.nn.softmax(jnp.where(seen | own, scores, -1e30), axis=-1)
                mixed = jnp.einsum("nts,snh->tnh", weights, v, precision=exact)
                return times(mixed.reshape(M * W, -1), w["o"])

            def mlp(h):
                return times(jax.nn.silu(times(h, w["gate"])) * times(h, w["up"]), w["down"])

            x = x + sublayer("attention_conv", norm(x, w["input_norm"]), attention)
            x = x + sublayer("mlp_conv", norm(x, w["post_norm"]), mlp)
        return norm(x, params["norm"])

    return jnp.stack([one(*row) for row in zip(x, tapped, anchor, strict=True)])


@pytest.mark.parametrize(
    ("kind", "scan", "remat"),
    representing(
        [
            ("full", False, "none"), ("row", True, "none"), ("anchor causal", True, "layers"),
            ("convolutions", True, "cheap"), ("convolutions", False, "layers"),
        ],
        ("convolutions", False, "layers"),
    ),
)  # fmt: skip
def test_gradients_equal_those_of_whole_scores(kind, scan, remat, small_pieces):
    config = conditioned(kind)
    params, (anchor, x, tapped) = params_of(config), train_example(config)
    to_out = normal(*x.shape, seed=6)

    def by_pieces(params, x, tapped):
        params = params if scan else unstack_layers(params, config.layers)
        return jnp.sum(read_blocks(bind(config, params), x, tapped, Blocks(anchor, W), remat) * to_out)

    def plainly(params, x, tapped):
        return jnp.sum(plain_blocks(config, params, x, tapped, anchor) * to_out)

    found, expected = (jax.jit(jax.value_and_grad(of, (0, 1, 2)))(params, x, tapped) for of in (by_pieces, plainly))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True
    ):
        scale = float(jnp.max(jnp.abs(other)))
        assert scale > 0, path
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * max(scale, 1), err_msg=str(path))


def test_what_follows_an_anchor_and_other_blocks_change_nothing():
    """Neither the value nor the gradient: of the first block, by all that is not its own."""
    config = conditioned("anchor causal")
    params, (anchor, x, tapped) = params_of(config), train_example(config)
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
    with_them = over_context(config, params, x, tapped, start)
    np.testing.assert_allclose(with_them, over_context(without, less, x, tapped, start), rtol=0, atol=1e-5)


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
    model, at = bind(config, params), jnp.zeros(B, jnp.int32)
    cache = write_cache(
        empty_cache(config, B, S + W, dataclasses.replace(Build.of("cpu"), cache_block=4)),
        context_kv(model, tapped, at), at,
    )  # fmt: skip
    start = np.array([13, 12], np.int32)  # slots from 8 on are seen
    broken = KVCache(cache.keys, cache.values.at[:, :, :, :8].set(jnp.nan), cache.block)
    np.testing.assert_array_equal(draft_block(model, x, broken, start), draft_block(model, x, cache, start))
    broken = KVCache(cache.keys, cache.values.at[:, :, :, :9].set(jnp.nan), cache.block)
    assert not np.isfinite(draft_block(model, x, broken, start)).all()


def test_bfloat16_stays_close_to_float32():
    config = conditioned("convolutions")
    params, (anchor, x, tapped) = params_of(config), train_example(config)

    def run(dtype):
        cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, x, tapped))
        out = read_blocks(bind(config, cast[0]), cast[1], cast[2], Blocks(anchor, W))
        draft = over_context(config, cast[0], cast[1][:, :W], cast[2], anchor[:, 0])
        assert out.dtype == draft.dtype == dtype
        return np.asarray(out, np.float32), np.asarray(draft, np.float32)

    for half, whole in zip(run(jnp.bfloat16), run(jnp.float32), strict=True):
        np.testing.assert_allclose(half, whole, rtol=0, atol=0.15)


@pytest.mark.parametrize(
    ("mesh", "kind"), representing([((2, 2, 2), "convolutions"), ((1, 1, 8), "row")], ((2, 2, 2), "convolutions"))
)
def test_a_mesh_gives_the_same(mesh, kind):
    config = conditioned(kind, heads=8, kv_heads=4, mlp_width=64, width=64)
    params, anchor = params_of(config), np.tile(train_example(config)[0], (2, 1))
    x, tapped = normal(4, anchor.shape[1] * W, config.width, seed=4), normal(4, S, TAPPED, seed=5)

    def run(params, x, tapped, anchor):
        def loss(params, x, tapped):
            out = read_blocks(bind(config, params), x, tapped, Blocks(anchor, W), "layers")
            return jnp.sum(out * jnp.cos(jnp.arange(config.width, dtype=jnp.float32))[None, None]), out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(params, x, tapped)
        return out, gradients, over_context(config, params, x[:, :W], tapped, anchor[:, 0])

    alone = jax.jit(run)(params, x, tapped, anchor)
    mesh = make_mesh(*mesh)
    placed = jax.device_put(params, placements(mesh, params, logical_axes(config)))
    rows = [jax.device_put(y, placement(mesh, y.shape, ("batch", None, None)[: y.ndim])) for y in (x, tapped, anchor)]
    with on_mesh(mesh):
        spread = jax.jit(run)(placed, *rows)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(spread), jax.tree.leaves(alone), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(other))))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale, err_msg=str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": (4,)}, r"windows must have an entry for each of the 2 layers, got \(4,\)"),
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
