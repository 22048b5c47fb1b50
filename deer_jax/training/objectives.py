"""What is minimised: cross-entropy on the target's tokens at masked positions, and logits computed only there.

With a teacher the labels are the target's distributions instead of the tokens it happened to say.

DEER (arXiv 2512.15176) equations 1 and 4; what is masked and weighted how is decided in `diffusion.corruption`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.config import ModelConfig
from deer_jax.drafters.standalone import MASK, SEPARATOR, StandaloneMethod, backbone
from deer_jax.models.layers import logits, precision
from deer_jax.models.piecewise import Before, BlockMask
from deer_jax.models.transformer import Params, bind

CHUNK_ROWS = 512  # masked positions whose logits exist at one time

# (parameters, batch, fixed parameters) -> the summed weighted cross-entropy, and the number of tokens predicted
Loss = Callable[[Params, dict[str, jax.Array], Params], tuple[jax.Array, jax.Array]]


def drafter_loss(method: StandaloneMethod, teacher: ModelConfig | None = None) -> Loss:
    """The loss of a drafter's stages. teacher: the target's shape, for soft labels; the fixed parameters are its."""
    loss = block_loss if method.cached else cut_loss

    def of(params: Params, batch: dict[str, jax.Array], target: Params):
        view = None if teacher is None else teach(teacher, target, batch["tokens"])
        return loss(method, params, batch, view)

    return of


def next_token_loss(config: ModelConfig) -> Loss:
    """The loss of an autoregressive model, on texts int32 [B, T] of which `length` int32 [B] tokens are real."""

    def of(params: Params, batch: dict[str, jax.Array], fixed: Params):
        tokens, length = batch["tokens"], batch["length"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        model = bind(config, params)
        hidden, _ = model(model.lookup(tokens), positions, remat=True)
        real = positions[:, 1:] < length[:, None]
        head = params["embed" if config.tied else "head"]
        hidden, labels = hidden[:, :-1].reshape(-1, config.width), tokens[:, 1:].reshape(-1)
        return weighted_cross_entropy(hidden, head, labels, real.reshape(-1).astype(jnp.float32)), jnp.sum(real)

    return of


class Teacher(NamedTuple):
    """The target's view of a batch, for soft labels: what it says after each text position."""

    hidden: jax.Array  # [B, T, D'] final hidden states over the clean texts
    head: jax.Array  # [V', D']


def teach(config: ModelConfig, params: Params, tokens) -> Teacher:
    """The target reads clean texts int32 [B, T]; nothing is differentiated."""
    model = bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = model(model.lookup(tokens), positions)
    return Teacher(lax.stop_gradient(hidden), params["embed" if config.tied else "head"])


def block_loss(method: StandaloneMethod, params: Params, batch: dict[str, jax.Array], teacher: Teacher | None = None):
    """Summed weighted cross-entropy of block-causal examples, and the number of masked positions.

    batch: tokens int32 [B, T] (clean texts, padded), anchor and size int32 [B, M], masked bool [B, M, W], weight
    float32 [B, M, W], text_weight float32 [B, T]; see `diffusion.corruption.Blocks`. Labels are the texts' tokens, or
    with a teacher its distributions there.
    """
    tokens, anchor, masked = batch["tokens"], batch["anchor"], batch["masked"]
    (B, T), (M, W) = tokens.shape, masked.shape[1:]
    hidden = read_blocks(method, params, tokens, anchor, batch["size"], masked)
    # Text rows predict the token after them, blocks their own.
    blocks = (anchor[..., None] + 1 + jnp.arange(W)[None, None]).reshape(B, M * W)
    place = jnp.concatenate([jnp.broadcast_to(1 + jnp.arange(T)[None], (B, T)), blocks], axis=1)
    weights = jnp.concatenate([batch["text_weight"], batch["weight"].reshape(B, -1)], axis=1)
    return _loss(method, params, hidden, tokens, place, weights, teacher), jnp.sum(masked)


