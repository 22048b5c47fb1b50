"""Text, JSON and YAML from elsewhere, read within bounds: whatever is wrong with a file is an InputError of one line.

JSON is also written here, so that whatever was read can be written, half of a surrogate pair included.
"""

import json
import os
import re
import stat
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from deer_jax.errors import InputError, RunError, one_line, shown
from deer_jax.files import WRONG_PATH
from deer_jax.stores import local_file

MOST_BYTES = 2**28  # of a file that is read whole; a tokenizer.json has some ten million
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
MOST_NODES = 100_000  # entries of a YAML file, those repeated through aliases counted as often as they stand


def unreadable(path: Path | str, error: OSError | ValueError) -> InputError | RunError:
    """One line for what the system says about reading a path: InputError for a wrong path, RunError otherwise."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such file")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    wrong = not isinstance(error, OSError) or error.errno is None or error.errno in WRONG_PATH
    return (InputError if wrong else RunError)(f"{path}: cannot be read: {reason}")


def open_file(path: Path | str, *, regular: bool = True) -> int:
    """An open descriptor for reading.

    regular: refuse what is no file, such as a pipe, which would be waited for; a folder is refused in any case.
    """
    try:
        descriptor = os.open(local_file(path), os.O_RDONLY | (os.O_NONBLOCK if regular else 0))
    except (OSError, ValueError) as error:
        raise error if isinstance(error, InputError) else unreadable(path, error) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode) or (regular and not stat.S_ISREG(mode)):
        os.close(descriptor)
        raise InputError(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; name a file")
    return descriptor


def read_bytes(path: Path | str, *, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most so many bytes."""
    with os.fdopen(open_file(path), "rb") as stream:
        try:
            content = stream.read(most + 1)
        except OSError as error:
            raise unreadable(path, error) from None
    if len(content) > most:
        raise InputError(f"{path}: has more than {most:,} bytes, too many for what it should be")
    return content


def read_text(path: Path | str, *, most: int = MOST_BYTES) -> str:
    """The content of a UTF-8 file."""
    try:
        return read_bytes(path, most=most).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text; a key that stands twice in an object is refused."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")  # some editors put a mark before it
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""  # pyrefly: ignore
        raise InputError(f"{where}: not valid JSON: {error.msg} at {line}column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InputError(f"{where}: not readable as JSON: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits, a key that stands twice
        raise InputError(f"{where}: not readable as JSON: {one_line(error)}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def read_json(path: Path | str, *, most: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes; anything else is an InputError."""
    values = parse_json(read_bytes(path, most=most), str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def json_bytes(values: Any, *, indent: int | None = None) -> bytes:
    """A JSON text with a newline at its end, in UTF-8; a lone surrogate becomes the escape that JSON has for it."""
    return (json.dumps(values, indent=indent, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; a file that holds something else is an error with its line."""
    values = parse_yaml(read_text(path, most=2**22), str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, of at most MOST_NODES entries; a key that stands twice is refused, with its line."""
    try:
        loader = _Loader(text, where)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, where)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        what = yaml.YAMLError(" ".join(filter(None, (error.context, error.problem))))
        raise InputError(f"{where}: not valid YAML: {line}{one_line(what)}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {one_line(error)}") from None
    except RecursionError:
        raise InputError(f"{where}: not readable as YAML: nested too deeply") from None
    except (ValueError, OverflowError, AttributeError, TypeError, LookupError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not readable as YAML: {one_line(error)}") from None


class _Loader(yaml.SafeLoader):
    """The safe loader, which takes the last of several equal keys; here they are an error, and so is a long text."""

    def __init__(self, text: str, where: str):
        super().__init__(text)
        self._where, self._nodes = where, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes += 1
        if self._nodes > MOST_NODES:  # before they have all been read, which takes long
            raise _too_many(self._where)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(name)} stands here and in line {seen[name]}", key.start_mark
                )
            seen[name] = line
        return super().construct_mapping(node, deep)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Whole numbers as people write them: YAML 1.1 also takes 1:30 for 90 and 010 for 8."""
    if not WHOLE.fullmatch(node.value):
        raise yaml.constructor.ConstructorError(
            None, None, f"the number {node.value:.40} may be read in several ways: write it plainly, or in quotes",
            node.start_mark,
        )  # fmt: skip
    return int(node.value.replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def _count(node: yaml.Node, where: str) -> None:
    """InputError if a document has too many entries; an alias counts as all it stands for."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MOST_NODES + 1  # of one that holds itself
            if isinstance(node, yaml.MappingNode):
                parts = [each for pair in node.value for each in pair]
            else:
                parts = node.value if isinstance(node, yaml.SequenceNode) else []
            sizes[id(node)] = 1 + sum(size(each) for each in parts)
        return sizes[id(node)]

    if size(node) > MOST_NODES:
        raise _too_many(where)


def _too_many(where: str) -> InputError:
    return InputError(f"{where}: has more than {MOST_NODES:,} entries, aliases counted as often as they stand")


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The value if it is keys and values; InputError otherwise."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be keys and values, got {shown(value)}")
    return value


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two plain values, one entry each: ``stages.0.steps was 10, is 20``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{where}{key}.")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line for i, pair in enumerate(zip(before, now, strict=True)) for line in differences(*pair, f"{where}{i}.")
        ]
    return [] if before == now else [f"{where.rstrip('.')} was {before!r:.80}, is {now!r:.80}"]
