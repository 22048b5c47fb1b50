"""What the loop promises holds for every kind of drafter and every head."""

import numpy as np
import pytest

from deer_jax import decode
from deer_jax.decoding import programs
from tests.decoding.agreement import assert_greedy, assert_same_greedy
from tests.fast import representing
from tests.kinds import KINDS, K, V, drafter_of, target_of

# Of one token, of one prefill pass and of several; more than slots.
LENGTHS, LIMITS, SLOTS = (1, 33, 5, 1, 16, 17, 40, 2), (24, 9, 30, 17, 40, 12, 26, 21), 3
HEADS = ("independent reduced", "selector", "vanilla", "gated", "rnn")  # one of each


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def plain(prompts):
    answers = decode(target_of(), prompts, max_new_tokens=LIMITS).tokens
    assert_greedy(target_of(), prompts, answers, LIMITS)
    return answers


@pytest.mark.parametrize("kind", representing(KINDS, "selector reduced"))
def test_greedy_equals_plain(prompts, plain, kind, monkeypatch):
    monkeypatch.setattr(programs, "PREFILL_CHUNK", 16)
    result = decode(
        target_of(), prompts, drafter=drafter_of(kind), draft_length=K, max_new_tokens=LIMITS, batch_size=SLOTS
    )
    assert_same_greedy(target_of(), prompts, plain, result.tokens)
    print(kind, np.sum(result.stats.accepted_histogram, axis=0))
    assert result.stats.acceptance_length > 1  # some drafts are right, some wrong
    assert max(map(max, result.stats.accepted_histogram)) > 0
