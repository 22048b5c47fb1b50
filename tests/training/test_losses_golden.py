"""Losses and their gradients are those of the `speculators` package; see tests/drafters/golden/README.md."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.training.cross_entropy import Selector, SoftLabels, weighted_loss
from deer_jax.training.losses import Mix, confidence_loss
from deer_jax.training.scores import Term
from deer_jax.training.slot_weights import decay

FILE = Path(__file__).resolve().parent.parent / "drafters" / "golden" / "losses.npz"
MIXES = {"kl_div": "kl", "ce": "ce", "tv": "tv"}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(FILE))


def arguments(golden, logits):
    """Terms, labels and soft labels whose scores are the file's; its labels are the target's best."""
    V = logits.shape[-1]
    theirs = SoftLabels(jnp.asarray(golden["target_logits"]), jnp.eye(V))
    return [Term(jnp.asarray(logits), jnp.eye(V), trained=False)], None, theirs


def slot_weights(golden, layout):
    """Weights of the slots, which decay, divided by how many count."""
    counts = golden[f"counts_{layout}"]
    first, count = (1, counts.shape[1] - 1) if layout == "fill_in" else (0, counts.shape[1])
    factor = np.zeros(counts.shape[1], np.float32)
    factor[first:] = decay(count, 4.0)
    np.testing.assert_allclose(factor, golden[f"weights_{layout}_4"][0], **CLOSE)
    return jnp.asarray(counts * factor) / np.float32(counts.sum())


@pytest.mark.parametrize("name", MIXES)
def test_each_loss_of_a_row(golden, name):
    terms, labels, soft = arguments(golden, golden["logits"])
    ones = jnp.ones(golden["logits"].shape[:2])
    _, rows = weighted_loss(terms, labels, ones, Mix(**{MIXES[name]: 1.0}), soft)
    np.testing.assert_allclose(rows.loss, golden[name], **CLOSE)
    np.testing.assert_allclose(rows.acceptance, 1 - golden["tv"], **CLOSE)


@pytest.mark.parametrize("layout", ["fill_in", "next_token"])
@pytest.mark.parametrize(("case", "mix"), [("kl", Mix(kl=1)), ("ce", Mix(ce=1))])
def test_dflash(golden, layout, case, mix):
    def loss(logits):
        terms, labels, soft = arguments(golden, logits)
        return weighted_loss(terms, labels, slot_weights(golden, layout), mix, soft)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(golden["logits"])
    np.testing.assert_allclose(value, golden[f"dflash_{layout}_{case}"], **CLOSE)
    np.testing.assert_allclose(gradient, golden[f"dflash_{layout}_{case}_gradient_logits"], **CLOSE)


@pytest.mark.parametrize("layout", ["fill_in", "next_token"])
def test_dspark(golden, layout):
    def loss(logits, confidence):
        terms, labels, soft = arguments(golden, logits)
        weights = slot_weights(golden, layout)
        value, rows = weighted_loss(terms, labels, weights, Mix(ce=0.1, tv=0.9), soft)
        return value + confidence_loss(confidence, rows.acceptance, weights)

    found, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(golden["logits"], golden["confidence_logits"])
    np.testing.assert_allclose(found, golden[f"dspark_{layout}"], **CLOSE)
    for name, gradient in zip(("logits", "confidence"), gradients, strict=True):
        np.testing.assert_allclose(gradient, golden[f"dspark_{layout}_gradient_{name}"], **CLOSE)


def test_dflash2(golden):
    K = golden["candidates"].shape[-1]
    counts = golden["counts_fill_in"]

    def loss(logits, transitions):
        terms, labels, soft = arguments(golden, logits)
        term = Term(transitions, jnp.eye(logits.shape[-1]))
        weights = slot_weights(golden, "fill_in")
        return weighted_loss(terms, labels, weights, Mix(kl=1), soft, Selector(term, weights, K))

    one = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (found, rows), gradients = one(golden["logits"], golden["transitions"])
    np.testing.assert_allclose(found, golden["dflash2_fixed_exp_decay"], **CLOSE)
    for name, gradient in zip(("logits", "transitions"), gradients, strict=True):
        np.testing.assert_allclose(gradient, golden[f"dflash2_fixed_exp_decay_gradient_{name}"], **CLOSE)
    np.testing.assert_array_equal(rows.recall, golden["target_was_candidate"] & counts)
