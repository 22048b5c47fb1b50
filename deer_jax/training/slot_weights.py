"""How much the slots of a block count beside each other: factors of a loss weight, for NumPy and JAX arrays.

DEER's own weights, 1/t and alpha^(R-i), are `diffusion.corruption`'s, and so is what the summed loss is divided by: the
slots that count in stage I (as published for these drafters: all slots of a block masked, t = 1), the sum of the
weights in stage II. The factors here are multiplied on and leave that divisor as it is, so a slot with a factor of 1
counts as much as it would without.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def decay(count: int, gamma: float) -> np.ndarray:
    """float32 [count]: exp(-i / gamma) for the i-th drafted token of a block, from 0.

    In slots of a block: the fill-in layout drafts its first token at slot 1, the next-token layout at slot 0.
    """
    return np.exp(-np.arange(count) / gamma).astype(np.float32)


def accepted_at_stake(chance, counts) -> jax.Array:
    """float32 [..., k]: how much of a block's expected accepted length hangs on each draft being acceptable.

    chance float32 [..., k]: that each draft is kept if those before it were. The chance that a place is reached, times
    one more than the drafts expected to be kept behind it; 0 where it does not count (counts bool [..., k]).

      chance 0.5 0.5 1:  1 * (1 + 0.5 + 0.5), 0.5 * (1 + 1), 0.25 * 1  =  2 1 0.25
    """
    chance = jnp.where(counts, chance, 0.0)
    ones = jnp.ones_like(chance[..., :1])
    reached = jnp.cumprod(jnp.concatenate([ones, chance[..., :-1]], axis=-1), axis=-1)
    # Of place i: the sum over j > i of the products over i < m <= j, from the last place on.
    behind = jnp.zeros_like(chance[..., 0])
    each = []
    for i in reversed(range(chance.shape[-1])):
        each.append(1 + behind)
        behind = chance[..., i] * (1 + behind)
    stake = reached * jnp.stack(each[::-1], axis=-1)
    return lax.stop_gradient(jnp.where(counts, stake, 0.0))
