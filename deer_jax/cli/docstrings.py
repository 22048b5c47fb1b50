"""What docstrings say, for help pages and the API page: their text, their lists, and the keys of recipes."""

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args, get_type_hints

from deer_jax.diffusion.corruption import Corruption
from deer_jax.training.recipe import Stage
from deer_jax.training.step import OptimizerConfig

Items = list[tuple[str, str]]  # names and what is said about them
WIDTH, NAMES = 100, 24  # letters of a line of help, and of its names


def sections(value: Any) -> tuple[str, dict[str, Items]]:
    """A docstring's text, and its lists under Args:, Attributes: and so on.

    "Does.\\n\\nArgs:\\n  a, b: numbers\\n    to add" -> "Does.", {"Args": [("a, b", "numbers to add")]}
    """
    lines = (inspect.getdoc(value) or "").splitlines()
    text, found, items = [], {}, None
    for line in lines:
        if heading := re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            items = found.setdefault(heading[1], [])
        elif items is not None and (entry := re.match(r"  (\w[\w, ]*): (.*)", line)):
            items.append((entry[1], entry[2]))
        elif items and line.startswith("  "):
            items.append((items[-1][0], f"{items.pop()[1]} {line.strip()}"))
        elif line or items is None:
            items = None
            text.append(line)
    # "temperature: 0 is greedy. top_k: 0 keeps all." are two.
    names = "|".join(inspect.signature(value).parameters) if found and callable(value) else ""
    for title, items in found.items():
        split = [(name, re.split(rf"[.;] ({names}): ", said)) for name, said in items]
        found[title] = [pair for name, parts in split for pair in zip([name, *parts[1::2]], parts[0::2], strict=True)]
    return "\n".join(text).strip(), found


def recipe_help(recipe: type) -> str:
    """Every key of a recipe with its meaning and default, the keys inside indented."""
    return "\n".join(["keys of the recipe:", *_keys(recipe, 1)])


def _keys(cls: type, depth: int, default: Any = None) -> Iterator[str]:
    """The lines of a dataclass's keys; in a stage those of corruption and optimiser stand side by side.

    default: a value of it that has the defaults; None: those of its own.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyrefly: ignore
    hints, said = get_type_hints(cls), {}
    for base in reversed(cls.__mro__):
        said |= {name: names for names, _ in sections(base)[1].get("Attributes", []) for name in names.split(", ")}
    meanings = {names: text for base in cls.__mro__ for names, text in sections(base)[1].get("Attributes", [])}
    done = set()
    for name in fields:
        names = said.get(name, name)
        if names in done:
            continue
        done.add(names)
        if cls is Stage and name in ("corruption", "optimizer"):
            yield from _keys(Corruption if name == "corruption" else OptimizerConfig, depth)
            continue
        if name == "optimizer":
            yield from _keys(OptimizerConfig, depth, fields[name].default)
            continue
        together = [
            fields[each].default if default is None else getattr(default, each)
            for each in names.split(", ")
            if each in fields
        ]
        yield from _entry(names, meanings.get(names, "") + _defaults(together), depth)
        if inner := _inside(hints[name]):
            yield from _keys(inner, depth + 1)


def _inside(hint: Any) -> type | None:
    """The dataclass that a field holds, alone, in a list, or where it may be None."""
    found = [kind for kind in (hint, *get_args(hint)) if kind not in (NoneType, ...)]
    return next((kind for kind in found if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def _defaults(values: list[Any]) -> str:
    """` (default: 8)`; nothing where a key is required or its default is none, nothing or keys of its own."""
    if any(value is dataclasses.MISSING or dataclasses.is_dataclass(value) for value in values):
        return ""
    if all(value is None or value == () for value in values):
        return ""
    return f" (default: {', '.join(json.dumps(value) for value in values)})"


def _entry(names: str, text: str, depth: int) -> Iterator[str]:
    head = f"{'  ' * depth}{names}"
    if len(head) >= NAMES:
        yield head
        head = ""
    yield from textwrap.wrap(
        " ".join(text.split()), WIDTH, initial_indent=f"{head:<{NAMES}}", subsequent_indent=" " * NAMES
    )
