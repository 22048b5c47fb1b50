"""The draft length chosen while decoding: what a round costs against what it is likely to commit.

Nothing is looked at but rounds that are over, and, for whether a draft is verified, the distribution that its first
token is drawn from, not the token. So every round is exact whatever was chosen for it, and so is the distribution of an
answer. Which tokens a seed gives depends on the lengths, though, and these on measured times.
"""

import dataclasses
import weakref
from typing import Literal

import numpy as np

from deer_jax.decoding.programs import bucket
from deer_jax.decoding.state import CERTAINTIES
from deer_jax.drafters.drafter import Drafter

AUTO = "auto"
DraftLength = int | Literal["auto"] | None  # as users give it; None: what the drafter was trained for
FIRST = 4  # the draft length that is tried first
TRIAL = 8  # rounds of a trial
SEGMENT = 16  # rounds between two choices
PATIENCE, MOST_PATIENCE = 64, 1024  # plain rounds until drafting is tried again, at first and after many failures
MEMORY = 64  # rounds after which an acceptance counts 1/e
PRIOR = 2.0  # what is thought of a depth, in rounds: it fares as the depth before it
GUESS = 0.6  # the same of the second
MARGIN = 1.02  # by how much drafting must look better than plain decoding
NEVER = 2.0  # a least certainty that no draft has


@dataclasses.dataclass(frozen=True)
class Segment:
    """What a segment was and what came of it.

    Attributes:
      k, rounds: draft length, and rounds that it ran.
      seconds: wall clock without compilation.
      context: tokens of the longest row.
      histogram: [most + 1] rounds of all rows that accepted i drafts.
      certain: of all rows, as `DecodeState` has it.
    """

    k: int
    rounds: int
    seconds: float
    context: int
    histogram: np.ndarray
    certain: np.ndarray

    @property
    def spared(self) -> int:
        """Rounds of all rows that drafted and did not verify."""
        drafted, verified, _ = self.certain.sum(axis=1)
        return int(drafted - verified)


