"""What a row loses, and its derivative, against autodiff of the plain formulas; slot weights against loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.errors import InputError
from deer_jax.training.losses import (
    Mix,
    Target,
    View,
    best_id,
    candidates,
    choice_loss,
    confidence_loss,
    log_normaliser,
    mixed,
)
from deer_jax.training.slot_weights import decay
from tests.training.naive import naive_choice, naive_losses

V, ROWS = 11, 7
NAMES = [field.name for field in dataclasses.fields(Mix)]


def rows_of(outside, seed=0):
    """scores, label, theirs, rest; one id without probability, one row whose q is p, one without a label."""
    rng = np.random.default_rng(seed)
    scores, theirs, rest = (3 * rng.normal(size=(ROWS, n)).astype(np.float32) for n in (V, V, outside))
    theirs[:, 4] = -np.inf
    scores[2] = np.where(np.isinf(theirs[2]), -100, theirs[2])
    label = rng.integers(0, V, ROWS)
    label[3] = -1
    return jnp.asarray(scores), jnp.asarray(label), jnp.asarray(theirs), jnp.asarray(rest)


def view_of(scores, label, theirs, rest):
    norm, best = log_normaliser(scores)
    theirs_norm, _ = log_normaliser(theirs)
    of_all, theirs_best = log_normaliser(jnp.concatenate([theirs, rest], axis=1))
    target = Target(theirs - theirs_norm, theirs_norm - of_all, theirs_best - of_all)
    is_label = label[:, None] == jnp.arange(V)[None]
    return View(scores - norm, best - norm, is_label, (label >= 0).astype(jnp.float32)[:, None], target)


@pytest.mark.parametrize("outside", [0, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_and_its_derivative(name, outside):
    rows = rows_of(outside)
    loss, slope = mixed(Mix(**{name: 1.0}), view_of(*rows))
    expected, pull = jax.vjp(lambda scores: naive_losses(scores, *rows[1:])[name], rows[0])
    np.testing.assert_allclose(loss[:, 0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, pull(jnp.ones(ROWS))[0], rtol=1e-5, atol=1e-6)
    assert name == "ce" or outside or loss[2, 0] < 1e-6  # q is p


def test_a_mix_is_the_weighted_sum():
    view, weights = view_of(*rows_of(5)), dict(zip(NAMES, (0.1, 0.2, 0.3), strict=True))
    alone = [(weight, *mixed(Mix(**{name: 1.0}), view)) for name, weight in weights.items()]
    for part, found in enumerate(mixed(Mix(**weights), view)):
        np.testing.assert_allclose(found, sum(one[0] * one[1 + part] for one in alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("weights", "message"), [({}, "above 0"), ({"kl": -1.0}, "kl"), ({"tv": math.inf}, "tv")])
def test_a_mix_without_sense_is_refused(weights, message):
    with pytest.raises(InputError, match=message):
        Mix(**weights)


@pytest.mark.parametrize("count", [1, 4, V])
def test_the_label_takes_the_last_place_where_it_is_not_among_the_best(count):
    scores, label, *_ = rows_of(0)
    chosen = candidates(scores, jnp.arange(V), label[:, None], count)
    rng = np.random.default_rng(1)
    extra = jnp.asarray(rng.normal(size=(ROWS, V)), jnp.float32)
    for row, right, ids, given, found in zip(*map(np.asarray, (scores, label, *chosen[:2], chosen.found)), strict=True):
        best = np.argsort(-row)[:count].tolist()
        assert bool(found) == (right in best)
        if right >= 0 and not found:
            best[-1] = right
        assert ids.tolist() == best
        np.testing.assert_array_equal(given, row[ids])
    loss, slope = choice_loss(chosen.scores + jnp.take_along_axis(extra, chosen.ids, axis=1), chosen.is_label)
    expected, pull = jax.vjp(lambda extra: naive_choice(scores, label, extra, count), extra)
    np.testing.assert_allclose(loss[:, 0], expected, rtol=1e-5, atol=1e-6)
    at = jnp.take_along_axis(pull(jnp.ones(ROWS))[0], chosen.ids, axis=1)
    np.testing.assert_allclose(slope, at, rtol=1e-5, atol=1e-6)


def test_the_best_id_is_the_lowest_of_several():
    scores = jnp.asarray([[0.0, 2.0, 2.0], [-jnp.inf, -5.0, -6.0]])
    assert best_id(scores, jnp.asarray([3, 5, 9])).tolist() == [[5], [5]]


def test_confidence_is_trained_on_the_acceptance_alone():
    rng = np.random.default_rng(0)
    scores, accepted, weights = (jnp.asarray(rng.random((2, 5)), jnp.float32) for _ in range(3))
    loss, (to_scores, to_accepted) = jax.value_and_grad(confidence_loss, (0, 1))(scores, accepted, weights)
    sure = 1 / (1 + np.exp(-np.asarray(scores, np.float64)))
    expected = -weights * (accepted * np.log(sure) + (1 - accepted) * np.log(1 - sure))
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(to_scores, weights * (sure - accepted), rtol=1e-4, atol=1e-6)
    assert not to_accepted.any()


def test_decay_begins_at_the_first_draft():
    np.testing.assert_allclose(decay(4, 2.0), [1, math.exp(-0.5), math.exp(-1), math.exp(-1.5)], rtol=1e-6)
