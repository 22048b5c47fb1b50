"""The standalone drafter (DEER): a diffusion language model that reads text only and drafts a block in one pass.

It is the target's kind of backbone with another mask and two entries of its own, mask and separator, which live in a
separate input-only parameter: no id of the target is shadowed and neither can be proposed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deer_jax.build import Build
from deer_jax.config import DrafterConfig, ModelConfig
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.protocol import Draft, Method, Pick, Row, Seen
from deer_jax.errors import InputError
from deer_jax.models.cache import KVCache, empty_cache, write_cache, write_rows
from deer_jax.models.piecewise import Before
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params, Transformer, bind, is_stacked, read_prompts
from deer_jax.sharding import constrain

MASK, SEPARATOR = 0, 1  # rows of params["special"] [2, D]


@dataclasses.dataclass(frozen=True)
class StandaloneMethod(Method):
    """The static half: shapes, reading conventions, and the target's vocabulary that drafts must fit."""

    shape: ModelConfig
    reading: DrafterConfig
    target_vocab: int

    def __str__(self) -> str:
        return f"{self.reading.attention}, draft length {self.draft_length}, {self.shape.described()}"

    @property
    def cached(self) -> bool:
        return self.reading.attention == "block_causal"

    @property
    def draft_length(self) -> int:
        return self.reading.draft_length

    def state(self, params: Params, shared: Params, batch: int, capacity: int, build: Build) -> Any:
        if not self.cached:
            return ()
        build = dataclasses.replace(build, dtype=params["embed"].dtype)
        cache = empty_cache(self.shape, batch, capacity, build)
        return {"cache": cache, "read": jnp.zeros((batch,), jnp.int32)}

    def state_axes(self, state: Any) -> Any:
        return {"cache": state["cache"].axes, "read": ("batch",)} if self.cached else ()

    def observe(self, params: Params, shared: Params, state: Any, seen: Seen, rows) -> Any:
        """Reads prompts. What a round commits is read in the pass of the next draft."""
        if rows is None or not self.cached:
            return state
        model = bind(self.shape, backbone(params))
        x = self.embed(model, params, seen.tokens)
        cache, _ = read_prompts(model, x, state["cache"], seen.start, rows, first=seen.first)
        slots = state["read"].shape[0]
        changed = jnp.where((seen.count > 0) | (seen.start == 0), rows, slots)
        now, first = (seen.start + seen.count)[:, None], jnp.zeros_like(seen.start)
        read = write_rows(state["read"][:, None], now, first, ("batch", "slots"), rows=changed)
        return {"cache": cache, "read": read[:, 0]}

    def catch_up(self, params: Params, shared: Params, state: Any, row: Row, k: int) -> Any:
        """Reads on until at most k + 1 committed tokens are left, as many as a draft takes."""
        if not self.cached:
            return state
        model, width = bind(self.shape, backbone(params)), k + 1

        def behind(state):
            return jnp.any(row.length - state["read"] > width)

        def read_on(state):
            read = state["read"]
            x = self.embed(model, params, _gather_rows(row.tokens, read, width))
            positions = read[:, None] + jnp.arange(width)[None]
            fresh = model(x, positions, cache=state["cache"], start=read).fresh
            read_now = jnp.minimum(read + width, row.length - 1)  # the anchor is left to the draft
            return {"cache": write_cache(state["cache"], fresh, read), "read": jnp.maximum(read, read_now)}

        return lax.while_loop(behind, read_on, state)

    def propose(self, params: Params, shared: Params, state: Any, row: Row, k: int, pick: Pick) -> tuple[Draft, Any]:
        with jax.named_scope("draft"):
            model = bind(self.shape, backbone(params))
            run = self._draft_block_causal if self.cached else self._draft_bidirectional
            hidden, state = run(model, params, state, row, k)
            logits = self._fit_vocabulary(model.logits(hidden))
        return pick(logits, 0), state

    def _draft_block_causal(self, model: Transformer, params: Params, state: Any, row: Row, k: int):
        """One pass over the tokens committed since the last one, k masks and the separator.

        Rows of the pass, k = 3 and c = 2 newly committed tokens t u (u is the anchor; `.` is padding):

            row        0  1  2  3 | 4  5  6  | 7           the first k+1 are cached from now on, the rest never
            entry      t  u  .  . | M  M  M  | SEP
            position   p p+1 -  - | p+2 .. p+4 | p+5       with the shifted head the drafts are read at u, M, M

        Prefix rows are causal; masks and separator see the cached prefix, the valid prefix rows and each other.
        """
        read, width = state["read"], k + 1
        fresh = row.length - read  # tokens not read yet, 1..k+1 for rows still running
        tokens = _gather_rows(row.tokens, read, width)
        tail = jnp.array([MASK] * k + [SEPARATOR] * self.reading.separator)
        special = jnp.broadcast_to(params["special"][tail][None], (tokens.shape[0], tail.size, self.shape.width))
        x = constrain(jnp.concatenate([self.embed(model, params, tokens), special], axis=1), "batch", None, None)

        steps = jnp.arange(width)[None]
        tail_positions = row.length[:, None] + jnp.arange(tail.size)[None]
        positions = jnp.concatenate([read[:, None] + steps, tail_positions], axis=1)
        prefix_to_prefix = jnp.broadcast_to(jnp.tril(jnp.ones((1, width, width), bool)), (x.shape[0], width, width))
        tail_to_prefix = jnp.broadcast_to((steps < fresh[:, None])[:, None], (x.shape[0], tail.size, width))
        visible = jnp.concatenate(
            [
                jnp.pad(prefix_to_prefix, ((0, 0), (0, 0), (0, tail.size))),
                jnp.pad(tail_to_prefix, ((0, 0), (0, 0), (0, tail.size)), constant_values=True),
            ],
            axis=1,
        )
        hidden, new, _ = model(x, positions, visible=visible, cache=state["cache"], start=read)
        prefix = KVCache(new.keys[:, :, :, :width], new.values[:, :, :, :width])
        cache = write_cache(state["cache"], prefix, read)
        masks = hidden[:, width : width + k]
        if self.reading.head == "shifted":
            anchor = jnp.take_along_axis(hidden, jnp.maximum(fresh - 1, 0)[:, None, None], axis=1, mode="clip")
            masks = jnp.concatenate([anchor, masks[:, :-1]], axis=1)
        return masks, {"cache": cache, "read": row.length}

    def _draft_bidirectional(self, model: Transformer, params: Params, state: Any, row: Row, k: int):
        """One pass over the whole buffer, every committed token and k masks and the separator seeing each other."""
        length = row.length
        B, S = row.tokens.shape
        positions = jnp.broadcast_to(jnp.arange(S)[None], (B, S))
        x = self.embed(model, params, row.tokens)
        special = params["special"]
        x = jnp.where((positions >= length[:, None])[..., None], special[MASK][None, None], x)
        end = length + k
        if self.reading.separator:
            x = jnp.where((positions == end[:, None])[..., None], special[SEPARATOR][None, None], x)
            end = end + 1
        # Rows behind the end see only real entries too, so that nothing of theirs can be NaN; nobody sees them.
        hidden = model(x, positions, visible=Before(end)).hidden
        first = row.length - (1 if self.reading.head == "shifted" else 0)
        return jnp.take_along_axis(
            hidden, (first[:, None] + jnp.arange(k)[None])[..., None], axis=1, mode="clip"
        ), state

    def embed(self, model: Transformer, params: Params, tokens):
        """Embeddings of the target's ids; an id this drafter does not share is read as a mask."""
        unknown = tokens >= self.shape.vocab_size
        for differing in self.reading.differing_ids:
            unknown = unknown | (tokens == differing)
        return jnp.where(unknown[..., None], params["special"][MASK][None, None], model.lookup(tokens))

    def _fit_vocabulary(self, logits):
        """Logits over the target's vocabulary: cut or padded, and -inf at ids that mean something else there."""
        own = self.shape.vocab_size
        logits = logits[..., : self.target_vocab]
        if own < self.target_vocab:
            logits = jnp.pad(logits, ((0, 0), (0, 0), (0, self.target_vocab - own)), constant_values=-jnp.inf)
        differing = [i for i in self.reading.differing_ids if i < self.target_vocab]
        if differing:
            forbidden = np.zeros((1, 1, self.target_vocab), bool)
            forbidden[..., differing] = True
            logits = jnp.where(forbidden, -jnp.inf, logits)
        return logits


