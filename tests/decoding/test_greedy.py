"""Greedy decoding with a drafter says what plain decoding says, whatever the drafter proposes."""

import dataclasses

import numpy as np
import pytest

from deer_jax import DrafterConfig, Target, decode, drafter_from_target
from deer_jax.decoding import engine
from tests.decoding.agreement import assert_same_greedy, departure
from tests.doubles import table_drafters
from tests.tiny import random_params, tiny

SMALL = {"vocab_size": 48, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 24}
# Rows past a batch's size refill its slots; those are of one token, which needs no prefill (so nothing to compile).
LENGTHS = (70, 1, 66, 1, 33, 2, 5, 16, 17, 64, 65, 3, 8, 40, 70, 12, 1, 1)
ROWS = {1: 3, 3: 4, 16: 18}  # prompts per batch size
LIMITS = tuple(8 + 5 * i % 17 for i in range(len(LENGTHS)))
MODES = [(attention, head) for attention in ("block_causal", "bidirectional") for head in ("shifted", "in_place")]

# Every pair of draft length, batch size and drafter meets at least once. One program per line: the drafters of a line
# differ by their tables or weights alone.
GRID = [
    (k, batch, drafters)
    for i, k in enumerate((1, 2, 3, 5, 8, 16, 32))
    for batch, drafters in zip(
        np.roll((1, 3, 16), i).tolist(),
        (("wrong", "second"), ("right", "half"), ("from_target", "random")) if i % 2 else
        (("second", "right"), ("wrong", "half"), ("from_target", "random")),
        strict=True,
    )
]  # fmt: skip


def make_target(family: str, *, scan: bool, stop_ids=(), **changes) -> Target:
    config = tiny(family, **(SMALL | changes))
    return Target(config=config, params=random_params(config, 5, scan=scan), stop_ids=stop_ids)


def make_prompts(lengths, vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


def inner_stops(answers) -> tuple[int, ...]:
    """Two ids that occur within answers, neither first nor last."""
    found = [answer[len(answer) // 2] for answer in answers if len(answer) > 4 and answer[0] not in answer[1:]]
    return tuple(dict.fromkeys(found))[:2]


@pytest.fixture(scope="module")
def case():
    """Target with stop ids that do occur, prompts, plain answers and the doubles around them."""
    target = make_target("qwen3", scan=False)
    prompts = make_prompts(LENGTHS, target.config.vocab_size)
    free = decode(target, prompts, max_new_tokens=LIMITS).tokens
    target = dataclasses.replace(target, stop_ids=inner_stops(free))
    plain = decode(target, prompts, max_new_tokens=LIMITS).tokens
    stopped = [len(answer) < limit for answer, limit in zip(plain, LIMITS, strict=True)]
    assert any(stopped)
    assert not all(stopped)
    return target, prompts, plain, table_drafters(target, prompts, plain)


def test_the_grid_covers_every_pair():
    calls = [(k, batch, drafter) for k, batch, drafters in GRID for drafter in drafters]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        values = [{call[i] for call in calls} for i in (first, second)]
        assert len({(call[first], call[second]) for call in calls}) == len(values[0]) * len(values[1])


@pytest.mark.parametrize(("k", "batch", "drafters"), GRID, ids=lambda value: str(value) if isinstance(value, int) else "")
def test_equals_plain(case, k, batch, drafters):
    target, prompts, plain, doubles = case
    n = ROWS[batch]
    attention, head = MODES[(k + batch) % 4]
    for name in drafters:
        drafter = doubles.get(name)
        if drafter is None:
            drafter = drafter_from_target(target, DrafterConfig(attention=attention, head=head, draft_length=k))
            if name == "random":
                special = drafter.params["special"]
                weights = random_params(target.config, 99, scan=False) | {"special": special}
                drafter = dataclasses.replace(drafter, params=weights)
        result = decode(
            target, prompts[:n], drafter=drafter, draft_length=k, max_new_tokens=LIMITS[:n], batch_size=batch
        )
        agreement = assert_same_greedy(target, prompts[:n], plain[:n], result.tokens, k=k, batch=batch)
        assert len(agreement.near_ties) <= 1
        rounds = result.stats.rounds
        if name == "right" and not agreement.near_ties:
            assert rounds == [-(-len(answer) // (k + 1)) for answer in result.tokens]
        if name in ("wrong", "second"):
            assert rounds == [len(answer) for answer in result.tokens]
