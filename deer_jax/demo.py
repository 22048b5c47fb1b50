"""A small pair in memory, to see the loop at work without a download."""

from collections.abc import Sequence
from typing import NoReturn

from deer_jax.config import DrafterConfig, InputError, ModelConfig
from deer_jax.drafters.standalone import StandaloneDrafter, drafter_from_target
from deer_jax.models.target import Target
from deer_jax.models.transformer import init_params

PROMPTS = ["Once upon a time", "def add(a, b):", "The deer ran"]
SEED = 0


class ByteTokenizer:
    """Text as its UTF-8 bytes, one id each."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_chat(self, messages, **template_arguments) -> NoReturn:
        raise InputError("the demonstration pair has no chat template; give plain text")

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")

    def settled(self, ids: Sequence[int]) -> int:
        """All: a later byte completes the last character or starts another."""
        return len(ids)


def demo_pair() -> tuple[Target, StandaloneDrafter]:
    """A random target of bytes and an untrained drafter with its weights: the same on every call."""
    config = ModelConfig(
        family="llama", vocab_size=256, width=64, layers=4, heads=4, kv_heads=2, head_width=16, mlp_width=128,
        context=512, tied=True,
    )  # fmt: skip
    params = init_params(config, SEED, scan=False)
    target = Target(config=config, params=params, tokenizer=ByteTokenizer(), name="random bytes")
    drafter = drafter_from_target(target, DrafterConfig(draft_length=4), name="untrained")
    return target, drafter
