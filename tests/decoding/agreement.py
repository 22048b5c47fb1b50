"""Greedy answers by an oracle of the tests' own: full forwards without cache, loop or drafter, and plain NumPy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deer_jax.models.target import Target
from tests import reference

Tokens = Sequence[Sequence[int]]


class Agreement(NamedTuple):
    """What was compared: tokens before each row's first departure, and how many of these are near-ties."""

    same_tokens: int
    near_ties: int


def assert_greedy(target: Target, prompts: Tokens, answers: Tokens, limits: Sequence[int]) -> None:
    """Every token is the best after all before it; answers end with their first stop token, or at their limit."""
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    best = np.asarray(target.logits(padded)).argmax(axis=-1)
    for row, (prompt, answer, limit) in enumerate(zip(prompts, answers, limits, strict=True)):
        assert list(answer) == best[row, len(prompt) - 1 : len(texts[row]) - 1].tolist(), f"row {row}"
        stops = [i for i, token in enumerate(answer) if token in target.stop_ids]
        ends = [len(answer) - 1] if stops else []
        assert stops == ends, f"row {row} goes on behind a stop token"
        assert stops or len(answer) == limit, f"row {row} ends at {len(answer)} of {limit} tokens"


def assert_same_greedy(
    target: Target, prompts: Tokens, plain: Tokens, other: Tokens, *, near_ties: int = 0
) -> Agreement:
    """The answers are equal row by row, up to first departures at near-ties, of which there are at most so many.

    A near-tie: in float64 the worse of the two tokens lies below the best by at most twice what the target's own full
    forward over that text is off. Whoever says another token than float64 is off by half of the gap at least.
    """
    same = found = 0
    for row, (prompt, ours, theirs) in enumerate(zip(prompts, plain, other, strict=True)):
        end = min(len(ours), len(theirs))
        at = next((i for i in range(end) if ours[i] != theirs[i]), end)
        same += at
        if at == len(ours) == len(theirs):
            continue
        what = f"row {row} departs at token {at}: {theirs[at : at + 1]} instead of {ours[at : at + 1]}"
        assert at < end, what
        gap, rounding = measured(target, [*prompt, *ours[:at]], ours[at], theirs[at])
        found += gap <= 2 * rounding
        what += f", {gap:.3g} below the best where rounding is {rounding:.3g}"
        assert gap <= 2 * rounding, what
        assert found <= near_ties, f"{what}: near-tie number {found}, expected at most {near_ties}"
    return Agreement(same, found)


def measured(target: Target, text: Sequence[int], ours: int, theirs: int) -> tuple[float, float]:
    """After `text`: how far the worse of two tokens lies below the best, and what the full forward is off at most."""
    truth = reference.forward(target.config, target.params, [text])[0]
    rounding = np.abs(np.asarray(target.logits([text]), np.float64)[0] - truth).max()
    return float(truth[-1].max() - min(truth[-1][ours], truth[-1][theirs])), float(rounding)
