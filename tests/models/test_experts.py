"""Every way of running experts against a loop over rows and their chosen experts, on one device and on meshes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.models import experts
from deer_jax.sharding import make_mesh, on_mesh, placement
from tests import reference
from tests.tiny import tiny

CONFIG = tiny("qwen3_moe")
BOUND = experts.LOOP_ROWS


def made(config):
    """A router, stacks, and rows [4, 25, D]."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray((rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32))

    L, E, D, F = config.layers, config.experts, config.width, config.expert_width
    stacks = {"gate": normal(L, E, F, D), "up": normal(L, E, F, D), "down": normal(L, E, D, F)}
    return normal(E, D) * 3, stacks, normal(4, 25, D) * 6


@pytest.fixture(scope="module")
def weights():
    return made(CONFIG)


def expected(x, router, stacks, layer, config):
    one = [stacks[name][layer] for name in ("gate", "up", "down")]
    return reference.experts(x, router, *one, config.experts_per_token, config.normalise_router)


def twin(x, router, stacks, layer, config):
    """All experts for all rows x [R, D], the chosen ones weighted: what is differentiated in the plain way."""
    scores = jax.nn.softmax(x @ router.T, axis=-1)
    least = jnp.sort(scores, axis=-1)[:, -config.experts_per_token, None]
    weight = jnp.where(scores >= least, scores, 0.0)
    weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    gate, up, down = (stacks[name][layer] for name in ("gate", "up", "down"))
    inner = jax.nn.silu(jnp.einsum("rd,efd->ref", x, gate)) * jnp.einsum("rd,efd->ref", x, up)
    return jnp.einsum("re,ref,edf->rd", weight, inner, down)


def dense(rows, router, stacks, layer, config):
    """The form that other platforms than this one take."""
    return experts._by_expert(rows, *experts.route(rows, router, config), stacks, layer)


@pytest.mark.parametrize("rows", [1, 7, BOUND, BOUND + 1, 100])
@pytest.mark.parametrize("normalise", [True, False])
def test_experts(rows, normalise, weights):
    config = dataclasses.replace(CONFIG, normalise_router=normalise)
    router, stacks, x = weights
    x, layer = x.reshape(1, 100, -1)[:, :rows], np.int32(1)
    wanted = expected(x[0], router, stacks, layer, config)
    run = jax.jit(lambda x, layer: experts.mix(x, router, stacks, layer, config))
    np.testing.assert_allclose(run(x, layer)[0], wanted, rtol=0, atol=1e-5)
    if rows > BOUND:
        run = jax.jit(lambda x, layer: dense(x, router, stacks, layer, config))
        np.testing.assert_allclose(run(x[0], layer), wanted, rtol=0, atol=1e-5)


def test_rows_that_share_one_expert_and_rows_that_cannot_choose(weights):
    """All rows equal, so that most experts get nothing; and a router without a preference: the first ones."""
    router, stacks, x = weights
    run = jax.jit(lambda x, router: experts.mix(x, router, stacks, 0, CONFIG))
    for rows in (8, 80):
        same = jnp.broadcast_to(x[:1, :1], (1, rows, CONFIG.width))
        wanted = expected(same[0, :1], router, stacks, 0, CONFIG)
        np.testing.assert_allclose(run(same, router)[0], np.tile(wanted, (rows, 1)), rtol=0, atol=1e-5)
        some = x.reshape(1, 100, -1)[:, :rows]
        wanted = expected(some[0], 0 * router, stacks, 0, CONFIG)
        np.testing.assert_allclose(run(some, 0 * router)[0], wanted, rtol=0, atol=1e-5)


