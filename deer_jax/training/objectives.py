"""What is minimised: cross-entropy on the target's tokens at masked positions, and logits computed only there.

With a teacher the labels are the target's distributions instead of the tokens it happened to say.

DEER (arXiv 2512.15176) equations 1 and 4; what is masked and weighted how is decided in `diffusion.corruption`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.build import Remat
from deer_jax.config import ModelConfig
from deer_jax.drafters.standalone import MASK, SEPARATOR, StandaloneMethod, backbone
from deer_jax.models.piecewise import Before, BlockMask
from deer_jax.models.transformer import Params, bind
from deer_jax.sharding import constrain, spread
from deer_jax.training.cross_entropy import SoftLabels, weighted_cross_entropy

# (parameters, batch, fixed parameters) -> the summed weighted cross-entropy, and the number of tokens predicted
Loss = Callable[[Params, dict[str, jax.Array], Params], tuple[jax.Array, jax.Array]]


def drafter_loss(method: StandaloneMethod, teacher: ModelConfig | None = None, remat: Remat = "none") -> Loss:
    """The loss of a drafter's stages. teacher: the target's shape, for soft labels; the fixed parameters are its.

    remat: what its gradients compute again, see `build.Remat`.
    """
    loss = block_loss if method.cached else cut_loss

    def of(params: Params, batch: dict[str, jax.Array], target: Params):
        view = None if teacher is None else teach(teacher, target, batch["tokens"])
        return loss(method, spread_vocabulary(params), batch, view, remat=remat)

    return of


def next_token_loss(config: ModelConfig, remat: Remat = "none") -> Loss:
    """The loss of an autoregressive model, on texts int32 [B, T] of which `length` int32 [B] tokens are real.

    remat: as for `drafter_loss`.
    """

    def of(params: Params, batch: dict[str, jax.Array], fixed: Params):
        tokens, length = batch["tokens"], batch["length"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        params = spread_vocabulary(params)
        model = bind(config, params)
        hidden = model(model.lookup(tokens), positions, remat=remat).hidden
        real = positions[:, 1:] < length[:, None]
        head = params["embed" if config.tied else "head"]
        loss = weighted_cross_entropy(hidden[:, :-1], head, tokens[:, 1:], real.astype(jnp.float32))
        return loss, jnp.sum(real)

    return of


def spread_vocabulary(params: Params) -> Params:
    """The parameters with the tables of the vocabulary as every shard of the rows has them; see `sharding.spread`."""
    return params | {name: spread(params[name]) for name in ("embed", "head") if name in params}


class Teacher(NamedTuple):
    """The target's view of a batch, for soft labels: what it says after each text position."""

    hidden: jax.Array  # [B, T, D'] final hidden states over the clean texts
    head: jax.Array  # [V', D']


def teach(config: ModelConfig, params: Params, tokens) -> Teacher:
    """The target reads clean texts int32 [B, T]; nothing is differentiated."""
    model = bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden = model(model.lookup(tokens), positions).hidden
    return Teacher(lax.stop_gradient(hidden), params["embed" if config.tied else "head"])


def block_loss(
    method: StandaloneMethod, params: Params, batch: dict[str, jax.Array], teacher: Teacher | None = None, *,
    remat: Remat = "none",
):  # fmt: skip
    """Summed weighted cross-entropy of block-causal examples, and the number of masked positions.

    batch: tokens int32 [B, T] (clean texts, padded), anchor and size int32 [B, M], masked bool [B, M, W], weight
    float32 [B, M, W], text_weight float32 [B, T]; see `diffusion.corruption.Blocks`. Labels are the texts' tokens, or
    with a teacher its distributions there.
    """
    tokens, anchor, masked = batch["tokens"], batch["anchor"], batch["masked"]
    (B, T), (M, W) = tokens.shape, masked.shape[1:]
    hidden = read_blocks(method, params, tokens, anchor, batch["size"], masked, remat)
    # Text rows predict the token after them, blocks their own.
    blocks = (anchor[..., None] + 1 + jnp.arange(W)[None, None]).reshape(B, M * W)
    place = jnp.concatenate([jnp.broadcast_to(1 + jnp.arange(T)[None], (B, T)), blocks], axis=1)
    weights = jnp.concatenate([batch["text_weight"], batch["weight"].reshape(B, -1)], axis=1)
    return _loss(method, params, hidden, tokens, place, weights, teacher), jnp.sum(masked)


