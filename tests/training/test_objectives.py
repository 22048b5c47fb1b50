"""The losses against plain NumPy, one block at a time; what leaks nowhere; and training against drafting."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax import DrafterConfig
from deer_jax.diffusion.corruption import Corruption, corrupt_blocks, corrupt_cut
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.standalone import MASK, SEPARATOR, StandaloneMethod
from deer_jax.models.layers import logits
from deer_jax.models.transformer import unstack_layers
from deer_jax.training import objectives
from deer_jax.training.cross_entropy import weighted_loss
from deer_jax.training.objectives import Objective, drafter_loss
from tests import reference
from tests.fast import representing
from tests.tiny import HERE, random_params, tiny

V, T, W, M = 48, 16, 4, 3
SMALL = {"vocab_size": V, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 24}
TEXTS = ((3, 14), (5, 16), (6, 8))  # prompt and length; the last has two places for three blocks
# Head, separator and tied head: every pair of values occurs.
READINGS = [("shifted", True, False), ("shifted", False, True), ("in_place", True, True), ("in_place", False, False)]
DRAFTED = [(*reading, (3, 9) if reading == READINGS[1] else ()) for reading in READINGS]
STAGES = {name: Corruption(stage=name, width=W, blocks=M, alpha=1.2) for name in ("continuation", "refinement")}


@functools.cache
def make_drafter(attention="block_causal", head="shifted", separator=True, tied=False, differing=()):
    """A random drafter with stacked layers."""
    model = tiny("qwen3", **SMALL, tied=tied)
    config = DrafterConfig(attention=attention, head=head, separator=separator, draft_length=W, differing_ids=differing)
    special = np.random.default_rng(8).normal(size=(2, 16)).astype(np.float32) * 0.3
    params = random_params(model, 7) | {"special": jnp.asarray(special)}
    return Drafter(method=StandaloneMethod(model, config, V), params=params)


def make_batch(stage, seed=0, *, bidirectional=False):
    """Corrupted texts of random tokens, TEXTS long, whose padding is not 0."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt, length in TEXTS:
        tokens = rng.integers(0, V, T + bidirectional).astype(np.int32)
        if bidirectional:
            cut = corrupt_cut(prompt, length, STAGES[stage], 0.6, rng)._asdict()
            pad = (0, T + 1 - length)
            rows.append({"tokens": tokens} | cut | {k: np.pad(cut[k], pad) for k in ("masked", "weight")})
        else:
            blocks = corrupt_blocks(prompt, length, STAGES[stage], rng)
            text_weight = np.pad(blocks.text_weight, (0, T - length))
            rows.append({"tokens": tokens} | blocks._replace(text_weight=text_weight)._asdict())
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@functools.partial(jax.jit, static_argnames="method")
def traced(method, params, batch):
    """The loss, the number of masks, and the logits at the rows that are read."""
    seen = []

    def record(terms, labels, *rest):
        seen.append((logits(terms[0].features, terms[0].table), labels))
        return weighted_loss(terms, labels, *rest)

    with mock.patch.object(objectives, "weighted_loss", record):
        loss, count = drafter_loss(method)(params, batch, {})
    return loss, count, *seen[0]


def run(drafter, batch):
    """Loss, masks, logits [B, M, W, V] or [B, T+1, V] at the place of the token they are for, and those tokens."""
    batch = {name: value for name, value in batch.items() if name != "total"}
    loss, count, rows, labels = (np.asarray(x) for x in traced(drafter.method, drafter.params, batch))
    B = len(batch["tokens"])
    if drafter.method.cached:  # the text's rows come first
        rows, labels = rows.reshape(B, -1, V)[:, T:], labels.reshape(B, -1)[:, T:]
        return float(loss), int(count), rows.reshape(B, M, W, V), labels.reshape(B, M, W)
    rows, labels = rows.reshape(B, -1, V), labels.reshape(B, -1)
    if drafter.method.reading.head == "shifted":
        rows, labels = np.pad(rows, ((0, 0), (1, 0), (0, 0))), np.pad(labels, ((0, 0), (1, 0)))
    return float(loss), int(count), rows, labels


