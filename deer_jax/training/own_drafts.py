"""The third stage: a drafter drafts on its own, the target verifies, and the expected accepted length is maximised.

DEER's paper has two stages; one summary of it speaks of reinforcement learning as a second one. What is maximised here
is what decoding does. Of a block drafted from the drafter's own distributions, x_1 .. x_W, with c_i = min(1, p(x_i) /
q(x_i)) token by token, the expected number of accepted tokens is

    E[ sum over i of the product over m < i of c_m, times A_i ],    A_i = sum over all ids of min(p_i, q_i)

The gradient goes through every A_i, each weighted with how likely its place is reached, times one more than what is
expected to be accepted behind it (`slot_weights.accepted_at_stake`): the policy gradient, summed over all ids of a
place instead of sampled, without the part that says which accepted token makes those behind it likelier.
"""

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.config import ModelConfig
from deer_jax.drafters.protocol import Draft, Trainable
from deer_jax.models.piecewise import BlockMask
from deer_jax.models.transformer import Params, bind


def drafted(method: Trainable, params: Params, shared: Params, batch: dict[str, jax.Array], tapped) -> jax.Array:
    """int32 [B, M, W]: what the drafter draws for the blocks of a batch at temperature 1; not differentiated.

    Its random numbers are a function of the texts and their anchors, so a resumed run draws the same.
    """
    places = jnp.arange(1, batch["anchor"].shape[1] + 1, dtype=jnp.int32)
    seed = jnp.sum(batch["anchor"] * places[None]) * 7919 + jnp.sum(batch["tokens"])
    key = jax.random.fold_in(jax.random.key(0), seed)

    def pick(logits, first: int, ids=None) -> Draft:
        noise = jax.random.gumbel(jax.random.fold_in(key, first), logits.shape, jnp.float32)
        at = jnp.argmax(logits.astype(jnp.float32) + noise, axis=-1).astype(jnp.int32)
        if ids is not None:
            at = jnp.take_along_axis(jnp.broadcast_to(ids, logits.shape), at[..., None], axis=-1)[..., 0]
        return Draft(at, None)

    return lax.stop_gradient(method.draw(params, shared, batch, tapped, pick))


def read_drafts(config: ModelConfig, params: Params, tokens, anchor, drafts) -> jax.Array:
    """The target's final hidden states [B, M*W, D] that say each token of drafts int32 [B, M, W] behind their anchors
    int32 [B, M] in clean texts int32 [B, T]: that of the anchor says the first, those of the drafts the others."""
    (B, T), (M, W) = tokens.shape, drafts.shape[1:]
    model, rows = bind(config, params), max(W - 1, 1)
    text = jnp.broadcast_to(jnp.arange(T, dtype=anchor.dtype)[None], (B, T))
    behind = anchor[..., None] + 1 + jnp.arange(rows, dtype=anchor.dtype)[None, None]
    x = model.lookup(jnp.concatenate([tokens, drafts[:, :, :rows].reshape(B, M * rows)], axis=1))
    visible = BlockMask(anchor, jnp.full_like(anchor, rows), rows, inside=jnp.tril(jnp.ones((rows, rows), bool)))
    positions = jnp.concatenate([text, behind.reshape(B, M * rows)], axis=1)
    hidden = lax.stop_gradient(model(x, positions, visible=visible).hidden)
    first = jnp.take_along_axis(hidden, anchor[..., None], axis=1)[:, :, None]
    others = hidden[:, T:].reshape(B, M, rows, -1)[:, :, : W - 1]
    return jnp.concatenate([first, others], axis=2).reshape(B, M * W, -1)