def read_blocks(method: StandaloneMethod, params: Params, tokens, anchor, size, masked, remat: Remat = "none"):
    """Final hidden states [B, T + M*W, D] of the text's rows, and of those where each block token is read.

    Block rows stand behind the text's rows at their true positions: they see the text up to their anchor and their own
    block with its separator, nothing else. The first token of a block is read at the anchor's own text row (shifted
    head). Shapes as in `block_loss`.
    """
    (B, T), (M, W) = tokens.shape, masked.shape[1:]
    model = bind(method.shape, backbone(params))
    steps = jnp.arange(W + 1)
    place = anchor[..., None] + 1 + steps[None, None]  # [B, M, W+1] true positions
    following = jnp.take_along_axis(tokens, place.reshape(B, -1), axis=1, mode="clip").reshape(B, M, W + 1)
    is_mask = jnp.pad(masked, ((0, 0), (0, 0), (0, 1)))
    # Looked up together: on a mesh the gradient of a table is summed over the shards for each look-up.
    rows = M * (W + 1)
    looked_up = method.embed(model, params, jnp.concatenate([tokens, following.reshape(B, rows)], axis=1))
    text_rows, block = looked_up[:, :T], looked_up[:, T:].reshape(B, M, W + 1, -1)
    block = jnp.where(is_mask[..., None], params["special"][MASK][None, None, None], block)
    real = size
    if method.reading.separator:
        at = steps[None, None] == size[..., None]
        block = jnp.where(at[..., None], params["special"][SEPARATOR][None, None, None], block)
        real = real + 1

    x = jnp.concatenate([text_rows, block.reshape(B, rows, -1)], axis=1)
    x = constrain(x, "batch", None, None)
    text = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    positions = jnp.concatenate([text, place.reshape(B, rows)], axis=1)
    hidden = model(x, positions, visible=BlockMask(anchor, real, W + 1), remat=remat).hidden

    if method.reading.head == "shifted":
        in_block = T + (jnp.arange(M) * (W + 1))[None, :, None] + steps[None, None, : W - 1]
        at = jnp.concatenate([anchor[..., None], jnp.broadcast_to(in_block, (B, M, W - 1))], axis=-1)
    else:
        in_block = T + (jnp.arange(M) * (W + 1))[None, :, None] + steps[None, None, :W]
        at = jnp.broadcast_to(in_block, (B, M, W))
    read = jnp.take_along_axis(hidden, at.reshape(B, -1, 1), axis=1, mode="clip")
    return jnp.concatenate([hidden[:, :T], read], axis=1)


def cut_loss(
    method: StandaloneMethod, params: Params, batch: dict[str, jax.Array], teacher: Teacher | None = None, *,
    remat: Remat = "none",
):  # fmt: skip
    """Summed weighted cross-entropy of bidirectional examples, and the number of masked positions.

    batch: tokens int32 [B, T], length int32 [B], masked bool [B, T], weight float32 [B, T]; see
    `diffusion.corruption.Cut`. T leaves room for the separator, which stands at `length`. Labels as in `block_loss`.
    """
    tokens, length, masked = batch["tokens"], batch["length"], batch["masked"]
    B, T = tokens.shape
    model = bind(method.shape, backbone(params))
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    x = jnp.where(masked[..., None], params["special"][MASK][None, None], method.embed(model, params, tokens))
    end = length
    if method.reading.separator:
        x = jnp.where((positions == end[:, None])[..., None], params["special"][SEPARATOR][None, None], x)
        end = end + 1
    hidden = model(constrain(x, "batch", None, None), positions, visible=Before(end), remat=remat).hidden
    place, weights = positions, batch["weight"]
    if method.reading.head == "shifted":
        hidden, place, weights = hidden[:, :-1], place[:, 1:], weights[:, 1:]
    return _loss(method, params, hidden, tokens, place, weights, teacher), jnp.sum(masked)


def _loss(method: StandaloneMethod, params: Params, hidden, tokens, place, weights, teacher: Teacher | None):
    """Weighted cross-entropy of hidden [B, R, D] for the tokens at `place` int [B, R] of the texts [B, T]."""
    labels = jnp.take_along_axis(tokens, place, axis=1, mode="clip")
    weights = _without_unknown(method, labels, weights)
    head, V = params["embed" if method.shape.tied else "head"], method.shape.vocab_size
    if teacher is None:
        return weighted_cross_entropy(hidden, head, labels, weights)
    before = (place - 1)[..., None]  # the target says the token at `place` one position earlier
    theirs = jnp.take_along_axis(teacher.hidden, before, axis=1, mode="clip")
    allowed = _without_unknown(method, jnp.arange(V), jnp.ones(V)) > 0
    return weighted_cross_entropy(hidden, head, labels, weights, SoftLabels(theirs, teacher.head, allowed))


def _without_unknown(method: StandaloneMethod, labels, weights):
    """The weights, 0 where the label is an id that the drafter does not share and can never propose."""
    unknown = labels >= method.shape.vocab_size
    for differing in method.reading.differing_ids:
        unknown = unknown | (labels == differing)
    return jnp.where(unknown, jnp.float32(0), weights)
