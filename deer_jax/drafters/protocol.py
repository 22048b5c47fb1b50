"""The seam between the loop and its drafters: what a drafter is told, what it is asked, what it answers.

A drafter has two halves: a `Method`, a hashable object of pure functions that is static under `jit`, and the arrays
that these functions read, `params` (its own) and `shared` (the target's). `drafter.Drafter` holds both.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from deer_jax.build import Build, Remat
from deer_jax.config import ModelConfig
from deer_jax.diffusion.corruption import Corruption
from deer_jax.errors import InputError
from deer_jax.models.transformer import Params


class Seen(NamedTuple):
    """A block that the target has just read: a chunk of prompts, or in a round the anchor and the draft.

    The token that the target chose last in a round is committed, but not read yet: it is in `Row`, not in here.

    Attributes:
      tokens: int32 [R, T].
      hidden: [R, T, n*D] outputs of the layers that the method taps, side by side; None without taps.
      start: int32 [R] position of tokens[:, 0]; 0: a new row begins, and what it held is forgotten.
      count: int32 [R] leading entries that stay; what lies behind them is padding, or a rejected draft.
      first: all rows begin here; known when the program is made.
    """

    tokens: jax.Array
    hidden: jax.Array | None
    start: jax.Array
    count: jax.Array
    first: bool = False


class Row(NamedTuple):
    """What a drafter may see of the rows: their committed tokens.

    Attributes:
      tokens: int32 [B, S]; row b holds length[b] committed tokens, scratch behind.
      length: int32 [B]; the anchor is tokens[b, length[b] - 1].
      prompt_index: int32 [B] number of the row's prompt in the call.
    """

    tokens: jax.Array
    length: jax.Array
    prompt_index: jax.Array


class Draft(NamedTuple):
    """Proposed tokens, and the distribution each was drawn from: dense, over some candidates, or a point mass.

    Attributes:
      tokens: int32 [B, k].
      log_q: float32 [B, k, m]; None: each token was certain (point mass).
      ids: int32, broadcast to [B, k, m]: what log_q is of; None: of every id, m = V.
      finite: bool [B], of the logits that the tokens were picked from; None: there were none.
      certainty: float32 [B], the largest probability in what the first token is drawn from; None: unknown.
    """

    tokens: jax.Array
    log_q: jax.Array | None
    ids: jax.Array | None = None
    finite: jax.Array | None = None
    certainty: jax.Array | None = None


def join(parts: Sequence[Draft]) -> Draft:
    """The draft that was picked in these parts, first positions first; all of one kind of distribution."""

    def beside(sides):
        return jnp.concatenate(sides, axis=1) if all(side is not None for side in sides) else None

    tokens, log_q, ids, finite, certainty = zip(*parts, strict=True)
    known = [each for each in finite if each is not None]
    return Draft(
        jnp.concatenate(tokens, axis=1),
        beside(log_q),
        beside(ids),
        jnp.all(jnp.stack(known), axis=0) if known else None,
        certainty[0],
    )


# pick(logits float32 [B, n, m], first, ids=None) draws n tokens per row for draft positions first..first+n-1 under the
# sampling settings of the run: of all ids (m = V), or of ids int32 [B, n, m], the candidates. A block drafter calls it
# once; one whose tokens depend on each other, once per position, and joins what it gets. Logits of -inf are never
# picked; a row that has nothing else, or NaN or +inf, is not finite, and the decode ends with an error.
Pick = Callable[..., Draft]


class Method:
    """The static half of a drafter: a frozen dataclass of pure functions, that is hashable and compared by value.

    A drafter that remembers nothing implements `propose` alone.

    Attributes:
      target_vocab: V of the target whose tokens it proposes.
      draft_length: k it was trained for.
      taps: layers of the target, from 0, whose outputs it reads; () for a drafter of text alone.
    """

    if TYPE_CHECKING:  # a property here would stand in the way of a field there

        @property
        def target_vocab(self) -> int: ...
        @property
        def draft_length(self) -> int: ...
        @property
        def taps(self) -> tuple[int, ...]: ...

    else:
        taps = ()

    def state(self, params: Params, shared: Params, batch: int, capacity: int, build: Build) -> Any:
        """Per-row state (caches), zeros, the same for every k; capacity: of a row's tokens and its last block."""
        return ()

    def state_axes(self, state: Any) -> Any:
        """The logical axes (see `sharding`) of every array of such a state, as tuples in a tree like it."""
        return ()

    def observe(self, params: Params, shared: Params, state: Any, seen: Seen, rows) -> Any:
        """The next state, when the target has read a block.

        Called when a prompt enters a slot, for each of its chunks, with `rows` int32 [R]: the slots; one that is none
        of the state's is padding and changes nothing. At least once, with count 0 for a prompt of one token. Then after
        every round, also those without a draft, with rows None: all slots in order.
        """
        return state

    def catch_up(self, params: Params, shared: Params, state: Any, row: Row, k: int) -> Any:
        """The state before the first draft of k tokens after rounds of another k, or of none: for drafters that leave
        committed tokens unread until the next draft."""
        return state

    def propose(self, params: Params, shared: Params, state: Any, row: Row, k: int, pick: Pick) -> tuple[Draft, Any]:
        """k drafted tokens after each row's committed ones, and the next state."""
        raise NotImplementedError


