"""EAGLE-3 (arXiv 2503.01840): an autoregressive drafter, one layer that reads the target's hidden states.

The baseline of the block drafters: k tokens take k passes over one row each, one after the other, see `models.eagle3`.
Its embedding is the target's, and so is its head, of which it may have a few rows only. It is trained as it drafts,
each row on the state that the row before has given ("training-time test"), on the text's own tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deer_jax.build import Build, Remat
from deer_jax.config import Eagle3Config
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.protocol import Draft, Pick, Predictions, Row, Seen, Term, join
from deer_jax.drafters.tapped import Ids, TappedMethod, TappedReading, shared_of
from deer_jax.models.cache import empty_cache, take_rows, write_cache, write_rows
from deer_jax.models.eagle3 import context_kv, draft_row, read_chains, states_of
from deer_jax.models.layers import logits, look_up
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params, abstract_params, bind, init_params, logical_axes, unstack_layers
from deer_jax.sharding import constrain, whole

AXES = ("batch", "slots")  # of a row's last tapped outputs


@dataclasses.dataclass(frozen=True)
class Eagle3Method(TappedMethod):
    """The static half."""

    shape: Eagle3Config
    reading: TappedReading

    @property
    def carries_head(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"EAGLE-3, draft length {self.draft_length}, one layer of width {self.shape.width}"

    def state(self, params: Params, shared: Params, batch: int, capacity: int, build: Build) -> Any:
        build = dataclasses.replace(build, dtype=params["fc"].dtype)
        last = jnp.zeros((batch, self.shape.tapped_width), build.dtype)
        return {"cache": empty_cache(self.shape, batch, capacity, build), "last": last}

    def state_axes(self, state: Any) -> Any:
        return {"cache": state["cache"].axes, "last": ("batch", None)}

    def observe(self, params: Params, shared: Params, state: Any, seen: Seen, rows) -> Any:
        """Keys and values of what the target has read, each token's with the tapped outputs before it; those of the
        last one are kept for the next token. Of what does not stay, they are written over later."""
        before = state["last"] if rows is None else take_rows(state["last"], rows, AXES)
        begins = (seen.start == 0)[:, None]
        before = jnp.where(begins, jnp.zeros((), before.dtype), before)
        hidden = seen.hidden.astype(before.dtype)
        model, earlier = bind(self.shape, params), jnp.concatenate([before[:, None], hidden[:, :-1]], axis=1)
        embedded = look_up(shared["embed"], seen.tokens).astype(before.dtype)
        fresh = context_kv(model, embedded, states_of(model, earlier), seen.start)
        stays = jnp.take_along_axis(hidden, jnp.maximum(seen.count - 1, 0)[:, None, None], axis=1)[:, 0]
        last = jnp.where((seen.count > 0)[:, None], stays, before)
        if rows is not None:
            last = write_rows(state["last"], last, jnp.zeros_like(seen.start), AXES, rows=rows)
        return {"cache": write_cache(state["cache"], fresh, seen.start, rows), "last": last}

    def propose(self, params: Params, shared: Params, state: Any, row: Row, k: int, pick: Pick) -> tuple[Draft, Any]:
        with jax.named_scope("draft"):
            model, start = bind(self.shape, params), row.length - 1
            states = states_of(model, state["last"][:, None])
            token = jnp.take_along_axis(row.tokens, start[:, None], axis=1)
            ids, parts, chain = shared.get("ids"), [], []
            for j in range(k):
                embedded = look_up(shared["embed"], token).astype(states.dtype)
                at = (start + j)[:, None]
                states, final = draft_row(model, embedded, states, at, chain, state["cache"], start)
                parts.append(pick(self._scores(shared, final), j, None if ids is None else ids[None, None]))
                token = parts[-1].tokens
        return join(parts), state

    def _scores(self, shared: Params, final):
        """float32 [B, n, V'] of final states."""
        final = final.astype(shared["head"].dtype)  # of the target, whose dtype may be another
        return constrain(logits(final, whole(shared["head"], ("vocab", "width"))), "batch", None, "vocab")

    # Training

    def shapes(self) -> Params:
        return abstract_params(self.shape)

    def axes(self) -> Params:
        return logical_axes(self.shape)

    def predict(self, params: Params, shared: Params, batch: dict[str, jax.Array], tapped, remat: Remat) -> Predictions:
        """Shapes of the batch as in `corruption.Blocks`. A chain begins at each anchor and reads the text's own tokens,
        masked or not; the weights say which of its predictions count."""
        tokens, anchor, (B, M, W) = batch["tokens"], batch["anchor"], batch["masked"].shape
        model, dtype = bind(self.shape, params), params["fc"].dtype
        before = jnp.pad(tapped[:, :-1], ((0, 0), (1, 0), (0, 0))).astype(dtype)
        embedded = look_up(shared["embed"], tokens).astype(dtype)
        place = (anchor[..., None] + jnp.arange(W)[None, None]).reshape(B, M * W)
        following = jnp.take_along_axis(embedded, place[..., None], axis=1, mode="clip").reshape(B, M, W, -1)
        final = read_chains(model, embedded, states_of(model, before), following, anchor, remat)
        return Predictions(
            place=place + 1,
            weight=batch["weight"].reshape(B, M * W),
            terms=(Term(final.reshape(B, M * W, -1), shared["head"], trained=False),),
            ids=shared.get("ids"),
        )

    def section(self) -> dict[str, Any]:
        names = ("tapped_width", "norm_tapped", "norm_residual", "norm_output", "qk_norm")
        return {
            "kind": "eagle3", "reading": dataclasses.asdict(self.reading),
            "shape": {name: getattr(self.shape, name) for name in names},
        }  # fmt: skip


def default_taps(layers: int) -> tuple[int, ...]:
    """The outputs that are the inputs of layers 2, L // 2 and L - 3 of a target with L layers."""
    return (1, layers // 2 - 1, layers - 4)


def eagle3_drafter(
    target: Target, reading: TappedReading, *, ids: Ids | None = None, seed: int = 0, name: str = "EAGLE-3", dtype=None,
    **shape: Any,
) -> Drafter:  # fmt: skip
    """An untrained EAGLE-3 drafter for a target.

    Args:
      ids: the ids that it proposes, ascending; their number is `reading.draft_vocab`.
      dtype: of its parameters; None: the target's.
      shape: of its layer, Llama's of the target's sizes, where it differs, see `Eagle3Config`.
    """
    values: dict[str, Any] = vars(target.config) | {
        "family": "llama", "qk_norm": False, "qkv_bias": False, "layers": 1, "experts": 0, "experts_per_token": 0,
        "expert_width": 0, "tapped_width": len(reading.taps) * target.config.width,
    } | shape  # fmt: skip
    method = Eagle3Method(Eagle3Config(**values), reading)
    shared = shared_of(method, target, ids)
    params = init_params(method.shape, seed)
    params = jax.tree.map(lambda x: x.astype(target.dtype if dtype is None else dtype), params)
    if not target.build.scan:
        params = unstack_layers(params, 1)
    return Drafter(method=method, params=params, shared=shared, name=name, tokenizer=target.tokenizer)
