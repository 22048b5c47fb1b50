"""What the loop asks of a drafter. Implemented by the standalone drafter and by the tests' doubles.

A drafter is split in two: `method`, a hashable object of pure functions that is static under `jit`, and `params`, the
arrays those functions read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from deer_jax.build import Build
from deer_jax.models.transformer import Params


class Context(NamedTuple):
    """What a drafter may see of a row: its committed tokens."""

    tokens: jax.Array  # int32 [B, S]; row b holds length[b] committed tokens, scratch behind
    length: jax.Array  # int32 [B]
    prompt_index: jax.Array  # int32 [B]


class Draft(NamedTuple):
    """Proposed tokens, and the distribution each was drawn from."""

    tokens: jax.Array  # int32 [B, k]
    log_q: jax.Array | None  # float32 [B, k, V]; None: each token was certain (point mass)
    finite: jax.Array | None = None  # bool [B], of the logits the tokens were picked from; None: there were none


# pick(logits float32 [B, n, V'], first) draws n tokens per row for draft positions first..first+n-1 under the sampling
# settings of the run. A block drafter calls it once; one whose tokens depend on each other, once per position and
# joins what it gets. Logits of -inf are never picked; a row that has nothing else, or NaN or +inf, is not finite, and
# the decode ends with an error.
Pick = Callable[[jax.Array, int], Draft]


class Method(Protocol):
    """The static half of a drafter. Instances are hashable and compare by value."""

    @property
    def target_vocab(self) -> int:
        """V of the target whose tokens it proposes."""
        ...

    def init_state(self, params: Params, batch: int, capacity: int, build: Build) -> Any:
        """Per-row state (caches), zeros."""

    def state_axes(self, state: Any) -> Any:
        """The logical axes (see `sharding`) of every array of such a state, as tuples in a tree like it."""

    def prefill(self, params: Params, state: Any, tokens, start, rows, *, first: bool) -> Any:
        """Read prompt chunk tokens int32 [R, P] at positions start.. into the given rows; `first`: start is 0.

        A row that is none of the state's is padding and changes nothing.
        """

    def ready(self, state: Any, length, rows) -> Any:
        """Rows int32 [R] now hold prompts of length int32 [R], read up to the last token; padding as in `prefill`."""

    def propose(self, params: Params, state: Any, context: Context, k: int, pick: Pick) -> tuple[Draft, Any]:
        """k drafted tokens after each row's committed ones, and the next state."""


class Drafter(Protocol):
    """A drafter as users hold it."""

    @property
    def name(self) -> str: ...
    @property
    def method(self) -> Method: ...
    @property
    def params(self) -> Params: ...
    @property
    def draft_length(self) -> int:
        """k it was trained for."""
        ...
