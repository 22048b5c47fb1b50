"""Cross-entropy over a large vocabulary: logits for a few rows at a time, on shards of rows and vocabulary."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.models.layers import logits, precision
from deer_jax.sharding import gathered, here, largest, on_shards, shard_index, spread, total

CHUNK_ROWS = 512  # rows whose logits exist at one time, on each shard of the rows


class SoftLabels(NamedTuple):
    """What another model says at each row, instead of one label; not differentiated."""

    hidden: jax.Array  # [B, R, D']
    head: jax.Array  # [V', D']
    allowed: jax.Array  # bool [V] ids that may have probability; those from V' on have none


def weighted_cross_entropy(hidden, head, labels, weights, soft: SoftLabels | None = None):
    """float32 []: sum of weights * -log softmax(hidden @ head.T)[label] over rows of non-zero weight.

    hidden [B, R, D], head [V, D] or what `sharding.spread` made of it, labels int32 [B, R], weights float32 [B, R] (not
    differentiated). With soft labels it is the cross-entropy against their distributions, and labels are not read. Rows
    of zero weight cost nothing and their labels may be anything: each shard moves its others to the front and takes
    them through its part of the vocabulary in chunks, gradients in the same pass, so logits exist for one chunk at a
    time, are computed once, and never leave their shard.
    """
    return _loss(hidden, spread(head) if head.ndim == 2 else head, labels, weights, soft)


@jax.custom_vjp
def _loss(hidden, head, labels, weights, soft):
    return _cross_entropy(hidden, head, labels, weights, soft)[0]


def _cross_entropy(hidden, head, labels, weights, soft):
    rows = here(labels.shape, "batch", None)
    states = here(hidden.shape, "batch", None, None)
    table = here(head.shape, "batch", "vocab", None) if head.ndim == 3 else here(head.shape, "vocab", "width")
    theirs: Any = None
    if soft is not None:
        V = head.shape[-2]
        short = jnp.pad(soft.head[:V], ((0, V - min(V, soft.head.shape[0])), (0, 0)))  # a row for each id of ours
        soft = SoftLabels(soft.hidden, short, soft.allowed & (jnp.arange(V) < soft.head.shape[0]))
        specs: Any = (
            here(soft.hidden.shape, "batch", None, None), here(soft.head.shape, "vocab", "width"),
            here(soft.allowed.shape, "vocab"),
        )  # fmt: skip
        theirs = SoftLabels(*specs)
    run = on_shards(_local, (states, table, rows, rows, theirs), (here(()), states, table))
    loss, to_hidden, to_head = run(hidden, head, labels, weights, soft)
    return loss, (to_hidden, to_head)


def _local(hidden, head, labels, weights, soft: SoftLabels | None):
    """Of one shard's rows, with its part of the vocabulary: the loss of all rows, and both gradients of its own."""
    (B, R, D), weights, labels = hidden.shape, weights.reshape(-1), labels.reshape(-1)
    table = head[0] if head.ndim == 3 else head
    V, N, chunk = table.shape[0], B * R, min(CHUNK_ROWS, B * R)
    ids = shard_index("vocab") * V + jnp.arange(V)
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, -N % chunk), constant_values=N)  # N points at a row of zeros
    padded = jnp.pad(hidden.reshape(N, D), ((0, 1), (0, 0)))
    labels, weights = jnp.pad(labels, (0, 1)), jnp.pad(weights, (0, 1))
    used = jnp.sum(weights != 0)
    if soft is not None:
        theirs, their_head = soft.hidden.reshape(N, -1), gathered(soft.head, "width", 1)

    def normaliser(scores):
        """log of the sum of exp(scores) over the whole vocabulary: [chunk, 1]."""
        top = largest(jnp.max(scores, axis=-1, keepdims=True), "vocab")
        return top + jnp.log(total(jnp.sum(jnp.exp(scores - top), axis=-1, keepdims=True), "vocab"))

    def wanted(rows):
        """float32 [chunk, V]: the distribution that each row is to have."""
        if soft is None:
            return (labels[rows][:, None] == ids[None]).astype(jnp.float32)
        scores = logits(theirs.at[rows].get(mode="clip"), their_head)
        scores = jnp.where(soft.allowed[None], scores, -jnp.inf)
        return jnp.exp(scores - normaliser(scores))

    def one_chunk(i, carry):
        loss, to_hidden, to_head = carry
        rows = lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        x, weight, label = padded[rows], weights[rows][:, None], wanted(rows)
        scores = logits(x, table)
        norm = normaliser(scores)
        said = total(jnp.sum(label * scores, axis=-1, keepdims=True), "vocab")
        loss = loss + jnp.sum(weight * (norm - said))
        error = ((jnp.exp(scores - norm) - label) * weight).astype(hidden.dtype)
        exact = precision(hidden.dtype)
        to_x = jnp.einsum("rv,vd->rd", error, table, precision=exact, preferred_element_type=jnp.float32)
        to_x = total(to_x.astype(hidden.dtype), "vocab")
        to_head = to_head + jnp.einsum("rv,rd->vd", error, x, precision=exact, preferred_element_type=jnp.float32)
        return loss, to_hidden.at[rows].set(to_x), to_head

    start = (jnp.zeros(()), jnp.zeros((N + 1, D), hidden.dtype), jnp.zeros(table.shape, jnp.float32))
    loss, to_hidden, to_head = lax.fori_loop(0, -(-used // chunk), one_chunk, start)
    return total(loss, "batch"), to_hidden[:N].reshape(B, R, D), to_head.astype(head.dtype).reshape(head.shape)


def _backward(gradients, cotangent):
    to_hidden, to_head = gradients
    return to_hidden * cotangent.astype(to_hidden.dtype), to_head * cotangent.astype(to_head.dtype), None, None, None


_loss.defvjp(_cross_entropy, _backward)
