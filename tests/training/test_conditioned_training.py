"""Drafters with heads in training: nothing leaks, and what is trained is what is drafted, for every head."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax import decode
from deer_jax.decoding import programs
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.heads import INDEPENDENT, PathSelector
from deer_jax.drafters.protocol import Draft, Row, Seen
from deer_jax.models.layers import logits
from deer_jax.training import objectives
from deer_jax.training.cross_entropy import weighted_loss
from deer_jax.training.objectives import CROSS_ENTROPY, Objective, loss_of, read_text
from tests.fast import representing
from tests.kinds import EAGLE, HEADED, K, V, drafter_of, target_of, with_head

B, PROMPT, NEW = 3, 18, 48
ANCHORS = np.arange(PROMPT - 1, PROMPT - 1 + NEW)
KINDS = ("independent reduced", "selector", "selector reduced", "vanilla", "gated", "rnn", *HEADED, *EAGLE)
kinds = pytest.mark.parametrize("kind", representing(KINDS, "gated"))


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(1).integers(0, V, (B, PROMPT)).tolist()


@pytest.fixture(scope="module")
def texts(prompts) -> np.ndarray:
    """int32 [B, T]: prompts and the target's answers."""
    answers = decode(target_of(), prompts, max_new_tokens=NEW + K).tokens
    return np.concatenate([prompts, answers], axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def tapped(texts) -> dict[tuple[int, ...], np.ndarray]:
    """What every choice of taps reads of the texts; of none something that must not count."""
    target, read = target_of(), jax.jit(read_text, static_argnums=(0, 3))
    every = {drafter_of(kind).method.taps for kind in KINDS} - {()}
    found = {taps: np.asarray(read(target.config, target.params, texts, taps).tapped) for taps in every}
    return found | {(): np.zeros((*texts.shape, 0), np.float32)}


def masked_blocks(texts) -> dict[str, Any]:
    """A block of masks behind every anchor."""
    shape = (B, NEW)
    return {
        "tokens": texts, "anchor": np.broadcast_to(ANCHORS, shape).astype(np.int32),
        "size": np.full(shape, K, np.int32), "masked": np.ones((*shape, K), bool),
        "weight": np.ones((*shape, K), np.float32), "text_weight": np.ones(texts.shape, np.float32),
    }  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def trained(method, params, shared, batch, tapped):
    """Of every place [B, M, W] of the blocks what is predicted, and its losses."""
    seen = []

    def record(*arguments):
        loss, rows = weighted_loss(*arguments)
        seen.append(rows)
        return loss, rows

    said = method.predict(params, shared, batch, tapped, "none")
    with mock.patch.object(objectives, "weighted_loss", record):
        loss = loss_of(said, batch["tokens"], CROSS_ENTROPY, None, batch["masked"].shape)
    each = [(term.softcap, logits(term.features, term.table)) for term in said.terms]
    scores = functools.reduce(jnp.add, [x if cap is None else cap * jnp.tanh(x / cap) for cap, x in each])
    if said.allowed is not None:
        scores = jnp.where(said.allowed[None, None], scores, -jnp.inf)
    found = {"scores": scores, "loss": seen[0].loss}
    if said.choice is not None:
        found |= {"choice": logits(said.choice.term.features, said.choice.term.table), "path": seen[0].choice_loss}
    if said.confidence is not None:
        found |= {"confidence": said.confidence}
    B, M, W = batch["masked"].shape
    return loss, {name: x[:, -M * W :].reshape(B, M, W, *x.shape[2:]) for name, x in found.items()}


def run(drafter: Drafter, batch, tapped):
    loss, found = trained(drafter.method, drafter.params, drafter.shared, batch, tapped)
    return float(loss), {name: np.asarray(x) for name, x in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def along(method, build, params, shared, tokens, tapped, length, following):
    """What `pick` is given in drafts after texts, float32 [R, K, m] and int32 [R, K, m], if `following` is picked."""
    (R, _), start, found = tokens.shape, jnp.zeros_like(length), []

    def pick(scores, first, ids=None):
        ids = jnp.arange(scores.shape[-1])[None, None] if ids is None else ids
        found.append((scores, jnp.broadcast_to(ids, scores.shape)))
        return Draft(following[:, first : first + scores.shape[1]], None)

    state = method.state(params, shared, R, tokens.shape[1] + K + 1, build)
    state = method.observe(params, shared, state, Seen(tokens, tapped, start, length - 1, True), jnp.arange(R))
    method.propose(params, shared, state, Row(tokens, length, jnp.arange(R)), K, pick)
    return tuple(jnp.concatenate(side, axis=1) for side in zip(*found, strict=True))


def is_selector(method) -> bool:
    return isinstance(getattr(method, "head", None), PathSelector)  # EAGLE-3 has no head of this kind


def chosen(method, found):
    """Which of the drafter's ids it would pick at every place: [B, M, W]."""
    if not is_selector(method):
        return found["scores"].argmax(axis=-1)
    few = np.argsort(-found["scores"], axis=-1, kind="stable")[..., : method.head.candidates]
    scores = np.take_along_axis(found["scores"] + found["choice"], few, axis=-1)
    return np.take_along_axis(few, scores.argmax(axis=-1)[..., None], axis=-1)[..., 0]


@kinds
def test_masked_blocks_are_trained_as_they_are_drafted(texts, tapped, kind):
    """The same scores of the same ids, along the text's own tokens."""
    drafter = drafter_of(kind)
    method, read = drafter.method, tapped[drafter.method.taps]
    _, found = run(drafter, masked_blocks(texts), read)
    following = np.stack([texts[:, anchor + 1 : anchor + 1 + K] for anchor in ANCHORS], axis=1).reshape(-1, K)
    rows = [np.repeat(x, NEW, axis=0) for x in (texts, read)]
    length = np.tile(ANCHORS + 1, B).astype(np.int32)
    scores, ids = along(method, target_of().build, drafter.params, drafter.shared, *rows, length, following)
    ours = np.full((B * NEW, K, V), -np.inf, np.float32)
    np.put_along_axis(ours, np.asarray(ids), np.asarray(scores), axis=-1)
    every = np.arange(V) if "ids" not in drafter.shared else np.asarray(drafter.shared["ids"])
    theirs = found["scores"]
    if is_selector(method):
        least = -np.sort(-theirs, axis=-1)[..., method.head.candidates - 1, None]
        theirs = np.where(theirs >= least, theirs + found["choice"], -np.inf)
    expected = np.full_like(ours, -np.inf)
    expected[..., every] = theirs.reshape(B * NEW, K, -1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)
    assert np.isfinite(expected).any(axis=-1).all()


@kinds
def test_replayed_rounds_accept_what_live_decoding_accepts(texts, tapped, prompts, kind, monkeypatch):
    monkeypatch.setattr(programs, "PREFILL_CHUNK", 16)  # of these shapes programs are compiled for other tests too
    drafter = drafter_of(kind)
    live = decode(target_of(), prompts, drafter=drafter, draft_length=K, max_new_tokens=NEW, batch_size=B)
    _, found = run(drafter, masked_blocks(texts), tapped[drafter.method.taps])
    drafts = chosen(drafter.method, found)
    if "ids" in drafter.shared:
        drafts = np.asarray(drafter.shared["ids"])[drafts]
    for b in range(B):
        place, histogram = 0, [0] * (K + 1)
        while place < NEW:
            at = ANCHORS[place] + 1
            accepted = int((drafts[b, place] == texts[b, at : at + K]).cumprod().sum())
            histogram[accepted] += 1
            place += accepted + 1
        assert live.stats.accepted_histogram[b] == histogram
    assert np.count_nonzero(np.sum(live.stats.accepted_histogram, axis=0)) >= 2


@pytest.mark.parametrize("kind", representing([kind for kind in KINDS if kind not in EAGLE], "gated"))
def test_nothing_leaks(texts, tapped, kind):
    """Bit for bit: neither the anchor's own state of the target and those behind it, nor another block, nor what stands
    behind a block, nor a token that is to be predicted, changes what is said of a block."""
    drafter, rng = drafter_of(kind), np.random.default_rng(3)
    batch, read = masked_blocks(texts), tapped[drafter.method.taps]
    batch["masked"] = rng.random(batch["masked"].shape) < 0.7
    batch["size"] = rng.integers(1, K + 1, batch["size"].shape).astype(np.int32)
    batch["masked"] &= np.arange(K) < batch["size"][..., None]
    batch["weight"] = batch["masked"].astype(np.float32)
    _, before = run(drafter, batch, read)

    inside = np.arange(K) < batch["size"][..., None]

    def others_that_differ(m, changed, read=read):
        """How many blocks say something else; block m does not."""
        _, after = run(drafter, changed, read)
        for name, x in after.items():
            np.testing.assert_array_equal(x[:, m][inside[:, m]], before[name][:, m][inside[:, m]], err_msg=name)
        return int((after["scores"] != before["scores"]).any(axis=(0, 2, 3)).sum())

    for m in (0, 7, NEW - 1):
        anchor, spoiled = ANCHORS[m], read.copy()
        spoiled[:, anchor:] = rng.normal(size=spoiled[:, anchor:].shape)
        if drafter.method.taps:
            assert others_that_differ(m, batch, spoiled) == NEW - 1 - m  # those behind see some of it
        other = np.arange(NEW) != m
        moved = batch["anchor"] - np.where(other & (ANCHORS[0] + 1 < ANCHORS), 1, 0).astype(np.int32)
        assert others_that_differ(m, batch | {"anchor": moved}) > NEW // 2
        flipped = batch["masked"] ^ other[None, :, None]
        assert others_that_differ(m, batch | {"masked": flipped}) > NEW // 2
        tokens = texts.copy()
        for b in range(B):
            tokens[b, anchor + 1 + batch["size"][b, m] :] = rng.integers(0, V - 1)
        others_that_differ(m, batch | {"tokens": tokens})


@kinds
def test_no_prediction_knows_its_token_or_those_behind_it(texts, tapped, kind):
    """Heads are shown the text's own tokens as predecessors: bit for bit those before a place, and no others."""
    drafter, batch = drafter_of(kind), masked_blocks(texts)
    read = tapped[drafter.method.taps]
    _, before = run(drafter, batch, read)
    for m, j in ((2, 0), (5, 1), (9, K - 1)):
        tokens = texts.copy()
        tokens[:, ANCHORS[m] + 1 + j :] = (tokens[:, ANCHORS[m] + 1 + j :] + 1) % (V - 1)
        _, after = run(drafter, batch | {"tokens": tokens}, read)
        for name in set(after) - {"loss", "path"}:
            np.testing.assert_array_equal(after[name][:, m, : j + 1], before[name][:, m, : j + 1], err_msg=name)
        assert (after["loss"][:, m, j] != before["loss"][:, m, j]).any()


@pytest.mark.parametrize("kind", ["standalone selector", "standalone rnn"])
def test_a_texts_own_predictions_are_the_backbones(texts, kind):
    """A head changes the losses of blocks and not those of the text, whatever it is trained with."""
    drafter, batch = drafter_of(kind), masked_blocks(texts)
    bare = with_head(drafter, INDEPENDENT)

    @functools.partial(jax.jit, static_argnums=1)
    def loss(params, method, batch):
        said = method.predict(params, {}, batch, None, "none")
        return loss_of(said, batch["tokens"], Objective(confidence=0.7), None, batch["masked"].shape)

    def losses(**weights):
        return [float(loss(each.params, each.method, batch | weights)) for each in (drafter, bare)]

    one, other = losses(weight=0 * batch["weight"])
    assert one == pytest.approx(other, rel=1e-6)
    one, other = losses(text_weight=0 * batch["text_weight"])
    assert abs(one - other) > 1
