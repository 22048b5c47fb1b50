"""Writes docs/api.md from the docstrings and the command line's options: python docs/make_api.py"""

import argparse
import dataclasses
import importlib
import inspect
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import deer_jax
from deer_jax.cli.docstrings import Items, sections
from deer_jax.cli.main import VERBS
from deer_jax.cli.options import _parser

PAGE = Path(__file__).with_name("api.md")
INTRODUCTION = """\
# API reference

Made from the docstrings by `make docs`; do not edit. What is not on this page may change without notice. The words are
in [glossary.md](glossary.md). Wrong arguments raise [InputError](#inputerror), a run that fails though its input was
right [RunError](#runerror); the command line then says one line and ends with status 2 or 1.
"""
RECORDS = """\
What the names above take and return. A recipe's YAML keys are the fields of [Recipe](#recipe); in a stage, the keys of
[Stage](#stage), [Corruption](#corruption) and [OptimizerConfig](#optimizerconfig) stand side by side.
"""


def page() -> str:
    """The text of docs/api.md."""
    public = {name: getattr(deer_jax, name) for name in sorted(deer_jax.__all__, key=str.lower)}
    classes = {name: value for name, value in public.items() if inspect.isclass(value)}
    functions = {name: value for name, value in public.items() if name not in classes}
    records = {cls.__name__: cls for cls in referenced(public)}
    parts = [
        INTRODUCTION,
        "\n".join(
            f"- {title}: " + ", ".join(f"[{name}](#{slug(prefix + name)})" for name in names)
            for title, prefix, names in (
                ("Functions", "", functions), ("Classes", "", classes), ("Records", "", records),
                ("Command line", "deer-jax ", VERBS),
            )
        ) + "\n",
        "## Functions\n", *(function(name, value) for name, value in functions.items()),
        "## Classes\n", *(record(name, value, members=True) for name, value in classes.items()),
        "## Records\n", RECORDS, *(record(name, value, members=False) for name, value in records.items()),
        "## Command line\n", *map(verb, VERBS),
    ]  # fmt: skip
    return "\n".join(parts)


def referenced(public: dict[str, Any]) -> list[type]:
    """Dataclasses of the package that signatures and fields of the public names name, directly or through others."""
    found: set[type] = set()

    def visit(hint: Any) -> None:
        for inner in get_args(hint):
            visit(inner)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in found:
            found.add(hint)
            for inner in get_type_hints(hint).values():
                visit(inner)

    for value in public.values():
        for hint in get_type_hints(value).values():
            visit(hint)
    ours = (cls for cls in found - set(public.values()) if cls.__module__.startswith("deer_jax"))
    return sorted(ours, key=lambda cls: cls.__name__.lower())


def function(name: str, value: Any) -> str:
    """A function's entry."""
    return f"### {name}\n\n{code(call('deer_jax.' + name, value))}\n{prose(*sections(value))}"


def record(name: str, cls: type, *, members: bool) -> str:
    """A class's entry: its fields, and with `members` its methods and properties."""
    text, found = sections(cls)
    family = [base for base in cls.__mro__ if base.__module__.startswith("deer_jax")]
    for base in family[1:]:
        found["Attributes"] = found.get("Attributes", []) + sections(base)[1].get("Attributes", [])
    parts = [f"### {name}\n"]
    if dataclasses.is_dataclass(cls):
        parts.append(code([f"class {name}:", *(f"    {field(each)}" for each in dataclasses.fields(cls))]))
    elif issubclass(cls, Exception):
        parts.append(code([f"class {name}({cls.__base__.__name__})"]))
    parts.append(prose(text, found))
    own = {key: value for base in reversed(family) for key, value in vars(base).items()} if members else {}
    for key, value in own.items():
        if isinstance(value, property) and not key.startswith("_"):
            said = inspect.getdoc(value)
            kind = annotation(inspect.signature(value.fget).return_annotation) if value.fget else ""
            parts.append(f"`{key}: {kind}`" + (f": {escape(said)}\n" if said else "\n"))
        elif isinstance(value, types.FunctionType) and not key.startswith("_") and inspect.getdoc(value):
            parts.append(code(call(key, value)) + "\n" + prose(*sections(value)))
    return "\n".join(parts)