def backbone(params: Params) -> Params:
    """The parameters without the drafter's own two entries."""
    return {name: value for name, value in params.items() if name != "special"}


def _gather_rows(tokens, start, width: int):
    """tokens [B, S] -> [B, width] from start [B] on."""
    columns = start[:, None] + jnp.arange(width)[None]
    return jnp.take_along_axis(tokens, columns, axis=1, mode="clip")


def new_entries(embed: jax.Array, seed: int = 0) -> jax.Array:
    """Mask and separator [2, D] before training: the mean embedding plus noise a tenth as large as an embedding."""
    table = embed.astype(jnp.float32)
    mean, spread = jnp.mean(table, axis=0, keepdims=True), jnp.std(table)
    noise = jax.random.normal(jax.random.key(seed), (2, embed.shape[1]), jnp.float32)
    return (mean + 0.1 * spread * noise).astype(embed.dtype)


def drafter_from_target(
    target: Target,
    config: DrafterConfig | None = None,
    *,
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
    name: str = "from-target",
) -> Drafter:
    """An untrained drafter with the target's weights, of all layers or the chosen ones, in the given order."""
    model, params = target.config, dict(target.params)
    if layers is not None:
        wrong = [i for i in layers if not 0 <= i < model.layers]
        if wrong or not layers:
            raise InputError(f"layers {list(layers)}: the target has layers 0..{model.layers - 1}")
        model = dataclasses.replace(model, layers=len(layers))
        if is_stacked(params):
            chosen = np.array(layers)
            params["layers"] = {key: value[chosen] for key, value in params["layers"].items()}
        else:
            params["layers"] = {new: params["layers"][old] for new, old in enumerate(layers)}
        if "experts" in params:
            params["experts"] = {key: value[np.array(layers)] for key, value in params["experts"].items()}
    params["special"] = new_entries(params["embed"], seed)
    method = StandaloneMethod(model, config or DrafterConfig(), model.vocab_size)
    return Drafter(method=method, params=params, name=name, tokenizer=target.tokenizer)
