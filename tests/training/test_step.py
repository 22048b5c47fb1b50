"""The training step against AdamW in plain NumPy, whatever the split into micro-batches; and that it learns."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from deer_jax import DrafterConfig, InputError, Target, drafter_from_target
from deer_jax.build import Build
from deer_jax.diffusion.corruption import Corruption, corrupt_blocks, corrupt_cut
from deer_jax.training import objectives
from deer_jax.training.objectives import drafter_loss
from deer_jax.training.step import OptimizerConfig, init_state, make_optimizer, make_step, schedule
from tests.tiny import random_params, tiny
from tests.training.naive import naive_cross_entropy

V, T, STEPS = 24, 12, 20
# Biases, two kinds of norm, and an embedding that is also the head.
MODEL = tiny("qwen2", vocab_size=V, width=8, heads=2, kv_heads=1, head_width=4, mlp_width=12)
FIXED = OptimizerConfig(learning_rate=1e-2, warmup=3, final_rate=0.1, clip=0.4, weight_decay=0.3, ema=0.8)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(config=MODEL, params=random_params(MODEL, 3))


def make_drafter(target, **reading):
    return drafter_from_target(target, DrafterConfig(draft_length=3, **reading))


def make_batch(parts: int, *, bidirectional=False):
    """The same eight examples in `parts` micro-batches."""
    rng = np.random.default_rng(0)
    settings = Corruption(stage="refinement", width=3, blocks=2)
    rows = []
    for i in range(8):
        tokens, prompt, length = rng.integers(0, V, T).astype(np.int32), 1 + i % 3, 6 + i % 5
        if bidirectional:
            cut = corrupt_cut(prompt, length, settings, 0.5, rng)._asdict()
            pad = {name: np.pad(cut[name], (0, T - length)) for name in ("masked", "weight")}
            rows.append({"tokens": tokens} | cut | pad)
        else:
            blocks = corrupt_blocks(prompt, length, settings, rng)
            text_weight = np.pad(blocks.text_weight, (0, T - length))
            rows.append({"tokens": tokens} | blocks._replace(text_weight=text_weight)._asdict())
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {name: x.reshape(parts, 8 // parts, *x.shape[1:]) for name, x in stacked.items()}


@functools.cache
def compiled(method):
    return make_step(drafter_loss(method), FIXED, STEPS, build=dataclasses.replace(Build.of("cpu"), scan=True))


@pytest.fixture(scope="module")
def drafter(target):
    return make_drafter(target)


def run(drafter, batch, count):
    """States' arrays on the host and metrics after each of `count` steps."""
    state, out = init_state(drafter.params, FIXED, STEPS), []
    for _ in range(count):
        state, metrics = compiled(drafter.method)(state, batch, {})
        out.append((jax.device_get((state.params, state.average)), {k: float(v) for k, v in metrics.items()}))
    return out


@pytest.fixture(scope="module")
def whole(drafter):
    """A run of all steps on one batch, undivided."""
    return run(drafter, make_batch(1), STEPS)


def assert_close(one, other, atol):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_the_split_into_micro_batches_changes_nothing(drafter, whole):
    for (params, metrics), (expected, expected_metrics) in zip(run(drafter, make_batch(4), 2), whole, strict=False):
        assert_close(params, expected, 1e-5)
        assert metrics == pytest.approx(expected_metrics, rel=1e-5)


