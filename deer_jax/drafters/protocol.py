"""The seam between the loop and its drafters: what a drafter is told, what it is asked, what it answers.

A drafter has two halves: a `Method`, a hashable object of pure functions that is static under `jit`, and the arrays
that these functions read, `params` (its own) and `shared` (the target's). `drafter.Drafter` holds both.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from deer_jax.build import Build
from deer_jax.models.transformer import Params


class Seen(NamedTuple):
    """A block that the target has just read: a chunk of prompts, or in a round the anchor and the draft.

    The token that the target chose last in a round is committed, but not read yet: it is in `Row`, not in here.
    """

    tokens: jax.Array  # int32 [R, T]
    hidden: jax.Array | None  # [R, T, n*D] outputs of the layers that the method taps, side by side; None without taps
    start: jax.Array  # int32 [R] position of tokens[:, 0]; 0: a new row begins, and what it held is forgotten
    count: jax.Array  # int32 [R] leading entries that stay; what lies behind them is padding, or a rejected draft
    first: bool = False  # all rows begin here, known when the program is made


class Row(NamedTuple):
    """What a drafter may see of the rows: their committed tokens."""

    tokens: jax.Array  # int32 [B, S]; row b holds length[b] committed tokens, scratch behind
    length: jax.Array  # int32 [B]; the anchor is tokens[b, length[b] - 1]
    prompt_index: jax.Array  # int32 [B] number of the row's prompt in the call


class Draft(NamedTuple):
    """Proposed tokens, and the distribution each was drawn from: dense, over some candidates, or a point mass."""

    tokens: jax.Array  # int32 [B, k]
    log_q: jax.Array | None  # float32 [B, k, m]; None: each token was certain (point mass)
    ids: jax.Array | None = None  # int32, broadcast to [B, k, m]: what log_q is of; None: of every id, m = V
    finite: jax.Array | None = None  # bool [B], of the logits the tokens were picked from; None: there were none


def join(parts: Sequence[Draft]) -> Draft:
    """The draft that was picked in these parts, first positions first; all of one kind of distribution."""

    def beside(sides):
        return jnp.concatenate(sides, axis=1) if all(side is not None for side in sides) else None

    tokens, log_q, ids, finite = zip(*parts, strict=True)
    known = [each for each in finite if each is not None]
    return Draft(
        jnp.concatenate(tokens, axis=1),
        beside(log_q),
        beside(ids),
        jnp.all(jnp.stack(known), axis=0) if known else None,
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
