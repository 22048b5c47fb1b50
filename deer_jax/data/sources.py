"""Prompt files as they are published: rows of JSON, recognised by their fields.

    fields                     published as                      prompt
    messages                   chat data                         the chat, without the assistant's last turns
    conversations              ShareGPT                          the same
    tokens                     token ids                         the ids
    turns                      MT-Bench, Spec-Bench              the first turn
    text, test_list            MBPP (full)                       task and tests, see `mbpp_prompt`
    prompt, test_list          MBPP (sanitized)                  the same
    prompt, answer (ids)       answer files of `answers`         the prompt's ids; read `whole`, those of both
    prompt                     HumanEval, LiveCodeBench, plain   the text, the chat or the ids
    instruction, input         Alpaca                            both texts, joined with a blank line
    question                   GSM8K                             the text as it stands
    problem                    MATH                              the text as it stands

HumanEval prompts are the start of a file, to be continued; the others speak to a model that follows instructions.
Beside a chat, `system` becomes its first message, and `tools`, `documents` and `chat_template_kwargs` go to the chat
template. A field beside a text that changes the task is an error: nothing of a row that matters is left out silently.
"""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deer_jax.data import chats
from deer_jax.data.chats import UNREAD, Chat, as_chat, check_text, excerpt, is_chat
from deer_jax.data.patterns import Pattern, is_pattern
from deer_jax.data.rows import read_rows
from deer_jax.data.templates import check_name
from deer_jax.errors import InputError, NotFiniteError, PromptError, RunError
from deer_jax.formats import parse_json, parse_yaml
from deer_jax.stores import place

# The first of these whose fields a row has says what the row is.
KINDS = (
    ("messages",),
    ("conversations",),
    ("tokens",),
    ("turns",),
    ("text", "test_list"),
    ("prompt", "test_list"),
    ("prompt",),
    ("instruction",),
    ("question",),
    ("problem",),
)
IDS = ("id", "task_id", "question_id", "unique_id")
# Beside a text, each of these is a part of the task; beside a chat, only what no message can hold.
BESIDE_TEXT = (
    "input", "inputs", "instruction", "instructions", "question", "query", "context", "contexts", "passage", "passages",
    "paragraph", "article", "document", "documents", "background", "choices", "options", "endings", "system",
    "system_prompt", "system_message", "history", "tools", "functions", "story", "suffix", *UNREAD,
)  # fmt: skip
BESIDE_CHAT = (
    "functions", "system_prompt", "system_message", "instruction", "input", "context", "passage", "choices", "options",
    *UNREAD,
)  # fmt: skip
CHOICE = re.compile(r"[A-E]|(option|choice|answer)_?[a-e1-5]", re.IGNORECASE)  # one column for each, beside a question


class _EmptyPrompt(InputError):
    """A prompt of no text, messages or ids."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a file or of the command line.

    Attributes:
      id: the file's own name of it, or its number.
      content: text, a chat (see `data.chats`), or token ids.
      where: where it stands: "file.jsonl:2", "file.json: entry 2", "--prompt 2".
    """

    id: str
    content: str | Chat | list[int]
    where: str = dataclasses.field(default="", compare=False)

    @property
    def place(self) -> str:
        """Where it stands, with its own name if it has one."""
        numbered = self.where.endswith((f":{self.id}", f" {self.id}"))
        return self.where if numbered else f"{self.where} (id {excerpt(self.id, quoted=False)})"


