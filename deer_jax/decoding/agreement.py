"""When two greedy decodes say the same: equal tokens, up to departures that rounding explains.

Programs of another width or batch round differently. A departure is a near-tie where the target's best logits are
closer than twice what the programs differ by at that very place; anything else is a mistake.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from deer_jax.config import Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.engine import Engine, round_weights
from deer_jax.decoding.programs import capacity_for
from deer_jax.drafters.protocol import Draft
from deer_jax.models.target import Target
from deer_jax.models.transformer import bind
from deer_jax.sharding import on_mesh

Tokens = Sequence[Sequence[int]]


class Departure(NamedTuple):
    """Where a row stops being equal."""

    row: int
    at: int  # index in the answer
    gap: float  # how far the worse of the two tokens lies below the best logit; inf where one answer ends early
    difference: float  # what the programs' logits differ by there

    @property
    def near_tie(self) -> bool:
        return self.gap <= 2 * self.difference


class Agreement(NamedTuple):
    """What was compared; `same_tokens` are those before each row's first departure."""

    rows: int
    same_tokens: int
    departures: tuple[Departure, ...]

    @property
    def near_ties(self) -> int:
        return sum(departure.near_tie for departure in self.departures)


def compare_greedy(target: Target, prompts: Tokens, plain: Tokens, other: Tokens, *, k: int, batch: int) -> Agreement:
    """Row by row, the answers of plain decoding and of the program with k drafted tokens and `batch` slots.

    A departure costs a few passes over its text; without departures nothing runs.
    What follows a row's first departure is another text and is not compared.
    """
    same, departures = 0, []
    for row, (prompt, ours, theirs) in enumerate(zip(prompts, plain, other, strict=True)):
        agree = [a == b for a, b in zip(ours, theirs, strict=False)]
        at = agree.index(False) if False in agree else len(agree)
        same += at
        if at < len(agree):
            gap, difference = _at(target, [*prompt, *ours[:at]], ours[at], theirs[at], k, batch)
            departures.append(Departure(row, at, gap, difference))
        elif len(ours) != len(theirs):
            departures.append(Departure(row, at, float("inf"), 0.0))
    return Agreement(len(prompts), same, tuple(departures))


def _at(target: Target, text: Sequence[int], ours: int, other: int, k: int, batch: int) -> tuple[float, float]:
    """Gap and difference after `text`.

    The programs: one row after the cache, and the block after the cache with the text's end at its first, middle and
    last place.
    """
    offsets = sorted({min(offset, len(text) - 1) for offset in (0, k // 2, k)})
    plain = cached_logits(target, text, 0, 0, batch)
    blocks = [cached_logits(target, text, k, offset, batch) for offset in offsets] if k else []
    difference = max((float(np.abs(plain - block).max()) for block in blocks), default=0.0)
    return float(plain.max() - min(plain[ours], plain[other])), difference


def cached_logits(target: Target, text: Sequence[int], k: int, offset: int, batch: int) -> np.ndarray:
    """float32 [V] after `text`, read over the cache in a block of k + 1 tokens whose last `offset` + 1 end the text."""
    split = len(text) - offset
    engine = Engine(target, None, 0, Sampling(), 0, (), batch, capacity_for([len(text)], k))
    batch, params = engine.slots, round_weights(target, None, engine.slots * (k + 1)).target
    engine.admit([text[:split]] * batch, [len(text) + 1] * batch, range(batch), range(batch))
    draft = np.zeros((batch, k), np.int32)
    draft[:, :offset] = text[split:]
    with on_mesh(target.mesh):
        draft = engine.put(draft, "batch", None)
        logits = _block_logits(engine.plan, params, engine.state, draft)
    return engine.fetch(logits)[0, offset]


@functools.partial(jax.jit, static_argnames="plan")
def _block_logits(plan, params, state, draft):
    _, read = loop.read_block(plan, params, state, Draft(draft, None))
    return bind(plan.target, params).logits(read.hidden)