def plain_logits(drafter, tokens, visible):
    """float64 [T, V] of one sequence in which V is the mask and V+1 the separator."""
    model = drafter.method.shape
    params = unstack_layers({k: v for k, v in drafter.params.items() if k != "special"}, model.layers)
    params["embed"] = np.concatenate([params["embed"], drafter.params["special"]])
    extended = dataclasses.replace(model, vocab_size=V + 2)
    return reference.forward(extended, params, [tokens], visible=visible[None])[0][:, :V]


def cross_entropy(row, label):
    return -np.log(reference.softmax(row)[label])


def plain_block(drafter, tokens, anchor, size, masked):
    """float64 [size, V] for the tokens of one block: nothing but its prefix, itself and its separator is there."""
    config = drafter.method.reading
    block = [V + MASK if masked[j] else int(tokens[anchor + 1 + j]) for j in range(size)]
    sequence = tokens[: anchor + 1].tolist() + block + [V + SEPARATOR] * config.separator
    visible = np.tril(np.ones((len(sequence),) * 2, bool))
    visible[anchor + 1 :] = True
    first = anchor if config.head == "shifted" else anchor + 1
    return plain_logits(drafter, sequence, visible)[first : first + size]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("head", "separator", "tied"), representing(READINGS, READINGS[0]))
def test_block_loss_is_that_of_every_block_alone(stage, head, separator, tied):
    drafter, batch = make_drafter("block_causal", head, separator, tied), make_batch(stage)
    loss, count, rows, labels = run(drafter, batch)
    expected, masks = 0.0, 0
    for b, tokens in enumerate(batch["tokens"]):
        for m in range(M):
            anchor, size, masked = (batch[name][b, m] for name in ("anchor", "size", "masked"))
            plain = plain_block(drafter, tokens, anchor, size, masked) if size else []
            np.testing.assert_allclose(rows[b, m, :size], np.reshape(plain, (size, V)), rtol=0, atol=1e-4)
            for j in range(size):
                label = tokens[anchor + 1 + j]
                assert labels[b, m, j] == label
                masks += int(masked[j])
                expected += batch["weight"][b, m, j] * cross_entropy(plain[j], label)
        text = plain_logits(drafter, tokens.tolist(), np.tril(np.ones((T, T), bool)))
        prompt, length = TEXTS[b]
        assert batch["text_weight"][b].sum() == pytest.approx(batch["total"][b], rel=1e-5)
        for p in range(prompt - 1, length - 1):
            expected += batch["text_weight"][b, p] * cross_entropy(text[p], tokens[p + 1])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert count == masks
    assert batch["size"][2, 2] == 0  # a block that is not used


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("head", "separator", "tied"), READINGS)
def test_cut_loss_is_that_of_every_text_alone(stage, head, separator, tied):
    drafter, batch = make_drafter("bidirectional", head, separator, tied), make_batch(stage, bidirectional=True)
    loss, count, rows, labels = run(drafter, batch)
    expected = 0.0
    for b, tokens in enumerate(batch["tokens"]):
        length, masked = batch["length"][b], batch["masked"][b]
        sequence = [V + MASK if masked[p] else int(tokens[p]) for p in range(length)] + [V + SEPARATOR] * separator
        plain = plain_logits(drafter, sequence, np.ones((len(sequence),) * 2, bool))
        for p in np.flatnonzero(masked):
            row = plain[p - 1 if head == "shifted" else p]
            np.testing.assert_allclose(rows[b, p], row, rtol=0, atol=1e-4)
            assert labels[b, p] == tokens[p]
            expected += batch["weight"][b, p] * cross_entropy(row, tokens[p])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert count == batch["masked"].sum()


def full_blocks(tokens, anchors, length):
    """Every block masked from end to end, as at inference."""
    B = len(tokens)
    anchor = np.broadcast_to(np.array(anchors, np.int32), (B, M))
    size = np.minimum(W, length - 1 - anchor)
    masked = np.arange(W) < size[..., None]
    weight, text_weight = masked.astype(np.float32), np.zeros((B, T), np.float32)
    return {"tokens": tokens, "anchor": anchor, "size": size, "masked": masked, "weight": weight,
            "text_weight": text_weight}  # fmt: skip