def read_prompts(
    path: str | Path, *, field: str | None = None, limit: int | None = None, chat: bool = False, whole: bool = False,
    allow_empty: bool = False,
) -> list[Prompt]:  # fmt: skip
    """The prompts of a file of JSON lines (.jsonl, .jsonl.gz) or of one JSON array, in its order.

    The assistant's turns at the end of a chat are left out, with one warning for the file: the target answers.

    Args:
      field: the field that holds the prompt, or a pattern of several: "{instruction}\\n{input}"; None recognises the
        published formats.
      limit: how many to read from the top; None reads all.
      chat: wrap each text as one user message, for the tokenizer's chat template; chats and ids stay what they are.
      whole: a line of an answer file is its prompt and its answer together.
      allow_empty: an empty prompt is an empty text, instead of an error.

    Raises InputError, naming file and line, for anything that cannot be read as prompts.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    pattern = Pattern.parse(field) if field is not None and is_pattern(field) else None
    found: list[Prompt] = []
    cut = 0
    for where, number, row in read_rows(place(path)):
        try:
            if pattern is not None:
                content = _checked(pattern.fill(row, where), "the pattern", row, where)
            else:
                content = _content(row, field, where, whole)
        except _EmptyPrompt:
            if not allow_empty:
                raise
            content = ""
        if chat and content and isinstance(content, str):
            content = as_chat(content)
        elif is_chat(content):
            content, answered = _without_answer(content, where)
            cut += answered
        name = next((row[key] for key in IDS if row.get(key) is not None), number)
        if not isinstance(name, str | int | float):
            raise InputError(f"{where}: the id must be a text or a number, found {type(name).__name__}")
        found.append(Prompt(check_text(str(name), f"{where}: id"), content, where))
        if len(found) == limit:
            break
    if not found:
        raise InputError(f"{path}: no prompts, the file is empty")
    if cut:
        warnings.warn(
            f"{path}: {cut} of {len(found)} prompts ended with the assistant's answer, which is left out: the target "
            "answers itself",
            stacklevel=2,
        )
    return found


def template_arguments(entries: Sequence[str], where: str) -> dict[str, Any]:
    """Arguments of a chat template from NAME=VALUE each; values are read as YAML. Errors name `where`."""
    found: dict[str, Any] = {}
    for text in entries:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InputError(f"{where}: expected NAME=VALUE, got {excerpt(text)}")
        if name in found:
            raise InputError(f"{where}: {excerpt(name)} is given twice")
        check_name(name, where)
        found[name] = chats.plain(parse_yaml(value, f"{where} {excerpt(name)}"), f"{where} {excerpt(name)}")
    return found


@contextlib.contextmanager
def placed(prompts: Sequence[Prompt]) -> Iterator[None]:
    """What is wrong with one of several prompts is said with its place in its file instead of its number."""
    try:
        yield
    except (PromptError, NotFiniteError) as error:
        if error.index >= len(prompts):
            raise
        kind = InputError if isinstance(error, PromptError) else RunError
        raise kind(f"{prompts[error.index].place}: {error.reason}") from None


def mbpp_prompt(task: str, tests: Sequence[str]) -> str:
    """The prompt of the MBPP paper (arXiv 2108.07732), without its worked examples.

    You are an expert Python programmer, and here is your task: TASK Your code should pass these tests:

    TESTS
    [BEGIN]
    """
    listed = "\n".join(tests)
    return (
        f"You are an expert Python programmer, and here is your task: {task.strip()} "
        f"Your code should pass these tests:\n\n{listed}\n[BEGIN]\n"
    )


def _content(row: Mapping[str, Any], field: str | None, where: str, whole: bool) -> str | Chat | list[int]:
    if field is not None:
        if field not in row:
            raise InputError(f"{where}: no field {excerpt(field)}; its fields: {_fields(row)}")
        return _checked(row[field], field, row, where)
    if whole and _is_ids(row.get("prompt")) and _is_ids(row.get("answer")):
        return _checked(row["prompt"] + row["answer"], "prompt", row, where)
    kind = next((kind for kind in KINDS if all(row.get(name) is not None for name in kind)), None)
    if kind is None:
        raise InputError(f"{where}: no field that holds a prompt; its fields: {_fields(row)}; name one")
    value = row[kind[0]]
    if kind == ("turns",):
        if not isinstance(value, list) or not value:
            raise InputError(f"{where}: turns must be a list of texts")
        return _checked(value[0], "turns", row, where)
    if kind == ("instruction",) and isinstance(value, str) and isinstance(row.get("input"), str):
        parts = [part for part in (value, row["input"]) if part.strip()]
        return _checked("\n\n".join(parts), "instruction", row, where, read=("input",))
    if kind[0] in ("messages", "conversations", "tokens") and not isinstance(value, list):
        raise InputError(f"{where}: {kind[0]} must be a list, found {type(value).__name__}")
    content = _checked(value, kind[0], row, where)
    if kind[1:] == ("test_list",):
        tests = row["test_list"]
        if not isinstance(content, str) or not isinstance(tests, list) or not all(isinstance(t, str) for t in tests):
            raise InputError(f"{where}: {kind[0]} must be a text and test_list a list of texts")
        content = check_text(mbpp_prompt(content, tests), f"{where}: test_list")
    return content


def _checked(
    value: Any, field: str, row: Mapping[str, Any], where: str, read: Sequence[str] = ()
) -> str | Chat | list[int]:
    """A text, a chat or token ids; anything else is refused. read: what else of the row has become part of it."""
    if isinstance(value, str | list) and not value:
        raise _EmptyPrompt(f"{where}: {excerpt(field, quoted=False)} is empty")
    if _is_ids(value):
        return value
    if isinstance(value, str):
        if field != "the pattern":
            _check_beside(row, field, BESIDE_TEXT, (field, *read), where)
        return check_text(value, f"{where}: {excerpt(field, quoted=False)}")
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return _chat(value, field, row, where)
    raise InputError(
        f"{where}: {excerpt(field, quoted=False)} must be a text, a list of messages (role, content) or of token ids"
    )


def _chat(messages: list[dict[str, Any]], field: str, row: Mapping[str, Any], where: str) -> Chat:
    """The chat in a field, with what stands beside it."""
    _check_beside(row, field, BESIDE_CHAT, (field,), where)
    given: dict[str, Any] = {"messages": messages}
    for key in chats.COMPANIONS:
        if not _is_empty(row.get(key)):
            value = row[key]
            # Some data sets store it as a text, so that all rows of a column have one type.
            given[key] = parse_json(value, f"{where}: {key}") if isinstance(value, str) else value
    try:
        found = chats.normalised(given)
        system = row.get("system")
        if not _is_empty(system):
            if not isinstance(system, str):
                raise InputError(f"system must be a text, found {type(system).__name__}")
            if found["messages"][0]["role"] == "system":
                raise InputError("has a system message and the field 'system' beside it; keep one of them")
            found["messages"].insert(0, {"role": "system", "content": check_text(system, "system")})
    except InputError as error:
        raise InputError(f"{where}: {excerpt(field, quoted=False)}: {error}") from None
    return chats.compact(found)


def _without_answer(chat: Any, where: str) -> tuple[Chat, bool]:
    """The chat up to where the target is to answer, and whether turns of the assistant had to go for it."""
    found = chats.normalised(chat)
    messages = list(found["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        roles = excerpt(", ".join(message["role"] for message in found["messages"]), quoted=False)
        raise InputError(f"{where}: the chat has no user message to answer; its roles: {roles}")
    if not any(message.get("content", "").strip() for message in messages if message["role"] == "user"):
        raise _EmptyPrompt(f"{where}: the messages of the user are empty")
    return chats.compact(found | {"messages": messages}), len(messages) < len(found["messages"])


def _check_beside(row: Mapping[str, Any], field: str, beside: Sequence[str], read: Sequence[str], where: str) -> None:
    """InputError for a field of the row that would be left out although it is a part of the task."""
    names = (*beside, *(name for name in row if CHOICE.fullmatch(name)))
    second = next((name for name in names if name not in read and not _is_empty(row.get(name))), None)
    if second is None:
        return
    name, alone = excerpt(field, quoted=False), f'--field "{{{excerpt(field, quoted=False)}}}"'
    if beside is BESIDE_CHAT:
        known = "write them as tools" if second == "functions" else "write it into the messages"
        raise InputError(f"{where}: '{second}' beside {name} would be left out; {known}, or remove the field")
    if isinstance(row[second], str):
        both = f'--field "{{{name}}}\\n{{{second}}}"'
        raise InputError(f"{where}: '{second}' beside '{name}' would be left out; give {both}, or {alone} without it")
    raise InputError(
        f"{where}: '{second}' beside '{name}' would be left out; write both into one text or chat, or give {alone} "
        "to do without it"
    )


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or value is False or value in ([], {})


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _fields(row: Mapping[str, Any]) -> str:
    names = ", ".join(excerpt(name, quoted=False) for name in list(row)[:20]) or "none"
    return names if len(row) <= 20 else f"{names} and {len(row) - 20} more"
