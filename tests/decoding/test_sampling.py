"""Token choice against plain NumPy and transformers; random keys; what is accepted, where a row stops, what is kept."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.build import Build
from deer_jax.config import Sampling
from deer_jax.decoding.accept import Verdict, accepted_prefix
from deer_jax.decoding.loop import commit, first_stop
from deer_jax.decoding.sampling import Kind, Knobs, keys_for, largest_threshold, log_probabilities, pick_draft
from deer_jax.decoding.state import StateShape, idle_state
from deer_jax.drafters.protocol import Row
from tests.decoding.processed import processed
from tests.tiny import tiny

ROWS, V = 40, 11
SETTINGS = [
    (temperature, top_k, top_p)
    for temperature in (0.3, 1.0, 1.7)
    for top_k, top_p in ((0, 1.0), (1, 1.0), (4, 1.0), (V, 1.0), (V + 5, 1.0), (0, 0.9), (0, 1e-6), (0, 0.5), (5, 0.8))
]


@jax.jit
def thresholds(values, weights, amount):
    return largest_threshold(values, weights, amount)


def test_largest_threshold_equals_sorting():
    rng = np.random.default_rng(0)
    values = rng.choice([-3.5, -1.0, -0.0, 0.0, 1e-40, 2.0, 2.5, -np.inf, 1e30], (200, 9)).astype(np.float32)
    weights = rng.integers(0, 4, values.shape).astype(np.float32)
    for amount in (1.0, 2.0, 5.0, 9.0, 12.0):
        found = np.asarray(thresholds(values, weights, jnp.float32(amount)))[:, 0]
        for row in range(len(values)):
            enough = [t for t in values[row] if weights[row][values[row] >= t].sum() >= amount]
            # -0.0 and 0.0 are two floats to the bisection; both admit the same values to a comparison.
            assert found[row] == (max(enough) if enough else -np.inf), (values[row], weights[row], amount)


@pytest.mark.parametrize(("amount", "expected"), [(1, 3), (2, 2), (3, 2), (4, 1)])
def test_largest_threshold_example(amount, expected):
    values = jnp.array([3.0, 1.0, 2.0, 2.0])
    assert largest_threshold(values, jnp.ones(4), jnp.float32(amount)).item() == expected


def test_threshold_passes_everything_when_the_amount_is_not_there():
    values = jnp.array([[0.5, -2.0, -jnp.inf]])
    assert thresholds(values, jnp.ones((1, 3)), jnp.float32(4)).item() == -np.inf


@functools.partial(jax.jit, static_argnames="kind")
def cut(logits, kind, knobs):
    return log_probabilities(logits, knobs.temperature, kind, knobs)


def ours(logits, temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    return np.asarray(cut(jnp.asarray(logits, jnp.float32), Kind.of(sampling), Knobs.of(sampling, 0)))


def all_logits(ties: bool) -> np.ndarray:
    rng = np.random.default_rng(1)
    logits = 2 * rng.normal(size=(ROWS, V)).astype(np.float32)
    return np.round(logits) if ties else logits


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_log_probabilities_equal_plain_numpy(setting):
    temperature, top_k, top_p = setting
    for ties in (False, True):
        logits = all_logits(ties)
        if ties and top_p < 1:
            continue  # tied at the edge of the mass: see the test of top-p ties
        got = ours(logits, *setting)
        for row in range(ROWS):
            expected = processed(logits[row], temperature, top_k, top_p)
            np.testing.assert_array_equal(np.isfinite(got[row]), expected > 0)
            np.testing.assert_allclose(np.exp(got[row]), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_log_probabilities_equal_transformers(setting):
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    temperature, top_k, top_p = setting
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for ties in (False,) if top_p < 1 else (False, True):
        logits = all_logits(ties)
        scores = torch.tensor(logits)
        for warper in warpers:
            scores = warper(None, scores)
        expected = torch.log_softmax(scores, -1).numpy()
        np.testing.assert_allclose(ours(logits, *setting), expected, rtol=0, atol=1e-5)


def test_ties_at_the_edge_of_the_mass_are_all_kept():
    """No order among equals: transformers keeps some of them by the order of its sort."""
    probabilities = np.exp(ours(np.log([[0.4, 0.2, 0.2, 0.2]]), 1.0, 0, 0.5))
    np.testing.assert_allclose(probabilities, [[0.4, 0.2, 0.2, 0.2]], atol=1e-6)


def test_forbidden_tokens_stay_forbidden():
    logits = np.array([[1.0, -np.inf, 0.5, -np.inf]], np.float32)
    for top_k, top_p in ((0, 1.0), (3, 1.0), (4, 0.99), (1, 0.5)):
        assert (np.exp(ours(logits, 0.8, top_k, top_p))[0, [1, 3]] == 0).all()


@functools.partial(jax.jit, static_argnames=("first", "kind"))
def picked(logits, first, kind, knobs):
    ints = jnp.zeros(logits.shape[0], jnp.int32)
    row = Row(jnp.zeros((logits.shape[0], 1), jnp.int32), ints + 1, ints)
    return pick_draft(logits, first, row=row, rounds=ints, kind=kind, knobs=knobs)


@pytest.mark.representative
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 0.8)])
@pytest.mark.parametrize("draft_temperature", [None, 0.4, 1.7])
def test_drafts_are_drawn_at_the_draft_temperature(draft_temperature, top_k, top_p):
    """q is that of plain NumPy, and tokens that q rules out are not drawn."""
    sampling = Sampling(temperature=1.0, draft_temperature=draft_temperature, top_k=top_k, top_p=top_p)
    logits = all_logits(ties=False)
    draft = picked(jnp.asarray(logits)[:, None], 0, Kind.of(sampling), Knobs.of(sampling, 0))
    assert draft.tokens.shape == (ROWS, 1)
    for row in range(ROWS):
        expected = processed(logits[row], draft_temperature or 1.0, top_k, top_p)
        np.testing.assert_allclose(np.exp(draft.log_q[row, 0]), expected, rtol=1e-5, atol=1e-7)
        assert expected[draft.tokens[row, 0]] > 0


def test_a_draft_temperature_of_zero_is_the_argmax_and_certain():
    sampling, logits = Sampling(temperature=1.0, draft_temperature=0.0), all_logits(ties=False)
    draft = picked(jnp.asarray(logits)[:, None], 0, Kind.of(sampling), Knobs.of(sampling, 0))
    assert draft.log_q is None
    np.testing.assert_array_equal(draft.tokens[:, 0], logits.argmax(axis=-1))


@pytest.mark.representative
def test_every_part_of_a_key_counts():
    """Keys of all combinations of seed, prompt, round, position and purpose differ; the row they are for is no part."""
    seen = set()
    for seed, purpose in itertools.product((0, 1), (0, 1, 2)):
        prompt, rounds = (np.array(x, np.int32) for x in zip(*itertools.product((0, 1, 2), repeat=2), strict=True))
        position = np.tile(np.array([0, 1, 2, 7], np.int32), (9, 1))
        keys = jax.random.key_data(keys_for(jax.random.key(seed), prompt, rounds, position, purpose))
        seen |= {tuple(key) for key in np.asarray(keys).reshape(-1, keys.shape[-1]).tolist()}
        backwards = keys_for(jax.random.key(seed), prompt[::-1], rounds[::-1], position, purpose)
        np.testing.assert_array_equal(jax.random.key_data(backwards)[::-1], keys)
    assert len(seen) == 2 * 3 * 9 * 4


def test_accepted_prefix_equals_a_plain_loop():
    for k in (0, 1, 2, 4):
        kept = np.array(list(itertools.product((False, True), repeat=k)), bool).reshape(2**k, k)
        expected = [next((i for i, keep in enumerate(row) if not keep), k) for row in kept.tolist()]
        got = accepted_prefix(jnp.asarray(kept))
        assert got.dtype == jnp.int32
        assert got.tolist() == expected


@pytest.mark.parametrize("stop_ids", [(), (3,), (0, 4, 9)])
def test_first_stop_equals_a_plain_loop(stop_ids):
    tokens = np.random.default_rng(0).integers(0, 6, (50, 4), dtype=np.int32)
    expected = [next((i for i, token in enumerate(row) if token in stop_ids), 4) for row in tokens.tolist()]
    assert first_stop(jnp.asarray(tokens), jnp.asarray(stop_ids, jnp.int32)).tolist() == expected


def plain_commit(row, choice, accepted, stop_ids):
    """One row as a dict, token by token."""
    if row["done"]:
        return dict(row)
    tokens, offered = list(row["tokens"]), 0
    for token in choice[: accepted + 1]:
        offered += 1
        if row["length"] + offered <= row["limit"]:
            tokens.append(token)
        if token in stop_ids:
            break
    new = dict(row, tokens=tokens, length=len(tokens), rounds=row["rounds"] + 1, histogram=list(row["histogram"]))
    new["histogram"][offered - 1] += 1
    committed = tokens[row["length"] :]
    new["done"] = len(tokens) == row["limit"] or any(token in stop_ids for token in committed)
    return new


@pytest.mark.representative
@pytest.mark.parametrize("k", [0, 3])
def test_commit_equals_a_plain_loop(k):
    rng, B, S, stop_ids = np.random.default_rng(k), 60, 24, (2, 5)
    state = idle_state(StateShape(tiny("qwen3"), None, B, S, k, Build.of("cpu")), {}, {})
    length = rng.integers(1, 12, B)
    rows = [
        {
            "tokens": rng.integers(0, 9, n).tolist(), "length": int(n), "limit": int(n + rng.integers(1, 6)),
            "done": bool(rng.random() < 0.2), "rounds": int(rng.integers(0, 5)), "histogram": [1] * (k + 1),
        }
        for n in length
    ]  # fmt: skip
    tokens = rng.integers(0, 9, (B, S))
    for row, source in zip(tokens, rows, strict=True):
        row[: source["length"]] = source["tokens"]
    fields = {name: jnp.asarray([row[name] for row in rows]) for name in ("length", "limit", "rounds", "histogram")}
    fields = {name: value.astype(jnp.int32) for name, value in fields.items()}
    done = jnp.asarray([row["done"] for row in rows])
    state = type(state)(
        **(vars(state) | fields | {"tokens": jnp.asarray(tokens, jnp.int32), "done": done})
    )  # fmt: skip
    choice, accepted = rng.integers(0, 9, (B, k + 1)), rng.integers(0, k + 1, B)
    verdict = Verdict(jnp.asarray(choice, jnp.int32), jnp.asarray(accepted, jnp.int32))
    faults = jnp.zeros((B, k + 1), jnp.int32)
    after = jax.jit(commit)(state, verdict, jnp.asarray(stop_ids, jnp.int32), faults)
    for i, row in enumerate(rows):
        expected = plain_commit(row, choice[i].tolist(), int(accepted[i]), stop_ids)
        assert after.tokens[i, : expected["length"]].tolist() == expected["tokens"]
        for name in ("length", "done", "rounds", "histogram"):
            assert getattr(after, name)[i].tolist() == expected[name], (i, name)
