"""Truncation, masks and weights: the contract token by token over many seeds, statistics, and the worked example."""

import math

import numpy as np
import pytest

from deer_jax import InputError
from deer_jax.diffusion.corruption import Corruption, corrupt_blocks, corrupt_cut

ONE, TWO = "continuation", "refinement"
SEEDS = range(300)


def check_masks(masked, weight, total, candidates, settings):
    """The contract of one run of candidate tokens, token by token. Returns what the weights say about t or R."""
    count = sum(bool(m) for m in masked)
    assert len(masked) == len(weight) == candidates
    if settings.stage == ONE:
        seen = {float(w) for w, m in zip(weight, masked, strict=True) if m}
        assert all(w == 0 for w, m in zip(weight, masked, strict=True) if not m)
        assert len(seen) <= 1  # one t for all
        assert total == candidates
        for w in seen:
            assert 1 <= w <= np.float32(1 / settings.least_rate)
        return 1 / seen.pop() if seen else None
    assert 1 <= count <= min(settings.max_masked, candidates)
    for i in range(candidates):
        place = i - (candidates - count) + 1  # i of the paper, 1 .. R
        assert bool(masked[i]) == (place >= 1)
        expected = settings.alpha ** (count - place) if place >= 1 else 0.0
        assert weight[i] == pytest.approx(expected, rel=1e-6)
    assert total == pytest.approx(sum(float(w) for w in weight), rel=1e-6)
    return count


@pytest.mark.representative
@pytest.mark.parametrize("stage", [ONE, TWO])
@pytest.mark.parametrize(("prompt", "length"), [(1, 2), (3, 4), (1, 9), (5, 12), (4, 40)])
def test_blocks_keep_their_contract(stage, prompt, length):
    settings = Corruption(stage=stage, width=5, blocks=6, max_masked=4, alpha=1.3, next_token=0.7)
    for seed in SEEDS:
        blocks = corrupt_blocks(prompt, length, settings, np.random.default_rng(seed))
        assert [x.dtype for x in blocks] == [np.int32, np.int32, bool, np.float32, np.float32, np.float32]
        assert [x.shape for x in blocks] == [(6,), (6,), (6, 5), (6, 5), (length,), ()]
        used = min(6, length - prompt)
        anchors = blocks.anchor[:used].tolist()
        assert anchors == sorted(set(anchors))
        total = 0.0
        for m in range(6):
            if m >= used:
                assert blocks.size[m] == blocks.anchor[m] == 0
            else:
                assert prompt - 1 <= anchors[m] <= length - 2
                assert blocks.size[m] == len(range(anchors[m] + 1, min(anchors[m] + 1 + 5, length)))
            size = int(blocks.size[m])
            assert not blocks.masked[m, size:].any()
            assert not blocks.weight[m, size:].any()
            if size:
                share = size if stage == ONE else blocks.weight[m].sum()
                check_masks(blocks.masked[m, :size], blocks.weight[m, :size], share, size, settings)
                total += share
        assert blocks.total == pytest.approx(total, rel=1e-6)
        predicting = [prompt - 1 <= p < length - 1 for p in range(length)]  # the next token is one of the answer
        each = settings.next_token * total / (length - prompt)
        assert blocks.text_weight == pytest.approx([each * yes for yes in predicting], rel=1e-5)


@pytest.mark.representative
@pytest.mark.parametrize("stage", [ONE, TWO])
@pytest.mark.parametrize(("prompt", "length"), [(1, 2), (3, 4), (2, 30)])
def test_cuts_keep_their_contract(stage, prompt, length):
    settings = Corruption(stage=stage, max_masked=7, alpha=0.9)
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        rate = 1 - rng.random()
        cut = corrupt_cut(prompt, length, settings, rate, rng)
        assert [x.dtype for x in cut] == [np.int32, bool, np.float32, np.float32]
        assert cut.masked.shape == cut.weight.shape == (length,)
        assert prompt + 1 <= cut.length <= length
        for outside in (slice(0, prompt), slice(cut.length, None)):
            assert not cut.masked[outside].any()
            assert not cut.weight[outside].any()
        answer = slice(prompt, cut.length)
        found = check_masks(cut.masked[answer], cut.weight[answer], cut.total, int(cut.length) - prompt, settings)
        if stage == ONE and found:
            assert found == pytest.approx(max(rate, settings.least_rate), rel=1e-6)


def even(counts, share):
    """Whether `counts` are as even as draws of equal probability are, within five standard deviations."""
    n = sum(counts)
    return all(abs(count - n * share) < 5 * math.sqrt(n * share * (1 - share)) for count in counts)