def rate_at(step, config, steps):
    """Linear to the top, then half a cosine down to the final rate at the last step."""
    number, top, warmup = step + 1, config.learning_rate, min(config.warmup, steps // 2)
    if number < warmup:
        return top * number / warmup
    share = (number - warmup) / (steps - warmup)
    return top * (config.final_rate + (1 - config.final_rate) * (1 + math.cos(math.pi * share)) / 2)


def naive_loss(terms, labels, weights, *rest):
    (term,) = terms
    return naive_cross_entropy(term.features, term.table, labels, weights), None


def test_steps_are_those_of_plain_adamw(monkeypatch, drafter, whole):
    batch = {name: x[0] for name, x in make_batch(1).items()}
    total = float(batch.pop("total").sum())
    monkeypatch.setattr(objectives, "weighted_loss", naive_loss)
    gradient = jax.jit(jax.value_and_grad(lambda params: drafter_loss(drafter.method)(params, batch, {}), has_aux=True))
    flat, structure = jax.tree_util.tree_flatten_with_path(jax.device_get(drafter.params))
    names = [path[-1].key for path, _ in flat]
    params = [np.asarray(x, np.float64) for _, x in flat]
    average = [x.copy() for x in params]
    first, second = [np.zeros_like(x) for x in params], [np.zeros_like(x) for x in params]
    clipped = 0
    for step, ((found, found_average), metrics) in enumerate(whole[:4]):
        tree = jax.tree.unflatten(structure, [x.astype(np.float32) for x in params])
        (loss, masked), gradients = gradient(tree)
        gradients = [np.asarray(g, np.float64) / total for g in jax.tree.leaves(gradients)]
        assert all(np.abs(g).max() > 1e-5 for g in gradients)  # everything learns, mask and separator too
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        clipped += norm > FIXED.clip
        assert metrics == pytest.approx(
            {"loss": float(loss) / total, "gradient_norm": norm, "predicted": int(masked)}, rel=1e-4
        )
        for i, g in enumerate(gradients):
            g = g * min(1, FIXED.clip / norm)
            first[i] = FIXED.b1 * first[i] + (1 - FIXED.b1) * g
            second[i] = FIXED.b2 * second[i] + (1 - FIXED.b2) * g**2
            update = first[i] / (1 - FIXED.b1 ** (step + 1))
            update = update / (np.sqrt(second[i] / (1 - FIXED.b2 ** (step + 1))) + 1e-8)
            if not names[i].endswith(("norm", "bias")):
                update = update + FIXED.weight_decay * params[i]
            params[i] = params[i] - rate_at(step, FIXED, STEPS) * update
            average[i] = FIXED.ema * average[i] + (1 - FIXED.ema) * params[i]
        assert_close(found, jax.tree.unflatten(structure, params), 2e-5)
        assert_close(found_average, jax.tree.unflatten(structure, average), 2e-5)
    assert clipped > 0


def test_the_loss_falls(whole):
    losses = [metrics["loss"] for _, metrics in whole]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_of_cuts_falls(target):
    drafter = make_drafter(target, attention="bidirectional")
    losses = [metrics["loss"] for _, metrics in run(drafter, make_batch(1, bidirectional=True), 8)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_step_takes_its_state_but_not_the_drafter_it_began_with(target, drafter):
    batch = make_batch(1)
    state = init_state(drafter.params, FIXED, STEPS)
    after, _ = compiled(drafter.method)(state, batch, {})
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.average, state.optimizer)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((after, drafter.params, target.params)))


def test_only_matrices_decay(drafter):
    config = dataclasses.replace(FIXED, warmup=0, weight_decay=0.5)
    optimizer = make_optimizer(config, 4)
    zero = jax.tree.map(np.zeros_like, drafter.params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(lambda zero, now: optimizer.update(zero, optimizer.init(now), now))(zero, drafter.params)
    rate, vectors = rate_at(0, config, 4), 0
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        weight = functools.reduce(lambda tree, step: tree[step.key], path, drafter.params)
        share = 0 if path[-1].key.endswith(("norm", "bias")) else -rate * 0.5
        np.testing.assert_allclose(update, share * np.asarray(weight), rtol=1e-5, atol=0)
        vectors += share == 0
    assert vectors == 6  # two norms and three biases of the layers, stacked, and the last norm


def test_without_an_average_there_is_none(drafter):
    assert init_state(drafter.params, dataclasses.replace(FIXED, ema=0.0), STEPS).average == {}


@pytest.mark.representative
@pytest.mark.parametrize(("warmup", "steps"), [(3, 20), (0, 5), (100, 10), (1, 2), (100, 1)])
def test_schedule(warmup, steps):
    config = dataclasses.replace(FIXED, warmup=warmup)
    rates = [float(schedule(config, steps)(step)) for step in range(steps)]
    np.testing.assert_allclose(rates, [rate_at(step, config, steps) for step in range(steps)], rtol=1e-5)
    assert min(rates) > 0
    assert rates[-1] == pytest.approx(config.learning_rate * config.final_rate)
    if warmup:
        assert steps == 1 or max(rates) == pytest.approx(config.learning_rate)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", 0.0, "learning_rate must be positive, got 0.0"),
        ("learning_rate", math.nan, "learning_rate must be positive, got nan"),
        ("clip", 0.0, "clip must be positive, got 0.0"),
        ("ema", 1.0, r"ema must be in \[0, 1\), got 1.0"),
        ("b2", -0.1, r"b2 must be in \[0, 1\), got -0.1"),
        ("weight_decay", -1.0, "weight_decay must not be negative, got -1.0"),
    ],
)
def test_bad_settings(name, value, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        OptimizerConfig(**{name: value})


@pytest.mark.parametrize("scan", [True, False])
def test_what_is_computed_again_is_the_same_and_saves_memory(scan):
    """Four layers, so that what each keeps shows."""
    model = dataclasses.replace(MODEL, layers=4)
    drafter = make_drafter(Target(config=model, params=random_params(model, 3)))
    build, batch = dataclasses.replace(Build.of("cpu"), scan=scan), make_batch(1)
    results, memory = {}, {}
    policies = ("none", "cheap", "layers") if scan else ("none", "layers")
    for remat in policies:
        step = make_step(drafter_loss(drafter.method, remat=remat), FIXED, STEPS, build=build)
        state = init_state(drafter.params, FIXED, STEPS)
        program = step.lower(state, batch, {}).compile()
        after, metrics = program(state, batch, {})
        results[remat], memory[remat] = (after.params, metrics), program.memory_analysis().temp_size_in_bytes
    for other in policies[1:]:
        assert_close(results[other], results["none"], 1e-6)
    assert sorted(policies, key=lambda name: -memory[name]) == list(policies)
