"""Drafters that read the target's hidden states: what their kinds have in common, and the target's arrays they read."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from deer_jax.config import (
    MOST_DRAFT_LENGTH,
    ConditionedConfig,
    Eagle3Config,
    ModelConfig,
    check_token_ids,
    check_whole,
)
from deer_jax.drafters.protocol import Trainable, check_tapped
from deer_jax.errors import InputError, shown
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params
from deer_jax.models.weights import Weight
from deer_jax.sharding import on_mesh, placement

Ids = Sequence[int] | np.ndarray  # of a reduced vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class TappedReading:
    """How such a drafter reads and is read.

    Attributes:
      taps: layers of the target whose outputs it reads, from 0; of the last one after the final norm.
      draft_length: k it was trained for.
      draft_vocab: how many ids it proposes; None: all of the target's.
    """

    taps: tuple[int, ...]
    draft_length: int = 8
    draft_vocab: int | None = None

    def __post_init__(self):
        check_token_ids("taps", self.taps)
        if not self.taps or len(set(self.taps)) != len(self.taps):
            raise InputError(f"taps must be different layers of the target, one or more, got {list(self.taps)}")
        check_whole("draft_length", self.draft_length, 1, MOST_DRAFT_LENGTH)
        if self.draft_vocab is not None:
            check_whole("draft_vocab", self.draft_vocab, 2, 2**31)


class TappedMethod(Trainable):
    """The static half, a dataclass that has these two. What it shares with the target: `embed` and `head`, and `ids`
    int32 [V'] of a reduced vocabulary, whose `head` has a row for each of these."""

    if TYPE_CHECKING:

        @property
        def shape(self) -> ConditionedConfig | Eagle3Config: ...
        @property
        def reading(self) -> TappedReading: ...

    def __post_init__(self):
        reading = self.reading
        if reading.draft_vocab is not None and reading.draft_vocab > self.target_vocab:
            raise InputError(f"draft_vocab {reading.draft_vocab} is more than the target's {self.target_vocab} ids")
        if self.shape.tapped_width % len(reading.taps):
            raise InputError(f"{len(reading.taps)} taps do not make a context of width {self.shape.tapped_width}")

    @property
    def target_vocab(self) -> int:
        return self.shape.vocab_size

    @property
    def draft_vocab(self) -> int:
        return self.reading.draft_vocab or self.shape.vocab_size

    @property
    def carries_head(self) -> bool:
        """Whether its folders may have the head it reads; else that is always the target's."""
        return self.reading.draft_vocab is not None

    @property
    def draft_length(self) -> int:
        return self.reading.draft_length

    @property
    def taps(self) -> tuple[int, ...]:
        return self.reading.taps

    @property
    def examples(self) -> Literal["blocks", "cut"]:
        return "blocks"

    def head_weights(self) -> dict[str, Weight]:
        """Of what makes drafts of its states, where it has such a head of its own."""
        return {}

    def borrowed(self, target: ModelConfig) -> dict[str, str]:
        head = {} if self.reading.draft_vocab else {"head": "embed" if target.tied else "head"}
        return {"embed": "embed"} | head


def shared_of(method: TappedMethod, target: Target, ids: Ids | None = None, *, rows: jax.Array | None = None) -> Params:
    """What such a drafter reads of its target.

    The head of a reduced vocabulary is gathered unless it is given, everything else are the target's own arrays.

    Args:
      ids: those of a reduced vocabulary, see `draft_ids`.
      rows: [V', D] of the head, where it is not to have the target's.
    """
    config = target.config
    check_target(method, config, target.name)
    chosen = draft_ids(method, ids)
    head = target.params["embed" if config.tied else "head"]
    shared = {"embed": target.params["embed"], "head": head}
    if chosen is None:
        return shared if rows is None else shared | {"head": rows}
    if rows is None:
        where = placement(target.mesh, (len(chosen), config.width), ("vocab", "width"))
        with on_mesh(target.mesh):
            rows = jax.jit(lambda head, ids: head[ids], out_shardings=where)(head, chosen)
    return shared | {"head": rows, "ids": jnp.asarray(chosen)}


def draft_ids(method: TappedMethod, ids: Any, where: str = "ids") -> np.ndarray | None:
    """int32 [V'] the ids of a method's reduced vocabulary, None of a whole one; InputError, which calls them `where`,
    for what they cannot be: other than so many, not ascending, none of the target."""
    count = method.reading.draft_vocab
    if ids is None and count is None:
        return None
    if ids is None or count is None:
        raise InputError(f"{where} and reading.draft_vocab belong together: give both, or neither")
    found = np.array(ids, object)
    whole = found.ndim == 1 and all(isinstance(each, int | np.integer) and type(each) is not bool for each in found)
    right = whole and len(found) == count and bool(np.all(np.diff(found) > 0))
    if not right or found[0] < 0 or found[-1] >= method.target_vocab:
        many = f"{len(found):,} of them, " if whole else ""
        raise InputError(
            f"{where} must be {count:,} ascending ids of the target's {method.target_vocab:,}, as reading.draft_vocab "
            f"says, got {many}{shown(ids)}"
        )
    return found.astype(np.int32)


def check_target(method: TappedMethod, config: ModelConfig, target: str) -> None:
    """InputError unless a drafter of this method is for a target of such sizes, which is called `target`."""
    shape = method.shape
    for name, ours, theirs in (
        ("width", shape.width, config.width),
        ("vocabulary", shape.vocab_size, config.vocab_size),
        ("tapped width", shape.tapped_width, len(method.taps) * config.width),
    ):
        if ours != theirs:
            raise InputError(f"the drafter is for another target: one of {name} {ours}, and {target} has {theirs}")
    check_tapped(method, config.layers, target)
