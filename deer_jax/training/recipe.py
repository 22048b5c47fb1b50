"""What a training run does, as one YAML file says it."""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from deer_jax.build import Remat
from deer_jax.checkpoints.families import check_family
from deer_jax.config import DrafterConfig, ModelConfig, Sampling, check_number
from deer_jax.diffusion.corruption import Corruption
from deer_jax.drafters.start import ConditionedStart, Eagle3Start, HeadStart
from deer_jax.errors import InputError, shown
from deer_jax.formats import mapping, parse_yaml, read_yaml
from deer_jax.sharding import MeshShape
from deer_jax.training.objectives import ACCEPTANCE, CROSS_ENTROPY, Objective
from deer_jax.training.step import OptimizerConfig
from deer_jax.training.values import build, check_keys, placed

MOST_GIB = 1e6  # of memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its corruption, its optimiser, and how long it runs.

    Attributes:
      steps: of the optimiser, each over a batch.
      loss: what is minimised, see `objectives.Objective`: by default cross-entropy on what the answers say (the paper).
        The stage `acceptance` has its own, see `own_drafts`.
    """

    steps: int
    loss: Objective = CROSS_ENTROPY
    corruption: Corruption
    optimizer: OptimizerConfig

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        if self.own and self.loss != ACCEPTANCE:
            raise InputError("the stage acceptance has a loss of its own: leave loss out")

    @property
    def own(self) -> bool:
        """Whether it trains on what the drafter drafts on its own."""
        return self.corruption.stage == "acceptance"


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
      max_new_tokens: stop an answer after so many tokens. batch_size: prompts that are decoded at once.
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
      remat: what gradients compute again instead of keeping it, to save memory: "none"; "cheap", what of each layer is
        no product with weights; "layers", all of each layer but its attention. None is none on CPU, layers elsewhere.
      batch: texts per step, in `accumulate` micro-batches.
      accumulate: into how many parts a step's texts are split where memory is short.
      seed: fixes every random choice.
      log_every: steps between lines of metrics.jsonl.
      checkpoint_every: steps between checkpoints. keep: how many of them stay, beside the best.
    """

    output: str
    dtype: Literal["bfloat16", "float32"] | None = None
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    remat: Remat | None = None
    batch: int = 8
    accumulate: int = 1
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self):
        if not self.output:
            raise InputError("output is empty; name a folder")
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
                f"{self.mesh.batch_ways} devices (data x fsdp of the mesh); choose a batch that is a multiple of "
                f"{self.accumulate * self.mesh.batch_ways}"
            )


