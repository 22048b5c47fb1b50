"""The numbers by their definitions, against plain loops."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from deer_jax.bench.report import (
    BenchReport,
    acceptance_by_depth,
    acceptance_interval,
    measure,
    repeated_windows,
    table,
)
from deer_jax.decoding.agreement import Agreement, Departure
from deer_jax.decoding.state import DecodeResult, DecodeStats


def result(tokens, histograms, seconds=2.0, prefill=0.5):
    stats = DecodeStats(
        draft_length=len(histograms[0]) - 1, new_tokens=[len(t) for t in tokens],
        rounds=[sum(row) for row in histograms], accepted_histogram=histograms, seconds=seconds,
        prefill_seconds=prefill, compile_seconds=9.0, fetches=1,
    )  # fmt: skip
    return DecodeResult(texts=None, tokens=tokens, stats=stats)


PLAIN = [result([[1, 2, 3, 4], [5, 6]], [[4], [2]], seconds=4.0), result([[1, 2, 3, 4], [5, 6]], [[4], [2]])]
DRAFTED = [
    result([[1, 2, 3, 4], [5, 6]], [[0, 2, 0], [2, 0, 0]], seconds=1.0, prefill=0.25),
    result([[1, 2, 3, 4], [5, 7]], [[1, 0, 1], [0, 1, 0]], seconds=0.5, prefill=0.25),
]


SAME = Agreement(2, 6, ())
# The second prompt departs in the second repeat: at a near-tie, or not.
NEAR, FAR = (Agreement(2, 5, (Departure(1, 1, gap, 1e-5),)) for gap in (1e-5, 1e-2))


def test_measure():
    found = measure(
        DRAFTED, PLAIN, drafter="x", temperature=0.0, batch_size=2, compile_seconds=7.0, agreements=[SAME, NEAR]
    )
    # Committed: 2 * 2 + 2 * 1 in the first repeat, 1 + 3 + 2 in the second; rounds: 4 and 3.
    assert found.acceptance_length == pytest.approx(12 / 7)
    assert found.accepted_histogram == [3, 3, 1]
    assert found.acceptance_by_depth == [4 / 7, 1 / 4]
    assert found.tokens_per_second == pytest.approx(12 / 1.5)
    assert found.decode_tokens_per_second == pytest.approx(12 / 1.0)
    assert found.speedup == pytest.approx((12 / 1.5) / (12 / 6.0))
    assert found.round_cost == pytest.approx((1.0 / 7) / (5.0 / 12))  # decode seconds per round, over plain's per step
    plain_decode = sum(len(answer) for result in PLAIN for answer in result.tokens) / 5.0
    assert found.decode_tokens_per_second / plain_decode == pytest.approx(found.acceptance_length / found.round_cost)
    assert found.exact_match == 0.5  # the second prompt departs in one repeat
    assert (found.rows_differing, found.near_ties) == (1, 1)
    assert (found.new_tokens, found.rounds, found.draft_length, found.compile_seconds) == (12, 7, 2, 7.0)
    assert found.repeated_8grams is None


def test_plain_and_sampled():
    plain = measure(
        PLAIN, PLAIN, drafter=None, temperature=0.0, batch_size=1, compile_seconds=0.0, agreements=[SAME, SAME]
    )
    assert (plain.drafter, plain.round_cost) == (None, 1)
    assert (plain.acceptance_length, plain.speedup, plain.exact_match, plain.acceptance_by_depth) == (1, 1, 1, [])
    far = measure(
        DRAFTED, PLAIN, drafter="x", temperature=0.0, batch_size=1, compile_seconds=0.0, agreements=[NEAR, FAR]
    )
    assert (far.rows_differing, far.near_ties) == (1, 0)
    sampled = measure(DRAFTED, PLAIN, drafter="x", temperature=0.7, batch_size=1, compile_seconds=0.0, agreements=None)
    assert sampled.exact_match is None
    assert (sampled.rows_differing, sampled.near_ties) == (None, None)
    assert sampled.temperature == 0.7


def test_interval_is_a_bootstrap_over_prompts():
    rng = np.random.default_rng(1)
    histograms = rng.integers(0, 20, (40, 5))
    low, high = acceptance_interval(histograms)
    committed, rounds = (histograms * [1, 2, 3, 4, 5]).sum(axis=1), histograms.sum(axis=1)
    assert low < committed.sum() / rounds.sum() < high
    ratios = []
    for _ in range(2000):
        drawn = [int(rng.integers(0, 40)) for _ in range(40)]
        ratios.append(sum(committed[i] for i in drawn) / sum(rounds[i] for i in drawn))
    assert (low, high) == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=0.15 * (high - low))
    assert acceptance_interval(histograms) == (low, high)


def test_interval_of_equal_prompts_and_of_one():
    assert acceptance_interval(np.array([[0, 3], [0, 5]])) == (2.0, 2.0)
    assert acceptance_interval(np.array([[1, 3]])) is None


def test_acceptance_by_depth():
    assert acceptance_by_depth(np.array([2, 3, 0, 0])) == [3 / 5, 0.0, None]
    histogram = np.random.default_rng(0).integers(1, 9, 5)
    # One entry per round: how many drafts it accepted.
    accepted = [i for i, count in enumerate(histogram) for _ in range(count)]
    for depth, share in enumerate(acceptance_by_depth(histogram)):
        reached = [a for a in accepted if a >= depth]
        assert share == pytest.approx(sum(a > depth for a in reached) / len(reached))


def test_repeated_windows():
    assert repeated_windows([list("ababa")], width=2) == 0.5
    assert repeated_windows([list("ab"), list("ab")], width=2) == 0  # each answer by itself
    assert repeated_windows([[7] * 10, [1, 2]]) == pytest.approx(2 / 3)
    assert repeated_windows([[1] * 7]) is None


def test_json_and_table():
    methods = {
        "plain": measure(
            PLAIN, PLAIN, drafter=None, temperature=0.0, batch_size=1, compile_seconds=0.0, agreements=[SAME]
        ),
        "x k=2": measure(
            DRAFTED, PLAIN, drafter="x", temperature=0.0, batch_size=1, compile_seconds=0.0, agreements=[NEAR]
        ),
    }
    report = BenchReport(
        methods=methods, machine={"platform": "cpu"}, date="2026-01-02", command="deer-jax bench", target="tiny",
        prompts=2, repeats=2, settings={},
    )  # fmt: skip
    values = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert list(values["methods"]) == ["plain", "x k=2"]
    assert values["methods"]["x k=2"]["acceptance_by_depth"] == [4 / 7, 1 / 4]
    console = Console(width=80, file=io.StringIO())
    console.print(table(report))
    lines = console.file.getvalue().splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    row = next(line.split() for line in lines if "x k=2" in line)
    assert row[:3] == ["x", "k=2", "1.71"]
    assert row[5] == "0.34"  # what a round costs, in plain steps
    assert row[-5:] == ["12.0", "4.00x", "50.0", "%", "-"]
