"""Prompt files as they are published: JSON lines, recognised by their fields.

    fields                     published as                      prompt
    messages                   chat data                         the chat
    tokens                     token ids                         the ids
    turns                      MT-Bench, Spec-Bench              the first turn
    text, test_list            MBPP (full)                       task and tests, see `mbpp_prompt`
    prompt, test_list          MBPP (sanitized)                  the same
    prompt, answer (ids)       answer files of `answers`         the prompt's ids; read `whole`, those of both
    prompt                     HumanEval, LiveCodeBench, plain   the text as it stands
    question                   GSM8K                             the text as it stands
    problem                    MATH                              the text as it stands

HumanEval prompts are the start of a file, to be continued; the others speak to a model that follows instructions.
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deer_jax.errors import InputError

# The first of these whose fields a line has says what the line is.
KINDS = (
    ("messages",),
    ("tokens",),
    ("turns",),
    ("text", "test_list"),
    ("prompt", "test_list"),
    ("prompt",),
    ("question",),
    ("problem",),
)
IDS = ("id", "task_id", "question_id", "unique_id")


class _EmptyPrompt(InputError):
    """A prompt of no text, messages or ids."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
      id: the file's own name of it, or its line number.
      content: text, a chat (list of messages with role and content), or token ids.
    """

    id: str
    content: str | list[dict[str, Any]] | list[int]


def read_prompts(
    path: str | Path, *, field: str | None = None, limit: int | None = None, chat: bool = False, whole: bool = False,
    allow_empty: bool = False,
) -> list[Prompt]:  # fmt: skip
    """The prompts of a `.jsonl` or `.jsonl.gz` file, in its order.

    Args:
      field: the field that holds the prompt; None recognises the published formats.
      limit: how many to read from the top; None reads all.
      chat: wrap each text as one user message, for the tokenizer's chat template; chats and ids stay what they are.
      whole: a line of an answer file is its prompt and its answer together.
      allow_empty: an empty prompt is an empty text, instead of an error.

    Raises InputError, naming file and line, for anything that cannot be read as prompts.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    found = []
    for number, row in _rows(Path(path)):
        where = f"{path}:{number}"
        try:
            content = _content(row, field, where, whole)
        except _EmptyPrompt:
            if not allow_empty:
                raise
            content = ""
        if chat and content and isinstance(content, str):
            content = as_chat(content)
        name = next((row[key] for key in IDS if row.get(key) is not None), number)
        found.append(Prompt(str(name), content))
        if len(found) == limit:
            break
    if not found:
        raise InputError(f"{path}: no prompts, the file is empty")
    return found


def template_arguments(entries: Sequence[str], where: str) -> dict[str, Any]:
    """Arguments of a chat template from NAME=VALUE each; values are read as YAML. Errors name `where`."""
    found = {}
    for text in entries:
        name, equals, value = text.partition("=")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not name or not equals:
            raise InputError(f"{where}: expected NAME=VALUE, got '{text}'")
    return found


def as_chat(text: str) -> list[dict[str, Any]]:
    """The text as a chat of one user message."""
    return [{"role": "user", "content": text}]


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


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and object of each line that is not blank."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line := line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                    yield number, row
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}:{number}: not UTF-8") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a .jsonl file in it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _content(row: Mapping[str, Any], field: str | None, where: str, whole: bool):
    if field is not None:
        if field not in row:
            raise InputError(f"{where}: no field '{field}'; its fields: {', '.join(row) or 'none'}")
        return _checked(row[field], field, where)
    if whole and _is_ids(row.get("prompt")) and _is_ids(row.get("answer")):
        return _checked(row["prompt"] + row["answer"], "prompt", where)
    kind = next((kind for kind in KINDS if all(name in row for name in kind)), None)
    if kind is None:
        raise InputError(f"{where}: no field that holds a prompt; its fields: {', '.join(row) or 'none'}; name one")
    value = row[kind[0]]
    if kind == ("turns",):
        if not isinstance(value, list) or not value:
            raise InputError(f"{where}: turns must be a list of texts")
        value = value[0]
    content = _checked(value, kind[0], where)
    if kind[1:] == ("test_list",):
        tests = row["test_list"]
        if not isinstance(content, str) or not isinstance(tests, list) or not all(isinstance(t, str) for t in tests):
            raise InputError(f"{where}: {kind[0]} must be a text and test_list a list of texts")
        content = mbpp_prompt(content, tests)
    return content


def _checked(value: Any, field: str, where: str):
    """A text, a chat or token ids; anything else is refused."""
    if isinstance(value, str | list) and not value:
        raise _EmptyPrompt(f"{where}: {field} is empty")
    if isinstance(value, str) or _is_ids(value):
        return value
    messages = value if isinstance(value, list) else [None]
    if all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        return value
    raise InputError(f"{where}: {field} must be a text, a list of messages (role, content) or of token ids")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