def assert_drafts(drafter, rows, text, k):
    """Training's logits [B, k, V] are those of a draft of k tokens after text, at the ids that may be proposed."""
    drafts = np.asarray(drafter.draft_logits(HERE, text[:, :-1], text[:, -1], k))
    may = np.isfinite(drafts).all(axis=(0, 1))
    assert np.flatnonzero(~may).tolist() == list(drafter.method.reading.differing_ids)
    np.testing.assert_allclose(rows[..., may], drafts[..., may], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("head", "separator", "tied", "differing"), DRAFTED)
def test_masked_blocks_are_trained_as_they_are_drafted(head, separator, tied, differing):
    drafter = make_drafter("block_causal", head, separator, tied, differing)
    tokens = np.random.default_rng(1).integers(0, V, (3, T)).astype(np.int32)
    tokens[:, 1] = 9  # read as a mask where it differs
    length, anchors = 14, (0, 5, 11)
    _, _, rows, labels = run(drafter, full_blocks(tokens, anchors, length))
    for m, anchor in enumerate(anchors):
        if m != 1 and (head, separator) != ("shifted", True):
            continue  # every k and every length of the prefix is one more compilation
        k = min(W, length - 1 - anchor)  # the last block is cut by the end of its text
        assert_drafts(drafter, rows[:, m, :k], tokens[:, : anchor + 1], k)
        np.testing.assert_array_equal(labels[:, m, :k], tokens[:, anchor + 1 : anchor + 1 + k])


@pytest.mark.parametrize(("head", "separator", "tied", "differing"), DRAFTED)
def test_masked_cuts_are_trained_as_they_are_drafted(head, separator, tied, differing):
    drafter = make_drafter("bidirectional", head, separator, tied, differing)
    tokens = np.random.default_rng(1).integers(0, V, (3, T + 1)).astype(np.int32)
    tokens[:, 1] = 9
    # Every length of the prefix is one more compilation.
    for end in (6, T) if (head, separator) == ("shifted", True) else (T,):
        masked = np.zeros((3, T + 1), bool)
        masked[:, end - W : end] = True
        batch = {"tokens": tokens, "length": np.full(3, end, np.int32), "masked": masked}
        _, _, rows, labels = run(drafter, batch | {"weight": masked.astype(np.float32)})
        assert_drafts(drafter, rows[:, end - W : end], tokens[:, : end - W], W)
        np.testing.assert_array_equal(labels[:, end - W : end], tokens[:, end - W : end])


@pytest.mark.parametrize("head", ["shifted", "in_place"])
def test_a_block_sees_the_text_up_to_its_anchor_and_itself(head):
    drafter, batch = make_drafter(head=head, tied=head == "in_place"), make_batch("continuation", seed=3)
    _, _, before, _ = run(drafter, batch)
    same = changed = 0
    for place in range(T):
        tokens = batch["tokens"].copy()
        tokens[:, place] = (tokens[:, place] + 1) % V
        _, _, after, labels = run(drafter, batch | {"tokens": tokens})
        for b, m in np.ndindex(len(tokens), M):
            anchor, size, masked = (batch[name][b, m] for name in ("anchor", "size", "masked"))
            if not size:
                continue
            rows = slice(0, size)
            j = place - anchor - 1
            if j < 0 or (j < size and not masked[j]):  # the prefix, or shown in the block
                # With the shifted head the first row is the anchor's own, which does not see the block.
                seen = slice(1 if head == "shifted" and j >= 0 else 0, size)
                moved = np.abs(after[b, m, seen] - before[b, m, seen]).max(axis=-1)
                assert np.all(moved > 1e-6)
                if seen.start:
                    np.testing.assert_array_equal(after[b, m, 0], before[b, m, 0])
                changed += 1
            else:
                np.testing.assert_array_equal(after[b, m, rows], before[b, m, rows])
                if j < size:
                    assert labels[b, m, j] == tokens[b, place]
                same += 1
    assert min(same, changed) > 20