# What may change while a run goes on.
INESSENTIAL = ("output", "log_every", "checkpoint_every", "keep", "keep_states", "mesh", "remat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(RunSettings):
    """An alignment run.

    Attributes:
      target: folder, GGUF file or hub id. answers: the files its `answers` wrote.
      stages: a list of them, run one after the other.
      drafter: what it starts from: a folder, a hub id, `from-target` or `from-target:0,2`; a conditioned one from such
        layers of the target, or from `random:2` layers; EAGLE-3 from `random:1`.
      reading: how a standalone drafter reads and is read; None: as its folder says, or the defaults for `from-target`.
      draft_head: the head that a standalone drafter begins with; None: as its folder says, or none.
      conditioned: begins a drafter that reads the target's hidden states; None: it is standalone, or in a folder.
      eagle3: begins an EAGLE-3 drafter instead.
      length: T, tokens per text.
      keep_states: GiB of each process's memory for what the target says of the texts, so that it reads each of them
        once and not in every epoch; None: it reads them in every step. A step then has the states of its whole batch on
        the devices, whatever `accumulate` is.
      evaluation: of the drafter while it learns; None: none, and the newest checkpoint counts.
    """

    target: str
    answers: tuple[str, ...]
    stages: tuple[Stage, ...]
    drafter: str = "from-target"
    reading: DrafterConfig | None = None
    draft_head: HeadStart | None = None
    conditioned: ConditionedStart | None = None
    eagle3: Eagle3Start | None = None
    length: int = 256
    keep_states: float | None = None
    evaluation: Evaluation | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.length < 1:
            raise InputError(f"length must be at least 1, got {self.length}")
        if self.keep_states is not None:
            check_number("keep_states", self.keep_states, 0, MOST_GIB, above=True)
        if not self.answers:
            raise InputError("answers is empty: name at least one file")
        if not self.stages:
            raise InputError("stages is empty: give at least one")
        begun = [name for name in ("conditioned", "eagle3") if getattr(self, name) is not None]
        if len(begun) > 1:
            raise InputError("conditioned and eagle3 begin drafters of two kinds: leave one out")
        if begun and self.reading is not None:
            raise InputError(
                f"reading is for a standalone drafter, and {begun[0]} begins one of another kind: leave one out"
            )
        if begun and self.draft_head is not None:
            raise InputError(
                "draft_head is for a standalone drafter; say which head a conditioned one has by conditioned.head"
            )


MOST_PARAMETERS = 10**12  # more of them, in float32 and with an optimiser, no machine holds
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
      steps: of the optimiser, each over a batch.
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
        if (count := _parameters(self.model)) > MOST_PARAMETERS:
            raise InputError(f"model: has {count:.2g} parameters, more than {MOST_PARAMETERS:.0e}; lower its sizes")


def _parameters(model: ModelConfig) -> int:
    """Of the large matrices."""
    attention = 2 * (model.heads + model.kv_heads) * model.head_width
    mlp = 3 * (model.experts * model.expert_width if model.experts else model.mlp_width)
    return model.width * ((2 - model.tied) * model.vocab_size + model.layers * (attention + mlp))


CORRUPTION = {field.name for field in dataclasses.fields(Corruption)}
OPTIMIZER = {field.name for field in dataclasses.fields(OptimizerConfig)}
OWN = {"steps", "loss"}
PARTS = {
    "reading": DrafterConfig, "draft_head": HeadStart, "conditioned": ConditionedStart, "eagle3": Eagle3Start,
    "evaluation": Evaluation,
}  # fmt: skip
MODEL, MESH = ({field.name for field in dataclasses.fields(kind)} for kind in (ModelConfig, MeshShape))
# Where keys belong that a recipe does not have itself.
PLACES: dict[str, str] = {}
for place, kind in (("mesh", MeshShape), *PARTS.items()):
    for name in (field.name for field in dataclasses.fields(kind)):
        PLACES[name] = f"{PLACES[name]} or {place}" if name in PLACES else place
PLACES |= dict.fromkeys(OWN | CORRUPTION | OPTIMIZER, "a stage, one of the list `stages`")
PRETRAIN_PLACES = dict.fromkeys(MESH, "mesh") | dict.fromkeys(MODEL, "model")


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file. Unknown keys, also those inside, are errors that name the nearest valid one."""
    return recipe_from(read_yaml(path), str(path))


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """`read_recipe` of the parsed file."""
    values = dict(mapping(values, where))
    try:
        check_keys(values, {field.name for field in dataclasses.fields(Recipe)}, where, PLACES)
        for name, kind in PARTS.items():
            if values.get(name) is not None:
                values[name] = build(kind, values[name], name)
        if "mesh" in values:
            values["mesh"] = build(MeshShape, values["mesh"], "mesh")
        if isinstance(values.get("answers"), str):
            values["answers"] = [values["answers"]]
        if "stages" in values:
            stages = values["stages"]
            if not isinstance(stages, list | tuple):
                raise InputError(f"stages must be a list, got {shown(stages)}")
            values["stages"] = tuple(_stage(stage, f"stages[{i}]") for i, stage in enumerate(stages))
        return build(Recipe, values, where)
    except InputError as error:
        raise placed(error, where) from None


def read_pretrain_recipe(path: str | Path) -> PretrainRecipe:
    """The recipe in a YAML file, as `read_recipe`."""
    return pretrain_recipe_from(read_yaml(path), str(path))


def pretrain_recipe_from(values: Mapping[str, Any], where: str) -> PretrainRecipe:
    """`read_pretrain_recipe` of the parsed file."""
    values = dict(mapping(values, where))
    try:
        known = OPTIMIZER | {field.name for field in dataclasses.fields(PretrainRecipe)} - {"optimizer"}
        check_keys(values, known, where, PRETRAIN_PLACES)
        default = dataclasses.asdict(PRETRAIN_OPTIMIZER)
        given = {key: values.pop(key) for key in OPTIMIZER & values.keys()}
        values["optimizer"] = build(OptimizerConfig, default | given, where)
        for name, kind in (("model", ModelConfig), ("mesh", MeshShape)):
            if name in values:
                values[name] = build(kind, values[name], name)
        for name in ("texts", "files", "exclude", "held_out"):
            if isinstance(values.get(name), str):
                values[name] = [values[name]]
        return build(PretrainRecipe, values, where)
    except InputError as error:
        raise placed(error, where) from None


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A recipe, its plain values or the path of its file, as a recipe."""
    if isinstance(recipe, Recipe):
        return recipe
    return read_recipe(recipe) if isinstance(recipe, str | Path) else recipe_from(recipe, "recipe")


def as_pretrain_recipe(recipe: PretrainRecipe | Mapping[str, Any] | str | Path) -> PretrainRecipe:
    """The same for pretraining."""
    if isinstance(recipe, PretrainRecipe):
        return recipe
    return read_pretrain_recipe(recipe) if isinstance(recipe, str | Path) else pretrain_recipe_from(recipe, "recipe")


def _stage(values: Any, where: str) -> Stage:
    """Keys of corruption and optimiser stand side by side."""
    values = mapping(values, where)
    check_keys(values, OWN | CORRUPTION | OPTIMIZER, where)
    corruption = {key: value for key, value in values.items() if key in CORRUPTION}
    optimizer = {key: value for key, value in values.items() if key in OPTIMIZER}
    parts = {
        "corruption": build(Corruption, corruption, where),
        "optimizer": build(OptimizerConfig, optimizer, where),
    }
    if "loss" in values:
        parts["loss"] = build(Objective, {"ce": 0.0, **mapping(values["loss"], f"{where}: loss")}, f"{where}: loss")
    elif values.get("stage") == "acceptance":
        parts["loss"] = ACCEPTANCE
    return build(Stage, {"steps": values["steps"]} | parts if "steps" in values else parts, where)


def to_mapping(recipe: Recipe | PretrainRecipe) -> dict[str, Any]:
    """The recipe as plain values that `recipe_from`, or `pretrain_recipe_from`, reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, Stage):
            parts = (dataclasses.asdict(value.corruption), dataclasses.asdict(value.optimizer))
            return {"steps": value.steps, "loss": plain(value.loss)} | parts[0] | parts[1]
        if dataclasses.is_dataclass(value):
            values = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return values | values.pop("optimizer", {})
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(recipe)


def with_settings(values: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A recipe's plain values with some replaced: ``seed=3``, ``stages.0.steps=100``, ``evaluation.every=50``.

    Values are read as YAML. A list entry is named by its number.
    """
    try:
        result = copy.deepcopy(dict(values))
    except RecursionError:
        raise InputError("the recipe is nested too deeply") from None
    for text in settings:
        path, equals, value = text.partition("=")
        if not equals or not all(path.split(".")):
            raise InputError(f"expected KEY=VALUE, as in stages.0.steps=100, got {shown(text)}")
        found, where = parse_yaml(value, path[:80]), path[:80]
        *parents, last = path.split(".")
        inner: Any = result
        for key in parents:
            inner = inner[_number(inner, key, where)] if isinstance(inner, list) else inner.setdefault(key, {})
            if not isinstance(inner, dict | list):
                raise InputError(f"{where}: {key[:80]} holds {shown(inner)}, nothing is inside it")
        if isinstance(inner, list):
            inner[_number(inner, last, where)] = found
        else:
            inner[last] = found
    return result


def _number(values: list, key: str, where: str) -> int:
    """The place in a list that a key names."""
    if not values:
        raise InputError(f"{where}: the list is empty")
    if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(values):
        raise InputError(f"{where}: {key[:80]} must be a number from 0 to {len(values) - 1}")
    return int(key)
