"""Drafters whose proposals are read from tables, so right, wrong or anything between; and a small tokenizer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.protocol import Draft, Method, Pick, Row, join
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params


@dataclasses.dataclass(frozen=True)
class TableMethod(Method):
    """Drafts table[prompt, position]: as a certain token, or as logits that favour it and go through `pick`."""

    target_vocab: int
    certain: bool = True
    draft_length = 64

    def propose(self, params: Params, shared: Params, state: Any, row: Row, k: int, pick: Pick) -> tuple[Draft, Any]:
        table = params["table"]
        at = jnp.minimum(row.length[:, None] + jnp.arange(k)[None], table.shape[1] - 1)
        tokens = table[row.prompt_index[:, None], at]
        if self.certain:
            return Draft(tokens, None), state
        favoured = tokens[..., None] == jnp.arange(self.target_vocab)[None, None]
        return pick(jnp.where(favoured, 3.0, 0.0), 0), state


@dataclasses.dataclass(frozen=True)
class AnchorMethod(Method):
    """Drafts from logits[anchor], whatever else the text is, of all ids or of each place's best few.

    A label keeps programs of one method apart.
    """

    target_vocab: int
    label: str = ""
    candidates: int = 0  # 0: all ids
    draft_length = 64

    def propose(self, params: Params, shared: Params, state: Any, row: Row, k: int, pick: Pick) -> tuple[Draft, Any]:
        anchor = jnp.take_along_axis(row.tokens, row.length[:, None] - 1, axis=1)[:, 0]
        logits = params["logits"][anchor, :k]
        return (pick(*best_of(logits, self.candidates, 0)) if self.candidates else pick(logits, 0)), state


def best_of(logits, count: int, first: int):
    """What `pick` is given to draw from the best few of logits [B, k, V]."""
    ids = jnp.argsort(-logits, axis=-1)[..., :count].astype(jnp.int32)
    return jnp.take_along_axis(logits, ids, axis=-1), first, ids


@dataclasses.dataclass(frozen=True)
class StepwiseMethod(Method):
    """Drafts position by position, each through a `pick` of its own, and joins the parts.

    Position i has logits[token, i]. The token is the anchor, or if `chained` the one drafted before.
    """

    target_vocab: int
    chained: bool
    draft_length = 64

    def propose(self, params: Params, shared: Params, state: Any, row: Row, k: int, pick: Pick) -> tuple[Draft, Any]:
        token = jnp.take_along_axis(row.tokens, row.length[:, None] - 1, axis=1)[:, 0]
        parts: list[Draft] = []
        for i in range(k):
            parts.append(pick(params["logits"][token, i][:, None], i))
            token = parts[-1].tokens[:, 0] if self.chained else token
        return join(parts), state


def table_drafter(table, vocab_size: int, *, certain: bool = True) -> Drafter:
    """Drafts table [P, S] of token ids, by prompt and position."""
    table = jnp.asarray(np.asarray(table), jnp.int32)
    return Drafter(method=TableMethod(vocab_size, certain), params={"table": table}, name="table")


def anchor_drafter(logits, label: str = "", candidates: int = 0) -> Drafter:
    """Drafts from logits float [V, k, V], by anchor and place in the draft; of the best few, where it says so."""
    logits = jnp.asarray(logits, jnp.float32)
    return Drafter(method=AnchorMethod(logits.shape[0], label, candidates), params={"logits": logits}, name="anchor")


def stepwise_drafter(logits, *, chained: bool) -> Drafter:
    """Drafts one position after the other from logits float [V, k, V], by anchor, or by the token drafted before."""
    logits = jnp.asarray(logits, jnp.float32)
    return Drafter(method=StepwiseMethod(logits.shape[0], chained), params={"logits": logits}, name="stepwise")


def text_table(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [P, S]: prompt and answer of every row, zeros behind."""
    table = np.zeros((len(prompts), max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))), np.int32)
    for row, prompt, answer in zip(table, prompts, answers, strict=True):
        row[: len(prompt) + len(answer)] = [*prompt, *answer]
    return table


def table_drafters(
    target: Target, prompts: Sequence[Sequence[int]], plain: Sequence[Sequence[int]], seed: int = 0
) -> dict[str, Drafter]:
    """Drafters around the target's plain answers: right, wrong, half right, and second-best at every position."""
    right, V = text_table(prompts, plain), target.config.vocab_size
    rng = np.random.default_rng(seed)
    half = np.where(rng.random(right.shape) < 0.4, rng.integers(0, V, right.shape), right)
    logits = np.asarray(target.logits(right))
    second = right.copy()
    # Column p is predicted by the logits at p - 1.
    second[:, 1:] = np.argsort(-logits[:, :-1], axis=-1, kind="stable")[..., 1]
    tables = {"right": right, "wrong": (right + 1) % V, "half": half, "second": second}
    return {name: table_drafter(table, V) for name, table in tables.items()}


class Pieces:
    """A tokenizer whose tokens are pieces of UTF-8, not always whole characters; `special` ids have no text."""

    def __init__(self, pieces: dict[int, bytes], special: tuple[int, ...] = (), vocab_size: int = 48):
        self.pieces, self.special, self.vocab_size = pieces, special, vocab_size

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % self.vocab_size for letter in text]

    def encode_chat(self, messages, **template_arguments) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))

    def decode(self, ids) -> str:
        joined = b"".join(self.pieces.get(token, b"?") for token in ids if token not in self.special)
        return joined.decode("utf-8", errors="replace")

    def settled(self, ids) -> int:
        return len(ids)
