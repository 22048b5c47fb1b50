"""Greedy decoding with a drafter says what plain decoding says, whatever the drafter proposes."""

import dataclasses

import numpy as np
import pytest

from deer_jax import DrafterConfig, Target, decode, drafter_from_target
from deer_jax.checkpoints.load import load_target
from deer_jax.decoding import programs
from tests.decoding.agreement import assert_greedy, assert_same_greedy
from tests.doubles import anchor_drafter, stepwise_drafter, table_drafter, table_drafters, text_table
from tests.fast import representing
from tests.tiny import random_params, tiny

SMALL = {"vocab_size": 48, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 24}
# Rows past a batch's size refill its slots; those are of one token, which needs no prefill (so nothing to compile).
LENGTHS = (70, 1, 66, 1, 33, 2, 5, 16, 17, 64, 65, 3, 8, 40, 70, 12, 1, 1)
ROWS = {1: (1, 3, 16), 3: (0, 1, 2, 3), 16: range(18)}  # which prompts each batch size decodes
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
    return Target(config=config, params=random_params(config, 8, scan=scan), stop_ids=stop_ids)


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
    assert_greedy(target, prompts, plain, LIMITS)
    stopped = [len(answer) < limit for answer, limit in zip(plain, LIMITS, strict=True)]
    assert any(stopped)
    assert not all(stopped)
    assert np.median([len(answer) for answer in plain]) > 10  # of one token nothing would be seen
    # Drafts go on behind the stop tokens, where they would be accepted too.
    return target, prompts, plain, table_drafters(target, prompts, free)


def test_the_grid_covers_every_pair():
    calls = [(k, batch, drafter) for k, batch, drafters in GRID for drafter in drafters]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        values = [{call[i] for call in calls} for i in (first, second)]
        assert len({(call[first], call[second]) for call in calls}) == len(values[0]) * len(values[1])


