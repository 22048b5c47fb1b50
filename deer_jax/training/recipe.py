"""What an alignment run does, as one YAML file says it."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from deer_jax.config import DrafterConfig, InputError, from_mapping, nearest, read_yaml
from deer_jax.diffusion.corruption import Corruption
from deer_jax.training.step import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its corruption, its optimiser, and how long it runs."""

    steps: int
    corruption: Corruption
    optimizer: OptimizerConfig

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Real decoding of held-out prompts while the drafter learns.

    Attributes:
      prompts: a prompt file; no training row may start with one of its prompts.
      every: steps between evaluations; the end of a stage always has one.
    """

    prompts: str
    every: int = 500
    limit: int | None = None
    draft_lengths: tuple[int, ...] = (8,)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    max_new_tokens: int = 64
    batch_size: int = 16

    def __post_init__(self):
        for name in ("every", "limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not self.draft_lengths or min(self.draft_lengths) < 1:
            raise InputError(f"draft_lengths must be one or more numbers from 1 on, got {list(self.draft_lengths)}")
        if not self.temperatures or not all(0 <= value < math.inf for value in self.temperatures):
            raise InputError(f"temperatures must be one or more numbers from 0 on, got {list(self.temperatures)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """An alignment run.

    Attributes:
      target: folder or hub id. answers: the file its `answers` wrote. output: the run's folder.
      drafter: what it starts from: a folder, a hub id, `from-target` or `from-target:0,2`.
      reading: conventions of a `from-target` drafter.
      length: T, tokens per text. batch: texts per step, in `accumulate` micro-batches.
      checkpoint_every: steps between checkpoints; `keep` of them stay, beside the best.
    """

    target: str
    answers: str
    output: str
    stages: tuple[Stage, ...]
    drafter: str = "from-target"
    reading: DrafterConfig = dataclasses.field(default_factory=DrafterConfig)
    dtype: Literal["bfloat16", "float32"] | None = None
    length: int = 256
    batch: int = 8
    accumulate: int = 1
    seed: int = 0
    evaluation: Evaluation | None = None
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self):
        for name in ("length", "batch", "accumulate", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be in 0..{2**32 - 1}, got {self.seed}")
        if self.batch % self.accumulate:
            raise InputError(f"batch ({self.batch}) must be a multiple of accumulate ({self.accumulate})")
        if not self.stages:
            raise InputError("stages is empty: give at least one")


CORRUPTION = {field.name for field in dataclasses.fields(Corruption)}
OPTIMIZER = {field.name for field in dataclasses.fields(OptimizerConfig)}
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file. Unknown keys, also those inside, are errors that name the nearest valid one."""
    return recipe_from(read_yaml(path), str(path))


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """`read_recipe` of the parsed file."""
    values = dict(values)
    try:
        if "reading" in values:
            values["reading"] = _build(DrafterConfig, values["reading"], "reading")
        if values.get("evaluation") is not None:
            values["evaluation"] = _build(Evaluation, values["evaluation"], "evaluation")
        if "stages" in values:
            stages = values["stages"]
            if not isinstance(stages, list):
                raise InputError(f"stages must be a list, got {stages!r}")
            # W follows the draft length unless it is given.
            width = values.get("reading", DrafterConfig()).draft_length
            values["stages"] = tuple(_stage(stage, f"stages[{i}]", width) for i, stage in enumerate(stages))
        return _build(Recipe, values, "recipe")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _stage(values: Any, where: str, width: int) -> Stage:
    """Keys of corruption and optimiser stand side by side."""
    values, known = _mapping(values, where), {"steps"} | CORRUPTION | OPTIMIZER
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown key '{key}', {nearest(str(key), known)}")
    corruption = {"width": width} | {key: value for key, value in values.items() if key in CORRUPTION}
    optimizer = {key: value for key, value in values.items() if key in OPTIMIZER}
    parts = {
        "corruption": _build(Corruption, corruption, where),
        "optimizer": _build(OptimizerConfig, optimizer, where),
    }
    return _build(Stage, parts | {key: value for key, value in values.items() if key == "steps"}, where)


def _build(cls, values: Any, where: str):
    """A dataclass from YAML's keys and values; whatever is wrong with them is one line that starts with `where`."""
    kinds = get_type_hints(cls)
    values = {
        key: _convert(kinds[key], value, f"{where}: {key}") if key in kinds else value
        for key, value in _mapping(values, where).items()
    }
    try:
        return from_mapping(cls, values, where)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(f"{where}: ") else f"{where}: {error}") from None


def _convert(kind: Any, value: Any, what: str) -> Any:
    """The value as its field's type; YAML gives lists for tuples and text for 1e-4."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        (kind,) = (each for each in inner if each is not NoneType)
        return _convert(kind, value, what)
    if origin is Literal:
        if value in inner:
            return value
        raise InputError(f"{what} must be one of {', '.join(inner)}, got {value!r}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{what} must be a list, got {value!r}")
        return tuple(_convert(inner[0], each, what) for each in value)
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is kind or kind not in KINDS:
        return value
    raise InputError(f"{what} must be {KINDS[kind]}, got {value!r}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be keys and values, got {value!r}")
    return value


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `read_recipe` reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, Stage):
            parts = (dataclasses.asdict(value.corruption), dataclasses.asdict(value.optimizer))
            return {"steps": value.steps} | parts[0] | parts[1]
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(recipe), sort_keys=False)
