"""What to say when a model's logits are not finite: whose, after how many tokens, and which weights are the cause."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NAMED = 3  # weights that the line names
STACKED = ("layers", "experts")  # of these a target's parameters may have all layers' weights in one array


def not_finite(model: str, params: Any, new_tokens: int) -> str:
    """The reason, on one line.

    Args:
      model: whose logits they are, as in "the target tiny".
      params: its weights; they are searched now, which reads all of them.
      new_tokens: how many the answer had before.
    """
    found = broken_weights(params)
    if found:
        more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
        cause = f"of its weights these are not finite: {', '.join(found[:NAMED])}{more}"
    else:
        dtypes = {x.dtype.name for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.inexact)}
        cause = f"no weight is not finite: its activations overflow in {' and '.join(sorted(dtypes)) or 'its dtype'}"
    return f"the logits of {model} are not finite after {new_tokens} new tokens; {cause}"


def broken_weights(params: Any) -> list[str]:
    """Names of the weights that hold NaN or infinity, as in "embed" or "layers.3.q", layer by layer."""
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            continue
        parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
        if len(parts) == 2 and parts[0] in STACKED and x.ndim > 1:
            finite = np.asarray(jax.device_get(jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))))
            found += [f"{parts[0]}.{layer}.{parts[1]}" for layer in np.flatnonzero(~finite)]
        elif not bool(jax.device_get(jnp.all(jnp.isfinite(x)))):
            found.append(".".join(parts))
    return found
