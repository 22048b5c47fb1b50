"""When two greedy decodes say the same: equality up to departures that rounding explains."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deer_jax.config import Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.engine import Engine, bucket, prefill_chunks
from deer_jax.drafters.protocol import Draft
from deer_jax.models.target import Target

Tokens = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class NearTie:
    """A row departed where the target's two best logits are closer than the programs' rounding."""

    row: int
    at: int  # index in the answer
    gap: float
    difference: float


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What was compared; `same_tokens` are those before each row's first departure."""

    rows: int
    same_tokens: int
    near_ties: tuple[NearTie, ...]


@functools.partial(jax.jit, static_argnames="config")
def _block_logits(config, params, state, draft):
    return loop.read_block(config, params, state, Draft(draft, None))[0]


def cached_logits(target: Target, text: Sequence[int], k: int, offset: int, batch: int) -> np.ndarray:
    """float32 [V] after `text`, read over the cache in a block of k + 1 tokens whose last `offset` + 1 end the text."""
    split = len(text) - offset
    needed = [len(text) + k + 1, *(start + width for start, width in prefill_chunks(split - 1))]
    engine = Engine(target, None, 0, Sampling(), 0, (), batch, bucket(max(needed), 64))
    engine.admit([text[:split]] * batch, [len(text) + 1] * batch, range(batch), range(batch))
    draft = np.zeros((batch, k), np.int32)
    draft[:, :offset] = text[split:]
    return np.asarray(_block_logits(target.config, target.params, engine.state, jnp.asarray(draft)))[0, offset]


def departure(target: Target, text: Sequence[int], ours: int, other: int, k: int, batch: int) -> tuple[float, float]:
    """How far the worse of two next tokens lies below the best logit, and what the programs differ by there.

    The programs: full forward, plain over the cache, and the block over the cache with the text's end at its first,
    middle and last place.
    """
    full = np.asarray(target.logits([text]))[0, -1]
    offsets = sorted({min(offset, len(text) - 1) for offset in (0, k // 2, k)})
    seen = [full, cached_logits(target, text, 0, 0, batch)]
    seen += [cached_logits(target, text, k, offset, batch) for offset in offsets] if k else []
    difference = max(float(np.abs(a - b).max()) for a in seen for b in seen)
    return float(full.max() - min(full[ours], full[other])), difference


def assert_same_greedy(
    target: Target, prompts: Tokens, plain: Tokens, other: Tokens, *, k: int = 8, batch: int = 1
) -> Agreement:
    """The answers are equal, row by row, up to a first departure that a near-tie of the target explains.

    A departure is explained if both tokens' logits are within twice the difference between the programs of the best
    one. What follows a departure is another text and is not compared. k, batch: of the program that gave `other`.
    """
    assert len(plain) == len(other) == len(prompts)
    same, near_ties = 0, []
    for row, (prompt, ours, theirs) in enumerate(zip(prompts, plain, other, strict=True)):
        agree = [a == b for a, b in zip(ours, theirs, strict=False)]
        at = agree.index(False) if False in agree else len(agree)
        same += at
        if at == len(agree):
            assert len(ours) == len(theirs), f"row {row}: {len(theirs)} tokens, plain has {len(ours)}"
            continue
        gap, difference = departure(target, [*prompt, *ours[:at]], ours[at], theirs[at], k, batch)
        assert gap <= 2 * difference, (
            f"row {row} departs at token {at}: {theirs[at]} instead of {ours[at]}, whose logits are {gap:.3g} apart "
            f"where the programs differ by {difference:.3g}"
        )
        near_ties.append(NearTie(row, at, gap, difference))
    return Agreement(len(prompts), same, tuple(near_ties))
