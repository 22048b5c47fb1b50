"""Weighted cross-entropy in chunks of rows, and its gradients, against plain NumPy and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.models.layers import look_up
from deer_jax.sharding import make_mesh, on_mesh, placement, spread
from deer_jax.training import cross_entropy
from deer_jax.training.cross_entropy import SoftLabels, weighted_cross_entropy
from tests import reference
from tests.training.naive import naive_cross_entropy


def rows_of(count, used, dtype=np.float32, seed=0):
    """hidden, head, labels, weights with `used` weights that are not zero, at random places."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(count, 8)), rng.normal(size=(20, 8))
    weights = np.zeros(count, np.float32)
    weights[rng.choice(count, used, replace=False)] = rng.uniform(0.1, 3, used)
    labels = rng.integers(0, 20, count).astype(np.int32)
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(labels), jnp.asarray(weights)


def loss_of(hidden, head, labels, weights, soft=None):
    """Of rows without a batch axis."""
    soft = soft and soft._replace(hidden=soft.hidden[None])
    return weighted_cross_entropy(hidden[None], head, labels[None], weights[None], soft)


CASES = [(13, 13, 4), (13, 8, 4), (13, 5, 1), (13, 6, 512), (13, 0, 4), (1, 1, 4)]


def gradients(rows):
    # A function of its own, so that nothing compiled for another chunk is found.
    return jax.jit(jax.value_and_grad(lambda *rows: 2.5 * loss_of(*rows), (0, 1)))(*rows)


naive_gradients = jax.jit(jax.grad(lambda *rows: 2.5 * naive_cross_entropy(*rows), (0, 1)))


@pytest.mark.parametrize(("count", "used", "chunk"), CASES)
def test_weighted_cross_entropy(monkeypatch, count, used, chunk):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", chunk)
    rows = rows_of(count, used)
    hidden, head, labels, weights = (np.asarray(x, np.float64) for x in rows)
    value, to_hidden, to_head = 0.0, np.zeros_like(hidden), np.zeros_like(head)
    for x, label, weight, into in zip(hidden, labels.astype(int), weights, to_hidden, strict=True):
        p = reference.softmax(head @ x)
        value -= weight * np.log(p[label])
        error = weight * (p - np.eye(20)[label])
        into += head.T @ error
        to_head += np.outer(error, x)
    found, ours = gradients(rows)
    np.testing.assert_allclose(found, 2.5 * value, rtol=1e-5)
    for a, plain, b in zip(ours, (to_hidden, to_head), naive_gradients(*rows), strict=True):
        np.testing.assert_allclose(a, 2.5 * plain, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ours[0][weights == 0], 0)
    if count == 1:  # without a gradient
        np.testing.assert_allclose(loss_of(*rows), value, rtol=1e-5)


@pytest.mark.parametrize("teachers", [15, 20, 23])
def test_weighted_cross_entropy_with_soft_labels(monkeypatch, teachers):
    """A teacher of fewer, as many and more ids; two ids that the drafter does not share."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 4)
    rows = rows_of(13, 8)
    rng = np.random.default_rng(5)
    theirs, their_head = rng.normal(size=(13, 6)), rng.normal(size=(teachers, 6))
    allowed = np.ones(20, bool)
    allowed[[3, 7]] = False
    soft = SoftLabels(*(jnp.asarray(x, jnp.float32) for x in (theirs, their_head)), jnp.asarray(allowed))
    hidden, head, _, weights = (np.asarray(x, np.float64) for x in rows)
    value, to_hidden, to_head = 0.0, np.zeros_like(hidden), np.zeros_like(head)
    for x, y, weight, into in zip(hidden, theirs, weights, to_hidden, strict=True):
        wanted, shared = np.zeros(20), np.flatnonzero(allowed[: min(teachers, 20)])
        wanted[shared] = reference.softmax((their_head @ y)[shared])
        p = reference.softmax(head @ x)
        value -= weight * (wanted * np.log(p)).sum()
        into += weight * head.T @ (p - wanted)
        to_head += weight * np.outer(p - wanted, x)
    one = jax.jit(jax.value_and_grad(lambda *rows: loss_of(*rows, soft), (0, 1)))
    found, (by_hidden, by_head) = one(*rows)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(by_hidden, to_hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_head, to_head, rtol=1e-4, atol=1e-5)


def test_labels_of_weightless_rows_may_be_anything(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 4)
    hidden, head, labels, weights = rows_of(9, 5)
    wild = jnp.where(weights == 0, 1000, labels)
    expected, found = gradients((hidden, head, labels, weights)), gradients((hidden, head, wild, weights))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weighted_cross_entropy_in_bfloat16(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 16)
    rows = rows_of(40, 30, jnp.bfloat16)
    exact = tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in rows)
    value, ours = gradients(rows)
    expected, theirs = gradients(exact)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, expected, rtol=1e-4)  # logits are accumulated in float32
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.02, atol=0.01 * float(np.abs(b).max()))


@pytest.mark.parametrize("shape", [{"data": 2, "tensor": 2}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"tensor": 4}])
@pytest.mark.parametrize("soft", [False, True])
def test_on_shards_of_rows_and_vocabulary(monkeypatch, shape, soft):
    """Some shards have no row of weight; the table is used twice, and its gradient is that of both uses."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 4)
    mesh, (hidden, head, labels, weights) = make_mesh(**shape), rows_of(32, 9)
    weights = weights.at[:8].set(0)
    hidden, labels, weights = (x.reshape(4, 8, *x.shape[1:]) for x in (hidden, labels, weights))
    rng = np.random.default_rng(5)
    theirs = rng.normal(size=(4, 8, 8)), rng.normal(size=(24, 8)), rng.random(20) < 0.8
    given = SoftLabels(*(jnp.asarray(x, jnp.float32) for x in theirs[:2]), jnp.asarray(theirs[2])) if soft else None

    def loss(hidden, head):
        table = spread(head)
        looked_up = look_up(table, labels)
        # A table that was not spread is so by itself.
        return weighted_cross_entropy(hidden + looked_up, head if soft else table, labels, weights, given)

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head)
    with on_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss, (0, 1)))
        where = placement(mesh, hidden.shape, ("batch", None, None)), placement(mesh, head.shape, ("vocab", "width"))
        found = program(jax.device_put(hidden, where[0]), jax.device_put(head, where[1]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
