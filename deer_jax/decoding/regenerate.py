"""Block regeneration: one block behind a text drafted again and again, and what of each the target would keep.

The fourth question of DEER (arXiv 2512.15176, section 4.5), which shows one example, with a measure: the share of the
blocks that the target accepts whole, and how many different ones there are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from deer_jax.config import Sampling, check_whole
from deer_jax.decoding.checks import check_models, prepare
from deer_jax.decoding.decode import DEFAULT_SLOTS
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.decoding.state import NONE
from deer_jax.drafters.drafter import Drafter
from deer_jax.errors import InputError, NotFiniteError
from deer_jax.models.target import Target

MOST_TIMES = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regeneration:
    """What `regenerate` returns, lists in the order of the prompts.

    Attributes:
      blocks: of each prompt the blocks that were drafted, token ids.
      accepted: of each of these how many leading tokens the target keeps.
      texts: the blocks as text; None without a tokenizer.
    """

    blocks: list[list[list[int]]]
    accepted: list[list[int]]
    texts: list[list[str]] | None

    @property
    def block_length(self) -> int:
        """Tokens per block."""
        return len(self.blocks[0][0])

    @property
    def accepted_share(self) -> float:
        """Share of the blocks that the target keeps whole."""
        return float(np.mean(np.asarray(self.accepted) == self.block_length))

    @property
    def accepted_tokens(self) -> float:
        """Tokens of a block that the target keeps, on average."""
        return float(np.mean(self.accepted))

    @property
    def distinct(self) -> float:
        """Different blocks per prompt, on average."""
        return float(np.mean([len(set(map(tuple, blocks))) for blocks in self.blocks]))


def regenerate(
    target: Target,
    prompts: Any,
    *,
    drafter: Drafter,
    block_length: int | None = None,
    times: int = 16,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    draft_temperature: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Regeneration:
    """Draft the block behind each prompt anew so many times, and verify each as a round of `decode` would.

    The drafts are independent of each other, and so are the decisions about them; the first is that of the first round
    of `decode` with the same seed. Nothing is committed.

    Args:
      prompts: as for `decode`: the text before the block.
      block_length: tokens per block; None is what the drafter was trained for.
      times: blocks per prompt.
      batch_size: prompts that are drafted for at once (default up to 16).

    Raises InputError for anything wrong with the arguments, NotFiniteError for logits that are not finite.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, draft_temperature=draft_temperature)
    check_models(target, drafter)
    if not isinstance(drafter, Drafter):
        raise InputError("drafter is None: give the one whose blocks are to be looked at")
    check_whole("times", times, 1, MOST_TIMES)
    if block_length is not None:
        check_whole("block_length", block_length, 1, target.config.context)
    encoded = encode_prompts(target, prompts, template_arguments)
    k = drafter.draft_length if block_length is None else block_length
    slots = DEFAULT_SLOTS if batch_size is None else batch_size
    engine, limits = prepare(target, encoded, drafter, k, k, sampling, seed, slots, ignore_stop=True)
    blocks: list[list[list[int]]] = [[] for _ in encoded]
    accepted: list[list[int]] = [[] for _ in encoded]
    for first in range(0, len(encoded), engine.slots):
        places = range(first, min(first + engine.slots, len(encoded)))
        rows = engine.order[: len(places)]
        engine.admit([encoded[i] for i in places], [limits[i] for i in places], places, rows)
        for _ in range(times):
            found = engine.regenerate()
            for row, i in zip(rows, places, strict=True):
                if found["fault"][row] != NONE:
                    raise NotFiniteError(i, engine.not_finite(int(found["fault"][row]), 0))
                length = len(encoded[i])
                blocks[i].append(found["tokens"][row, length : length + k].tolist())
                accepted[i].append(int(found["histogram"][row].argmax()))
    texts = None
    if (tokenizer := target.tokenizer) is not None:
        texts = [[tokenizer.decode(block) for block in each] for each in blocks]
    return Regeneration(blocks=blocks, accepted=accepted, texts=texts)