class AutoLength:
    """Draft lengths 0, 2, 4, .. up to the drafter's own, with what each costs and how deep drafts are accepted; and how
    certain a draft must be to be verified.

    The rates of acceptance are of the drafts that went before, the newest counting most; the costs are per size and
    per context, on a coarse grid. Sizes that were never run are judged by the line through those that were, so a size
    is compiled only if it promises to be the best. Where plain decoding is, drafting is tried again now and then, ever
    more rarely.

    How often the first draft is accepted is counted by how certain it was, and how often drafts are as certain: that
    says what each size commits and costs if only those from some certainty on are verified.
    """

    def __init__(self, most: int):
        self.most = most
        self.sizes = sorted({0, most, *(2**i for i in range(1, 16) if 2**i < most)})
        self.tried, self.kept = np.zeros(most), np.zeros(most)  # by depth, of verified drafts
        self.certain = np.zeros((3, CERTAINTIES))  # as `DecodeState` has it
        # Seconds of a round by slots, context, drafts verified, and whether there were any.
        self.costs: dict[tuple[int, int, int, bool], float] = {}
        self.plain_rounds, self.patience = 0, PATIENCE
        self.k, self.left, self.least = min(FIRST, most), 0, 0.0  # what runs, and for how many rounds more

    def choose(self, slots: int, context: int) -> tuple[int, int, float]:
        """Draft length, number of rounds and least certainty of the next segment."""
        if self.left <= 0:
            self.k, self.left, self.least = self._next(slots, bucket(context, 128))
        return self.k, self.left, self.least

    def note(self, slots: int, segment: Segment) -> None:
        """Remember a segment."""
        self.left -= segment.rounds
        if segment.rounds < 1:
            return
        rounds = segment.histogram.sum()  # of all rows
        self._note_costs(slots, segment, segment.rounds * segment.spared / max(rounds, 1))
        if segment.k == 0:
            self.plain_rounds += segment.rounds
            return
        histogram, certain = segment.histogram.copy(), segment.certain
        if not certain.any():  # a drafter that does not say how certain it is
            certain = np.zeros_like(certain)
            certain[:, -1] = rounds, rounds, rounds - histogram[0]
        histogram[0] -= segment.spared
        reached = np.cumsum(histogram[::-1])[::-1]  # [i]: rounds that accepted at least i
        fading = np.exp(-segment.rounds / MEMORY)
        self.tried, self.kept, self.certain = self.tried * fading, self.kept * fading, self.certain * fading + certain
        self.tried[: segment.k] += reached[: segment.k]
        self.kept[: segment.k] += reached[1 : segment.k + 1]

    def _note_costs(self, slots: int, segment: Segment, spared: float) -> None:
        """Of rounds with and without verification, the seconds go to each as these were known to differ."""
        context, each = bucket(segment.context, 128), segment.seconds / segment.rounds
        parts = {segment.k: segment.rounds - spared, 0: spared} if segment.k else {0: segment.rounds}
        parts = {k: rounds for k, rounds in parts.items() if rounds}
        drafted = segment.k > 0
        guesses = {k: self._nearest(slots, context, k, drafted) or each for k in parts}
        ratio = segment.seconds / sum(rounds * guesses[k] for k, rounds in parts.items())
        for k, rounds in parts.items():
            key, cost = (slots, context, k, drafted), guesses[k] * ratio
            old = self.costs.get(key, cost)
            self.costs[key] = old + (cost - old) * (0.5 if cost < old else 0.2) * rounds / segment.rounds
        if self.least == NEVER and not spared:  # a drafter that does not say how certain it is
            self.costs[slots, context, 0, True] = self.costs[slots, context, segment.k, True]

    def expected(self, k: int) -> float:
        """Tokens that a round is thought to commit whose first of k drafts is accepted, beside the target's own."""
        total = alive = 1.0
        rate = GUESS
        for tried, kept in zip(self.tried[1:k], self.kept[1:k], strict=True):
            rate = (kept + PRIOR * rate) / (tried + PRIOR)
            alive *= rate
            total += alive
        return total

    def _next(self, slots: int, context: int) -> tuple[int, int, float]:
        known = {k: cost for k in self.sizes if (cost := self._nearest(slots, context, k, k > 0)) is not None}
        first = min(FIRST, self.most)
        for k in (first, 0):
            if k not in known:
                return k, TRIAL, 0.0
        spared = self._nearest(slots, context, 0, True)
        if spared is None:
            return first, TRIAL, NEVER
        costs = self._all(known)
        speeds = {k: self._speed(k, spared, costs[k], slots) for k in costs if k}
        best = max(speeds, key=lambda k: speeds[k])
        rounds = SEGMENT if best in known else TRIAL
        if speeds[best][0] > MARGIN / costs[0]:
            self.plain_rounds, self.patience = 0, PATIENCE
        elif self.plain_rounds >= self.patience:
            self.plain_rounds, self.patience = 0, min(2 * self.patience, MOST_PATIENCE)
            best, rounds = max([k for k in known if k], key=lambda k: speeds[k]), TRIAL // 2
        else:
            return 0, SEGMENT, 0.0
        return best, rounds, speeds[best][1]

    def _speed(self, k: int, spared: float, verified: float, slots: int) -> tuple[float, float]:
        """The most tokens per second of k drafts, whose rounds take so long without and with verification, and the
        least certainty that gives them."""
        drafted, tried, kept = self.certain
        share = drafted / drafted.sum()
        middles = (np.arange(CERTAINTIES) + 0.5) / CERTAINTIES  # taken for the rate until there is a better one
        gains = share * (kept + PRIOR * middles) / (tried + PRIOR) * self.expected(k)
        found = []
        for least in range(CERTAINTIES):
            below = share[:least].sum()
            along = 1 - below ** (slots - 1)  # a row that is less certain is verified beside one that is not
            tokens = 1 + gains[least:].sum() + gains[:least].sum() * along
            cost = spared + (verified - spared) * (1 - below**slots)
            found.append((tokens / cost, least / CERTAINTIES))
        return max(found)

    def _nearest(self, slots: int, context: int, k: int, drafted: bool) -> float | None:
        """The measured cost of the context nearest to this one."""
        kind = [slots, k, drafted]
        found = [(abs(c - context), cost) for (s, c, *rest), cost in self.costs.items() if [s, *rest] == kind]
        return min(found)[1] if found else None

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
