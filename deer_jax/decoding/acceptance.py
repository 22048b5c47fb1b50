"""What the histograms of accepted drafts say: intervals, acceptance by depth; and how much an answer repeats itself."""

import itertools
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
WINDOW = 8  # tokens


def acceptance_interval(histograms: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of the acceptance length, prompts drawn with replacement; histograms int [prompts, k+1].

    Every resample divides sums, as the acceptance length itself does. One prompt has no interval.
    """
    count, width = histograms.shape
    if count < 2:
        return None
    rounds, committed = histograms.sum(axis=1), histograms @ np.arange(1, width + 1)
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(committed[drawn].sum(axis=1) / rounds[drawn].sum(axis=1), (2.5, 97.5))
    return float(low), float(high)


def acceptance_by_depth(histogram: np.ndarray) -> list[float | None]:
    """P(draft i accepted | the drafts before it accepted), i = 0..k-1, from [k+1] rounds that accepted i drafts.

    [2, 3, 0, 0] -> [3/5, 0, None]
    """
    reached = np.cumsum(histogram[::-1])[::-1]  # rounds that accepted at least i
    return [float(after / before) if before else None for before, after in itertools.pairwise(reached)]


def repeated_windows(answers: Sequence[Sequence[int]], width: int = WINDOW) -> float | None:
    """Share of `width`-token windows that occurred before in the same answer; None without any window.

    width 2:  a b a b a -> windows ab ba ab ba, two of four
    """
    windows = [[tuple(answer[i : i + width]) for i in range(len(answer) - width + 1)] for answer in answers]
    total = sum(map(len, windows))
    return 1 - sum(len(set(row)) for row in windows) / total if total else None
