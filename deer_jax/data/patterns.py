"""Prompts put together from several fields of a row: "{instruction}\\n{input}".

A backslash and an n are a newline, {{ and }} are braces. Nothing but the name of a field stands in braces. A line of
the pattern whose fields are all empty is left out.
"""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any

from deer_jax.config import nearest
from deer_jax.data.chats import excerpt
from deer_jax.errors import InputError


def is_pattern(field: str) -> bool:
    """Whether a field is given as a pattern: braces tell it from a name."""
    return "{" in field or "}" in field


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A pattern's lines, each in parts of a literal text and the name of a field behind it, None behind the last."""

    lines: tuple[tuple[tuple[str, str | None], ...], ...]

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """The pattern of a text; InputError for one that cannot be read, or that names no field."""
        lines = []
        try:
            for line in text.replace("\\n", "\n").split("\n"):
                parts = []
                for literal, name, spec, conversion in string.Formatter().parse(line):
                    if name == "" or spec or conversion:
                        raise ValueError("a field stands in braces by its name alone, {name}")
                    parts.append((literal, name))
                lines.append(tuple(parts))
        except ValueError as error:
            raise InputError(f"field: the pattern {excerpt(text)} cannot be read: {error}; {{{{ is a brace") from None
        found = cls(tuple(lines))
        if not any(name for line in found.lines for _, name in line):
            raise InputError(f"field: the pattern {excerpt(text)} names no field")
        return found

    def fill(self, row: Mapping[str, Any], where: str) -> str:
        """The text for a row; empty if all its fields are."""
        texts, filled = [], False
        for line in self.lines:
            values = [_value(row, name, where) for _, name in line if name is not None]
            if values and not any(values):
                continue
            filled = filled or any(values)
            pieces = iter(values)
            texts.append("".join(literal + (next(pieces) if name is not None else "") for literal, name in line))
        return "\n".join(texts) if filled else ""


def _value(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        hint = excerpt(nearest(name[:50], row), 200, quoted=False)
        raise InputError(f"{where}: no field {excerpt(name)}, {hint}")
    value = row[name]
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{where}: {excerpt(name)} is a {type(value).__name__}; a pattern takes texts and numbers")
    return str(value)
