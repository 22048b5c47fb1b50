"""The loss by materialised logits, for autodiff to differentiate."""

import jax
import jax.numpy as jnp


def naive_cross_entropy(hidden, head, labels, weights):
    """Like `training.cross_entropy.weighted_cross_entropy`."""
    scores = jax.nn.log_softmax(hidden.astype(jnp.float32) @ head.astype(jnp.float32).T, axis=-1)
    return -jnp.sum(weights * jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0])


def naive_losses(scores, label, theirs, rest):
    """Each loss of `training.losses.Mix` by its formula, [..., ]; scores and theirs [..., V] of the drafter's ids.

    label int [...], -1 for none; rest [..., X]: the target's scores of ids that the drafter has not.
    """
    p = jax.nn.softmax(jnp.concatenate([theirs, rest], axis=-1), axis=-1)
    q = jnp.pad(jax.nn.softmax(scores, axis=-1), [(0, 0)] * (scores.ndim - 1) + [(0, rest.shape[-1])])
    log_q, among = jax.nn.log_softmax(scores, axis=-1), jax.nn.softmax(theirs, axis=-1)
    kl = jnp.sum(jnp.where(among > 0, among * (jnp.log(jnp.where(among > 0, among, 1.0)) - log_q), 0.0), axis=-1)
    said = jnp.take_along_axis(log_q, jnp.maximum(label, 0)[..., None], axis=-1)[..., 0]
    return {"ce": jnp.where(label >= 0, -said, 0.0), "kl": kl, "tv": jnp.sum(jnp.abs(p - q), axis=-1) / 2}


def naive_choice(scores, label, extra, count):
    """The selector's loss [...]: extra [..., V] is what it adds to each id's score; label as in `naive_losses`."""
    _, ids = jax.lax.top_k(scores, count)
    absent = (label >= 0) & ~jnp.any(ids == label[..., None], axis=-1)
    ids = ids.at[..., -1].set(jnp.where(absent, label, ids[..., -1]))
    log_q = jax.nn.log_softmax(jnp.take_along_axis(scores + extra, ids, axis=-1), axis=-1)
    return -jnp.sum(jnp.where((ids == label[..., None]) & (label >= 0)[..., None], log_q, 0.0), axis=-1)