def check_tapped(method: Method, layers: int, target: str) -> None:
    """InputError for a tap that is none of the layers of a target, which has so many and is called `target`."""
    for tap in method.taps:
        if not 0 <= tap < layers:
            raise InputError(
                f"the drafter reads layer {tap} of its target, {target} has layers 0..{layers - 1}: give it the target "
                "that it was trained for"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """A part of the scores, features @ table.T, or cap * tanh(features @ table.T / cap).

    Attributes:
      features: [B, R, d], differentiated.
      table: [V, d], or what `sharding.spread` made of it.
      trained: whether the table has a gradient; where not, nothing is computed or held for one.
      softcap: the cap; None has none.
    """

    features: jax.Array
    table: jax.Array
    trained: bool = dataclasses.field(default=True, metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})


class Choice(NamedTuple):
    """A choice among each prediction's best `count` ids: by their scores plus one more term."""

    term: Term  # features made of predecessor and state, and the table of successors
    count: int


class Predictions(NamedTuple):
    """What a drafter says about a batch of training examples: R predictions for each text.

    A prediction's predecessor is the text's token before the one it is of, whether the drafter saw that or a mask.
    Predictions of the blocks come last, block by block; weights by place, choice and confidence are theirs alone.
    """

    place: jax.Array  # int32 [B, R] position in the text of the token that is predicted
    weight: jax.Array  # float32 [B, R] of its loss; 0 where nothing is predicted
    terms: tuple[Term, ...]  # whose sum are the scores, over the drafter's ids
    ids: jax.Array | None = (
        None  # int32 [V'], ascending: which id of the target each of the drafter's is; None: the same
    )
    allowed: jax.Array | None = None  # bool [V'] ids that may be proposed; None: all
    choice: Choice | None = None
    confidence: jax.Array | None = None  # float32 [B, R] logits of the probability that the token is accepted


def predecessors(batch: dict[str, jax.Array]) -> jax.Array:
    """int32 [B, M, W]: the token before each of the blocks' tokens, those of a text or of drafts."""
    anchor, (B, M, W) = batch["anchor"], batch["masked"].shape
    width = 1 if "drafted" in batch else W
    place = (anchor[..., None] + jnp.arange(width, dtype=anchor.dtype)[None, None]).reshape(B, M * width)
    found = jnp.take_along_axis(batch["tokens"], place, axis=1, mode="clip").reshape(B, M, width)
    return jnp.concatenate([found, batch["drafted"][..., :-1]], axis=-1) if "drafted" in batch else found


class Trainable(Method):
    """A method that can be trained: what `training` and `checkpoints` ask of it besides.

    Attributes:
      examples: how a text becomes an example, see `diffusion.corruption`: `blocks`, or `cut`.
      shape: of its backbone; its `context` is the longest text that it reads.
    """

    if TYPE_CHECKING:

        @property
        def examples(self) -> Literal["blocks", "cut"]: ...
        @property
        def shape(self) -> ModelConfig: ...

    @property
    def reserved(self) -> tuple[int, ...]:
        """Ids of the target that are masks to it: texts to train on must not have them."""
        return ()

    @property
    def draws(self) -> bool:
        """Whether it can draft the blocks of a batch of examples, see `draw`."""
        return False

    @property
    def has_confidence(self) -> bool:
        """Whether it says how likely its tokens are to be accepted."""
        return False

    def borrowed(self, target: ModelConfig) -> dict[str, str]:
        """Which of its shared arrays are parameters of a target of such sizes, and which: {"head": "embed"}, say."""
        return {}

    def shapes(self) -> Params:
        """Its parameters as training holds them, float32 and stacked, as shapes."""
        raise NotImplementedError

    def axes(self) -> Params:
        """The logical axes of these, as tuples in a tree like it."""
        raise NotImplementedError

    def check(self, corruption: Corruption) -> None:
        """InputError for a stage that it cannot have."""

    def predict(self, params: Params, shared: Params, batch: dict[str, jax.Array], tapped, remat: Remat) -> Predictions:
        """What it says about a batch of examples.

        batch: see `diffusion.corruption.Blocks` and `Cut`, with `tokens` int32 [B, T]; with `drafted` int32 [B, M, W]
        what it says about these blocks, of its own, instead of the text's. tapped [B, T, n*D]: the outputs of the
        target layers that it taps, of the clean texts.
        """
        raise NotImplementedError

    def draw(self, params: Params, shared: Params, batch: dict[str, jax.Array], tapped, pick: Pick) -> jax.Array:
        """int32 [B, M, W]: what it drafts behind the anchors of a batch; `pick` as in `propose`, of B*M rows."""
        raise NotImplementedError

    def section(self) -> dict[str, Any]:
        """What its part of config.json says beside the backbone's shape: plain values."""
        raise NotImplementedError
