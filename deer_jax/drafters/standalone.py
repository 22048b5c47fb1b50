"""The standalone drafter (DEER): a diffusion language model that reads text only and drafts a block in one pass.

It is the target's kind of backbone with another mask and two entries of its own, mask and separator, which live in a
separate input-only parameter: no id of the target is shadowed and neither can be proposed. Its head may be any of
`heads`, as a conditioned drafter's.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deer_jax.build import Build, Remat
from deer_jax.config import DrafterConfig, ModelConfig
from deer_jax.diffusion.corruption import Corruption
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.heads import (
    HEAD,
    INDEPENDENT,
    Block,
    Head,
    PathSelector,
    axes_of,
    check_vocabulary,
    section_of,
    shapes_of,
)
from deer_jax.drafters.protocol import Draft, Pick, Predictions, Row, Seen, Term, Trainable, predecessors
from deer_jax.errors import InputError
from deer_jax.models.cache import KVCache, empty_cache, write_cache, write_rows
from deer_jax.models.piecewise import Before, BlockMask
from deer_jax.models.target import Target, check_target, chosen_layers
from deer_jax.models.transformer import (
    Params,
    Transformer,
    abstract_params,
    bind,
    is_stacked,
    logical_axes,
    read_prompts,
)
from deer_jax.models.weights import Weight
from deer_jax.sharding import constrain

MASK, SEPARATOR = 0, 1  # rows of params["special"] [2, D]


@dataclasses.dataclass(frozen=True)
class StandaloneMethod(Trainable):
    """The static half: shapes, reading conventions, the target's vocabulary that drafts must fit, and the head."""

    shape: ModelConfig
    reading: DrafterConfig
    target_vocab: int
    head: Head = INDEPENDENT  # what turns states into drafts; `reading.head` says which states those are

    def __post_init__(self):
        if self.head == INDEPENDENT:
            return
        if not self.cached:
            raise InputError(
                "a drafter whose attention is bidirectional is not trained on blocks, so it cannot have a head; set "
                "attention: block_causal, or leave the head out"
            )
        if self.shape.vocab_size != self.target_vocab or self.reading.differing_ids:
            raise InputError(
                f"a head reads and proposes the target's {self.target_vocab} ids, and this drafter, of "
                f"{self.shape.vocab_size}, does not have the same ones; leave the head out"
            )
        check_vocabulary(self.head, self.target_vocab)

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
            scores = self._fit_vocabulary(model.logits(hidden))
            anchor = jnp.take_along_axis(row.tokens, row.length[:, None] - 1, axis=1)[:, 0]
        return self.head.draft(params.get(HEAD, {}), Block(hidden, scores, anchor, None), pick), state

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
        B, tail = tokens.shape[0], k + int(self.reading.separator)
        nothing = jnp.zeros((B, tail, self.shape.width), params["special"].dtype)
        masks = self._with_entries(params, nothing, jnp.arange(tail)[None] < k, jnp.full((B,), k))
        x = constrain(jnp.concatenate([self.embed(model, params, tokens), masks], axis=1), "batch", None, None)

        steps = jnp.arange(width)[None]
        tail_positions = row.length[:, None] + jnp.arange(tail)[None]
        positions = jnp.concatenate([read[:, None] + steps, tail_positions], axis=1)
        prefix_to_prefix = jnp.broadcast_to(jnp.tril(jnp.ones((1, width, width), bool)), (B, width, width))
        tail_to_prefix = jnp.broadcast_to((steps < fresh[:, None])[:, None], (B, tail, width))
        visible = jnp.concatenate(
            [
                jnp.pad(prefix_to_prefix, ((0, 0), (0, 0), (0, tail))),
                jnp.pad(tail_to_prefix, ((0, 0), (0, 0), (0, tail)), constant_values=True),
            ],
            axis=1,
        )
        hidden, new, _ = model(x, positions, visible=visible, cache=state["cache"], start=read)
        prefix = KVCache(new.keys[:, :, :, :width], new.values[:, :, :, :width])
        cache = write_cache(state["cache"], prefix, read)
        at = self._read_at(jnp.maximum(fresh - 1, 0), jnp.full((B,), width), k)
        return _rows_at(hidden, at), {"cache": cache, "read": row.length}

    def _draft_bidirectional(self, model: Transformer, params: Params, state: Any, row: Row, k: int):
        """One pass over the whole buffer, every committed token and k masks and the separator seeing each other."""
        B, S = row.tokens.shape
        positions = jnp.broadcast_to(jnp.arange(S)[None], (B, S))
        end = row.length + k
        x = self._with_entries(params, self.embed(model, params, row.tokens), positions >= row.length[:, None], end)
        # Rows behind the end see only real entries too, so that nothing of theirs can be NaN; nobody sees them.
        hidden = model(x, positions, visible=Before(end + int(self.reading.separator))).hidden
        return _rows_at(hidden, self._read_at(row.length - 1, row.length, k)), state

    def _with_entries(self, params: Params, x, masked, size):
        """Embeddings [.., n, D] with the mask where masked [.., n] says so, and the separator at `size` int [..]."""
        x = jnp.where(masked[..., None], _entry(params, MASK, x), x)
        if not self.reading.separator:
            return x
        at = lax.broadcasted_iota(jnp.int32, x.shape[:-1], x.ndim - 2) == size[..., None]
        return jnp.where(at[..., None], _entry(params, SEPARATOR, x), x)

    def _read_at(self, anchor, first, width: int):
        """int [.., width]: the rows at which a block's tokens are read; anchor, first int [..]: the row of its anchor,
        and that of its first token."""
        rows = first[..., None] + lax.broadcasted_iota(first.dtype, (*first.shape, width), first.ndim)
        if self.reading.head == "in_place":
            return rows
        return jnp.concatenate([anchor[..., None], rows[..., :-1]], axis=-1)

    def embed(self, model: Transformer, params: Params, tokens):
        """Embeddings of the target's ids; an id this drafter does not share is read as a mask."""
        x = model.lookup(tokens)
        return jnp.where(self._unknown(tokens)[..., None], _entry(params, MASK, x), x)

    def _unknown(self, ids):
        """bool like ids: those that this drafter does not share with its target."""
        unknown = ids >= self.shape.vocab_size
        for differing in self.reading.differing_ids:
            unknown = unknown | (ids == differing)
        return unknown

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

    # Training

    @property
    def examples(self) -> Literal["blocks", "cut"]:
        return "blocks" if self.cached else "cut"

    def shapes(self) -> Params:
        special = {"special": jax.ShapeDtypeStruct((2, self.shape.width), jnp.float32)}
        return abstract_params(self.shape) | special | shapes_of(self.head_weights())

    def axes(self) -> Params:
        return logical_axes(self.shape) | {"special": (None, "width")} | axes_of(self.head_weights())

    @property
    def has_confidence(self) -> bool:
        return self.head.has_confidence

    def head_weights(self) -> dict[str, Weight]:
        return self.head.weights(self.shape.width, self.target_vocab, self.target_vocab)

    def section(self) -> dict[str, Any]:
        head = {} if self.head == INDEPENDENT else {HEAD: section_of(self.head)}
        return dataclasses.asdict(self.reading) | head

    def check(self, corruption: Corruption) -> None:
        if self.cached and corruption.next_token and self.reading.head != "shifted":
            raise InputError(
                f"next_token {corruption.next_token:g} trains the shifted head, and this drafter reads in place; set "
                "next_token: 0"
            )

    def predict(self, params: Params, shared: Params, batch: dict[str, jax.Array], tapped, remat: Remat) -> Predictions:
        read = self._read_blocks if self.cached else self._read_cut
        hidden, place, weight = read(params, batch, remat)
        ids = jnp.arange(self.shape.vocab_size)
        term = Term(hidden, params["embed" if self.shape.tied else "head"])
        said = Predictions(place, weight, (term,), allowed=~self._unknown(ids))
        return self._with_head(params.get(HEAD, {}), batch, said) if self.cached else said

    @property
    def draws(self) -> bool:
        return self.cached and not isinstance(self.head, PathSelector)  # whose q is not that of its scores

    def draw(self, params: Params, shared: Params, batch: dict[str, jax.Array], tapped, pick: Pick) -> jax.Array:
        B, M, W = batch["masked"].shape
        model = bind(self.shape, backbone(params))
        hidden = self._read_blocks(params, batch, "none")[0]
        hidden = hidden[:, hidden.shape[1] - M * W :].reshape(B * M, W, -1)
        anchor = predecessors(batch)[..., 0].reshape(B * M)
        block = Block(hidden, self._fit_vocabulary(model.logits(hidden)), anchor, None)
        return self.head.draft(params.get(HEAD, {}), block, pick).tokens.reshape(B, M, W)

    def _with_head(self, params: Params, batch: dict[str, jax.Array], said: Predictions) -> Predictions:
        """Predictions with the head's part in those of the blocks; those of the text, which come first, have none."""
        B, M, W = batch["masked"].shape
        text = said.place.shape[1] - M * W
        states = said.terms[0].features[:, text:].reshape(B, M, W, -1)
        before = predecessors(batch)

        def behind_text(x):
            return jnp.pad(x, ((0, 0), (text, 0), *((0, 0),) * (x.ndim - 2)))

        def moved(term: Term) -> Term:
            return dataclasses.replace(term, features=behind_text(term.features))

        terms, choice = self.head.terms(params, states, before), self.head.choice(params, states, before)
        confidence = self.head.confidence(params, states, before)
        return said._replace(
            terms=(*said.terms, *map(moved, terms)),
            choice=None if choice is None else choice._replace(term=moved(choice.term)),
            confidence=None if confidence is None else behind_text(confidence.reshape(B, M * W)),
        )

    def _read_blocks(self, params: Params, batch: dict[str, jax.Array], remat: Remat):
        """Hidden states [B, T + M*W, D] of the text's rows, which predict the token after them, and of those where each
        block token is read; places and weights.

        batch: tokens int32 [B, T] (clean texts, padded), anchor and size int32 [B, M], masked bool [B, M, W], weight
        float32 [B, M, W], text_weight float32 [B, T]; see `diffusion.corruption.Blocks`.

        Block rows stand behind the text's rows at their true positions: they see the text up to their anchor and their
        own block with its separator, nothing else.
        """
        tokens, anchor, size, masked = (batch[name] for name in ("tokens", "anchor", "size", "masked"))
        (B, T), (M, W) = tokens.shape, masked.shape[1:]
        model, rows = bind(self.shape, backbone(params)), M * (W + 1)
        place = anchor[..., None] + 1 + jnp.arange(W + 1)[None, None]  # [B, M, W+1] true positions
        following = jnp.take_along_axis(tokens, place.reshape(B, -1), axis=1, mode="clip").reshape(B, M, W + 1)
        # Looked up together: on a mesh the gradient of a table is summed over the shards for each look-up.
        looked_up = self.embed(model, params, jnp.concatenate([tokens, following.reshape(B, rows)], axis=1))
        block = looked_up[:, T:].reshape(B, M, W + 1, -1)
        block = self._with_entries(params, block, jnp.pad(masked, ((0, 0), (0, 0), (0, 1))), size)
        x = jnp.concatenate([looked_up[:, :T], block.reshape(B, rows, -1)], axis=1)
        text = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        positions = jnp.concatenate([text, place.reshape(B, rows)], axis=1)
        visible = BlockMask(anchor, size + int(self.reading.separator), W + 1)
        hidden = model(constrain(x, "batch", None, None), positions, visible=visible, remat=remat).hidden
        first = jnp.broadcast_to(T + jnp.arange(M)[None] * (W + 1), (B, M))
        read = _rows_at(hidden, self._read_at(anchor, first, W).reshape(B, M * W))
        places = jnp.concatenate([text + 1, place[..., :W].reshape(B, M * W)], axis=1)
        weights = jnp.concatenate([batch["text_weight"], batch["weight"].reshape(B, -1)], axis=1)
        return jnp.concatenate([hidden[:, :T], read], axis=1), places, weights

    def _read_cut(self, params: Params, batch: dict[str, jax.Array], remat: Remat):
        """Hidden states where each token of the texts is read, their places and weights.

        batch: tokens int32 [B, T], length int32 [B], masked bool [B, T], weight float32 [B, T]; see
        `diffusion.corruption.Cut`. T leaves room for the separator, which stands at `length`.
        """
        tokens, length = batch["tokens"], batch["length"]
        model = bind(self.shape, backbone(params))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        x = self._with_entries(params, self.embed(model, params, tokens), batch["masked"], length)
        visible = Before(length + int(self.reading.separator))
        hidden = model(constrain(x, "batch", None, None), positions, visible=visible, remat=remat).hidden
        if self.reading.head == "shifted":
            return hidden[:, :-1], positions[:, 1:], batch["weight"][:, 1:]
        return hidden, positions, batch["weight"]


