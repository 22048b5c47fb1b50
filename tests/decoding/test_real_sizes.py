"""The decode loop at real size, without its memory: shapes of the paper's targets and drafter trace and lower."""

import jax
import jax.numpy as jnp
import pytest

from deer_jax.build import Build
from deer_jax.config import DrafterConfig, Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.sampling import Kind, Knobs
from deer_jax.decoding.state import StateShape, abstract_state
from deer_jax.drafters.standalone import StandaloneMethod
from deer_jax.models.transformer import abstract_params
from tests.tiny import REAL

B, S, K = 4, 8192, 16


def abstract_drafter(target_vocab: int):
    model = REAL["qwen2"]  # open-dCoder has the shapes of Qwen2.5-0.5B
    special = jax.ShapeDtypeStruct((2, model.width), jnp.bfloat16)
    method = StandaloneMethod(model, DrafterConfig(draft_length=K), target_vocab)
    return method, abstract_params(model, jnp.bfloat16) | {"special": special}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_the_loop_lowers_at_real_size(name, temperature):
    config = REAL[name]
    params = abstract_params(config, jnp.bfloat16)
    billions = sum(x.size for x in jax.tree.leaves(params)) / 1e9
    assert billions == pytest.approx({"qwen3": 8.19, "qwen3_moe": 30.53}[name], abs=0.01)
    method, drafter_params = abstract_drafter(config.vocab_size)
    state = abstract_state(StateShape(config, method, B, S, K, Build.of("tpu")), drafter_params, {})
    sampling = Sampling(temperature=temperature, top_k=20, top_p=0.95) if temperature else Sampling()
    plan = loop.Plan(config, method, K, Kind.of(sampling))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = loop.run_segment.lower(
        plan,
        state,
        loop.Weights(params, drafter_params, {}),
        Knobs.of(sampling, 0),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        number,
        number,
    )
    after = lowered.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
