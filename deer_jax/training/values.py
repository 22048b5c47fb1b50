"""The plain values of a recipe as dataclasses: what does not fit is one line that names its place."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from deer_jax.config import from_mapping, nearest
from deer_jax.errors import InputError, shown
from deer_jax.formats import mapping

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
MOST_WHOLE = 2**32  # a seed may be just below it; nothing that is counted comes near


def check_keys(
    values: Mapping[Any, Any], known: Collection[str], where: str, places: Mapping[str, str] | None = None
) -> None:
    """InputError for a key that is not known; it says where the key belongs, or names the nearest one.

    places: where keys belong that stand one level further down.
    """
    for key in values:
        if key not in known:
            place = (places or {}).get(key) if isinstance(key, str) else None
            name = key[:80] if isinstance(key, str) else shown(key)
            hint = f"it belongs into {place}" if place else nearest(name, known)
            raise InputError(f"{where}: unknown key '{name}', {hint}")


def build(cls, values: Any, where: str):
    """A dataclass from YAML's keys and values; whatever is wrong with them is one line that starts with `where`."""
    kinds, values = get_type_hints(cls), mapping(values, where)
    check_keys(values, {field.name for field in dataclasses.fields(cls)}, where)
    values = {key: _convert(kinds[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return from_mapping(cls, values, where)
    except InputError as error:
        raise placed(error, where) from None


def placed(error: InputError, where: str) -> InputError:
    """The error with the place where it is, said once."""
    return error if str(error).startswith(f"{where}: ") else InputError(f"{where}: {error}")


def _convert(kind: Any, value: Any, what: str) -> Any:
    """The value as its field's type; YAML gives lists for tuples and text for 1e-4."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        (kind,) = (each for each in inner if each is not NoneType)
        return _convert(kind, value, what)
    if origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
        raise InputError(f"{what} must be one of {', '.join(inner)}, got {shown(value)}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{what} must be a list, got {shown(value)}")
        return tuple(_convert(inner[0], each, what) for each in value)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, what)  # pyrefly: ignore
    if kind is float:
        value = _float(value)
    if type(value) is not kind:
        raise InputError(f"{what} must be {KINDS[kind]}, got {shown(value)}")
    if kind is int and abs(value) >= MOST_WHOLE:
        raise InputError(f"{what} must be below {MOST_WHOLE:,}, got {shown(value)}")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{what} must be finite, got {value}")
    if kind is str:
        _check_text(value, what)
    return value


def _float(value: Any) -> Any:
    """The number that is meant; the value itself if it is none."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    return value


def _check_text(value: str, what: str) -> None:
    if not value:
        raise InputError(f"{what} is empty; give one, or leave the key out")
    if "\0" in value:
        raise InputError(f"{what} must not have a NUL in it, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} must be UTF-8, got {shown(value)}") from None
