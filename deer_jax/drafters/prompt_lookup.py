"""Prompt lookup: no model at all. What followed the last time the text ended as it does now is proposed again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.build import Build
from deer_jax.config import check_whole
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.protocol import Draft, Method, Pick, Row, Seen
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params

LONGEST = 3


def look_up_text(row: Row, k: int, longest: int) -> tuple[jax.Array, jax.Array]:
    """What followed the latest earlier place where the last `longest` tokens stand, or else fewer of them.

    Returns the tokens int32 [B, k], and how many of the last stand there, int32 [B].

    a b c d a b, longest 3  ->  c d a b, 2: the last two tokens stood at the beginning
    """
    (B, S), last = row.tokens.shape, row.length[:, None] - 1
    places = jnp.arange(S)[None]
    same, after, matched = places < last, jnp.zeros((B,), jnp.int32), jnp.zeros((B,), jnp.int32)
    for n in range(longest):  # same: the n tokens up to this place are the text's last n
        earlier = jnp.roll(row.tokens, n, axis=1)
        wanted = jnp.take_along_axis(row.tokens, jnp.maximum(last - n, 0), axis=1)
        same = same & (places >= n) & (last >= n) & (earlier == wanted)
        found = jnp.max(jnp.where(same, places + 1, 0), axis=1)
        after, matched = jnp.where(found > 0, found, after), jnp.where(found > 0, n + 1, matched)
    at = jnp.minimum(after[:, None] + jnp.arange(k)[None], last)  # what is not there yet: the anchor again
    return jnp.take_along_axis(row.tokens, at, axis=1), matched


@dataclasses.dataclass(frozen=True)
class PromptLookup(Method):
    """Proposes what `look_up_text` finds, whatever it is."""

    target_vocab: int
    draft_length: int = 8
    longest: int = LONGEST

    def propose(self, params: Params, shared: Params, state: Any, row: Row, k: int, pick: Pick) -> tuple[Draft, Any]:
        tokens, matched = look_up_text(row, k, self.longest)
        return Draft(tokens, None, certainty=matched.astype(jnp.float32) / self.longest), state


def prompt_lookup(target: Target, draft_length: int = 8) -> Drafter:
    """The drafter for a target, of no parameters."""
    return Drafter(method=PromptLookup(target.config.vocab_size, draft_length), params={}, name="prompt-lookup")


@dataclasses.dataclass(frozen=True)
class LookupFirst(Method):
    """Copies where the text repeats itself, and drafts where it does not.

    A row whose last `longest` tokens stand earlier in its text proposes what followed there, for certain; every other
    row what the drafter says. Where every row copies, the drafter does not run, unless it is one that reads on whenever
    it drafts: its caches, handed out of a branch, would be copied. Only committed tokens decide.
    """

    drafter: Method
    longest: int = LONGEST

    def __str__(self) -> str:
        return f"prompt lookup where the last {self.longest} tokens repeat, else {self.drafter}"

    @property
    def target_vocab(self) -> int:
        return self.drafter.target_vocab

    @property
    def draft_length(self) -> int:
        return self.drafter.draft_length

    @property
    def taps(self) -> tuple[int, ...]:
        return self.drafter.taps

    def state(self, params: Params, shared: Params, batch: int, capacity: int, build: Build) -> Any:
        return self.drafter.state(params, shared, batch, capacity, build)

    def state_axes(self, state: Any) -> Any:
        return self.drafter.state_axes(state)

    def observe(self, params: Params, shared: Params, state: Any, seen: Seen, rows) -> Any:
        return self.drafter.observe(params, shared, state, seen, rows)

    def catch_up(self, params: Params, shared: Params, state: Any, row: Row, k: int) -> Any:
        return self.drafter.catch_up(params, shared, state, row, k)

    def propose(self, params: Params, shared: Params, state: Any, row: Row, k: int, pick: Pick) -> tuple[Draft, Any]:
        copied, matched = look_up_text(row, k, self.longest)
        copies = matched == self.longest

        def drafted():
            return self.drafter.propose(params, shared, state, row, k, pick)

        if type(self.drafter).catch_up is not Method.catch_up:  # it reads on when it drafts
            draft, state = drafted()
            return _with_copies(draft, copied, copies), state

        def skipped():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(drafted)[0])

        draft = lax.cond(jnp.all(copies), skipped, lambda: drafted()[0])
        return _with_copies(draft, copied, copies), state


def lookup_first(drafter: Drafter, longest: int = LONGEST) -> Drafter:
    """A drafter that copies what followed where the text's last `longest` tokens stand already, and where they do not,
    drafts as the given one; see `LookupFirst`."""
    check_whole("longest", longest, 1, 64)
    method, name = LookupFirst(drafter.method, longest), f"prompt-lookup or {drafter.name}"
    return dataclasses.replace(drafter, method=method, name=name)


def _with_copies(draft: Draft, copied, copies) -> Draft:
    """A draft in which some rows, bool [B], propose other tokens int32 [B, k], for certain."""
    chosen = copies[:, None]
    finite = None if draft.finite is None else draft.finite | copies
    certainty = None if draft.certainty is None else jnp.where(copies, 1.0, draft.certainty)
    tokens = jnp.where(chosen, copied, draft.tokens)
    if draft.log_q is None:
        return Draft(tokens, None, finite=finite, certainty=certainty)
    log_q, ids, wanted = draft.log_q, draft.ids, copied[..., None]
    if ids is None:
        every = jnp.arange(log_q.shape[-1], dtype=jnp.int32)[None, None]
    else:  # what is copied need not be among the candidates: it is one more, which only rows that copy propose
        ids = every = jnp.concatenate([jnp.broadcast_to(ids, log_q.shape), wanted], axis=-1)
        log_q = jnp.pad(log_q, ((0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)
        wanted = jnp.where(jnp.arange(ids.shape[-1])[None, None] == ids.shape[-1] - 1, wanted, -1)
    certain = jnp.where(every == wanted, 0.0, -jnp.inf)
    return Draft(tokens, jnp.where(chosen[..., None], certain, log_q), ids, finite, certainty)