def read_blocks(method: StandaloneMethod, params: Params, tokens, anchor, size, masked):
    """Final hidden states [B, T + M*W, D] of the text's rows, and of those where each block token is read.

    Block rows stand behind the text's rows at their true positions: they see the text up to their anchor and their own
    block with its separator, nothing else. The first token of a block is read at the anchor's own text row (shifted
    head). Shapes as in `block_loss`.
    """
    (B, T), (M, W) = tokens.shape, masked.shape[1:]
    model = bind(method.model, backbone(params))
    steps = jnp.arange(W + 1)
    place = anchor[..., None] + 1 + steps[None, None]  # [B, M, W+1] true positions
    following = jnp.take_along_axis(tokens, place.reshape(B, -1), axis=1, mode="clip").reshape(B, M, W + 1)
    is_mask = jnp.pad(masked, ((0, 0), (0, 0), (0, 1)))
    block = jnp.where(
        is_mask[..., None], params["special"][MASK][None, None, None], method.embed(model, params, following)
    )
    real = size
    if method.config.separator:
        at = steps[None, None] == size[..., None]
        block = jnp.where(at[..., None], params["special"][SEPARATOR][None, None, None], block)
        real = real + 1

    rows = M * (W + 1)
    x = jnp.concatenate([method.embed(model, params, tokens), block.reshape(B, rows, -1)], axis=1)
    text = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    positions = jnp.concatenate([text, place.reshape(B, rows)], axis=1)
    hidden, _ = model(x, positions, visible=BlockMask(anchor, real, W + 1), remat=True)

    if method.config.head == "shifted":
        in_block = T + (jnp.arange(M) * (W + 1))[None, :, None] + steps[None, None, : W - 1]
        at = jnp.concatenate([anchor[..., None], jnp.broadcast_to(in_block, (B, M, W - 1))], axis=-1)
    else:
        in_block = T + (jnp.arange(M) * (W + 1))[None, :, None] + steps[None, None, :W]
        at = jnp.broadcast_to(in_block, (B, M, W))
    read = jnp.take_along_axis(hidden, at.reshape(B, -1, 1), axis=1, mode="clip")
    return jnp.concatenate([hidden[:, :T], read], axis=1)


def cut_loss(method: StandaloneMethod, params: Params, batch: dict[str, jax.Array], teacher: Teacher | None = None):
    """Summed weighted cross-entropy of bidirectional examples, and the number of masked positions.

    batch: tokens int32 [B, T], length int32 [B], masked bool [B, T], weight float32 [B, T]; see
    `diffusion.corruption.Cut`. T leaves room for the separator, which stands at `length`. Labels as in `block_loss`.
    """
    tokens, length, masked = batch["tokens"], batch["length"], batch["masked"]
    B, T = tokens.shape
    model = bind(method.model, backbone(params))
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    x = jnp.where(masked[..., None], params["special"][MASK][None, None], method.embed(model, params, tokens))
    end = length
    if method.config.separator:
        x = jnp.where((positions == end[:, None])[..., None], params["special"][SEPARATOR][None, None], x)
        end = end + 1
    hidden, _ = model(x, positions, visible=Before(end), remat=True)
    place, weights = positions, batch["weight"]
    if method.config.head == "shifted":
        hidden, place, weights = hidden[:, :-1], place[:, 1:], weights[:, 1:]
    return _loss(method, params, hidden, tokens, place, weights, teacher), jnp.sum(masked)


def _loss(method: StandaloneMethod, params: Params, hidden, tokens, place, weights, teacher: Teacher | None):
    """Weighted cross-entropy of hidden [B, R, D] for the tokens at `place` int [B, R] of the texts [B, T]."""
    labels = jnp.take_along_axis(tokens, place, axis=1, mode="clip")
    weights = _without_unknown(method, labels, weights).reshape(-1)
    head = params["embed"] if method.model.tied else params["head"]
    hidden, labels = hidden.reshape(weights.shape[0], -1), labels.reshape(-1)
    if teacher is None:
        return weighted_cross_entropy(hidden, head, labels, weights)
    before = (place - 1)[..., None]  # the target says the token at `place` one position earlier
    theirs = jnp.take_along_axis(teacher.hidden, before, axis=1, mode="clip")
    allowed = _without_unknown(method, jnp.arange(head.shape[0]), jnp.ones(head.shape[0])) > 0
    soft = SoftLabels(theirs.reshape(hidden.shape[0], -1), teacher.head, allowed)
    return weighted_cross_entropy(hidden, head, labels, weights, soft)


