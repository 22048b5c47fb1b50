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
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from deer_jax.config import nearest
from deer_jax.errors import InputError
from deer_jax.formats import read_yaml

Options = TypeVar("Options")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `InputError`s."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def parse(cls: type[Options], verb: str, argv: Sequence[str], example: str) -> Options:
    """The options in argv; `--help` prints and exits. With a `config` field, a YAML file may give them too.

    The command line wins over the file.
    """
    parser = _parser(cls, verb, example)
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
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            raise InputError(f"unexpected argument '{name}'; options start with --")
        flags = ["--help", *(_flag(field.name) for field in _fields(cls))]
        raise InputError(f"unknown option '{name}', {nearest(name, flags)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(found).items()}


def _parser(cls: type, verb: str, example: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"deer-jax {verb}",
        description=inspect.getdoc(cls),
        epilog=f"example:\n  {example}",
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
        return argument | {"action": argparse.BooleanOptionalAction}
    if types.NoneType in typing.get_args(kind):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return argument | {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
        argument["action"] = "extend" if kind in (int, float) else "append"
    argument["metavar"] = metavar[0] if metavar else {str: "TEXT", int: "N", float: "X", Path: "FILE"}[kind]
    argument["type"] = {int: _integers, float: _floats}[kind] if argument.get("action") == "extend" else kind
    return argument


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


_integers.__name__ = _floats.__name__ = "comma-separated numbers"  # argparse names the type in its errors


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _as_arguments(cls: type, values: Mapping[str, Any]) -> list[str]:
    """A YAML file's keys as they would stand on the command line, so that both are checked alike.

    {"chat": True, "draft_lengths": [2, 4], "template": {"x": False}}
    -> ["--chat", "--draft-lengths=2", "--draft-lengths=4", "--template=x=false"]
    """
    names = {field.name for field in _fields(cls)} - {"config"}
    arguments = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise InputError(f"unknown key '{key}', {nearest(name, names)}")
        if isinstance(value, bool):
            arguments.append(_flag(name if value else f"no_{name}"))
            continue
        if isinstance(value, Mapping):
            value = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items()]
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None:
                arguments.append(f"{_flag(name)}={entry}")
    return arguments
