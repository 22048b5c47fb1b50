"""Prompts in any accepted form, as token ids."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from deer_jax.data.chats import excerpt, is_chat, normalised, plain
from deer_jax.data.templates import ArgumentError, check_name
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.errors import InputError, PromptError
from deer_jax.models.target import Target


def encode_prompts(
    target: Target,
    prompts: Any,
    template_arguments: Mapping[str, Any] | None = None,
    now: datetime.datetime | None = None,
) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
      prompts: a string, a chat, or a list of strings, chats or token-id lists; or an array of token ids, [T] of one
        prompt or [B, T] of several of one length. A chat is a list of messages with role and content, or a mapping
        {"messages": ..., "tools": ..., "documents": ..., "chat_template_kwargs": ...}; see `data.chats`. Strings get
        BOS if the tokenizer adds one; chats go through the tokenizer's template, which writes its own.
      template_arguments: passed to the template; a chat's own chat_template_kwargs win.
      now: the moment that templates which write the date write; None is the present.

    Raises InputError for a list that is none, PromptError for anything about one prompt.
    """
    if isinstance(prompts, str) or is_chat(prompts):
        prompts = [prompts]
    if isinstance(prompts, np.ndarray | jax.Array):
        if not np.issubdtype(prompts.dtype, np.integer) or prompts.ndim not in (1, 2):
            raise InputError(
                "prompts as an array must be token ids, integers [T] of one prompt or [B, T] of several, got "
                f"{prompts.dtype} of shape {prompts.shape}"
            )
        prompts = list(np.atleast_2d(np.asarray(prompts)))
    if not isinstance(prompts, Sequence):
        raise InputError(f"prompts must be a string, a chat or a list of these, got {type(prompts).__name__}")
    if not prompts:
        raise InputError("prompts is empty: give at least one")
    if all(is_whole(prompt) for prompt in prompts):
        raise InputError("prompts is one list of token ids: wrap it in a list, [[1, 2, 3]]")
    arguments = plain(dict(template_arguments or {}), "template_arguments")
    for name in arguments:
        check_name(name)
    return [_encode(target, i, prompt, arguments, now) for i, prompt in enumerate(prompts)]


def _encode(
    target: Target, index: int, prompt: Any, template_arguments: Mapping[str, Any], now: datetime.datetime | None
) -> list[int]:
    said = isinstance(prompt, str) or is_chat(prompt)
    if said:
        if target.tokenizer is None:
            raise PromptError(index, f"is text but {target.name} has no tokenizer: give token ids")
        try:
            if not isinstance(prompt, str):
                tokens = _encode_chat(target, prompt, template_arguments, now)
            else:
                tokens = target.tokenizer.encode(prompt) if prompt else []
        except InputError as error:
            if isinstance(error, ArgumentError) and error.name in template_arguments:
                raise
            raise PromptError(index, str(error)) from None
    else:
        tokens = _ids(prompt)
        if tokens is None:
            raise PromptError(
                index, f"must be a string, a chat or a list of token ids, got {excerpt(prompt, quoted=False)}"
            )
    if len(tokens) == 0:
        raise PromptError(index, "is empty: give at least one token (for none but BOS, give its id)")
    size = target.config.vocab_size
    for token in tokens:
        if not 0 <= token < size:
            text = target.tokenizer.token(token) if said and isinstance(target.tokenizer, Tokenizer) else None
            name = excerpt(token, quoted=False) if text is None else f"{token} ({excerpt(text)})"
            raise PromptError(index, f"token id {name} is outside the vocabulary of {size} (0..{size - 1})")
    return tokens


def _encode_chat(
    target: Target, prompt: Any, template_arguments: Mapping[str, Any], now: datetime.datetime | None
) -> list[int]:
    assert target.tokenizer is not None
    chat = normalised(prompt)
    if chat["messages"][-1]["role"] == "assistant":
        raise InputError(
            "ends with a message of the assistant, which the target would answer once more; leave it out: the target "
            "writes its own"
        )
    for name in chat.get("chat_template_kwargs", {}):
        check_name(name)
    given = {**template_arguments, **{key: chat[key] for key in ("tools", "documents") if key in chat}}
    return target.tokenizer.encode_chat(chat["messages"], now=now, **{**given, **chat.get("chat_template_kwargs", {})})


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _ids(prompt: Any) -> list[int] | None:
    """Token ids as a list; None if the prompt is none of them."""
    if isinstance(prompt, np.ndarray | jax.Array):
        prompt = np.asarray(prompt)
        whole = prompt.ndim == 1 and np.issubdtype(prompt.dtype, np.integer)
        return prompt.tolist() if whole or (prompt.ndim == 1 and not prompt.size) else None
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) and all(is_whole(token) for token in prompt):
        return [int(token) for token in prompt]
    return None