def backbone(params: Params) -> Params:
    """The parameters without the drafter's own two entries and its head."""
    return {name: value for name, value in params.items() if name not in ("special", HEAD)}


def _gather_rows(tokens, start, width: int):
    """tokens [B, S] -> [B, width] from start [B] on."""
    columns = start[:, None] + jnp.arange(width)[None]
    return jnp.take_along_axis(tokens, columns, axis=1, mode="clip")


def _entry(params: Params, which: int, like):
    """One of the drafter's own entries, with as many axes as embeddings [.., D]."""
    return lax.expand_dims(params["special"][which], range(like.ndim - 1))


def _rows_at(hidden, at):
    """Rows at int [B, n] of hidden [B, T, D]."""
    return jnp.take_along_axis(hidden, at[..., None], axis=1, mode="clip")


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
    check_target(target)
    model, params = target.config, dict(target.params)
    if layers is not None:
        own = chosen_layers(target, layers)
        model = dataclasses.replace(model, layers=len(layers))
        if not is_stacked(params):
            own = {i: {name: w[i] for name, w in own.items()} for i in range(len(layers))}
        params["layers"] = own
        if "experts" in params:
            params["experts"] = {key: value[np.array(layers)] for key, value in params["experts"].items()}
    params["special"] = new_entries(params["embed"], seed)
    method = StandaloneMethod(model, config or DrafterConfig(), model.vocab_size)
    return Drafter(method=method, params=params, name=name, tokenizer=target.tokenizer)
