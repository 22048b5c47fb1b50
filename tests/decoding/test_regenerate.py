"""Blocks that are drafted again and again: independent, verified as rounds are, whatever the batch."""

import itertools

import numpy as np
import pytest

import deer_jax
from deer_jax import regenerate
from deer_jax.errors import InputError
from tests.doubles import anchor_drafter
from tests.kinds import K, V, drafter_of, target_of

PROMPTS = [[1, 4, 2], [3], [5, 6, 1, 0, 2, 2, 7, 1, 8, 2, 3, 4, 9]]


def test_the_first_is_the_first_round_of_decode():
    target, options = target_of(), {"drafter": drafter_of("rnn reduced"), "temperature": 1.0, "seed": 3}
    found = regenerate(target, PROMPTS, times=2, **options)
    committed = next(deer_jax.stream_blocks(target, [PROMPTS[0]], max_new_tokens=9, **options))
    accepted = found.accepted[0][0]
    assert accepted == len(committed) - 1
    assert found.blocks[0][0][:accepted] == committed[:-1]
    assert found.block_length == K


def test_results_do_not_depend_on_the_batch():
    target, drafter = target_of(), drafter_of("vanilla")
    options = {"drafter": drafter, "times": 5, "seed": 1}
    one, three = (regenerate(target, PROMPTS, batch_size=size, **options) for size in (1, 3))
    assert one == three


def test_shares_are_those_of_the_two_distributions():
    """The chance that a whole block is kept, by enumeration, and of a longer one less."""
    target = target_of()
    logits = 1.5 * np.random.default_rng(5).normal(size=(V, 2, V))
    drafter, anchor, times = anchor_drafter(logits), 4, 1500
    found = {n: regenerate(target, [[1, anchor]], drafter=drafter, block_length=n, times=times, seed=2) for n in (1, 2)}
    q = np.exp(logits[anchor]) / np.exp(logits[anchor]).sum(axis=-1, keepdims=True)
    texts = np.array([[1, anchor, token] for token in range(V)])
    scores = np.asarray(target.logits(texts), np.float64)
    p = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    first = np.minimum(p[0, 1], q[0])
    whole = sum(first[a] * min(p[a, 2, b], q[1, b]) for a, b in itertools.product(range(V), repeat=2))
    for n, chance in ((1, first.sum()), (2, whole)):
        spread = np.sqrt(chance * (1 - chance) / times)
        assert abs(found[n].accepted_share - chance) < 5 * spread
    assert found[1].distinct < found[2].distinct <= V * V
    assert found[2].accepted_share < found[1].accepted_share


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": 0}, "times must be a whole number of at least 1, got 0"),
        ({"block_length": 0}, "block_length must be a whole number of at least 1, got 0"),
        ({"drafter": None}, "drafter is None"),
        ({"drafter": "runs/mine"}, "load it first"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(InputError, match=message):
        regenerate(target_of(), PROMPTS, **({"drafter": drafter_of("vanilla")} | options))
