"""A target: configuration, parameters, tokenizer and stop ids, ready to decode."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deer_jax.config import InputError, ModelConfig
from deer_jax.models.transformer import Params, bind


@functools.partial(jax.jit, static_argnames="config")
def full_logits(params: Params, tokens, config: ModelConfig):
    """float32 [B, T, V]: causal logits of tokens int [B, T], without a cache."""
    model = bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = model(model.lookup(tokens), positions)
    return model.logits(hidden)


def check_tokens(tokens, vocab_size: int) -> np.ndarray:
    """tokens as int32 [B, T], refused where empty or outside the vocabulary."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"tokens must be integers [B, T], got {tokens.dtype} of shape {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise InputError(f"token id {wrong} is outside the vocabulary of {vocab_size} (0..{vocab_size - 1})")
    return tokens.astype(np.int32)


class Tokenizer(Protocol):
    """What decoding needs of a tokenizer; `data.tokenizer.Tokenizer` is the one for Hugging Face folders."""

    def encode(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_arguments: Any) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def settled(self, ids: Sequence[int]) -> int:
        """How many leading ids have a text that later ids cannot change, but for an incomplete last character."""
        ...


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Target:
    """An autoregressive model whose output is to be reproduced.

    Attributes:
      params: see `models.transformer`; their dtype is the compute dtype.
      tokenizer: None serves token ids only.
      stop_ids: generation ends with the first of these.
      name: where it came from.
      mesh: the devices its parameters lie on; None is the default device.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None = None
    stop_ids: tuple[int, ...] = ()
    name: str = "target"
    mesh: Mesh | None = None

    def logits(self, tokens) -> jax.Array:
        """float32 [B, T, V] of tokens int [B, T]: one full forward, for checks and research."""
        return full_logits(self.params, check_tokens(tokens, self.config.vocab_size), self.config)