def test_cut_place_and_number_of_masks_are_uniform():
    settings = Corruption(stage=TWO, max_masked=96)
    cuts = [corrupt_cut(4, 9, settings, 1.0, np.random.default_rng(seed)) for seed in range(3000)]
    assert even(np.bincount([c.length - 4 for c in cuts], minlength=6)[1:], 1 / 5)
    whole = [int(c.masked.sum()) for c in cuts if c.length == 9]
    assert even(np.bincount(whole, minlength=6)[1:], 1 / 5)
    bounded = Corruption(stage=TWO, max_masked=3, width=8, blocks=1)
    blocks = [corrupt_blocks(1, 60, bounded, np.random.default_rng(seed)) for seed in range(2000)]
    assert even(np.bincount([int(b.masked.sum()) for b in blocks], minlength=4)[1:], 1 / 3)


def test_anchors_are_uniform():
    settings = Corruption(stage=TWO, width=8, blocks=2)
    anchors = [corrupt_blocks(3, 8, settings, np.random.default_rng(seed)).anchor for seed in range(2000)]
    counts = np.bincount(np.concatenate(anchors), minlength=7)
    assert counts[:2].sum() == 0
    assert even(counts[2:], 1 / 5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 1.0])
def test_tokens_are_masked_at_the_rate_and_the_weights_undo_it(rate):
    settings = Corruption(stage=ONE)
    drawn = [corrupt_cut(1, 60, settings, rate, np.random.default_rng(seed)) for seed in range(400)]
    candidates = sum(float(c.total) for c in drawn)
    masked, weight = (sum(float(c[i].sum()) for c in drawn) for i in (1, 2))
    deviation = math.sqrt(candidates * rate * (1 - rate))
    assert abs(masked - candidates * rate) <= 5 * deviation
    assert weight == pytest.approx(masked / rate, rel=1e-4)  # E[weight] = 1 for every candidate


def test_a_small_rate_is_clamped():
    settings = Corruption(stage=ONE, least_rate=0.25)
    drawn = [corrupt_cut(1, 40, settings, 1e-9, np.random.default_rng(seed)) for seed in range(200)]
    weights = np.concatenate([c.weight for c in drawn])
    assert set(weights.tolist()) == {0.0, 4.0}
    share = sum(c.masked.sum() for c in drawn) / sum(c.total for c in drawn)
    assert 0.2 < share < 0.3


def test_the_rates_of_a_text_are_one_in_each_stratum_in_any_order():
    settings = Corruption(stage=ONE, width=200, blocks=4, least_rate=1e-6)
    orders = set()
    for seed in range(100):
        blocks = corrupt_blocks(100, 10_000, settings, np.random.default_rng(seed))
        weights = blocks.weight.max(axis=1)
        if not weights.all():  # a tiny t may mask nothing
            continue
        strata = [min(int(4 / float(w)), 3) for w in weights]
        assert sorted(strata) == [0, 1, 2, 3]
        orders.add(tuple(strata))
    assert len(orders) > 15


@pytest.mark.representative
def test_worked_example():
    text, prompt = ["def", "f", "(", "x", ")", ":"], 2
    settings = Corruption(stage=TWO, width=3, blocks=1, alpha=2.0)
    found = False
    for seed in range(100):
        blocks = corrupt_blocks(prompt, len(text), settings, np.random.default_rng(seed))
        if text[blocks.anchor[0]] != "(" or blocks.masked.sum() < 3:
            continue
        found = True
        positions = [int(blocks.anchor[0]) + 1 + j for j in range(int(blocks.size[0]))]
        assert positions == [3, 4, 5]
        assert [text[p] for p in positions] == ["x", ")", ":"]
        assert blocks.masked.tolist() == [[True, True, True]]
        assert blocks.weight.tolist() == [[4, 2, 1]]
        assert blocks.total == 7
    assert found


@pytest.mark.parametrize("stage", [ONE, TWO])
def test_same_generator_state_same_result(stage):
    settings = Corruption(stage=stage, width=8)
    for make in (
        lambda rng: corrupt_blocks(5, 50, settings, rng),
        lambda rng: corrupt_cut(5, 50, settings, 0.5, rng),
    ):
        one, same, other = (make(np.random.default_rng(seed)) for seed in (1, 1, 2))
        for a, b in zip(one, same, strict=True):
            np.testing.assert_array_equal(a, b)
        assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": "third"}, "stage must be continuation, refinement or acceptance, got 'third'"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"blocks": -1}, "blocks must be at least 1, got -1"),
        ({"max_masked": 0}, "max_masked must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"alpha": math.nan}, "alpha must be positive, got nan"),
        ({"least_rate": 0.0}, r"least_rate must be in \(0, 1\], got 0.0"),
        ({"least_rate": 1.5}, r"least_rate must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        Corruption(**({"stage": ONE} | values))
