"""Heads: what turns the hidden states of a block into draft tokens, one class each.

A pass gives every place of a block scores of its own. `Independent` draws from these. The others make a token depend
on the one before it, its predecessor (for the first, the anchor), without another pass of the backbone:

- `PathSelector` (DFlash 2) chooses among the best few of each place, by their scores and how well they follow;
- `Markov` (DSpark) adds a term of low rank to all scores, made of the predecessor.

Each returns the q that it drew from, at any temperature. In training the predecessor is the text's own token.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deer_jax.config import check_choice, check_flag, check_whole, from_mapping
from deer_jax.drafters.protocol import Choice, Draft, Pick, Term, join
from deer_jax.errors import InputError
from deer_jax.formats import mapping
from deer_jax.models.layers import linear, logits, look_up
from deer_jax.models.transformer import Params
from deer_jax.models.weights import Weight
from deer_jax.sharding import gathered, here, on_shards, shard_index, whole

HEAD = "draft_head"  # among a drafter's parameters: those of its head
MOST_RANK, MOST_CANDIDATES = 4096, 1024


@dataclasses.dataclass(frozen=True)
class Block:
    """What a head is given of a draft of k tokens.

    Attributes:
      hidden: [B, n, D] final states of the pass; those that predict are the last k.
      scores: float32 [B, k, V'] of these, over the drafter's ids.
      anchor: int32 [B].
      ids: int32 [V'], which id of the target each of the drafter's is; None: the same.
    """

    hidden: jax.Array
    scores: jax.Array
    anchor: jax.Array
    ids: jax.Array | None

    @property
    def first(self) -> int:
        """The first state that predicts."""
        return self.hidden.shape[1] - self.scores.shape[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Independent:
    """Every token from its own scores.

    Attributes:
      has_confidence: whether a further head says how likely a place's token is to be accepted. It is trained and kept;
        drafts do not depend on it.
    """

    has_confidence: bool = False

    def __post_init__(self):
        check_flag("has_confidence", self.has_confidence)

    def weights(self, width: int, vocab: int, draft_vocab: int) -> dict[str, Weight]:
        """Its weights, for a backbone of this width; vocab: the target's ids, draft_vocab: the drafter's."""
        return self._confidence_weights(width)

    def _confidence_weights(self, features: int) -> dict[str, Weight]:
        if not self.has_confidence:
            return {}
        return {
            "confidence": Weight((1, features), (None, None)),
            "confidence_bias": Weight((1,), (None,), "zeros"),
        }

    def draft(self, params: Params, block: Block, pick: Pick) -> Draft:
        """The draft of a block."""
        return pick(block.scores, 0, None if block.ids is None else block.ids[None, None])

    def terms(self, params: Params, hidden, before) -> tuple[Term, ...]:
        """What training adds to the scores of hidden [B, M, n, D], whose last W states predict; before int32 [B, M, W]:
        their predecessors."""
        return ()

    def choice(self, params: Params, hidden, before) -> Choice | None:
        """The choice that training trains beside the scores; arguments as for `terms`."""
        return None

    def confidence(self, params: Params, hidden, before) -> jax.Array | None:
        """float32 [B, M, W]: logits of the probability that a place's token is accepted; None where it has none."""
        if not self.has_confidence:
            return None
        features = self._confidence_features(params, hidden[:, :, hidden.shape[2] - before.shape[2] :], before)
        return linear(features, params["confidence"], params["confidence_bias"])[..., 0].astype(jnp.float32)

    def _confidence_features(self, params: Params, states, before):
        return states


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathSelector(Independent):
    """Of each place's best `candidates` ids c, by score: score(c) + <predecessor[x] * projection h, successor[c]>.

    Attributes:
      rank: of the two codebooks.
    """

    rank: int = 256
    candidates: int = 16

    def __post_init__(self):
        super().__post_init__()
        check_whole("rank", self.rank, 1, MOST_RANK)
        check_whole("candidates", self.candidates, 1, MOST_CANDIDATES)

    def weights(self, width: int, vocab: int, draft_vocab: int) -> dict[str, Weight]:
        return {
            "predecessor": Weight((vocab, self.rank), ("vocab", "width")),
            "successor": Weight((draft_vocab, self.rank), ("vocab", "width")),
            "projection": Weight((self.rank, width), (None, "width"), "zeros"),  # it begins as if it were not there
        } | self._confidence_weights(width)

    def draft(self, params: Params, block: Block, pick: Pick) -> Draft:
        best, at = best_of(block.scores, self.candidates)
        ids = at if block.ids is None else block.ids[at]
        states = self._project(params, block.hidden[:, block.first :])
        followers = look_up(params["successor"], at)
        token, parts = block.anchor, []
        for j in range(best.shape[1]):
            key = look_up(params["predecessor"], token[:, None]) * states[:, j : j + 1]
            follows = jnp.einsum("bjr,bjkr->bjk", key, followers[:, j : j + 1], preferred_element_type=jnp.float32,
                                 precision=lax.Precision.HIGHEST)  # fmt: skip
            parts.append(pick(best[:, j : j + 1] + follows, j, ids[:, j : j + 1]))
            token = parts[-1].tokens[:, 0]
        return join(parts)

    def choice(self, params: Params, hidden, before) -> Choice:
        states = self._project(params, hidden[:, :, hidden.shape[2] - before.shape[2] :])
        key = look_up(params["predecessor"], _flat(before)) * _flat(states)
        return Choice(Term(key, params["successor"]), self.candidates)

    def _project(self, params: Params, hidden):
        return linear(hidden, whole(params["projection"], (None, "width")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Markov(Independent):
    """Adds w2 of what the predecessor's row of w1 makes to a place's scores.

    Attributes:
      rank: of w1 and w2.
      form: `vanilla`: the row itself; `gated`: times a gate made of state and row; `rnn`: of a recurrent state that
        goes through the block.
      confidence_reads_row: whether the confidence is of state and row, not of the state alone.
    """

    rank: int = 256
    form: Literal["vanilla", "gated", "rnn"] = "vanilla"
    confidence_reads_row: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_whole("rank", self.rank, 1, MOST_RANK)
        check_choice("form", self.form, ("vanilla", "gated", "rnn"))
        check_flag("confidence_reads_row", self.confidence_reads_row)

    def weights(self, width: int, vocab: int, draft_vocab: int) -> dict[str, Weight]:
        r = self.rank
        table = {
            "w1": Weight((vocab, r), ("vocab", "width"), "tokens"),
            "w2": Weight((draft_vocab, r), ("vocab", "width"), "zeros"),  # it begins as if it were not there
        }
        if self.form == "gated":
            table |= {"gate": Weight((r, width + r), (None, None)), "gate_bias": Weight((r,), (None,), "zeros")}
        if self.form == "rnn":
            table |= {"joint": Weight((3 * r, 2 * r + width), (None, None))}
            table |= {"joint_bias": Weight((3 * r,), (None,), "zeros")}
        return table | self._confidence_weights(width + r * self.confidence_reads_row)

    def draft(self, params: Params, block: Block, pick: Pick) -> Draft:
        w2, token, parts = whole(params["w2"], ("vocab", "width")), block.anchor, []
        ids = None if block.ids is None else block.ids[None, None]
        state = jnp.zeros((token.shape[0], self.rank), block.hidden.dtype)
        row = look_up(params["w1"], token[:, None])[:, 0]
        for j in range(block.first):  # states that predict nothing, of the anchor
            _, state = self._step(params, block.hidden[:, j], row, state)
        for j in range(block.scores.shape[1]):
            features, state = self._step(params, block.hidden[:, block.first + j], row, state)
            scores = block.scores[:, j : j + 1] + logits(features, w2)[:, None]
            parts.append(pick(scores, j, ids))
            token = parts[-1].tokens[:, 0]
            row = look_up(params["w1"], token[:, None])[:, 0]
        return join(parts)

    def terms(self, params: Params, hidden, before) -> tuple[Term, ...]:
        rows, first = self._rows(params, before), hidden.shape[2] - before.shape[2]
        if self.form != "rnn":
            features, _ = self._step(params, hidden[:, :, first:], rows, None)
            return (Term(_flat(features), params["w2"]),)
        rows = jnp.concatenate([rows[:, :, :1]] * first + [rows], axis=2)  # the anchor's, as in `draft`

        def step(state, at):
            features, state = self._step(params, at[0], at[1], state)
            return state, features

        start = jnp.zeros((*before.shape[:2], self.rank), hidden.dtype)
        _, features = lax.scan(step, start, (jnp.moveaxis(hidden, 2, 0), jnp.moveaxis(rows, 2, 0)))
        return (Term(_flat(jnp.moveaxis(features[first:], 0, 2)), params["w2"]),)

    def _confidence_features(self, params: Params, states, before):
        return jnp.concatenate([states, self._rows(params, before)], axis=-1) if self.confidence_reads_row else states

    def _rows(self, params: Params, before):
        return look_up(params["w1"], _flat(before)).reshape(*before.shape, self.rank)

    def _step(self, params: Params, hidden, row, state):
        """What w2 is applied to, [.., r], and the next recurrent state."""
        if self.form == "vanilla":
            return row, state
        if self.form == "gated":
            both = jnp.concatenate([hidden, row], axis=-1)
            return row * jax.nn.sigmoid(linear(both, params["gate"], params["gate_bias"])), state
        joint = linear(jnp.concatenate([state, row, hidden], axis=-1), params["joint"], params["joint_bias"])
        gate, candidate, output = jnp.split(joint, 3, axis=-1)
        gate = jax.nn.sigmoid(gate)
        return jnp.tanh(output), gate * state + (1 - gate) * jnp.tanh(candidate)


INDEPENDENT = Independent()
Head = Independent | PathSelector | Markov
HEADS: dict[str, type[Independent]] = {"none": Independent, "selector": PathSelector, "markov": Markov}


def head_from(values: Any, where: str) -> Head:
    """The head that plain values say, as `section_of` writes them; InputError, which begins with `where`."""
    values = dict(mapping(values, where))
    kind: Any = values.pop("kind", None)
    check_choice(f"{where}: kind", kind, HEADS)
    return from_mapping(HEADS[kind], values, where)


def section_of(head: Head) -> dict[str, Any]:
    """Its part of config.json: plain values."""
    kind = next(name for name, kind in HEADS.items() if kind is type(head))
    return {"kind": kind} | dataclasses.asdict(head)


def shapes_of(weights: Mapping[str, Weight]) -> Params:
    """What a head with such weights adds to a drafter's parameters as training holds them: shapes."""
    found = {name: jax.ShapeDtypeStruct(weight.shape, jnp.float32) for name, weight in weights.items()}
    return {HEAD: found} if found else {}


def axes_of(weights: Mapping[str, Weight]) -> Params:
    """The logical axes of these, as tuples in a tree like it."""
    found = {name: weight.axes for name, weight in weights.items()}
    return {HEAD: found} if found else {}


def check_vocabulary(head: Head, vocab: int) -> None:
    """InputError for a head that wants more ids than a drafter's vocabulary has."""
    if isinstance(head, PathSelector) and head.candidates > vocab:
        raise InputError(f"the selector chooses among {head.candidates} ids, more than the vocabulary of {vocab}")


def best_of(scores, count: int):
    """The best `count` of scores float32 [B, k, V], and their places int32 [B, k, count], the best first.

    On a mesh each shard of the vocabulary gives its best, which are then compared.
    """

    def local(scores):
        best, at = lax.top_k(scores, min(count, scores.shape[-1]))
        at = at + shard_index("vocab") * scores.shape[-1]
        best, at = gathered(best, "vocab", 2), gathered(at, "vocab", 2)
        best, order = lax.top_k(best, count)
        return best, jnp.take_along_axis(at, order, axis=2).astype(jnp.int32)

    rows = here((*scores.shape[:2], count), "batch", None, None)
    return on_shards(local, (here(scores.shape, "batch", None, "vocab"),), (rows, rows))(scores)


def initial(weights: dict[str, Weight], seed: int, dtype=jnp.float32, embedding: jax.Array | None = None) -> Params:
    """Arrays for a table of weights.

    embedding: [V, D] of the target, which a table of its tokens begins with: projected at random to the table's rank,
    with mean square 1, so that tokens alike are alike there. None: it begins with a random row per token.
    """
    params: dict[str, Any] = {}
    for key, (name, weight) in zip(
        jax.random.split(jax.random.key(seed), max(len(weights), 1)), weights.items(), strict=False
    ):
        if weight.init == "tokens" and embedding is not None:
            projection = np.asarray(jax.random.normal(key, (embedding.shape[1], weight.shape[1])), embedding.dtype)
            rows = jnp.matmul(embedding, projection, preferred_element_type=jnp.float32)
            params[name] = (rows * lax.rsqrt(jnp.mean(rows**2))).astype(dtype)
        elif weight.init in ("normal", "tokens"):
            params[name] = jax.random.normal(key, weight.shape, dtype) / math.sqrt(weight.shape[-1])
        else:
            params[name] = jnp.zeros(weight.shape, dtype)
    return params


def _flat(x):
    """[B, M, W, ..] -> [B, M*W, ..]"""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
