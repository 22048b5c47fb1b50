"""Tiny versions of real configurations, as ours and as Hugging Face's, and random torch models of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deer_jax.build import Build
from deer_jax.config import ModelConfig, Rope
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params, abstract_params, unstack_layers

# Shapes as published: Llama-3.2-1B, Qwen2.5-0.5B, Qwen3-8B, Qwen3-30B-A3B.
REAL = {
    "llama": ModelConfig(
        family="llama", vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8, head_width=64,
        mlp_width=8192, context=131072, norm_eps=1e-5, tied=True,
        rope=Rope(theta=500000.0, kind="llama3", factor=32.0, original_context=8192),
    ),
    "qwen2": ModelConfig(
        family="qwen2", vocab_size=151936, width=896, layers=24, heads=14, kv_heads=2, head_width=64,
        mlp_width=4864, context=32768, rope=Rope(theta=1e6), tied=True, qkv_bias=True,
    ),
    "qwen3": ModelConfig(
        family="qwen3", vocab_size=151936, width=4096, layers=36, heads=32, kv_heads=8, head_width=128,
        mlp_width=12288, context=40960, rope=Rope(theta=1e6), qk_norm=True,
    ),
    "qwen3_moe": ModelConfig(
        family="qwen3_moe", vocab_size=151936, width=2048, layers=48, heads=32, kv_heads=4, head_width=128,
        mlp_width=6144, context=40960, rope=Rope(theta=1e6), qk_norm=True, experts=128, experts_per_token=8,
        expert_width=768,
    ),
}  # fmt: skip


def tiny(family: str, **changes) -> ModelConfig:
    """The real configuration of a family with two layers of width 32 and 96 tokens, then changed further."""
    small = {"vocab_size": 96, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 48, "context": 256}
    # Not width / heads: Qwen3 chooses it freely, and a mix-up would not show otherwise.
    small["head_width"] = 16 if family in ("qwen3", "qwen3_moe") else 8
    if family == "qwen3_moe":
        small |= {"experts": 6, "experts_per_token": 2, "expert_width": 24}
    if family == "llama":
        small["rope"] = dataclasses.replace(REAL["llama"].rope, theta=10000.0, factor=8.0, original_context=32)
    return dataclasses.replace(REAL[family], **(small | changes))


def random_params(config: ModelConfig, seed: int = 0, dtype=np.float32, *, scan: bool = True) -> Params:
    """Random parameters whose norms and biases matter too, unlike fresh ones; made without compiling anything."""
    rng = np.random.default_rng(seed)

    def fill(path, abstract):
        name, noise = path[-1].key, rng.normal(size=abstract.shape)
        if name.endswith("norm"):
            noise = 1 + 0.3 * noise
        else:
            noise *= 0.3 if name.endswith("bias") else abstract.shape[-1] ** -0.5
        return noise.astype(np.float32).astype(dtype)

    params = jax.tree_util.tree_map_with_path(fill, abstract_params(config))
    return jax.tree.map(jnp.asarray, params if scan else unstack_layers(params, config.layers))


def hf_rope(rope: Rope) -> dict:
    """`rope_parameters` as transformers 5 spells them, written independently of the exporter."""
    values = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind == "default":
        return values
    values["factor"] = rope.factor
    if rope.kind == "linear":
        return values
    values["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        return values | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    optional = {name: getattr(rope, name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
    values |= {name: value for name, value in optional.items() if value is not None}
    return values | {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}


def hf_config(config: ModelConfig):
    """The transformers configuration object of the same model."""
    import transformers

    common = {
        "vocab_size": config.vocab_size, "hidden_size": config.width, "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_width,
        "max_position_embeddings": config.context, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied, "rope_parameters": hf_rope(config.rope),
    }  # fmt: skip
    if config.family == "qwen3_moe":
        common |= {
            "num_experts": config.experts, "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.expert_width, "norm_topk_prob": config.normalise_router,
        }  # fmt: skip
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}[config.family]
    return getattr(transformers, f"{name}Config")(**common)


def torch_model(config: ModelConfig, seed: int = 0):
    """A random float32 transformers model whose norms and biases matter too."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(hf_config(config), attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.3 * noise)
            else:
                weight.copy_(noise * (0.3 if name.endswith("bias") else weight.shape[-1] ** -0.5))
    return model.eval()


# What a drafter that reads text only asks of its target.
HERE = Target(config=REAL["llama"], params={}, build=Build.of("cpu"))
