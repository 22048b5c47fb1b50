"""What the rows of a conditioned drafter's blocks see: the context before their anchor, and their own block."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deer_jax.config import MOST, ConditionedConfig


class Blocks(NamedTuple):
    """M blocks of `rows` rows each: an anchor, and what is to be drafted behind it.

    anchors 3 and 5, 3 rows:  positions  3 4 5 | 5 6 7    context that is seen  0 1 2 | 0 1 2 3 4
    """

    anchor: jax.Array  # int32 [B, M] position; the context before it is seen
    rows: int

    @property
    def positions(self) -> jax.Array:
        """int32 [B, M*rows]"""
        steps = jnp.arange(self.rows, dtype=self.anchor.dtype)
        return (self.anchor[..., None] + steps[None, None]).reshape(self.anchor.shape[0], -1)

    def begin(self, config: ConditionedConfig, layer) -> jax.Array | None:
        """int32 [B, M*rows]: the first position of the context that a row sees; None: 0. layer: traced or not."""
        windows = tuple(window or MOST["context"] for window in config.windows)  # further than there are positions
        window = _of_layer(windows, layer)
        if isinstance(window, int) and window == MOST["context"]:
            return None
        if config.window_from == "row":
            return jnp.maximum(self.positions - window + 1, 0)
        return jnp.repeat(jnp.maximum(self.anchor - window, 0), self.rows, axis=1)

    def inside(self, config: ConditionedConfig, layer) -> jax.Array:
        """bool [rows, rows]: which row of its block (last axis) a row sees. layer: traced or not."""
        steps = np.arange(self.rows)
        ahead = steps[None] - steps[:, None]
        seen = jnp.asarray(ahead <= 0) | ~jnp.asarray(_of_layer(config.causal, layer))
        if config.window_from == "row":
            windows = tuple(window or self.rows for window in config.windows)
            seen = seen & (jnp.asarray(np.abs(ahead)) < _of_layer(windows, layer))
        return seen


def _of_layer(values: tuple, layer) -> Any:
    """The value of one layer: itself where it is known, traced where it depends on a traced layer."""
    if len(set(values)) == 1:
        return values[0]
    return values[layer] if isinstance(layer, int) else jnp.asarray(np.array(values))[layer]
