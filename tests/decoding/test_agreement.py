"""When `bench` calls two greedy answers the same: departures, their gap and rounding, and what a near-tie is."""

import dataclasses

import numpy as np
import pytest

from deer_jax import Target, decode
from deer_jax.decoding.agreement import Agreement, Departure, compare_greedy
from tests.decoding.agreement import measured
from tests.tiny import random_params, tiny

V, NEW = 48, 6
PROMPTS = [[5, 9, 2, 40, 7], [3]]


@pytest.fixture(scope="module")
def twins():
    """A target to which two ids are the same, its answers, where in the first one of the two stands, and the other."""
    config = tiny("qwen3", vocab_size=V, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24)
    target = Target(config=config, params=random_params(config, 5, scan=False))
    plain = decode(target, PROMPTS, max_new_tokens=NEW).tokens
    at = next(i for i in range(1, NEW) if plain[0][i] not in plain[0][:i])
    twin, head = next(token for token in range(V) if token not in plain[0]), target.params["head"]
    params = target.params | {"head": head.at[twin].set(head[plain[0][at]])}
    return dataclasses.replace(target, params=params), plain, at, twin


@pytest.mark.representative
@pytest.mark.parametrize("difference", [1e-6, 1e-3, 0.5])
@pytest.mark.parametrize(("share", "near"), [(0.0, True), (1.0, True), (1.9, True), (2.1, False), (20.0, False)])
def test_a_near_tie_is_a_gap_of_at_most_twice_the_difference(difference, share, near):
    assert Departure(0, 3, share * difference, difference).near_tie is near


def test_a_gap_without_rounding_is_no_near_tie():
    assert not Departure(0, 3, 1e-9, 0.0).near_tie
    assert not Departure(0, 3, float("inf"), 0.5).near_tie
    assert Departure(0, 3, 0.0, 0.0).near_tie


def test_equal_answers_have_no_departures(twins):
    target, plain, _, _ = twins
    assert compare_greedy(target, PROMPTS, plain, plain, k=3, batch=2) == Agreement(2, 2 * NEW, ())


def test_a_near_tie_is_counted_and_what_follows_is_not_compared(twins):
    target, plain, at, twin = twins
    other = [[*plain[0][:at], twin, 1, 2], plain[1]]
    agreement = compare_greedy(target, PROMPTS, plain, other, k=3, batch=2)
    assert (agreement.rows, agreement.same_tokens, agreement.near_ties) == (2, at + NEW, 1)
    ((row, place, gap, difference),) = agreement.departures
    assert (row, place) == (0, at)
    assert gap <= 1e-6
    assert difference < 1e-5  # rounding of float32, and no more


def test_other_departures_are_none(twins):
    """The gap is that of plain NumPy, and the larger of the two answers' own."""
    target, plain, at, twin = twins
    wrong = next(token for token in range(V) if token not in (plain[0][at], twin))
    other = [[*plain[0][:at], wrong, *plain[0][at + 1 :]], plain[1]]
    agreement = compare_greedy(target, PROMPTS, plain, other, k=3, batch=2)
    ((_, place, gap, difference),) = agreement.departures
    assert (place, agreement.near_ties) == (at, 0)
    expected, _ = measured(target, [*PROMPTS[0], *plain[0][:at]], plain[0][at], wrong)
    assert gap == pytest.approx(expected, abs=1e-4)
    assert compare_greedy(target, PROMPTS, other, plain, k=3, batch=2).departures[0].gap == gap
    assert difference < 1e-5


def test_an_answer_that_ends_early_is_no_near_tie(twins):
    target, plain, _, _ = twins
    for one, other in ((plain, [plain[0], plain[1][:4]]), ([plain[0], plain[1][:4]], plain)):
        agreement = compare_greedy(target, PROMPTS, one, other, k=3, batch=2)
        assert (agreement.same_tokens, agreement.near_ties) == (NEW + 4, 0)
        assert agreement.departures == (Departure(1, 4, np.inf, 0.0),)
