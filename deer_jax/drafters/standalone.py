"""The standalone drafter (DEER): a diffusion language model that reads text only and drafts a block in one pass.

It is the target's kind of backbone with another mask and two entries of its own, mask and separator, which live in a
separate input-only parameter: no id of the target is shadowed and neither can be proposed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deer_jax.build import Build
from deer_jax.config import DrafterConfig, ModelConfig
from deer_jax.drafters.protocol import Context, Draft, Pick
from deer_jax.errors import InputError
from deer_jax.models.cache import KVCache, empty_cache, write_cache
from deer_jax.models.piecewise import Before
from deer_jax.models.target import Target, Tokenizer, check_tokens
from deer_jax.models.transformer import Params, Transformer, bind, is_stacked, read_prompts
from deer_jax.sharding import batch_ways, constrain, on_mesh

MASK, SEPARATOR = 0, 1  # rows of params["special"] [2, D]


@dataclasses.dataclass(frozen=True)
class StandaloneMethod:
    """The static half: shapes, reading conventions, and the target's vocabulary that drafts must fit."""

    model: ModelConfig
    config: DrafterConfig
    target_vocab: int

    @property
    def cached(self) -> bool:
        return self.config.attention == "block_causal"

    def init_state(self, params: Params, batch: int, capacity: int, build: Build) -> Any:
        if not self.cached:
            return ()
        build = dataclasses.replace(build, dtype=params["embed"].dtype)
        cache = empty_cache(self.model, batch, capacity, build)
        return {"cache": cache, "read": jnp.zeros((batch,), jnp.int32)}

    def state_axes(self, state: Any) -> Any:
        return {"cache": state["cache"].axes, "read": ("batch",)} if self.cached else ()

    def prefill(self, params: Params, state: Any, tokens, start, rows, *, first: bool) -> Any:
        if not self.cached:
            return state
        model = bind(self.model, backbone(params))
        x = self.embed(model, params, tokens)
        starts = jnp.broadcast_to(start, rows.shape)
        return state | {"cache": read_prompts(model, x, state["cache"], starts, rows, first=first)[0]}

    def ready(self, state: Any, length, rows) -> Any:
        return state | {"read": state["read"].at[rows].set(length - 1, mode="drop")} if self.cached else state

    def propose(self, params: Params, state: Any, context: Context, k: int, pick: Pick) -> tuple[Draft, Any]:
        logits, state = self.draft_logits(params, state, context, k)
        return pick(logits, 0), state

    def draft_logits(self, params: Params, state: Any, context: Context, k: int):
        """float32 [B, k, V] of the target's vocabulary (-inf where nothing may be proposed), and the next state."""
        with jax.named_scope("draft"):
            model = bind(self.model, backbone(params))
            run = self._draft_block_causal if self.cached else self._draft_bidirectional
            hidden, state = run(model, params, state, context, k)
            return self._fit_vocabulary(model.logits(hidden)), state

    def _draft_block_causal(self, model: Transformer, params: Params, state: Any, context: Context, k: int):
        """One pass over the tokens committed since the last one, k masks and the separator.

        Rows of the pass, k = 3 and c = 2 newly committed tokens t u (u is the anchor; `.` is padding):

            row        0  1  2  3 | 4  5  6  | 7           the first k+1 are cached from now on, the rest never
            entry      t  u  .  . | M  M  M  | SEP
            position   p p+1 -  - | p+2 .. p+4 | p+5       with the shifted head the drafts are read at u, M, M

        Prefix rows are causal; masks and separator see the cached prefix, the valid prefix rows and each other.
        """
        read, width = state["read"], k + 1
        fresh = context.length - read  # tokens not read yet, 1..k+1 for rows still running
        tokens = _gather_rows(context.tokens, read, width)
        tail = jnp.array([MASK] * k + [SEPARATOR] * self.config.separator)
        special = jnp.broadcast_to(params["special"][tail][None], (tokens.shape[0], tail.size, self.model.width))
        x = constrain(jnp.concatenate([self.embed(model, params, tokens), special], axis=1), "batch", None, None)

        steps = jnp.arange(width)[None]
        tail_positions = context.length[:, None] + jnp.arange(tail.size)[None]
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
        if self.config.head == "shifted":
            anchor = jnp.take_along_axis(hidden, jnp.maximum(fresh - 1, 0)[:, None, None], axis=1, mode="clip")
            masks = jnp.concatenate([anchor, masks[:, :-1]], axis=1)
        return masks, {"cache": cache, "read": context.length}

    def _draft_bidirectional(self, model: Transformer, params: Params, state: Any, context: Context, k: int):
        """One pass over the whole buffer, every committed token and k masks and the separator seeing each other."""
        length = context.length
        B, S = context.tokens.shape
        positions = jnp.broadcast_to(jnp.arange(S)[None], (B, S))
        x = self.embed(model, params, context.tokens)
        special = params["special"]
        x = jnp.where((positions >= length[:, None])[..., None], special[MASK][None, None], x)
        end = length + k
        if self.config.separator:
            x = jnp.where((positions == end[:, None])[..., None], special[SEPARATOR][None, None], x)
            end = end + 1
        # Rows behind the end see only real entries too, so that nothing of theirs can be NaN; nobody sees them.
        hidden = model(x, positions, visible=Before(end)).hidden
        first = context.length - (1 if self.config.head == "shifted" else 0)
        return jnp.take_along_axis(
            hidden, (first[:, None] + jnp.arange(k)[None])[..., None], axis=1, mode="clip"
        ), state

    def embed(self, model: Transformer, params: Params, tokens):
        """Embeddings of the target's ids; an id this drafter does not share is read as a mask."""
        unknown = tokens >= self.model.vocab_size
        for differing in self.config.differing_ids:
            unknown = unknown | (tokens == differing)
        return jnp.where(unknown[..., None], params["special"][MASK][None, None], model.lookup(tokens))

    def _fit_vocabulary(self, logits):
        """Logits over the target's vocabulary: cut or padded, and -inf at ids that mean something else there."""
        own = self.model.vocab_size
        logits = logits[..., : self.target_vocab]
        if own < self.target_vocab:
            logits = jnp.pad(logits, ((0, 0), (0, 0), (0, self.target_vocab - own)), constant_values=-jnp.inf)
        differing = [i for i in self.config.differing_ids if i < self.target_vocab]
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


