"""Prompts in any accepted form, as token ids."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deer_jax.errors import InputError
from deer_jax.models.target import Target


def encode_prompts(
    target: Target,
    prompts: Any,
    template_arguments: Mapping[str, Any] | None = None,
    now: datetime.datetime | None = None,
) -> list[list[int]]:
    """Token ids of each prompt.

    prompts: a string, a chat (list of messages with role and content), or a list of strings, chats or token-id lists.
    Strings get BOS if the tokenizer adds one; chats go through the tokenizer's template, which writes its own.
    """
    if isinstance(prompts, str) or _is_chat(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise InputError(f"prompts must be a string, a chat or a list of these, got {type(prompts).__name__}")
    if not prompts:
        raise InputError("prompts is empty: give at least one")
    if all(isinstance(prompt, int | np.integer) for prompt in prompts):
        raise InputError("prompts is one list of token ids: wrap it in a list, [[1, 2, 3]]")
    return [_encode(target, i, prompt, template_arguments or {}, now) for i, prompt in enumerate(prompts)]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(message, Mapping) for message in prompt)


def _encode(
    target: Target, index: int, prompt: Any, template_arguments: Mapping[str, Any], now: datetime.datetime | None
) -> list[int]:
    if isinstance(prompt, str) or _is_chat(prompt):
        if target.tokenizer is None:
            raise InputError(f"prompt {index} is text but {target.name} has no tokenizer: give token ids")
        if not isinstance(prompt, str):
            tokens = target.tokenizer.encode_chat(prompt, **({} if now is None else {"now": now}), **template_arguments)
        elif prompt:
            tokens = target.tokenizer.encode(prompt)
        else:
            tokens = []
    else:
        if not isinstance(prompt, Sequence | np.ndarray) or not all(isinstance(t, int | np.integer) for t in prompt):
            raise InputError(f"prompt {index} must be a string, a chat or a list of token ids, got {prompt!r:.60}")
        tokens = [int(token) for token in prompt]
    if len(tokens) == 0:
        raise InputError(f"prompt {index} is empty: give at least one token (for none but BOS, give its id)")
    for token in tokens:
        if not 0 <= token < target.config.vocab_size:
            size = target.config.vocab_size
            raise InputError(f"prompt {index}: token id {token} is outside the vocabulary of {size} (0..{size - 1})")
    return tokens
