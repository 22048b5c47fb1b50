"""Chats in every form they come in, as one form: messages that a chat template reads.

A chat is a list of messages, or a mapping of these with what else the template gets:

    [{"role": "user", "content": "hi"}]
    {"messages": [{"role": "user", "content": "hi"}], "tools": [...], "documents": [...], "chat_template_kwargs": {...}}

A message has a role and a content, a text or text parts; what else it has (name, tool_calls, reasoning_content, ...) is
the template's to read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deer_jax.config import nearest
from deer_jax.errors import InputError, one_line

COMPANIONS = ("tools", "documents", "chat_template_kwargs")
KEYS = ("messages", *COMPANIONS)
# Who speaks in ShareGPT's conversations, as a role.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}
# What a message or part may hold beside its text that would be left out.
UNREAD = ("image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos", "file", "files")
DEPTH = 100  # of lists and mappings within a message

Chat = list[dict[str, Any]] | dict[str, Any]


def is_chat(value: Any) -> bool:
    """Whether a prompt is meant as a chat: messages, or a mapping. Several such mappings are several chats."""
    if isinstance(value, Mapping):
        return True
    listed = isinstance(value, Sequence) and not isinstance(value, str) and bool(value)
    return listed and all(isinstance(message, Mapping) and "messages" not in message for message in value)


def as_chat(text: str) -> list[dict[str, Any]]:
    """The text as a chat of one user message."""
    return [{"role": "user", "content": text}]


def normalised(chat: Any) -> dict[str, Any]:
    """The mapping form of a chat, with what it has of KEYS: every message with a role, and its content as one text.

    Raises InputError, without a name of the chat, for anything that is none.
    """
    if not isinstance(chat, Mapping):
        return {"messages": messages_of(chat)}
    for key in chat:
        if key not in KEYS:
            if "role" in chat and "messages" not in chat:
                raise InputError("is a message alone; put it into a list, [{...}]")
            raise InputError(f"has an unknown key {excerpt(key)}, {nearest(str(key)[:50], KEYS)}")
    if "messages" not in chat:
        raise InputError("is a mapping without messages")
    found: dict[str, Any] = {"messages": messages_of(chat["messages"])}
    for key in ("tools", "documents"):
        value = chat.get(key)
        if value is None or (isinstance(value, Sequence) and not value):
            continue
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise InputError(f"{key} must be a list, got {type(value).__name__}")
        for place, entry in enumerate(value):
            if not isinstance(entry, Mapping):
                raise InputError(
                    f"{key}[{place}] must be a mapping, got {type(entry).__name__}"
                    + ("; transformers.utils.get_json_schema describes a function" if callable(entry) else "")
                )
        found[key] = plain(value, key)
    arguments = chat.get("chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise InputError(f"chat_template_kwargs must be a mapping, got {type(arguments).__name__}")
    if arguments:
        found["chat_template_kwargs"] = plain(arguments, "chat_template_kwargs")
    return found


def compact(chat: dict[str, Any]) -> Chat:
    """A normalised chat in its shortest form: the messages alone where nothing is beside them."""
    return chat if len(chat) > 1 else chat["messages"]


def messages_of(values: Any) -> list[dict[str, Any]]:
    """Messages of a list, those of ShareGPT (from, value) included."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(f"messages must be a list of messages (role, content), got {type(values).__name__}")
    if not values:
        raise InputError("has no messages")
    return [_message(value, f"message {number}") for number, value in enumerate(values, 1)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be a mapping of role and content, got {type(value).__name__}")
    found = plain({key: entry for key, entry in value.items() if entry is not None and key != "content"}, where)
    content = value.get("content")
    if "from" in found and "role" not in found:  # ShareGPT
        speaker, content = found.pop("from"), found.pop("value", content)
        role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            raise InputError(f"{where} is from {excerpt(speaker)}, which is none of {', '.join(SPEAKERS)}")
        found = {"role": role, **found}
    role = found.get("role")
    if not isinstance(role, str) or not role:
        raise InputError(f"{where} has {'no role' if role is None else f'the role {excerpt(role)}'}; a role is a text")
    role = SPEAKERS.get(role.lower(), role)  # "model", "Assistant": what templates and we call the assistant
    found["role"] = role
    if content is None:
        if not found.get("tool_calls"):
            raise InputError(f"{where} ({excerpt(role, quoted=False)}) has no content; only one with tool_calls may")
        return found
    for key in UNREAD:
        if found.get(key):
            raise InputError(f"{where} has {excerpt(key)} beside its text; only text can be read")
    return {"role": role, "content": _text(content, where), **{key: v for key, v in found.items() if key != "role"}}


def _text(content: Any, where: str) -> str:
    """A message's content as one text: its text parts joined."""
    if isinstance(content, str):
        return check_text(content, f"{where}: content")
    if not isinstance(content, Sequence):
        raise InputError(f"{where}: content must be a text or a list of text parts, got {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind == "text" and isinstance(part.get("text"), str):
            if unread := next((key for key in UNREAD if part.get(key)), None):
                raise InputError(f"{where}: a text part has {excerpt(unread)} too; only text can be read")
            texts.append(part["text"])
        elif kind == "text":
            raise InputError(f"{where}: a text part has no text")
        else:
            what = f"type {excerpt(kind)}" if kind is not None else f"kind {type(part).__name__}"
            raise InputError(f"{where}: content has a part of {what}; only text can be read")
    return check_text("".join(texts), f"{where}: content")


def plain(value: Any, where: str, depth: int = DEPTH) -> Any:
    """The value in what JSON has: texts, numbers, lists, mappings with texts as keys; others are an InputError."""
    if depth == 0:
        raise InputError(f"{where}: nested too deeply")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return check_text(str(value), where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{where}: the key {excerpt(key)} must be a text")
        return {check_text(key, where): plain(entry, where, depth - 1) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, where, depth - 1) for entry in value]
    raise InputError(f"{where}: a {type(value).__name__} is no text, number, list or mapping; write it as a text")


def check_text(text: str, where: str) -> str:
    """The text, if it is one: with half of a surrogate pair it has no bytes, and so no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start + 1} is half of a surrogate pair ({text[error.start]!a}), which is "
            "no text; correct it"
        ) from None
    return text


def excerpt(value: Any, most: int = 60, *, quoted: bool = True) -> str:
    """A foreign value in an error: on one line, printable, and short."""
    try:
        text = value[: most + 1] if isinstance(value, str) else f"{value!r:.{most + 1}}"
    except (RecursionError, ValueError):  # nested a thousand deep, a number of thousands of digits
        text = f"of type {type(value).__name__}"
    text = text if text.isprintable() else ascii(text)[1:-1]
    text = one_line(ValueError(text), most) if text.strip() else text[:most]
    return f"'{text}'" if quoted else text