@pytest.mark.accelerator
@pytest.mark.parametrize(
    ("k", "batch", "drafters"),
    representing(GRID, next(line for line in GRID if line[:2] == (5, 3))),
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_equals_plain(case, k, batch, drafters):
    target, prompts, plain, doubles = case
    rows = list(ROWS[batch])
    prompts, plain, limits = ([values[row] for row in rows] for values in (prompts, plain, LIMITS))
    attention, head = MODES[(k + batch) % 4]
    for name in drafters:
        if name in doubles:
            table = doubles[name].params["table"][np.array(rows)]
            drafter = dataclasses.replace(doubles[name], params={"table": table})
        else:
            drafter = drafter_from_target(target, DrafterConfig(attention=attention, head=head, draft_length=k))
            if name == "random":
                special = drafter.params["special"]
                weights = random_params(target.config, 99, scan=False) | {"special": special}
                drafter = dataclasses.replace(drafter, params=weights)
        result = decode(target, prompts, drafter=drafter, draft_length=k, max_new_tokens=limits, batch_size=batch)
        assert_same_greedy(target, prompts, plain, result.tokens)
        rounds = result.stats.rounds
        if name == "right":
            assert rounds == [-(-len(answer) // (k + 1)) for answer in result.tokens]
        if name in ("wrong", "second"):
            assert rounds == [len(answer) for answer in result.tokens]


@pytest.mark.parametrize("certain", [True, False])
def test_right_and_half_right_tables_accept_what_they_should(case, certain):
    """Through `pick`, logits that favour the right token draft it: the other way for a drafter to say the same."""
    target, prompts, plain, _ = case
    n, k = 4, 3
    drafter = table_drafter(text_table(prompts, plain), target.config.vocab_size, certain=certain)
    result = decode(target, prompts[:n], drafter=drafter, draft_length=k, max_new_tokens=LIMITS[:n], batch_size=3)
    assert_same_greedy(target, prompts[:n], plain[:n], result.tokens)
    assert result.stats.rounds == [-(-len(answer) // (k + 1)) for answer in plain[:n]]


def test_drafts_made_position_by_position(case):
    """One `pick` for each position: the answer is the same, and if the logits are, so are the rounds."""
    target, prompts, plain, _ = case
    n, k, V = 4, 3, target.config.vocab_size
    logits, follows = np.zeros((2, V, k, V))
    for text in ([*prompt, *answer] for prompt, answer in zip(prompts[:n], plain[:n], strict=True)):
        for at in range(len(text) - 1):
            follows[text[at], :, text[at + 1]] += 1
            for i, token in enumerate(text[at + 1 : at + 1 + k]):
                logits[text[at], i, token] += 1  # what stands i + 1 tokens behind this one
    found = {}
    for name, drafter in {
        "at once": anchor_drafter(logits),
        "by position": stepwise_drafter(logits, chained=False),
        "chained": stepwise_drafter(follows, chained=True),
    }.items():
        result = decode(target, prompts[:n], drafter=drafter, draft_length=k, max_new_tokens=LIMITS[:n], batch_size=3)
        assert_same_greedy(target, prompts[:n], plain[:n], result.tokens)
        found[name] = result.stats
    assert found["by position"].accepted_histogram == found["at once"].accepted_histogram
    assert min(stats.acceptance_length for stats in found.values()) > 1.2


@pytest.mark.parametrize(("family", "scan"), [("qwen2", True), ("qwen3_moe", False)])
def test_scanned_layers_and_experts(family, scan):
    changes = {"expert_width": 8, "experts": 4} if family == "qwen3_moe" else {}
    target = make_target(family, scan=scan, **changes)
    prompts = make_prompts((5, 1, 14), target.config.vocab_size)
    plain = decode(target, prompts, max_new_tokens=16).tokens
    assert_greedy(target, prompts, plain, [16] * 3)
    drafter = drafter_from_target(target, layers=(1,))
    result = decode(target, prompts, drafter=drafter, draft_length=3, max_new_tokens=16)
    assert_same_greedy(target, prompts, plain, result.tokens)
    assert [len(answer) for answer in result.tokens] == [16] * 3


def test_prompts_longer_than_a_prefill_pass_enter_running_batches(case, monkeypatch):
    """Slots are refilled while their neighbours run, by prompts that take several passes to read."""
    target, prompts, plain, _ = case
    monkeypatch.setattr(programs, "PREFILL_CHUNK", 16)
    assert programs.prefill_chunks(69) == [(0, 16), (16, 16), (32, 16), (48, 16), (64, 16)]
    n = 9
    result = decode(
        target,
        prompts[:n],
        drafter=drafter_from_target(target),
        draft_length=3,
        max_new_tokens=LIMITS[:n],
        batch_size=2,
    )
    assert_same_greedy(target, prompts[:n], plain[:n], result.tokens)


def test_a_real_target(stories_dir):
    target = load_target(stories_dir)
    prompts = [
        "Once upon a time, there was a little girl named Lily.",
        "Tom had a big red ball.",
        "The cat saw a bird in the tree and",
        "One day",
        "Mom said: do not go into the dark forest. But Tim wanted to see the old house, so he walked and walked.",
    ]
    plain = decode(target, prompts, max_new_tokens=48)
    result = decode(target, prompts, drafter=drafter_from_target(target), draft_length=5, max_new_tokens=48)
    ids = [target.tokenizer.encode(prompt) for prompt in prompts]
    assert_greedy(target, ids, plain.tokens, [48] * len(ids))
    assert_same_greedy(target, ids, plain.tokens, result.tokens)
    assert result.texts == plain.texts
    assert result.stats.acceptance_length > 1.5


@pytest.mark.representative
def test_what_counts_as_the_same():
    """The oracle itself: a near-tie is counted where one is allowed, and anything else refused."""
    target = make_target("qwen3", scan=False)
    limits, V = [6], target.config.vocab_size
    prompts, head = make_prompts((5,), V), target.params["head"]
    plain = decode(target, prompts, max_new_tokens=6).tokens
    assert_greedy(target, prompts, plain, limits)
    at = next(i for i in range(1, 6) if plain[0][i] not in plain[0][:i])
    twin = next(token for token in range(V) if token not in plain[0])
    alike = dataclasses.replace(target, params=target.params | {"head": head.at[twin].set(head[plain[0][at]])})
    other = [[*plain[0][:at], twin, *plain[0][at + 1 :]]]
    assert assert_same_greedy(alike, prompts, plain, other, near_ties=1) == (at, 1)
    assert assert_same_greedy(alike, prompts, plain, plain) == (6, 0)
    with pytest.raises(AssertionError, match=f"row 0 departs at token {at}: .* near-tie number 1, expected at most 0"):
        assert_same_greedy(alike, prompts, plain, other)
    with pytest.raises(AssertionError, match=f"row 0 departs at token {at}: .* where rounding is"):
        assert_same_greedy(target, prompts, plain, other, near_ties=1)
    with pytest.raises(AssertionError, match=r"row 0 departs at token 5: \[\] instead of"):
        assert_same_greedy(target, prompts, plain, [plain[0][:-1]])
    with pytest.raises(AssertionError, match="row 0"):
        assert_greedy(target, prompts, other, limits)
    with pytest.raises(AssertionError, match="row 0 ends at 5 of 6 tokens"):
        assert_greedy(target, prompts, [plain[0][:-1]], limits)
    with pytest.raises(AssertionError, match="row 0 goes on behind a stop token"):
        assert_greedy(dataclasses.replace(target, stop_ids=(plain[0][at - 1],)), prompts, plain, limits)


def test_padding_of_a_prompt_ends_where_the_capacity_does():
    """Prefill pads to a power of two, the capacity follows the answer alone: a padded write that ran over its end would
    be moved back, onto the prompt's first pass or, where there is one pass only, would not compile."""
    config = tiny("qwen3", vocab_size=48, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24, context=1024)
    target = Target(config=config, params=random_params(config, 5, scan=False))
    for length, chunks, capacity in ((70, [(0, 128)], 80), (800, [(0, 512), (512, 512)], 896)):
        assert programs.prefill_chunks(length - 1) == chunks
        assert programs.capacity_for([length + 3], 0) == capacity < sum(chunks[-1])
        prompt = np.random.default_rng(length).integers(0, 48, length).tolist()
        (answer,) = decode(target, [prompt], max_new_tokens=3).tokens
        logits = np.asarray(target.logits([prompt + answer]))[0]
        for place, token in enumerate(answer):
            row = logits[length - 1 + place]
            assert row[token] >= row.max() - 1e-4
