"""What a conditioned drafter begins with."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.drafters.conditioned import ConditionedReading, conditioned_drafter
from deer_jax.drafters.heads import HEAD, Markov
from deer_jax.models.conditioned import context_kv
from deer_jax.models.target import Target
from deer_jax.models.transformer import bind
from tests.tiny import random_params, tiny

READING = ConditionedReading(taps=(0, 1), mask=0, draft_length=3)


def target_of(family: str) -> Target:
    config = tiny(family, layers=4)
    return Target(config=config, params=random_params(config, 3))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_layer_of_the_target_reads_the_tap_before_it_as_it_did(family):
    target = target_of(family)
    model, tokens = bind(target.config, target.params), jnp.asarray([[5, 3, 9, 2, 7]])
    read = model(model.lookup(tokens), jnp.arange(5)[None], taps=READING.taps)
    drafter = conditioned_drafter(target, READING, layers=(2,))
    found = context_kv(bind(drafter.method.shape, drafter.params), read.tapped, jnp.zeros(1, jnp.int32))
    for own, theirs in ((found.keys, read.fresh.keys), (found.values, read.fresh.values)):
        np.testing.assert_allclose(own[0], theirs[2], atol=1e-5)


def test_a_heads_table_begins_with_the_targets_embedding():
    target = target_of("llama")
    embed = target.params["embed"]
    target = dataclasses.replace(target, params=target.params | {"embed": embed.at[7].set(embed[5])})
    for rank in (8, 48):  # below the target's width and above it
        head = conditioned_drafter(target, READING, layers=(2, 3), head=Markov(rank=rank)).params[HEAD]
        table = np.asarray(head["w1"])
        np.testing.assert_allclose(table[7], table[5], rtol=1e-5)
        assert not np.allclose(table[7], table[6])
        assert np.mean(table**2) == pytest.approx(1, rel=1e-3)
        assert np.linalg.matrix_rank(table) == min(rank, target.config.width)


def test_what_begins_at_random():
    target = target_of("llama")
    given = {"head": Markov(rank=8), "seed": 4}
    warm, cold = (conditioned_drafter(target, READING, layers=(2, 3), warm=warm, **given) for warm in (True, False))
    fresh, same = (conditioned_drafter(target, READING, layers=2, warm=warm, **given) for warm in (True, False))
    for name in ("fc", "hidden_norm"):
        assert not np.allclose(warm.params[name], cold.params[name])
        np.testing.assert_array_equal(cold.params[name], fresh.params[name])
        np.testing.assert_array_equal(same.params[name], fresh.params[name])
    assert not np.allclose(warm.params[HEAD]["w1"], cold.params[HEAD]["w1"])
    np.testing.assert_array_equal(fresh.params[HEAD]["w1"], cold.params[HEAD]["w1"])
