"""The record a round takes and returns, and what a finished decode reports."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deer_jax.build import Build
from deer_jax.config import ModelConfig
from deer_jax.drafters.protocol import Method, Row
from deer_jax.models.cache import KVCache, empty_cache
from deer_jax.models.transformer import Params
from deer_jax.sharding import placements

# What ended a row early: logits that are not finite, and whose. The target's weigh more where both are.
NONE, DRAFTER, TARGET = 0, 1, 2
CERTAINTIES = 10  # parts that the certainty of drafts is counted in


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """What one round reads and returns.

    Row b has committed tokens[b, :length[b]]. The last of these, the anchor, is the one committed token the target's
    cache does not hold: the next round feeds it together with the draft. Token and cache slots from there on are
    scratch; the next round overwrites them before any query can see them, so a rejected draft needs no rollback.

    Attributes:
      limit: length at which the row ends.
      done: rows that have ended, and slots that hold no prompt. They keep computing at their own length; only `commit`
        freezes them.
      prompt_index: which prompt the row holds; part of the keys of its random numbers.
      rounds: the row's own count.
      histogram: rounds of the row that committed i + 1 tokens (i accepted drafts), before the limit's cut.
      certain: the row's rounds by the certainty of their draft, in equal parts of 0 to 1: all that drafted, those that
        verified the draft, and of these those that kept its first token. Counted where drafts may go unverified.
      fault: NONE, or whose logits were not finite in the round that ended the row, which committed nothing.
      drafter: the drafter's own state.
    """

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B]
    limit: jax.Array  # int32 [B]
    done: jax.Array  # bool [B]
    prompt_index: jax.Array  # int32 [B]
    rounds: jax.Array  # int32 [B]
    histogram: jax.Array  # int32 [B, most k + 1]
    certain: jax.Array  # int32 [B, 3, CERTAINTIES]
    fault: jax.Array  # int32 [B]
    cache: KVCache
    drafter: Any

    @property
    def row(self) -> Row:
        return Row(self.tokens, self.length, self.prompt_index)

    def axes(self, drafter: Any) -> "DecodeState":
        """The logical axes of every array, in their places; drafter: those of the drafter's own state."""
        row: Any = ("batch",)
        rows: Any = ("batch", None)
        parts: Any = ("batch", None, None)
        return DecodeState(
            tokens=rows, length=row, limit=row, done=row, prompt_index=row, rounds=row, histogram=rows,
            certain=parts, fault=row, cache=self.cache.axes, drafter=drafter,
        )  # fmt: skip


class StateShape(NamedTuple):
    """What decides the arrays of a `DecodeState`."""

    target: ModelConfig
    drafter: Method | None
    slots: int
    capacity: int
    most: int  # the largest k of any round
    build: Build


def idle_state(shape: StateShape, params: Params, shared: Params) -> DecodeState:
    """A state whose slots hold no prompt. `length` is 1 so that every index a round forms stays in range."""
    batch, capacity, build = shape.slots, shape.capacity, shape.build

    def ints(*sizes):
        return jnp.zeros(sizes, jnp.int32)

    return DecodeState(
        tokens=ints(batch, capacity),
        length=jnp.ones((batch,), jnp.int32),
        limit=jnp.ones((batch,), jnp.int32),
        done=jnp.ones((batch,), bool),
        prompt_index=ints(batch),
        rounds=ints(batch),
        histogram=ints(batch, shape.most + 1),
        certain=ints(batch, 3, CERTAINTIES),
        fault=ints(batch),
        cache=empty_cache(shape.target, batch, capacity, build),
        drafter=shape.drafter.state(params, shared, batch, capacity, build) if shape.drafter else (),
    )


def abstract_state(shape: StateShape, params: Params, shared: Params, mesh: Mesh | None = None) -> DecodeState:
    """`idle_state` as shapes, with the places where its arrays lie on a mesh; nothing is computed."""
    state = jax.eval_shape(functools.partial(idle_state, shape), params, shared)
    if mesh is None:
        return state
    axes = state.axes(shape.drafter.state_axes(state.drafter) if shape.drafter else ())
    places = placements(mesh, state, axes)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, places)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeStats:
    """What a decode did. Lists are per prompt, in the order of the prompts.

    Attributes:
      draft_length: k, the largest where it was chosen ("auto"); 0 is plain decoding.
      rounds_at: this call's rounds by the number of drafts that were verified, where it was chosen.
      new_tokens: tokens in the result, stop token included.
      rounds: draft-and-verify rounds.
      accepted_histogram: [k+1] counts: rounds that committed i + 1 tokens, counted up to and including a stop token
        and before the limit's cut.
      resumed_tokens: of new_tokens, those that the call found in its output; speeds do not count them.
      seconds: wall clock of the call, compilation excluded, prefill included.
      prefill_seconds: the part of it that read prompts; None where it was not measured (`time_prefill`).
      compile_seconds: what compilation took, not part of `seconds`.
      fetches: blocking copies from the device; one per segment.
    """

    draft_length: int
    new_tokens: list[int]
    rounds: list[int]
    accepted_histogram: list[list[int]]
    seconds: float
    prefill_seconds: float | None
    compile_seconds: float
    fetches: int
    resumed_tokens: int = 0
    rounds_at: dict[int, int] | None = None

    @property
    def acceptance_length(self) -> float:
        """Tokens committed per round, the target's own included; summed over prompts before dividing. Plain: 1."""
        return acceptance_length(self.accepted_histogram)

    @property
    def _made(self) -> int:
        return sum(self.new_tokens) - self.resumed_tokens

    @property
    def tokens_per_second(self) -> float:
        return self._made / self.seconds if self.seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Like `tokens_per_second`, without prefill; None where prefill was not measured."""
        if self.prefill_seconds is None:
            return None
        seconds = self.seconds - self.prefill_seconds
        return self._made / seconds if seconds > 0 else 0.0


def acceptance_length(histograms: list[list[int]]) -> float:
    """Tokens committed over rounds, both summed over the rows of `accepted_histogram`; 0 without rounds."""
    rounds = sum(sum(row) for row in histograms)
    committed = sum((i + 1) * count for row in histograms for i, count in enumerate(row))
    return committed / rounds if rounds else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """What `decode` returns, in the order of the prompts.

    Attributes:
      texts: the answers alone, without stop and special tokens; None without a tokenizer.
      tokens: new tokens only, the stop token included if it was produced.
    """

    texts: list[str] | None
    tokens: list[list[int]]
    stats: DecodeStats
