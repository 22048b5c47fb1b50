"""The two stages' loss: cross-entropy on the target's tokens at masked positions, and logits computed only there.

DEER (arXiv 2512.15176) equations 1 and 4; what is masked and weighted how is decided in `diffusion.corruption`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.drafters.standalone import MASK, SEPARATOR, StandaloneMethod, backbone
from deer_jax.models.attention import Blocks
from deer_jax.models.layers import logits, precision
from deer_jax.models.transformer import Params, bind

CHUNK_ROWS = 512  # masked positions whose logits exist at one time


def block_loss(method: StandaloneMethod, params: Params, batch: dict[str, jax.Array]):
    """Summed weighted cross-entropy of block-causal examples, and the number of masked positions.

    batch: tokens int32 [B, T] (clean texts, padded), anchor and size int32 [B, M], masked bool [B, M, W], weight
    float32 [B, M, W], text_weight float32 [B, T]; see `diffusion.corruption.Blocks`. Block rows stand behind the text's rows at their true
    positions: they see the text up to their anchor and their own block with its separator, nothing else. The first
    token of a block is read at the anchor's own text row (shifted head).
    """
    tokens, anchor, size, masked = batch["tokens"], batch["anchor"], batch["size"], batch["masked"]
    (B, T), (M, W) = tokens.shape, masked.shape[1:]
    model = bind(method.model, backbone(params))
    steps = jnp.arange(W + 1)
    place = anchor[..., None] + 1 + steps[None, None]  # [B, M, W+1] true positions
    following = jnp.take_along_axis(tokens, place.reshape(B, -1), axis=1, mode="clip").reshape(B, M, W + 1)
    is_mask = jnp.pad(masked, ((0, 0), (0, 0), (0, 1)))
    block = jnp.where(
        is_mask[..., None], params["special"][MASK][None, None, None], method.embed(model, params, following)
    )
    real = steps[None, None] < size[..., None]
    if method.config.separator:
        at = steps[None, None] == size[..., None]
        block = jnp.where(at[..., None], params["special"][SEPARATOR][None, None, None], block)
        real = real | at

    rows = M * (W + 1)
    x = jnp.concatenate([method.embed(model, params, tokens), block.reshape(B, rows, -1)], axis=1)
    text = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    positions = jnp.concatenate([text, place.reshape(B, rows)], axis=1)
    hidden, _ = model(x, positions, visible=Blocks(anchor, real))

    if method.config.head == "shifted":
        in_block = T + (jnp.arange(M) * (W + 1))[None, :, None] + steps[None, None, : W - 1]
        at = jnp.concatenate([anchor[..., None], jnp.broadcast_to(in_block, (B, M, W - 1))], axis=-1)
    else:
        in_block = T + (jnp.arange(M) * (W + 1))[None, :, None] + steps[None, None, :W]
        at = jnp.broadcast_to(in_block, (B, M, W))
    # Text rows predict the token after them, blocks their own.
    read = jnp.take_along_axis(hidden, at.reshape(B, -1, 1), axis=1, mode="clip")
    read = jnp.concatenate([hidden[:, :T], read], axis=1)
    labels = jnp.concatenate([jnp.roll(tokens, -1, axis=1), following[..., :W].reshape(B, -1)], axis=1).reshape(-1)
    weights = jnp.concatenate([batch["text_weight"], batch["weight"].reshape(B, -1)], axis=1).reshape(-1)
    weights = _without_unknown(method, labels, weights)
    head = params["embed"] if method.model.tied else params["head"]
    return weighted_cross_entropy(read.reshape(labels.shape[0], -1), head, labels, weights), jnp.sum(masked)


def cut_loss(method: StandaloneMethod, params: Params, batch: dict[str, jax.Array]):
    """Summed weighted cross-entropy of bidirectional examples, and the number of masked positions.

    batch: tokens int32 [B, T], length int32 [B], masked bool [B, T], weight float32 [B, T]; see
    `diffusion.corruption.Cut`. T leaves room for the separator, which stands at `length`.
    """
    tokens, length, masked = batch["tokens"], batch["length"], batch["masked"]
    B, T = tokens.shape
    model = bind(method.model, backbone(params))
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    x = jnp.where(masked[..., None], params["special"][MASK][None, None], method.embed(model, params, tokens))
    end = length[:, None]
    if method.config.separator:
        x = jnp.where((positions == end)[..., None], params["special"][SEPARATOR][None, None], x)
        end = end + 1
    visible = jnp.broadcast_to((positions < end)[:, None], (B, T, T))
    hidden, _ = model(x, positions, visible=visible)
    labels, weights = tokens, batch["weight"]
    if method.config.head == "shifted":
        hidden, labels, weights = hidden[:, :-1], labels[:, 1:], weights[:, 1:]
    weights = _without_unknown(method, labels, weights)
    head = params["embed"] if method.model.tied else params["head"]
    flat = hidden.reshape(-1, hidden.shape[-1])
    return weighted_cross_entropy(flat, head, labels.reshape(-1), weights.reshape(-1)), jnp.sum(masked)


def _without_unknown(method: StandaloneMethod, labels, weights):
    """The weights, 0 where the label is an id that the drafter does not share and can never propose."""
    unknown = labels >= method.model.vocab_size
    for differing in method.config.differing_ids:
        unknown = unknown | (labels == differing)
    return jnp.where(unknown, jnp.float32(0), weights)


@jax.custom_vjp
def weighted_cross_entropy(hidden, head, labels, weights):
    """float32 []: sum of weights * -log softmax(hidden @ head.T)[label] over rows of non-zero weight.

    hidden [R, D], head [V, D], labels int32 [R], weights float32 [R] (not differentiated). Rows of zero weight cost
    nothing and their labels may be anything: the others are moved to the front and go through the vocabulary in chunks,
    gradients in the same pass, so logits exist for one chunk at a time and are computed once.
    """
    return _cross_entropy(hidden, head, labels, weights)[0]


def _cross_entropy(hidden, head, labels, weights):
    R, D = hidden.shape
    chunk = min(CHUNK_ROWS, R)
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, -R % chunk), constant_values=R)  # R points at a row of zeros
    padded = jnp.pad(hidden, ((0, 1), (0, 0)))
    labels, weights = jnp.pad(labels, (0, 1)), jnp.pad(weights, (0, 1))
    used = jnp.sum(weights != 0)

    def one_chunk(i, carry):
        loss, to_hidden, to_head = carry
        rows = lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        x, label, weight = padded[rows], labels[rows], weights[rows]
        scores = logits(x, head)
        norm = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        picked = jnp.take_along_axis(scores, label[:, None], axis=1, mode="clip")
        loss = loss + jnp.sum(weight[:, None] * (norm - picked))
        error = jnp.exp(scores - norm) - jax.nn.one_hot(label, head.shape[0], dtype=jnp.float32)
        error = (error * weight[:, None]).astype(hidden.dtype)
        exact = precision(hidden.dtype)
        to_x = jnp.einsum("rv,vd->rd", error, head, precision=exact, preferred_element_type=jnp.float32)
        to_head = to_head + jnp.einsum("rv,rd->vd", error, x, precision=exact, preferred_element_type=jnp.float32)
        return loss, to_hidden.at[rows].set(to_x), to_head

    start = (jnp.zeros(()), jnp.zeros((R + 1, D)), jnp.zeros(head.shape, jnp.float32))
    loss, to_hidden, to_head = lax.fori_loop(0, -(-used // chunk), one_chunk, start)
    return loss, (to_hidden[:R].astype(hidden.dtype), to_head.astype(head.dtype))


def _backward(gradients, cotangent):
    to_hidden, to_head = gradients
    return (to_hidden * cotangent.astype(to_hidden.dtype), to_head * cotangent.astype(to_head.dtype), None, None)


weighted_cross_entropy.defvjp(_cross_entropy, _backward)