def verb(name: str) -> str:
    """A verb's entry: what its --help says."""
    module = importlib.import_module(f"deer_jax.cli.{name}")
    text, found = sections(module.Options)
    parts = [f"### deer-jax {name}\n", prose(text, found)]
    for group in parser(name)._action_groups:
        actions = [action for action in group._group_actions if "--help" not in action.option_strings]
        if actions:
            title = "option" if group.title == name else f"option: {group.title}"
            parts.append(f"| {title} | meaning |\n| --- | --- |")
            parts += [f"| {flag(action)} | {cell(str(action.help).replace('%%', '%'))} |" for action in actions]
            parts.append("")
    if hasattr(module, "EXAMPLE"):
        parts.append(f"```bash\n{module.EXAMPLE}\n```\n")
    return "\n".join(parts)


def parser(name: str) -> argparse.ArgumentParser:
    """The argument parser of a verb."""
    return _parser(importlib.import_module(f"deer_jax.cli.{name}").Options, name, "")


def flag(action: argparse.Action) -> str:
    """`--limit N`, or `--chat`, `--no-chat`."""
    value = "" if action.nargs == 0 else f" {action.metavar or '{' + ','.join(map(str, action.choices or ())) + '}'}"
    return ", ".join(f"`{name}{value}`" for name in action.option_strings)


def prose(text: str, found: dict[str, Items]) -> str:
    """A docstring as Markdown."""
    parts = [escape(text) + "\n"] if text else []
    for title, items in found.items():
        parts.append(f"{'Arguments' if title == 'Args' else title}:\n" if title != "Attributes" else "Fields:\n")
        parts += [f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {escape(said)}" for names, said in items]
        parts.append("")
    return "\n".join(parts)


def call(name: str, value: Any) -> list[str]:
    """A signature, one argument per line if it has several."""
    signature = inspect.signature(value)
    arguments = list(_arguments(signature))
    arrow = "" if signature.return_annotation in (None, inspect.Signature.empty) else " -> "
    end = f"){arrow}{annotation(signature.return_annotation)}" if arrow else ")"
    one = f"{name}({', '.join(arguments)}{end}"
    return [one] if len(one) <= 80 else [f"{name}(", *(f"    {each}," for each in arguments), end]


def _arguments(signature: inspect.Signature) -> Iterator[str]:
    keyword_only = False
    for each in signature.parameters.values():
        if each.name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "*"
        star = "*" if each.kind is each.VAR_POSITIONAL else "**" if each.kind is each.VAR_KEYWORD else ""
        kind = "" if each.annotation is each.empty else f": {annotation(each.annotation)}"
        equals = " = " if kind else "="
        yield star + each.name + kind + ("" if each.default is each.empty else equals + default(each.default))


def field(each: dataclasses.Field) -> str:
    """`limit: int | None = None` of a dataclass."""
    found = f"{each.name}: {annotation(each.type)}"
    if each.default is not dataclasses.MISSING:
        return f"{found} = {default(each.default)}"
    if each.default_factory is not dataclasses.MISSING:
        return f"{found} = {getattr(each.default_factory, '__name__', '...')}()"
    return found


def annotation(hint: Any) -> str:
    """A type without the modules of its names, the same in every Python: Target | None for Optional[....Target]"""
    if hint is None or hint is types.NoneType:
        return "None"
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(map(annotation, inner))
    if origin is Literal:
        return f"Literal[{', '.join(map(default, inner))}]"
    if isinstance(hint, list):  # the arguments of a Callable
        return f"[{', '.join(map(annotation, hint))}]"
    if inner:
        return f"{origin.__name__}[{', '.join('...' if each is ... else annotation(each) for each in inner)}]"
    return getattr(hint, "__name__", str(hint)).rpartition(".")[2]


def default(value: Any) -> str:
    """A default value; of a dataclass only what differs from its own defaults."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return f"({', '.join(map(default, value))}{',' if len(value) == 1 else ''})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    fields = ((each.name, getattr(value, each.name), each.default) for each in dataclasses.fields(value))
    return f"{type(value).__name__}({', '.join(f'{n}={default(v)}' for n, v, usual in fields if v != usual)})"


def code(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```", ""])


def escape(text: str) -> str:
    """Text in which Markdown takes nothing for markup but code: single backquotes and indented lines stay."""
    parts = re.split(r"(``?[^`]+``?|^    .*$)", text, flags=re.MULTILINE)
    return "".join(part if i % 2 else re.sub(r"([<*])", r"\\\1", part) for i, part in enumerate(parts))


def cell(text: str) -> str:
    return escape(text).replace("|", "\\|")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading: `deer-jax decode` -> deer-jax-decode"""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