def _without_unknown(method: StandaloneMethod, labels, weights):
    """The weights, 0 where the label is an id that the drafter does not share and can never propose."""
    unknown = labels >= method.model.vocab_size
    for differing in method.config.differing_ids:
        unknown = unknown | (labels == differing)
    return jnp.where(unknown, jnp.float32(0), weights)


class SoftLabels(NamedTuple):
    """What another model says at each row, instead of one label; not differentiated."""

    hidden: jax.Array  # [R, D']
    head: jax.Array  # [V', D']
    allowed: jax.Array  # bool [V] ids that may have probability; those from V' on have none


@jax.custom_vjp
def weighted_cross_entropy(hidden, head, labels, weights, soft: SoftLabels | None = None):
    """float32 []: sum of weights * -log softmax(hidden @ head.T)[label] over rows of non-zero weight.

    hidden [R, D], head [V, D], labels int32 [R], weights float32 [R] (not differentiated). With soft labels it is the
    cross-entropy against their distributions, and labels are not read. Rows of zero weight cost nothing and their
    labels may be anything: the others are moved to the front and go through the vocabulary in chunks, gradients in the
    same pass, so logits exist for one chunk at a time and are computed once.
    """
    return _cross_entropy(hidden, head, labels, weights, soft)[0]


def _cross_entropy(hidden, head, labels, weights, soft):
    R, D = hidden.shape
    V, chunk = head.shape[0], min(CHUNK_ROWS, R)
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, -R % chunk), constant_values=R)  # R points at a row of zeros
    padded = jnp.pad(hidden, ((0, 1), (0, 0)))
    labels, weights = jnp.pad(labels, (0, 1)), jnp.pad(weights, (0, 1))
    used = jnp.sum(weights != 0)

    def wanted(rows):
        """float32 [chunk, V]: the distribution that each row is to have."""
        if soft is None:
            return jax.nn.one_hot(labels[rows], V, dtype=jnp.float32)
        theirs = logits(soft.hidden.at[rows].get(mode="clip"), soft.head)[:, :V]
        theirs = jnp.pad(theirs, ((0, 0), (0, V - theirs.shape[1])), constant_values=-jnp.inf)
        return jax.nn.softmax(jnp.where(soft.allowed[None], theirs, -jnp.inf), axis=-1)

    def one_chunk(i, carry):
        loss, to_hidden, to_head = carry
        rows = lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        x, weight, label = padded[rows], weights[rows][:, None], wanted(rows)
        scores = logits(x, head)
        norm = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        loss = loss + jnp.sum(weight * (norm - jnp.sum(label * scores, axis=-1, keepdims=True)))
        error = ((jnp.exp(scores - norm) - label) * weight).astype(hidden.dtype)
        exact = precision(hidden.dtype)
        to_x = jnp.einsum("rv,vd->rd", error, head, precision=exact, preferred_element_type=jnp.float32)
        to_head = to_head + jnp.einsum("rv,rd->vd", error, x, precision=exact, preferred_element_type=jnp.float32)
        return loss, to_hidden.at[rows].set(to_x), to_head

    start = (jnp.zeros(()), jnp.zeros((R + 1, D)), jnp.zeros(head.shape, jnp.float32))
    loss, to_hidden, to_head = lax.fori_loop(0, -(-used // chunk), one_chunk, start)
    return loss, (to_hidden[:R].astype(hidden.dtype), to_head.astype(head.dtype))


def _backward(gradients, cotangent):
    to_hidden, to_head = gradients
    return to_hidden * cotangent.astype(to_hidden.dtype), to_head * cotangent.astype(to_head.dtype), None, None, None


weighted_cross_entropy.defvjp(_cross_entropy, _backward)
