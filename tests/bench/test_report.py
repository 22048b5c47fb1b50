"""The numbers by their definitions, against plain loops."""

import io
import itertools
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
from deer_jax.decoding import acceptance
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


@pytest.mark.representative
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
    assert found.speed_range == (6 / 1.0, 6 / 0.5)
    assert found.speedup_range == ((6 / 1.0) / (6 / 4.0), (6 / 0.5) / (6 / 2.0))  # of the same turn
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


# [prompts, k+1]: few rounds that accept much and many that accept little, and the other way round.
UNEQUAL = {
    3: [[0, 0, 1], [40, 10, 0], [60, 20, 20]],
    5: [[0, 1, 0], [2, 1, 1], [1, 0, 19], [50, 0, 0], [38, 27, 35]],
}


def resampled(histograms, divide):
    """The acceptance length of every way to draw the prompts with replacement, in order."""
    ways = itertools.product(histograms, repeat=len(histograms))
    return sorted(divide([(sum(row), sum((i + 1) * n for i, n in enumerate(row))) for row in way]) for way in ways)


def ratio_of_sums(rows):
    return sum(committed for _, committed in rows) / sum(rounds for rounds, _ in rows)


def mean_of_ratios(rows):
    return sum(committed / rounds for rounds, committed in rows) / len(rows)


def quantile(values, share):
    """The smallest value that at least this share of all does not exceed."""
    return values[int(np.ceil(share * len(values))) - 1]


@pytest.mark.representative
@pytest.mark.parametrize("prompts", UNEQUAL)
def test_interval_is_that_of_all_resamples_of_the_prompts(prompts, monkeypatch):
    """95 % of them, each a ratio of sums: exact from all 27 or 3,125."""
    monkeypatch.setattr(acceptance, "RESAMPLES", 200_000)  # so that chance is no excuse
    histograms = UNEQUAL[prompts]
    values = resampled(histograms, ratio_of_sums)
    found = acceptance_interval(np.array(histograms))
    assert found == pytest.approx((quantile(values, 0.025), quantile(values, 0.975)), rel=0.01)
    assert found != pytest.approx((quantile(values, 0.05), quantile(values, 0.95)), rel=0.02), "that of 90 %"
    if prompts > 3:  # the outermost of 27 draw one prompt thrice, to which both are the same
        means = resampled(histograms, mean_of_ratios)
        assert found != pytest.approx((quantile(means, 0.025), quantile(means, 0.975)), rel=0.02)


def test_interval_is_the_same_on_every_call():
    histograms = np.random.default_rng(1).integers(0, 20, (40, 5))
    low, high = acceptance_interval(histograms)
    rounds, committed = histograms.sum(axis=1), (histograms * [1, 2, 3, 4, 5]).sum(axis=1)
    assert low < committed.sum() / rounds.sum() < high
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
        methods=methods, date="2026-01-02", command="deer-jax bench", target="tiny", prompts=2, repeats=2,
        machine={"platform": "cpu", "device_kind": "some cpu", "devices": 1, "cores": 2, "jax": "0.1"},
        settings={"dtype": "float32"},
    )  # fmt: skip
    values = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert list(values["methods"]) == ["plain", "x k=2"]
    assert values["methods"]["x k=2"]["acceptance_by_depth"] == [4 / 7, 1 / 4]
    console = Console(width=80, file=io.StringIO())
    console.print(table(report))
    lines = console.file.getvalue().splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    row = next(line.split() for line in lines if "x k=2 " in line)
    assert row[:3] == ["x", "k=2", "1.71"]
    assert row[5] == "0.34"  # what a round costs, in plain steps
    assert row[-6:] == ["12.0", "4.00x", "4.00..4.00", "50.0", "%", "-"]
    text = " ".join(" ".join(lines).split())
    assert "target tiny, 2 prompts x 2 repeats, T=0, float32, batch 1" in text
    assert "1 x some cpu, 2 cores, jax 0.1, 2026-01-02" in text
    assert "x k=2: its repeats differ by 100%, 6.0 to 12.0 tokens/s; measure again on a quiet machine" in text