@functools.partial(jax.jit, static_argnames=("method", "k", "build"))
def _draft_logits_from_text(method: StandaloneMethod, params: Params, tokens, k: int, build: Build):
    B, T = tokens.shape
    state = method.init_state(params, B, T + k + 1, build)
    rows, zero = jnp.arange(B), jnp.zeros((), jnp.int32)
    if T > 1:
        state = method.prefill(params, state, tokens[:, :-1], zero, rows, first=True)
    length = jnp.full((B,), T, jnp.int32)
    state = method.ready(state, length, rows)
    context = Context(jnp.pad(tokens, ((0, 0), (0, k + 1))), length, rows)
    return method.draft_logits(params, state, context, k)[0]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StandaloneDrafter:
    """A standalone drafter as users hold it.

    Attributes:
      method: shapes and conventions. params: the backbone's, and "special" [2, D]: mask and separator.
    """

    method: StandaloneMethod
    params: Params
    name: str = "drafter"
    tokenizer: Tokenizer | None = None

    def __repr__(self) -> str:
        reading, dtype = self.method.config, self.params["embed"].dtype
        return (
            f"StandaloneDrafter({self.name}: {reading.attention}, draft length {reading.draft_length}, "
            f"{self.method.model.described()}, {dtype.name})"
        )

    @property
    def draft_length(self) -> int:
        return self.method.config.draft_length

    def draft_logits(self, target: Target, tokens, anchor, draft_length: int | None = None) -> jax.Array:
        """float32 [B, k, V]: one draft pass after prefix tokens int [B, T] (T may be 0) and anchor int [B].

        Of the target only its build is used here; conditioned drafters read its hidden states.
        """
        anchor = check_tokens(np.asarray(anchor)[:, None], self.method.target_vocab)
        prefix = np.asarray(tokens).reshape(anchor.shape[0], -1)
        text = np.concatenate([prefix, anchor], axis=1)
        text = check_tokens(text.astype(np.int64), self.method.target_vocab)
        k = self.draft_length if draft_length is None else draft_length
        if k < 1:
            raise InputError(f"draft_length must be at least 1, got {k}")
        rows = len(text)
        with on_mesh(target.mesh):
            text = np.pad(text, ((0, -rows % batch_ways(target.mesh)), (0, 0)))
            return _draft_logits_from_text(self.method, self.params, text, k, target.build)[:rows]


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
) -> StandaloneDrafter:
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
    return StandaloneDrafter(method=method, params=params, name=name, tokenizer=target.tokenizer)
