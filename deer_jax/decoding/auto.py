"""The draft length chosen while decoding: what a round costs against what it is likely to commit.

Nothing is looked at but rounds that are over, so every round is exact whatever was chosen for it, and so is the
distribution of an answer. Which tokens a seed gives depends on the lengths, though, and these on measured times.
"""

import dataclasses
import weakref
from typing import Literal

import numpy as np

from deer_jax.decoding.programs import bucket
from deer_jax.drafters.drafter import Drafter

AUTO = "auto"
DraftLength = int | Literal["auto"] | None  # as users give it; None: what the drafter was trained for
FIRST = 4  # the draft length that is tried first
TRIAL = 8  # rounds of a trial
SEGMENT = 16  # rounds between two choices
PATIENCE, MOST_PATIENCE = 64, 1024  # plain rounds until drafting is tried again, at first and after many failures
MEMORY = 64  # rounds after which an acceptance counts 1/e
PRIOR = 2.0  # what is thought of a depth, in rounds: it fares as the depth before it
GUESS = 0.6  # the same of the first depth
MARGIN = 1.02  # by how much drafting must look better than plain decoding


@dataclasses.dataclass(frozen=True)
class Segment:
    """What a segment was and what came of it.

    Attributes:
      k, rounds: draft length, and rounds that it ran.
      seconds: wall clock without compilation.
      context: tokens of the longest row.
      histogram: [most + 1] rounds of all rows that accepted i drafts.
    """

    k: int
    rounds: int
    seconds: float
    context: int
    histogram: np.ndarray


class AutoLength:
    """Draft lengths 0, 2, 4, .. up to the drafter's own, with what each costs and how deep drafts are accepted.

    The rates of acceptance are of the drafts that went before, the newest counting most; the costs are per size and
    per context, on a coarse grid. Sizes that were never run are judged by the line through those that were, so a size
    is compiled only if it promises to be the best. Where plain decoding is, drafting is tried again now and then, ever
    more rarely.
    """

    def __init__(self, most: int):
        self.most = most
        self.sizes = sorted({0, most, *(2**i for i in range(1, 16) if 2**i < most)})
        self.tried, self.kept = np.zeros(most), np.zeros(most)  # by depth
        self.costs: dict[tuple[int, int, int], float] = {}  # seconds of a round by slots, context and k
        self.plain_rounds, self.patience = 0, PATIENCE
        self.k, self.left = min(FIRST, most), 0  # what runs, and for how many rounds more

    def choose(self, slots: int, context: int) -> tuple[int, int]:
        """Draft length and number of rounds of the next segment."""
        if self.left <= 0:
            self.k, self.left = self._next(slots, context)
        return self.k, self.left

    def note(self, slots: int, segment: Segment) -> None:
        """Remember a segment."""
        self.left -= segment.rounds
        if segment.rounds < 1:
            return
        key = (slots, bucket(segment.context, 128), segment.k)
        cost, old = segment.seconds / segment.rounds, self.costs.get(key)
        self.costs[key] = cost if old is None else old + (cost - old) * (0.5 if cost < old else 0.2)
        if segment.k == 0:
            self.plain_rounds += segment.rounds
            return
        reached = np.cumsum(segment.histogram[::-1])[::-1]  # [i]: rounds that accepted at least i
        fading = np.exp(-segment.rounds / MEMORY)
        self.tried = self.tried * fading
        self.kept = self.kept * fading
        self.tried[: segment.k] += reached[: segment.k]
        self.kept[: segment.k] += reached[1 : segment.k + 1]

    def expected(self, k: int) -> float:
        """Tokens that a round of k drafts is thought to commit."""
        total = alive = 1.0
        rate = GUESS
        for tried, kept in zip(self.tried[:k], self.kept[:k], strict=True):
            rate = (kept + PRIOR * rate) / (tried + PRIOR)
            alive *= rate
            total += alive
        return total

    def _next(self, slots: int, context: int) -> tuple[int, int]:
        known = self._known(slots, bucket(context, 128))
        first = min(FIRST, self.most)
        for k in (first, 0):
            if k not in known:
                return k, TRIAL
        speeds = {k: self.expected(k) / cost for k, cost in self._all(known).items()}
        best = max(speeds, key=lambda k: speeds[k] / (1 if k else 1 / MARGIN))
        if best:
            self.plain_rounds, self.patience = 0, PATIENCE
            return best, SEGMENT if best in known else TRIAL
        if self.plain_rounds >= self.patience:
            self.plain_rounds, self.patience = 0, min(2 * self.patience, MOST_PATIENCE)
            drafting = [k for k in known if k]
            return max(drafting, key=lambda k: speeds[k]), TRIAL // 2
        return 0, SEGMENT

    def _known(self, slots: int, context: int) -> dict[int, float]:
        """Measured costs by size, of the contexts nearest to this one."""
        found: dict[int, tuple[int, float]] = {}
        for (s, c, k), cost in self.costs.items():
            if s == slots and (k not in found or abs(c - context) < found[k][0]):
                found[k] = abs(c - context), cost
        return {k: cost for k, (_, cost) in found.items()}

    def _all(self, known: dict[int, float]) -> dict[int, float]:
        """Costs of all sizes: those that were never measured from the line through the drafting sizes next to them.

        With one such size only, half of what its cost is above the plain step's is taken to be a fixed price.
        """
        drafting = sorted(k for k in known if k)
        points = dict(known)
        if len(drafting) == 1:
            (k,) = drafting
            points[2 * k] = known[k] + max(known[k] - known[0], 0) / 2
            drafting.append(2 * k)
        places = np.array(drafting, float)
        values = np.array([points[k] for k in drafting])

        def at(k: int) -> float:
            if k in known:
                return known[k]
            i = int(np.clip(np.searchsorted(places, k), 1, len(places) - 1))
            slope = (values[i] - values[i - 1]) / (places[i] - places[i - 1])
            return max(values[i] + slope * (k - places[i]), known[0])

        return {k: at(k) for k in self.sizes}


_lengths: weakref.WeakKeyDictionary[Drafter, AutoLength] = weakref.WeakKeyDictionary()


def auto_length(drafter: Drafter) -> AutoLength:
    """That of a drafter: what one call has learnt serves the next."""
    found = _lengths.get(drafter)
    if found is None:
        found = _lengths[drafter] = AutoLength(drafter.draft_length)
    return found
