"""What a drafted row costs by the compiled pass, against what `benchmarks/comparison` counts for its table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.comparison.rows import multiplied
from deer_jax import DrafterConfig, Target, drafter_from_target
from deer_jax.drafters.protocol import Draft, Row
from deer_jax.drafters.start import ConditionedStart
from deer_jax.models.transformer import abstract_params, unstack_layers
from deer_jax.planning.hlo import Program
from tests.tiny import tiny

# Of the sizes of stories260k, of which the table is.
TARGET = tiny("llama", vocab_size=512, width=64, layers=5, heads=8, kv_heads=4, head_width=8, mlp_width=172)
STARTS: dict[str, dict[str, Any] | None] = {
    "standalone": None,
    "dflash": {},
    "dflash2": {"head": "selector", "rank": 32, "candidates": 16, "conv_kernel": 2, "conv_group": 16},
    "dspark": {"head": "markov", "rank": 96, "layout": "next_token", "draft_vocab": 256, "causal": True},
}
BATCH, CAPACITY = 2, 64


def draft_of(start: dict[str, Any] | None, k: int):
    """The method of a drafter of k tokens, and the flops of its draft for a text, but for attention to its keys."""
    methods = []

    def begin(params):
        target = Target(config=TARGET, params=unstack_layers(params, TARGET.layers))
        if start is None:
            drafter = drafter_from_target(target, DrafterConfig(draft_length=k), layers=(0, 1))
        else:
            begun = ConditionedStart(taps=(0, 2, 4), mask=0, draft_length=k, **start)
            drafter = begun.begin(target, 2, np.arange(TARGET.vocab_size), 0)
        methods.append(drafter.method)
        state = drafter.method.state(drafter.params, drafter.shared, BATCH, CAPACITY, target.build)
        return drafter.params, drafter.shared, state

    def pick(logits, first, ids=None) -> Draft:
        return Draft(jnp.argmax(logits, axis=-1).astype(jnp.int32), None)

    def draft(params, shared, state, row):
        found, state = methods[0].propose(params, shared, state, row, k, pick)
        return found.tokens, state

    arrays, numbers = jax.eval_shape(begin, abstract_params(TARGET)), jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    row = Row(jax.ShapeDtypeStruct((BATCH, CAPACITY), jnp.int32), numbers, numbers)
    steps = Program(jax.jit(draft).lower(*arrays, row).compile().as_text()).whole().steps
    attended = sum(step.flops * step.times for step in steps if "/attend" in step.origin)
    assert attended
    return methods[0], (sum(step.flops * step.times for step in steps) - attended) / BATCH


@pytest.mark.parametrize("kind", STARTS)
def test_weights_multiplied_for_a_drafted_row_are_counted(kind):
    """By what a longer draft costs more. A drafter that reads text alone also reads a row of it for each row that it
    drafts, which the table does not count; norms and kernels, which are no products of matrices, it does."""
    (method, short), (_, long) = (draft_of(STARTS[kind], k) for k in (2, 4))
    layers = {name: x.size for name, x in method.shapes()["layers"].items()}
    vectors = sum(size for name, size in layers.items() if name.endswith(("norm", "base")))
    counted, again = multiplied(method) - vectors, sum(layers.values()) - vectors if kind == "standalone" else 0
    assert (long - short) / 2 / 2 == counted + again
