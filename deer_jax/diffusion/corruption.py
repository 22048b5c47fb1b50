"""What a drafter is shown and what it must recover: truncation, masks and loss weights. NumPy only.

One example is a prompt P and the target's answer A, joined to one text of token ids. Two layouts:

*Block-causal.* The text is read clean and causally. Beside it stand up to M blocks, each holding the up to W tokens
that follow a random anchor (P's last token .. A's last but one), some of them masked, and a separator:

    text       def f ( x ) :        P = def f, A = ( x ) :
    block      [M] [M] [M] [SEP]    anchor (, W = 3, refinement with R = 3: targets x ) :

*Bidirectional.* The answer is cut at a random place and closed with the separator; masks lie in the cut answer itself.

Stage I (continuation): every candidate token is masked with probability t ~ U(0, 1), loss weight 1/t. Stage II
(refinement): the last R ~ U(1, min(R_max, candidates)) tokens are masked, weight alpha^(R-i) for the i-th of them, so
that the tokens next to the prefix weigh most. DEER, arXiv 2512.15176, equations 1 to 4. Stage III (acceptance): blocks
are masked whole, as in a draft, all weights 1.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from deer_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corruption:
    """How examples of one stage are corrupted.

    Attributes:
      stage: "continuation" (I), "refinement" (II), or "acceptance" (III), for what the drafter drafts on its own.
      width: W, tokens per block; block-causal only. None is the drafter's draft length.
      blocks: M, blocks per text; block-causal only.
      max_masked: R_max of stage II.
      alpha: base of stage II's weights.
      least_rate: t is clamped from below to this, which bounds 1/t.
      next_token: weight of the text's own next-token loss beside the blocks' loss; block-causal only. A block's first
        token is read at a text row, which this keeps as good as an autoregressive model's.
    """

    stage: Literal["continuation", "refinement", "acceptance"]
    width: int | None = None
    blocks: int = 8
    max_masked: int = 96
    alpha: float = 1.01
    least_rate: float = 0.02
    next_token: float = 1.0

    def __post_init__(self):
        if self.stage not in ("continuation", "refinement", "acceptance"):
            raise InputError(f"stage must be continuation, refinement or acceptance, got {self.stage!r}")
        for name in ("width", "blocks", "max_masked"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 < self.alpha < np.inf:
            raise InputError(f"alpha must be positive, got {self.alpha}")
        if not 0 < self.least_rate <= 1:
            raise InputError(f"least_rate must be in (0, 1], got {self.least_rate}")
        if not 0 <= self.next_token < np.inf:
            raise InputError(f"next_token must not be negative, got {self.next_token}")


class Blocks(NamedTuple):
    """Block-causal corruption of one text. Unused blocks have size 0; entries behind `size` are False and 0."""

    anchor: np.ndarray  # int32 [M] position of the anchor in the text
    size: np.ndarray  # int32 [M] tokens in the block, at most W
    masked: np.ndarray  # bool [M, W]
    weight: np.ndarray  # float32 [M, W] loss weight, 0 where not masked
    text_weight: np.ndarray  # float32 [n] of predicting the token after each text position; sums to next_token * total
    total: np.float32  # what the summed loss is divided by: candidates (I, III) or sum of weights (II)


class Cut(NamedTuple):
    """Bidirectional corruption of one text of n tokens, kept up to `length`."""

    length: np.int32  # prompt and cut answer
    masked: np.ndarray  # bool [n]
    weight: np.ndarray  # float32 [n], 0 where not masked
    total: np.float32


def corrupt_blocks(prompt: int, length: int, settings: Corruption, rng: np.random.Generator) -> Blocks:
    """Random blocks of a text with `prompt` prompt tokens and `length` tokens in all (prompt < length).

    Anchors differ from each other; there are at most as many as there are places.
    """
    M, W = settings.blocks, settings.width
    assert W is not None
    places = length - prompt  # the prompt's last token .. the last but one of the text
    count = min(M, places)
    anchor, size = np.zeros(M, np.int32), np.zeros(M, np.int32)
    anchor[:count] = np.sort(rng.choice(places, count, replace=False)) + prompt - 1
    size[:count] = np.minimum(W, length - 1 - anchor[:count])
    masked, weight = np.zeros((M, W), bool), np.zeros((M, W), np.float32)
    rates = _stratified(count, rng)
    for m in range(count):
        masked[m, : size[m]], weight[m, : size[m]] = _mask(size[m], rates[m], settings, rng)
    total = weight.sum() if settings.stage == "refinement" else size.sum()
    text_weight = np.zeros(length, np.float32)
    text_weight[prompt - 1 : length - 1] = settings.next_token * total / places
    return Blocks(anchor, size, masked, weight, text_weight, np.float32(total))


def corrupt_cut(prompt: int, length: int, settings: Corruption, rate: float, rng: np.random.Generator) -> Cut:
    """A random cut c ~ U(1, answer) of the text, and masks in the cut answer; `rate` in (0, 1] is stage I's t."""
    kept = int(rng.integers(1, length - prompt, endpoint=True))
    masked, weight = np.zeros(length, bool), np.zeros(length, np.float32)
    answer = slice(prompt, prompt + kept)
    masked[answer], weight[answer] = _mask(kept, rate, settings, rng)
    total = kept if settings.stage == "continuation" else weight.sum()
    return Cut(np.int32(prompt + kept), masked, weight, np.float32(total))


def _stratified(count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` rates in (0, 1], one in each of as many equal strata, in random order: less variance of 1/t."""
    return (rng.permutation(count) + 1 - rng.random(count)) / max(count, 1)


def _mask(size: int, rate: float, settings: Corruption, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which of `size` candidate tokens are masked, and their weights.

    size = 4, refinement with R = 3, alpha = 2:  masked F T T T, weight 0 4 2 1
    """
    if settings.stage == "acceptance":
        return np.ones(size, bool), np.ones(size, np.float32)
    if settings.stage == "continuation":
        t = max(float(rate), settings.least_rate)
        masked = rng.random(size) < t
        return masked, np.where(masked, np.float32(1 / t), np.float32(0))
    count = int(rng.integers(1, min(settings.max_masked, size), endpoint=True))
    place = np.arange(size) - (size - count)  # 0 at the first masked token
    masked = place >= 0
    return masked, np.where(masked, np.power(settings.alpha, count - 1.0 - place), 0).astype(np.float32)
