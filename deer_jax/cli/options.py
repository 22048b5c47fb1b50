"""A verb's options: a frozen dataclass in, the command line and a YAML file parsed into it.

Every field is an option of the same name, hyphens for underscores, with its type and default, required without one and
repeatable if it is a tuple (of numbers: also separated by commas):

    limit: Annotated[int | None, "read only the first N prompts", "N"] = None     type, help text, name of the value

Base classes are the groups of the help page, headed by their docstrings. What is wrong is an `InputError` of one line.
"""

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NewType, NoReturn, TypeVar

from deer_jax.config import nearest
from deer_jax.decoding.auto import AUTO
from deer_jax.errors import InputError, one_line
from deer_jax.formats import read_yaml
from deer_jax.sharding import MeshShape
from deer_jax.stores import place

Options = TypeVar("Options")
Source = NewType("Source", str)  # a path, or what else names a model: a hub id, NAME=PATH
Length = NewType("Length", int)  # a draft length: a whole number, or AUTO
Number = TypeVar("Number", int, float, int | str)
SHOWN = 60  # letters of a wrong value


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `InputError`s."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise InputError(message if len(message) <= 5 * SHOWN else f"{message[: 5 * SHOWN]}...")


class _Once(argparse.Action):
    """Stores the value of an option that takes one: a second, different one is an error."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        _store(self, parser, namespace, values)


class _Switch(argparse.BooleanOptionalAction):
    """The same for --NAME and --no-NAME."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        assert option_string is not None
        _store(self, parser, namespace, not option_string.startswith("--no-"))


def _store(action: argparse.Action, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any) -> None:
    before = getattr(namespace, action.dest, value)
    if before != value:
        parser.error(
            f"{action.option_strings[0]} is given twice, as {shown(before)} and {shown(value)}, but takes one value"
        )
    setattr(namespace, action.dest, value)


def parse(cls: type[Options], verb: str, argv: Sequence[str], example: str, more: Callable[[], str] = str) -> Options:
    """The options in argv; `--help` prints and exits. With a `config` field, a YAML file may give them too.

    The command line wins over the file. more: what the help page says behind the options.
    """
    parser = _parser(cls, verb, example)
    if {"-h", "--help"} & set(argv) and (text := more()):
        parser.epilog = f"{text}\n\n{parser.epilog}"
    given = _parse(cls, parser, argv)
    if given.get("config") is not None:
        path = given["config"]
        try:
            given = _parse(cls, parser, _as_arguments(cls, read_yaml(path))) | given
        except InputError as error:
            raise InputError(str(error) if str(error).startswith(f"{path}:") else f"{path}: {error}") from None
    for field in _fields(cls):
        if field.default is dataclasses.MISSING and field.name not in given:
            raise InputError(f"{_flag(field.name)} is missing; see deer-jax {verb} --help")
    return cls(**given)


def _parse(cls: type, parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """The options that are in argv, without defaults."""
    found, unknown = parser.parse_known_args(list(argv))
    if unknown:
        name = unknown[0].partition("=")[0][:SHOWN]
        names = [field.name for field in _fields(cls)]
        if not name.startswith("-"):
            file = next((each for each in ("recipe", "steps", "config") if each in names), None)
            meant = f"; did you mean --{file} {name}?" if file and name.endswith((".yaml", ".yml")) else ""
            raise InputError(f"unexpected argument '{name}'{meant or '; options start with --'}")
        flags = ["--help", *map(_flag, names)]
        raise InputError(f"unknown option '{name}', {nearest(name, flags)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(found).items()}


def _parser(cls: type, verb: str, example: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"deer-jax {verb}",
        description=inspect.getdoc(cls),
        epilog=f"example, in the repository:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage=f"deer-jax {verb} [options]",
    )
    hints, defaults = typing.get_type_hints(cls, include_extras=True), {f.name: f.default for f in _fields(cls)}
    for base in (cls, *reversed(cls.__mro__[1:-1])):
        group = parser.add_argument_group(verb if base is cls else base.__doc__)
        for name in inspect.get_annotations(base):
            group.add_argument(_flag(name), **_argument(hints[name], defaults[name]))
    return parser


def _argument(hint: Any, default: Any) -> dict[str, Any]:
    """What `add_argument` takes for a field: Annotated[int, "how many"], 3 -> type, metavar and help."""
    kind, help, *metavar = typing.get_args(hint)
    if default is dataclasses.MISSING:
        help += " (required)"
    elif default is not None and default is not False and default != ():
        help += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
    argument: dict[str, Any] = {"help": help.replace("%", "%%")}
    if kind is bool:
        return argument | {"action": _Switch}
    kind, several = _kind(kind)
    if typing.get_origin(kind) is typing.Literal:
        return argument | {"action": _Once, "choices": typing.get_args(kind)}
    argument["metavar"] = metavar[0] if metavar else {str: "TEXT", int: "N", float: "X", Path: "FILE"}[kind]
    argument["action"] = ("extend" if kind in (int, float, Length) else "append") if several else _Once
    argument["type"] = {
        int: _integers if several else _integer, float: _floats if several else _float,
        Length: _lengths if several else _length, Path: _path, Source: _source, str: _text, MeshShape: _mesh,
    }[kind]  # fmt: skip
    return argument


def _kind(hint: Any) -> tuple[Any, bool]:
    """What one value of a field is, and whether there may be several: tuple[int, ...] | None -> int, True"""
    if types.NoneType in typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    return (typing.get_args(hint)[0], True) if typing.get_origin(hint) is tuple else (hint, False)


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)


def _integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"invalid int value: {shown(text)}")
    return int(text)


