"""Prompt lookup: no model at all. What followed the last time the text ended as it does now is proposed again."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.protocol import Draft, Method, Pick, Row
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params


@dataclasses.dataclass(frozen=True)
class PromptLookup(Method):
    """Proposes what follows the latest earlier place where the last `longest` tokens stand, or else fewer of them.

    a b c d a b, longest 2  ->  c d a b: the last two tokens stood at the beginning
    """

    target_vocab: int
    draft_length: int = 8
    longest: int = 3

    def propose(self, params: Params, shared: Params, state: Any, row: Row, k: int, pick: Pick) -> tuple[Draft, Any]:
        (B, S), last = row.tokens.shape, row.length[:, None] - 1
        places = jnp.arange(S)[None]
        same, after = places < last, jnp.zeros((B,), jnp.int32)
        for n in range(self.longest):  # same: the n tokens up to this place are the text's last n
            earlier = jnp.roll(row.tokens, n, axis=1)
            wanted = jnp.take_along_axis(row.tokens, jnp.maximum(last - n, 0), axis=1)
            same = same & (places >= n) & (last >= n) & (earlier == wanted)
            found = jnp.max(jnp.where(same, places + 1, 0), axis=1)
            after = jnp.where(found > 0, found, after)
        at = jnp.minimum(after[:, None] + jnp.arange(k)[None], last)  # what is not there yet: the anchor again
        return Draft(jnp.take_along_axis(row.tokens, at, axis=1), None), state


def prompt_lookup(target: Target, draft_length: int = 8) -> Drafter:
    """The drafter for a target, of no parameters."""
    return Drafter(method=PromptLookup(target.config.vocab_size, draft_length), params={}, name="prompt-lookup")
