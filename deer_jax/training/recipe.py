"""What a training run does, as one YAML file says it."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from deer_jax.checkpoints.families import check_family
from deer_jax.config import DrafterConfig, ModelConfig, Sampling, from_mapping, nearest
from deer_jax.diffusion.corruption import Corruption
from deer_jax.errors import InputError
from deer_jax.formats import read_yaml
from deer_jax.sharding import MeshShape
from deer_jax.training.step import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its corruption, its optimiser, and how long it runs.

    Attributes:
      labels: "tokens": what the answers say (the paper); "target": the target's distributions at these places, which
        it computes anew in every step.
    """

    steps: int
    labels: Literal["tokens", "target"] = "tokens"
    corruption: Corruption
    optimizer: OptimizerConfig

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Real decoding of held-out prompts while the drafter learns.

    Attributes:
      prompts: a prompt file; those of its prompts that occur in a training row are left out.
      field, chat, template: the field that holds the prompt; texts sent through the chat template, with these
        arguments, NAME=VALUE each.
      every: steps between evaluations; the start and the end of a stage always have one.
      limit: how many of the prompts to use.
      draft_lengths, temperatures: each pair is measured; the first pair decides which checkpoint is the best. Draft
        lengths None is the drafter's.
    """

    prompts: str
    field: str | None = None
    chat: bool = False
    template: tuple[str, ...] = ()
    every: int = 500
    limit: int | None = None
    draft_lengths: tuple[int, ...] | None = None
    temperatures: tuple[float, ...] = (0.0, 1.0)
    max_new_tokens: int = 64
    batch_size: int = 16

    def __post_init__(self):
        for name in ("every", "limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.draft_lengths is not None and (not self.draft_lengths or min(self.draft_lengths) < 1):
            raise InputError(
                f"draft_lengths must be one or more numbers from 1 on, got {list(self.draft_lengths or ())}"
            )
        if not self.temperatures:
            raise InputError("temperatures is empty: give at least one, 0 is greedy")
        for value in self.temperatures:
            Sampling(temperature=value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every training run has.

    Attributes:
      output: the run's folder.
      dtype: of the computation; None is bfloat16 on TPU and GPU, float32 on CPU. Trained are float32 values.
      mesh: devices to train on.
      batch: texts per step, in `accumulate` micro-batches.
      log_every: steps between lines of metrics.jsonl.
      checkpoint_every: steps between checkpoints; `keep` of them stay, beside the best.
    """

    output: str
    dtype: Literal["bfloat16", "float32"] | None = None
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    batch: int = 8
    accumulate: int = 1
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self):
        for name in ("batch", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be in 0..{2**32 - 1}, got {self.seed}")
        if self.batch % self.accumulate:
            raise InputError(f"batch ({self.batch}) must be a multiple of accumulate ({self.accumulate})")
        if self.batch // self.accumulate % self.mesh.batch_ways:
            raise InputError(
                f"a micro-batch of {self.batch // self.accumulate} texts cannot be split over "
                f"{self.mesh.batch_ways} devices (data x fsdp of the mesh)"
            )


# What may change while a run goes on.
INESSENTIAL = ("output", "log_every", "checkpoint_every", "keep", "mesh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(RunSettings):
    """An alignment run.

    Attributes:
      target: folder or hub id. answers: the files its `answers` wrote.
      drafter: what it starts from: a folder, a hub id, `from-target` or `from-target:0,2`.
      reading: how the drafter reads and is read; None: as its folder says, or the defaults for `from-target`.
      length: T, tokens per text.
    """

    target: str
    answers: tuple[str, ...]
    stages: tuple[Stage, ...]
    drafter: str = "from-target"
    reading: DrafterConfig | None = None
    length: int = 256
    evaluation: Evaluation | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.length < 1:
            raise InputError(f"length must be at least 1, got {self.length}")
        if not self.answers:
            raise InputError("answers is empty: name at least one file")
        if not self.stages:
            raise InputError("stages is empty: give at least one")


PRETRAIN_OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainRecipe(RunSettings):
    """A pretraining run: a small target from text.

    Attributes:
      texts: folders, files, or `stdlib`: the standard library of the Python that runs this.
      files: patterns of the file names to read, as in "*.py"; exclude: of the paths below their folder to leave out;
        held_out: of those to keep apart, for the evaluation and for prompts.
      model: shape of the target, as in `config.ModelConfig`; its tokenizer, byte-level BPE, is learnt to its
        vocab_size.
      length: tokens per training window.
      optimizer: its keys stand beside the others: learning_rate, warmup, ...
      evaluate_every: steps between evaluations on the texts kept apart.
      prompts: beginnings of paragraphs of the training texts to write as prompts, none longer than three quarters of
        the context.
    """

    texts: tuple[str, ...]
    model: ModelConfig
    steps: int
    files: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    length: int = 512
    optimizer: OptimizerConfig = PRETRAIN_OPTIMIZER
    evaluate_every: int = 500
    prompts: int = 4096

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "evaluate_every", "prompts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.length <= self.model.context:
            raise InputError(f"length must be in 2..{self.model.context}, the model's context, got {self.length}")
        if not self.texts:
            raise InputError("texts is empty: name at least one folder")
        check_family(self.model)


CORRUPTION = {field.name for field in dataclasses.fields(Corruption)}
OPTIMIZER = {field.name for field in dataclasses.fields(OptimizerConfig)}
OWN = {"steps", "labels"}
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file. Unknown keys, also those inside, are errors that name the nearest valid one."""
    return recipe_from(read_yaml(path), str(path))


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """`read_recipe` of the parsed file."""
    values = dict(values)
    try:
        if values.get("reading") is not None:
            values["reading"] = _build(DrafterConfig, values["reading"], "reading")
        if values.get("evaluation") is not None:
            values["evaluation"] = _build(Evaluation, values["evaluation"], "evaluation")
        if "mesh" in values:
            values["mesh"] = _build(MeshShape, values["mesh"], "mesh")
        if isinstance(values.get("answers"), str):
            values["answers"] = [values["answers"]]
        if "stages" in values:
            stages = values["stages"]
            if not isinstance(stages, list):
                raise InputError(f"stages must be a list, got {stages!r}")
            values["stages"] = tuple(_stage(stage, f"stages[{i}]") for i, stage in enumerate(stages))
        return _build(Recipe, values, where)
    except InputError as error:
        raise _placed(error, where) from None


def read_pretrain_recipe(path: str | Path) -> PretrainRecipe:
    """The recipe in a YAML file, as `read_recipe`."""
    return pretrain_recipe_from(read_yaml(path), str(path))


def pretrain_recipe_from(values: Mapping[str, Any], where: str) -> PretrainRecipe:
    """`read_pretrain_recipe` of the parsed file."""
    values = dict(values)
    try:
        known = OPTIMIZER | {field.name for field in dataclasses.fields(PretrainRecipe)} - {"optimizer"}
        for key in values:
            if key not in known:
                raise InputError(f"unknown key '{key}', {nearest(str(key), known)}")
        default = dataclasses.asdict(PRETRAIN_OPTIMIZER)
        given = {key: values.pop(key) for key in OPTIMIZER & values.keys()}
        values["optimizer"] = _build(OptimizerConfig, default | given, where)
        for name, kind in (("model", ModelConfig), ("mesh", MeshShape)):
            if name in values:
                values[name] = _build(kind, values[name], name)
        for name in ("texts", "files", "exclude", "held_out"):
            if isinstance(values.get(name), str):
                values[name] = [values[name]]
        return _build(PretrainRecipe, values, where)
    except InputError as error:
        raise _placed(error, where) from None


def _stage(values: Any, where: str) -> Stage:
    """Keys of corruption and optimiser stand side by side."""
    values, known = _mapping(values, where), OWN | CORRUPTION | OPTIMIZER
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown key '{key}', {nearest(str(key), known)}")
    corruption = {key: value for key, value in values.items() if key in CORRUPTION}
    optimizer = {key: value for key, value in values.items() if key in OPTIMIZER}
    parts = {
        "corruption": _build(Corruption, corruption, where),
        "optimizer": _build(OptimizerConfig, optimizer, where),
    }
    return _build(Stage, parts | {key: value for key, value in values.items() if key in OWN}, where)


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
        raise _placed(error, where) from None


def _placed(error: InputError, where: str) -> InputError:
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
        if value in inner:
            return value
        raise InputError(f"{what} must be one of {', '.join(inner)}, got {value!r}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{what} must be a list, got {value!r}")
        return tuple(_convert(inner[0], each, what) for each in value)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _build(kind, value, what)
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


def to_mapping(recipe: Recipe | PretrainRecipe) -> dict[str, Any]:
    """The recipe as plain values that `recipe_from`, or `pretrain_recipe_from`, reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, Stage):
            parts = (dataclasses.asdict(value.corruption), dataclasses.asdict(value.optimizer))
            return {name: getattr(value, name) for name in sorted(OWN, reverse=True)} | parts[0] | parts[1]
        if dataclasses.is_dataclass(value):
            values = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return values | values.pop("optimizer", {})
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(recipe)


def with_settings(values: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A recipe's plain values with some replaced: ``seed=3``, ``stages.0.steps=100``, ``evaluation.every=50``.

    Values are read as YAML. A list entry is named by its number.
    """
    result = copy.deepcopy(dict(values))
    for text in settings:
        path, equals, value = text.partition("=")
        if not equals or not all(path.split(".")):
            raise InputError(f"expected KEY=VALUE, as in stages.0.steps=100, got '{text}'")
        try:
            found = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"{path}: not a YAML value: {value}") from None
        *parents, last = path.split(".")
        inner: Any = result
        for key in parents:
            inner = _entry(inner, key, path) if isinstance(inner, list) else inner.setdefault(key, {})
            if not isinstance(inner, dict | list):
                raise InputError(f"{path}: {key} holds {inner!r}, nothing is inside it")
        if isinstance(inner, list):
            _entry(inner, last, path)
            inner[int(last)] = found
        else:
            inner[last] = found
    return result


def _entry(values: list, key: str, path: str) -> Any:
    if not key.isdigit() or int(key) >= len(values):
        raise InputError(f"{path}: {key} must be a number from 0 to {len(values) - 1}")
    return values[int(key)]