def _float(text: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) or not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"invalid float value: {shown(text)}")
    return float(text)


def _integers(text: str) -> list[int]:
    return _numbers(_integer, text)


def _floats(text: str) -> list[float]:
    return _numbers(_float, text)


def _length(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    try:
        return _integer(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a whole number or {AUTO}, got {shown(text)}") from None


def _lengths(text: str) -> list[int | str]:
    return _numbers(_length, text)


def _numbers(read: Callable[[str], Number], text: str) -> list[Number]:
    try:
        return [read(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"invalid comma-separated numbers value: {shown(text)}") from None


def _text(text: str) -> str:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise argparse.ArgumentTypeError(f"is not UTF-8: {shown(text)}")
    return text


def _mesh(text: str) -> MeshShape:
    try:
        return MeshShape.parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _path(text: str) -> Path:
    try:
        return place(_source(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _source(text: str) -> Source:
    """A path that the system takes; whether something is there is another question."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a path")
    try:
        os.stat(text)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise argparse.ArgumentTypeError(f"{shown(text)}: {reason}") from None
    return Source(text)


def shown(value: Any) -> str:
    """A wrong value as a message quotes it, of a sane length."""
    try:
        text = str(value)
    except ValueError:  # of thousands of digits, which Python does not print
        return f"an {type(value).__name__} of too many digits"
    return f"'{text}'" if len(text) <= SHOWN else f"'{text[:SHOWN]}...'"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _as_arguments(cls: type, values: Mapping[str, Any]) -> list[str]:
    """A YAML file's keys as they would stand on the command line, so that both are checked alike.

    {"chat": True, "draft_lengths": [2, 4], "template": {"x": False}}
    -> ["--chat", "--draft-lengths=2", "--draft-lengths=4", "--template=x=false"]
    """
    hints = {name: typing.get_args(hint)[0] for name, hint in typing.get_type_hints(cls, include_extras=True).items()}
    names = {field.name for field in _fields(cls)} - {"config"}
    arguments, seen = [], {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise InputError(f"unknown key {shown(key)}, {nearest(name[:SHOWN], names)}")
        if name in seen:
            raise InputError(f"the key '{key}' stands twice, also as '{seen[name]}'")
        seen[name] = key
        if value is None:
            continue
        if hints[name] is bool:
            if not isinstance(value, bool):
                raise InputError(f"key '{key}': expected true or false, got {shown(value)}")
            arguments.append(_flag(name if value else f"no_{name}"))
            continue
        kind, several = _kind(hints[name])
        if kind is MeshShape and isinstance(value, Mapping):  # as a recipe writes it
            value = ",".join(f"{axis}={count}" for axis, count in value.items())
        if isinstance(value, list | Mapping) and not several:
            raise InputError(f"key '{key}' takes one value, got {shown(value)}")
        if isinstance(value, Mapping):
            if kind in (int, float, Length):
                raise InputError(f"key '{key}' takes numbers, got {shown(value)}")
            value = [f"{k}={v if isinstance(v, str) else _as_json(v, f'{key}.{k}')}" for k, v in value.items()]
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, bool) or not isinstance(entry, str | int | float):
                what = f"got {shown(entry)}, a YAML {type(entry).__name__}; quotes make it text"
                raise InputError(f"key '{key}': expected text or a number, {what}")
            arguments.append(f"{_flag(name)}={entry if isinstance(entry, str) else _as_json(entry, key)}")
    return arguments


def _as_json(value: Any, key: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"key {shown(key)}: {one_line(error)}") from None
