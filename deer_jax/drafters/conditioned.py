"""The conditioned drafter: a block drafter that also reads the target's hidden states (DFlash, DFlash 2, DSpark).

Its embedding and head are the target's, and so is its mask: a row of the target's embedding that texts do not contain.
A block is the anchor and masks behind it, at their true positions. Every layer sees the context, that is the target's
hidden states of what it has read, and the block. The anchor is not among what the target has read.

    text        def  f  (  x        the anchor is (, W = 3
    context     c0   c1             of the positions before the anchor
    fill-in     ( [M] [M] [M]       a row predicts its own token: x is read at the first mask, nothing at the anchor
    next-token  ( [M] [M]           a row predicts the token behind it: x is read at the anchor
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from deer_jax.build import Build, Remat
from deer_jax.config import ConditionedConfig, check_choice, check_number, check_token_ids
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.heads import (
    HEAD,
    INDEPENDENT,
    Block,
    Head,
    PathSelector,
    axes_of,
    check_vocabulary,
    initial,
    section_of,
    shapes_of,
)
from deer_jax.drafters.protocol import Draft, Pick, Predictions, Row, Seen, Term, predecessors
from deer_jax.drafters.tapped import Ids, TappedMethod, TappedReading, shared_of
from deer_jax.errors import InputError
from deer_jax.models.blocks import Blocks
from deer_jax.models.cache import empty_cache, write_cache
from deer_jax.models.conditioned import context_kv, draft_block, read_blocks
from deer_jax.models.layers import logits, look_up
from deer_jax.models.target import Target, chosen_layers
from deer_jax.models.transformer import Params, abstract_params, bind, init_params, logical_axes, unstack_layers
from deer_jax.sharding import constrain, whole

MOST_FACTOR = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionedReading(TappedReading):
    """How a conditioned drafter reads and is read, beside what all tapped drafters have.

    Attributes:
      mask: the id of the target whose embedding is the mask; it is never proposed.
      layout: `fill_in`: a row predicts its own token; `next_token`: the one behind it.
      input_scale, output_scale, softcap: factors on the block's embeddings and on its scores, and the bound that these
        approach (cap * tanh(scores / cap)); None has none.
    """

    mask: int
    layout: Literal["fill_in", "next_token"] = "fill_in"
    input_scale: float = 1.0
    output_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_token_ids("mask", (self.mask,))
        check_choice("layout", self.layout, ("fill_in", "next_token"))
        for name in ("input_scale", "output_scale"):
            check_number(name, getattr(self, name), 0, MOST_FACTOR, above=True)
        if self.softcap is not None:
            check_number("softcap", self.softcap, 0, MOST_FACTOR, above=True)

    @property
    def first(self) -> int:
        """The first row of a block that predicts."""
        return 1 if self.layout == "fill_in" else 0


@dataclasses.dataclass(frozen=True)
class ConditionedMethod(TappedMethod):
    """The static half."""

    shape: ConditionedConfig
    reading: ConditionedReading
    head: Head = INDEPENDENT

    def __post_init__(self):
        if self.reading.mask >= self.target_vocab:
            raise InputError(
                f"the mask is id {self.reading.mask}, the target's vocabulary ends at {self.target_vocab - 1}"
            )
        super().__post_init__()
        check_vocabulary(self.head, self.draft_vocab)

    def __str__(self) -> str:
        shape = self.shape
        return f"conditioned, draft length {self.draft_length}, {shape.layers} layers of width {shape.width}"

    @property
    def reserved(self) -> tuple[int, ...]:
        return (self.reading.mask,)

    def state(self, params: Params, shared: Params, batch: int, capacity: int, build: Build) -> Any:
        build = dataclasses.replace(build, dtype=params["fc"].dtype)
        return empty_cache(self.shape, batch, capacity, build)

    def state_axes(self, state: Any) -> Any:
        return state.axes

    def observe(self, params: Params, shared: Params, state: Any, seen: Seen, rows) -> Any:
        """Keys and values of what the target has read; of what does not stay, they are written over later."""
        fresh = context_kv(self._bind(params), seen.hidden.astype(params["fc"].dtype), seen.start)
        return write_cache(state, fresh, seen.start, rows)

    def propose(self, params: Params, shared: Params, state: Any, row: Row, k: int, pick: Pick) -> tuple[Draft, Any]:
        """Rows of a block see each other, so the pass has as many as in training even if fewer are drafted: with fewer
        masks the first ones would say something else, and less (unless no row sees those behind it)."""
        with jax.named_scope("draft"):
            start, first = row.length - 1, self.reading.first
            anchor = jnp.take_along_axis(row.tokens, start[:, None], axis=1)
            rows = first + (k if all(self.shape.causal) else max(k, self.draft_length))
            tokens = jnp.pad(anchor, ((0, 0), (0, rows - 1)))
            x = self._embed(shared, tokens, jnp.arange(rows)[None] > 0).astype(params["fc"].dtype)
            hidden = draft_block(self._bind(params), x, state, start)[:, : first + k]
            scores = self._scores(shared, hidden[:, first:])
        block = Block(hidden, scores, anchor[:, 0], shared.get("ids"))
        return self.head.draft(params.get(HEAD, {}), block, pick), state

    def _bind(self, params: Params):
        return bind(self.shape, {name: value for name, value in params.items() if name != HEAD})

    def _embed(self, shared: Params, tokens, is_mask):
        """Embeddings [B, n, D] of rows of blocks: tokens int32 [B, n], masks where it says so."""
        x = look_up(shared["embed"], jnp.where(is_mask, self.reading.mask, tokens))
        return constrain(x * jnp.asarray(self.reading.input_scale, x.dtype), "batch", None, None)

    def _scores(self, shared: Params, hidden):
        """float32 [B, n, V'] of final states."""
        hidden = hidden.astype(shared["head"].dtype)  # of the target, whose dtype may be another
        scores = constrain(logits(hidden, whole(shared["head"], ("vocab", "width"))), "batch", None, "vocab")
        scores = scores * self.reading.output_scale
        if self.reading.softcap is not None:
            scores = self.reading.softcap * jnp.tanh(scores / self.reading.softcap)
        ids = shared.get("ids", jnp.arange(scores.shape[-1], dtype=jnp.int32))
        return jnp.where((ids == self.reading.mask)[None, None], -jnp.inf, scores)

    # Training

    @property
    def has_confidence(self) -> bool:
        return self.head.has_confidence

    def head_weights(self):
        return self.head.weights(self.shape.width, self.target_vocab, self.draft_vocab)

    def shapes(self) -> Params:
        return abstract_params(self.shape) | shapes_of(self.head_weights())

    def axes(self) -> Params:
        return logical_axes(self.shape) | axes_of(self.head_weights())

    def predict(self, params: Params, shared: Params, batch: dict[str, jax.Array], tapped, remat: Remat) -> Predictions:
        """Shapes of the batch as in `corruption.Blocks`: W places behind each anchor, of which those masked count."""
        (B, M, W), first = batch["masked"].shape, self.reading.first
        states = self._read(params, shared, batch, tapped, remat)
        predicted = (batch["anchor"][..., None] + 1 + jnp.arange(W)[None, None]).reshape(B, M * W)
        before, head = predecessors(batch), params.get(HEAD, {})
        features = states[:, :, first:].reshape(B, M * W, -1) * jnp.asarray(self.reading.output_scale, states.dtype)
        ids, confidence = shared.get("ids"), self.head.confidence(head, states, before)
        every = jnp.arange(self.draft_vocab, dtype=jnp.int32) if ids is None else ids
        return Predictions(
            place=predicted,
            weight=batch["weight"].reshape(B, M * W),
            terms=(
                Term(features, shared["head"], trained=False, softcap=self.reading.softcap),
                *self.head.terms(head, states, before),
            ),
            ids=ids,
            allowed=every != self.reading.mask,
            choice=self.head.choice(head, states, before),
            confidence=None if confidence is None else confidence.reshape(B, M * W),
        )

    def _read(self, params: Params, shared: Params, batch: dict[str, jax.Array], tapped, remat: Remat):
        """Final states [B, M, rows, D] of the blocks of a batch, of which the last W predict."""
        tokens, anchor, masked = batch["tokens"], batch["anchor"], batch["masked"]
        B, M, W = masked.shape
        rows = W + self.reading.first
        place = (anchor[..., None] + jnp.arange(rows)[None, None]).reshape(B, M * rows)
        following = jnp.take_along_axis(tokens, place, axis=1, mode="clip")
        hidden_from_it = masked | (jnp.arange(W)[None, None] >= batch["size"][..., None])  # behind a text are masks
        is_mask = jnp.pad(hidden_from_it, ((0, 0), (0, 0), (1, 0)))[..., :rows].reshape(B, M * rows)
        x = self._embed(shared, following, is_mask)
        return read_blocks(self._bind(params), x, tapped, Blocks(anchor, rows), remat).reshape(B, M, rows, -1)

    @property
    def draws(self) -> bool:
        return not isinstance(self.head, PathSelector)  # whose q is not that of its scores

    def draw(self, params: Params, shared: Params, batch: dict[str, jax.Array], tapped, pick: Pick) -> jax.Array:
        B, M, W = batch["masked"].shape
        hidden = self._read(params, shared, batch, tapped, "none").reshape(B * M, -1, self.shape.width)
        scores = self._scores(shared, hidden[:, self.reading.first :])
        anchor = predecessors(batch)[..., 0].reshape(B * M)
        block = Block(hidden, scores, anchor, shared.get("ids"))
        return self.head.draft(params.get(HEAD, {}), block, pick).tokens.reshape(B, M, W)

    def section(self) -> dict[str, Any]:
        shape = self.shape
        names = (
            "tapped_width", "windows", "causal", "window_from", "conv_kernel", "conv_group", "qk_norm", "qkv_bias",
            "o_bias",
        )  # fmt: skip
        return {
            "kind": "conditioned", "reading": dataclasses.asdict(self.reading),
            "shape": {name: getattr(shape, name) for name in names},
            "head": section_of(self.head),
        }  # fmt: skip


def default_taps(layers: int, count: int) -> tuple[int, ...]:
    """`count` layers of a target with so many, from its second to its third last (DFlash)."""
    if count == 1:
        return (layers // 2,)
    return tuple(round(1 + i * (layers - 4) / (count - 1)) for i in range(count))


def conditioned_drafter(
    target: Target,
    reading: ConditionedReading,
    *,
    layers: int | Sequence[int] = 2,
    warm: bool = True,
    head: Head | None = None,
    ids: Ids | None = None,
    seed: int = 0,
    name: str = "conditioned",
    dtype=None,
    **shape: Any,
) -> Drafter:
    """An untrained conditioned drafter for a target.

    Args:
      layers: how many random layers, or those of the target that it starts from.
      warm: whether one that starts from layers of the target reads it as they do: `fc` hands on the last tap, normed as
        they norm what they read (with the tap before it, a layer's keys and values of the context are the target's
        own), and a Markov head's table begins with the target's embedding. Otherwise these are random, as with random
        layers always.
      ids: the ids that it proposes, ascending; their number is `reading.draft_vocab`.
      dtype: of its parameters; None: the target's.
      shape: of its backbone, where it differs from the target's, see `ConditionedConfig`.
    """
    config = target.config
    own = None if isinstance(layers, int) else chosen_layers(target, layers)
    count = layers if isinstance(layers, int) else len(layers)
    normed = own is None or config.qk_norm
    values: dict[str, Any] = vars(config) | {
        "family": "qwen3" if normed else config.family, "qk_norm": normed, "layers": count, "windows": (0,) * count,
        "causal": (False,) * count, "experts": 0, "experts_per_token": 0, "expert_width": 0,
        "tapped_width": len(reading.taps) * config.width,
    } | ({"qkv_bias": False} if own is None else {}) | shape  # fmt: skip
    method = ConditionedMethod(ConditionedConfig(**values), reading, head or INDEPENDENT)
    shared = shared_of(method, target, ids)
    params = init_params(method.shape, seed)
    for key, weight in params["layers"].items() if own is not None else ():
        if key in own and own[key].shape != weight.shape:
            raise InputError(f"a drafter of other sizes than {target.name} cannot start from its layers: see {key}")
        params["layers"][key] = own.get(key, weight)
    embedding = None
    if own is not None and warm:
        embedding = target.params["embed"]
        params["fc"] = jnp.eye(config.width, method.shape.tapped_width, method.shape.tapped_width - config.width)
        params["hidden_norm"] = jnp.mean(own["input_norm"], axis=0)
    if found := method.head_weights():
        params[HEAD] = initial(found, seed + 1, embedding=embedding)
    params = jax.tree.map(lambda x: x.astype(target.dtype if dtype is None else dtype), params)
    if not target.build.scan:
        params = unstack_layers(params, count)
    return Drafter(method=method, params=params, shared=shared, name=name, tokenizer=target.tokenizer)
