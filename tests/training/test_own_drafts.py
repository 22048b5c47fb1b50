"""The third stage: what the drafter drafts on its own is verified as decoding would, and more of it is accepted."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax import regenerate
from deer_jax.drafters.protocol import Draft
from deer_jax.models.layers import logits
from deer_jax.sharding import make_mesh, on_mesh
from deer_jax.training.objectives import ACCEPTANCE, drafter_loss, fixed_params, read_text
from deer_jax.training.own_drafts import drafted, read_drafts
from deer_jax.training.slot_weights import accepted_at_stake
from tests.fast import representing
from tests.kinds import K, V, drafter_of, target_of

KINDS = ("standalone rnn", "vanilla")  # of the text alone, and of the target with a reduced vocabulary
kinds = pytest.mark.parametrize("kind", representing(KINDS, "vanilla"))
COPIES, T = 512, 14


def batch_of(tokens, anchor) -> dict:
    """Blocks masked whole behind anchors int [B, M] of texts int [B, T]."""
    shape = (*np.shape(anchor), K)
    return {
        "tokens": jnp.asarray(tokens, jnp.int32), "anchor": jnp.asarray(anchor, jnp.int32),
        "size": jnp.full(shape[:2], K, jnp.int32), "masked": jnp.ones(shape, bool), "weight": jnp.ones(shape),
        "text_weight": jnp.zeros(np.shape(tokens)),
    }  # fmt: skip


def text_of(seed: int = 1, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V - 1, (rows, T))


@functools.partial(jax.jit, static_argnums=(0, 1))
def expected(method, config, target, params, shared, batch):
    """Of each block [B, M] what is expected to be accepted; its drafts, the target's p, its scores in training and in
    its draw."""
    view = read_text(config, target, batch["tokens"], method.taps)
    drafts = drafted(method, params, shared, batch, view.tapped)
    (B, M, W), asked = drafts.shape, []

    def pick(scores, first, ids=None):
        asked.append(scores)
        return Draft(drafts.reshape(B * M, W)[:, first : first + scores.shape[1]], None)

    method.draw(params, shared, batch, view.tapped, pick)
    said = method.predict(params, shared, batch | {"drafted": drafts}, view.tapped, "none")
    scores = sum(logits(term.features, term.table) for term in said.terms)[:, -M * W :].reshape(B, M, W, -1)
    states = read_drafts(config, target, batch["tokens"], batch["anchor"], drafts)
    p = jax.nn.softmax(logits(states, view.head), axis=-1).reshape(B, M, W, -1)
    drawn = jnp.concatenate(asked, axis=1).reshape(B, M, W, -1)
    q = jax.nn.softmax(drawn, axis=-1)
    if said.ids is not None:
        q = jnp.zeros_like(p).at[..., said.ids].set(q)
    one_p, one_q = (jnp.take_along_axis(x, drafts[..., None], axis=-1)[..., 0] for x in (p, q))
    chance = jnp.minimum(one_p / one_q, 1)
    reached = jnp.cumprod(jnp.pad(chance, ((0, 0), (0, 0), (1, 0)), constant_values=1)[..., :-1], axis=-1)
    length = jnp.sum(reached * jnp.sum(jnp.minimum(p, q), axis=-1), axis=-1)
    return length, drafts, p, jnp.where(jnp.isfinite(drawn), scores, 0), jnp.where(jnp.isfinite(drawn), drawn, 0)


def run(drafter, batch):
    target = target_of()
    found = expected(drafter.method, target.config, target.params, drafter.params, drafter.shared, batch)
    return [np.asarray(x) for x in found]


@kinds
def test_what_is_expected_to_be_accepted_is_what_decoding_accepts(kind):
    """On average over many drafts behind one anchor; a tenth of the place's spread apart is much."""
    drafter, text, anchor = drafter_of(kind), text_of(), 8
    length, drafts, *_ = run(drafter, batch_of(np.repeat(text, COPIES, axis=0), np.full((COPIES, 1), anchor)))
    live = regenerate(target_of(), text[:, : anchor + 1].tolist(), drafter=drafter, block_length=K, times=2000, seed=3)
    assert len({tuple(row) for row in drafts[:, 0].tolist()}) > 10
    accepted = np.array(live.accepted[0])
    spread = np.hypot(accepted.std() / np.sqrt(len(accepted)), length.std() / np.sqrt(COPIES))
    assert abs(length.mean() - accepted.mean()) < 4 * spread + 1e-3


@kinds
def test_drafts_are_drawn_from_the_scores_that_are_trained(kind):
    """And the target's states are those of the text before the anchor with the draft behind it."""
    drafter, text, anchor = drafter_of(kind), text_of(2, 2), np.array([[3, 9], [1, 8]])
    _, drafts, p, trained, drawn = run(drafter, batch_of(text, anchor))
    np.testing.assert_allclose(trained, drawn, rtol=0, atol=2e-5)
    for b, m in np.ndindex(anchor.shape):
        whole = np.concatenate([text[b, : anchor[b, m] + 1], drafts[b, m]])
        scores = np.asarray(target_of().logits(whole[None].astype(np.int32)))[0, anchor[b, m] : -1]
        np.testing.assert_allclose(p[b, m], jax.nn.softmax(scores, axis=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vanilla"])
def test_steps_of_the_stage_raise_what_is_accepted(kind):
    drafter, target = drafter_of(kind), target_of()
    method = drafter.method
    text = text_of(3, 8)
    batch = batch_of(text, np.tile([4, 7, 9], (8, 1)))
    loss = drafter_loss(method, target.config, ACCEPTANCE, own=True)
    fixed = fixed_params(method, target.config, ACCEPTANCE, target.params, drafter.shared)
    slope, params = jax.jit(jax.grad(lambda params: loss(params, batch, fixed)[0])), drafter.params

    def accepted(params):
        found = expected(method, target.config, target.params, params, drafter.shared, many)
        return float(np.mean(found[0]))

    many = batch_of(np.repeat(text, 16, axis=0), np.tile([4, 7, 9], (128, 1)))
    before = accepted(params)
    for _ in range(40):
        params = jax.tree.map(lambda x, g: x - 0.01 * g, params, slope(params))
    assert accepted(params) > before + 0.1


def test_the_loss_is_the_same_on_a_mesh():
    """Of a drafter with tables of its own, which lie there as every shard of the rows has them."""
    drafter, target = drafter_of("standalone rnn"), target_of()
    method, batch = drafter.method, batch_of(text_of(4, 2), np.tile([4, 7, 9], (2, 1)))
    loss = drafter_loss(method, target.config, ACCEPTANCE, own=True)
    fixed = fixed_params(method, target.config, ACCEPTANCE, target.params, drafter.shared)
    found = []
    for where in (contextlib.nullcontext(), on_mesh(make_mesh(data=2, devices=jax.devices()[:2]))):
        with where:
            found.append(float(jax.jit(lambda params: loss(params, batch, fixed)[0])(drafter.params)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_place_counts_as_much_as_it_is_reached_and_leads_to():
    chance, counts = jnp.array([[0.5, 0.5, 1.0], [0.2, 0.9, 0.4]]), jnp.array([[True] * 3, [True, True, False]])
    found = accepted_at_stake(chance, counts)
    np.testing.assert_allclose(found, [[2, 1, 0.25], [1.9, 0.2, 0]], rtol=1e-6)
