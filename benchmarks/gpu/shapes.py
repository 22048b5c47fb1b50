"""The models whose rounds and steps are measured, as published, and tiny ones in their place."""

import dataclasses

from deer_jax.config import ModelConfig, Rope

PUBLISHED = {
    "0.5b": ModelConfig(family="qwen2", vocab_size=151936, width=896, layers=24, heads=14, kv_heads=2, head_width=64,
                        mlp_width=4864, context=32768, rope=Rope(theta=1e6), tied=True, qkv_bias=True),
    "8b": ModelConfig(family="qwen3", vocab_size=151936, width=4096, layers=36, heads=32, kv_heads=8, head_width=128,
                      mlp_width=12288, context=40960, rope=Rope(theta=1e6), qk_norm=True),
    "30b": ModelConfig(family="qwen3_moe", vocab_size=151936, width=2048, layers=48, heads=32, kv_heads=4,
                       head_width=128, mlp_width=6144, context=40960, rope=Rope(theta=1e6), qk_norm=True, experts=128,
                       experts_per_token=8, expert_width=768),
}  # fmt: skip
DRAFTER_LAYERS = {False: 5, True: 1}  # of the conditioned drafters published for these; True: of tiny ones
MASK = {False: 151669, True: 95}  # their mask; True: of the tiny ones


def shape_of(name: str, tiny: bool) -> ModelConfig:
    """A model of PUBLISHED, or a tiny one of its family."""
    config = PUBLISHED[name]
    if not tiny:
        return config
    config = dataclasses.replace(
        config, vocab_size=96, width=32, layers=4, heads=4, kv_heads=2, head_width=8, mlp_width=48, context=512
    )
    if config.experts:
        config = dataclasses.replace(config, experts=6, experts_per_token=2, expert_width=24)
    return config