@pytest.mark.parametrize("head", ["shifted", "in_place"])
def test_blocks_do_not_see_each_other(head):
    drafter, batch = make_drafter(head=head, tied=head == "in_place"), make_batch("continuation", seed=4)
    other = make_batch("refinement", seed=5)
    _, _, before, _ = run(drafter, batch)
    for m in range(M):
        mixed = batch | {name: other[name].copy() for name in ("anchor", "size", "masked", "weight")}
        for name in ("anchor", "size", "masked", "weight"):
            mixed[name][:, m] = batch[name][:, m]
        _, _, after, _ = run(drafter, mixed)
        for b in range(len(TEXTS)):
            size = batch["size"][b, m]
            np.testing.assert_array_equal(after[b, m, :size], before[b, m, :size])


def test_the_first_token_of_a_block_is_the_causal_models():
    drafter, batch = make_drafter(), make_batch("refinement")
    _, _, rows, _ = run(drafter, batch)
    causal = np.tril(np.ones((T, T), bool))
    for b, tokens in enumerate(batch["tokens"]):
        plain = plain_logits(drafter, tokens.tolist(), causal)
        for m in np.flatnonzero(batch["size"][b]):
            np.testing.assert_allclose(rows[b, m, 0], plain[batch["anchor"][b, m]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
def test_ids_the_drafter_does_not_share_teach_nothing(attention):
    drafter = make_drafter(attention, "shifted", False, True, (3, 9))
    batch = make_batch("refinement", seed=6, bidirectional=attention == "bidirectional")
    rng = np.random.default_rng(0)
    strange = rng.random(batch["tokens"].shape) < 0.5
    batch["tokens"] = np.where(strange, rng.choice([3, 9, V, V + 5], strange.shape), batch["tokens"]).astype(np.int32)
    loss, count, rows, labels = run(drafter, batch)
    assert (labels[batch["masked"]] == -1).any()
    shared = labels >= 0
    expected = 0.0
    if attention == "block_causal":  # the text's own loss is another matter
        plain = batch | {"text_weight": np.zeros_like(batch["text_weight"])}
        with_text, (loss, *_) = loss, run(drafter, plain)
        assert with_text > loss
    for where in np.argwhere(batch["masked"] & shared):
        where = tuple(where)
        expected += batch["weight"][where] * cross_entropy(rows[where].astype(np.float64), labels[where])
    assert 0 < (batch["masked"] & shared).sum() < count == batch["masked"].sum()
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
def test_with_a_teacher_the_labels_are_what_it_says_at_the_place(attention):
    """The teacher's distribution for a token is that after the true text before it, whatever the drafter sees."""
    drafter = make_drafter(attention)
    bidirectional = attention == "bidirectional"
    batch = make_batch("refinement", seed=2, bidirectional=bidirectional)
    batch.pop("total")
    teacher_config = tiny("llama", vocab_size=V)
    teacher = random_params(teacher_config, 9)
    unstacked = unstack_layers(teacher, teacher_config.layers)
    width = batch["tokens"].shape[1]

    @jax.jit
    def losses(params, teacher):
        loss = drafter_loss(drafter.method, teacher_config, Objective(ce=0, kl=1))
        return loss(params, batch, {"target": teacher})[0]

    _, _, rows, _ = run(drafter, batch)
    expected = 0.0
    for b, tokens in enumerate(batch["tokens"]):
        causal = np.tril(np.ones((width, width), bool))[None]
        says = reference.softmax(reference.forward(teacher_config, unstacked, [tokens], visible=causal)[0])
        for where in np.argwhere(batch["masked"][b]):
            place = where[0] if bidirectional else batch["anchor"][b, where[0]] + 1 + where[1]
            ours = rows[(b, *where)].astype(np.float64)
            p = says[place - 1]
            expected += batch["weight"][(b, *where)] * (p * (np.log(p) - np.log(reference.softmax(ours)))).sum()
        if not bidirectional:
            text = plain_logits(drafter, tokens.tolist(), causal[0])
            for p in np.flatnonzero(batch["text_weight"][b]):
                ours = np.log(reference.softmax(text[p]))
                expected += batch["text_weight"][b, p] * (says[p] * (np.log(says[p]) - ours)).sum()
    assert losses(drafter.params, teacher) == pytest.approx(expected, rel=1e-5)