def test_batch_layout_does_not_matter(weights):
    router, stacks, x = weights
    run = jax.jit(lambda x: experts.mix(x, router, stacks, 0, CONFIG))
    np.testing.assert_allclose(run(x).reshape(1, 100, -1), run(x.reshape(1, 100, -1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [20, 100])
def test_an_expert_that_is_not_finite_reaches_only_the_rows_that_chose_it(rows, weights):
    router, stacks, x = weights
    x = x.reshape(1, 100, -1)[:, :rows]
    met = (np.asarray(experts.route(x[0], router, CONFIG)[0]) == 2).any(axis=1)
    assert 0 < met.sum() < rows
    run = jax.jit(lambda x, stacks: experts.mix(x, router, stacks, 0, CONFIG)[0])
    other = jax.jit(lambda x, stacks: dense(x[0], router, stacks, 0, CONFIG))
    for form in (run, other)[: 1 + (rows > BOUND)]:
        for name, value in (("down", np.nan), ("gate", np.inf)):
            broken = stacks | {name: stacks[name].at[0, 2].set(value)}
            before, after = np.asarray(form(x, stacks)), np.asarray(form(x, broken))
            np.testing.assert_array_equal(before[~met], after[~met])
            assert not np.isfinite(after[met]).all(axis=1).any()


def gradients(run):
    """The jitted output, and the gradients of a fixed weighting of it."""

    @jax.jit
    def of(x, router, stacks, layer):
        out, pull = jax.vjp(lambda *arguments: run(*arguments, layer), x, router, stacks)
        return out, pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return of


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)


@pytest.mark.parametrize("rows", [7, BOUND, BOUND + 1, 100])
def test_gradients(rows, weights):
    router, stacks, x = weights
    x = x.reshape(100, -1)[:rows]
    mine = gradients(lambda x, router, stacks, layer: experts.mix(x[None], router, stacks, layer, CONFIG)[0])
    plain = gradients(lambda x, router, stacks, layer: twin(x, router, stacks, layer, CONFIG))
    found, wanted = (of(x, router, stacks, np.int32(1)) for of in (mine, plain))
    assert_close(found, wanted)
    for of_stack in found[1][2].values():  # the other layer has none
        assert not np.asarray(of_stack[0]).any()
        assert np.asarray(of_stack[1]).any()


def test_gradients_in_a_loop_over_layers_need_memory_for_one(optimised, weights):
    router, _, x = weights

    def memory(layers):
        stacks = made(dataclasses.replace(CONFIG, layers=layers))[1]

        def loss(x, stacks):
            def body(x, layer):
                return x + experts.mix(x, router, stacks, layer, CONFIG), None

            return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, jnp.arange(layers))[0])

        compiled = jax.jit(jax.grad(loss, argnums=1)).lower(x[:, :1], stacks).compile()
        return compiled.memory_analysis().temp_size_in_bytes, sum(x.nbytes for x in stacks.values()) / layers

    (few, of_layer), (many, _) = memory(2), memory(10)
    assert many - few < of_layer


def collectives(text: str) -> list[str]:
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return sorted(re.findall(rf" ({kinds})(?:-start)?\(", text))


ON_MESH = dataclasses.replace(CONFIG, experts=8)
GATHERED, SUM = "all-gather", "all-reduce"


@pytest.mark.parametrize("rows", [3, 25], ids=["few", "many"])
@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 1, 2), (1, 2, 2), (1, 4, 1)], ids=str)
def test_on_a_mesh(shape, rows, monkeypatch):
    """The same values and gradients, whatever the shards chose; and what it says to other devices."""
    monkeypatch.setattr(experts, "LOOP_ROWS", 12)  # 3 to 12 rows on a shard, or 25 to 100
    router, stacks, x = made(ON_MESH)
    x, layer = x[:, :rows], np.int32(1)
    mix = functools.partial(experts.mix, config=ON_MESH)
    wanted = gradients(mix)(x, router, stacks, layer)
    mesh = make_mesh(*shape)
    x = jax.device_put(x, placement(mesh, x.shape, ("batch", None, None)))
    stacks = {
        name: jax.device_put(stack, placement(mesh, stack.shape, (None, *experts.AXES[name])))
        for name, stack in stacks.items()
    }
    with on_mesh(mesh):
        assert_close(gradients(mix)(x, router, stacks, layer), wanted)
        said = collectives(jax.jit(mix).lower(x, router, stacks, layer).compile().as_text())
    split, tensor = shape[1] > 1, shape[2] > 1
    together = [GATHERED] * 3 * split  # an expert's weights, or once those of a layer
    in_step = [SUM] * (split and rows == 3)
    assert said == together + in_step + [SUM] * tensor
