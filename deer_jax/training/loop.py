"""An alignment run: stages of steps, real acceptance in between, checkpoints from which it goes on bit for bit."""

import dataclasses
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deer_jax.checkpoints.drafters import describe_drafter, load_drafter, place_drafter, usable_drafter
from deer_jax.checkpoints.load import compute_dtype, load_target, scan_layers
from deer_jax.checkpoints.runs import DAMAGED, Checkpoints, claim
from deer_jax.config import InputError
from deer_jax.data.answers import AnswerFiles
from deer_jax.data.examples import example_batches
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.decoding.answers import target_digest
from deer_jax.drafters.standalone import StandaloneDrafter
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params
from deer_jax.sharding import MeshShape, batch_placement, make_mesh
from deer_jax.training.acceptance import Acceptance, measure, read_held_out, survey
from deer_jax.training.metrics import MetricsLog
from deer_jax.training.recipe import Recipe, Stage, read_recipe, recipe_from, to_mapping
from deer_jax.training.step import TrainState, init_state, make_step, schedule

Progress = Callable[[int, int, str], Any]  # finished steps, all steps, what else is known


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignReport:
    """What a run did.

    Attributes:
      output: the run's folder, which `load_drafter` reads.
      step: the last step done; `steps`: of all stages.
      finished: whether all steps are done; False if `should_stop` said so before.
      best: step of the best checkpoint, if acceptance was measured.
      evaluations: by step, in order, those of this call.
      tokens: text tokens read in this call; blocks, padding and the steps that compile not counted.
      seconds: of training alone, without compilation, evaluations and checkpoints.
      data_seconds: the part of it that training waited for examples.
    """

    output: Path
    step: int
    steps: int
    finished: bool
    best: int | None
    evaluations: dict[int, list[Acceptance]]
    tokens: int
    seconds: float
    data_seconds: float


def align(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> AlignReport:
    """Train a drafter through the stages of a recipe, or go on with the run in its output folder.

    Args:
      recipe: a Recipe, its plain values, or a YAML file of them.
      progress: called after every step, and during evaluations.
      should_stop: asked after every step; True writes a checkpoint and returns.

    Raises:
      InputError: anything wrong with the recipe or the files it names, before any work is done; a full disk.
    """
    if isinstance(recipe, str | Path):
        recipe = read_recipe(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = recipe_from(recipe, "recipe")
    with _Run(recipe, progress or (lambda *_: None), should_stop or (lambda: False)) as run:
        return run.train()


class _Run:
    """One call of `align`."""

    def __init__(self, recipe: Recipe, progress: Progress, should_stop: Callable[[], bool]):
        self.recipe, self.show, self.should_stop = recipe, progress, should_stop
        self.output, self.steps = Path(recipe.output), sum(stage.steps for stage in recipe.stages)
        self.mesh = make_mesh(**dataclasses.asdict(recipe.mesh))
        self.dtype = compute_dtype(recipe.dtype)
        show_bytes = lambda done, total: self.show(0, self.steps, f"loading, {done:,} of {total:,} bytes")  # noqa: E731
        self.target = load_target(
            recipe.target, self.dtype, self.mesh if self.mesh.size > 1 else None, progress=show_bytes
        )
        tokenizer = self.target.tokenizer
        self.records = AnswerFiles(
            recipe.answers,
            vocab_size=self.target.config.vocab_size,
            tokenizer=tokenizer.fingerprint if isinstance(tokenizer, Tokenizer) else None,
        )
        self.drafter = load_drafter(
            recipe.drafter, target=self.target, dtype="float32", config=recipe.reading, progress=show_bytes
        )
        self.stages = [resolved(stage, self.drafter) for stage in recipe.stages]
        self.held_out = self.read_data()
        check(recipe, self.stages, self.target, self.drafter, self.records)
        claim(
            self.output, to_mapping(recipe), self.facts(),
            essential=essential, describe=lambda folder: describe_drafter(folder, self.drafter),
        )  # fmt: skip
        self.checkpoints = Checkpoints(self.output, keep=recipe.keep)
        self.evaluations: dict[int, list[Acceptance]] = {}
        self.tokens, self.seconds, self.data_seconds = 0, 0.0, 0.0

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *error) -> None:
        self.checkpoints.__exit__(*error)

    def read_data(self) -> list[list[int]]:
        """Every training row once: what is wrong with one is said before any work. The held-out prompts to use."""
        recipe, evaluation = self.recipe, self.recipe.evaluation
        self.show(0, self.steps, "reading the training rows")
        prompts = read_held_out(self.target, evaluation) if evaluation else []
        room = recipe.length if self.drafter.method.cached else recipe.length - 1  # for the separator
        found = survey(self.records, prompts, room)
        if found.overlong:
            self.records.leave_out(found.overlong)
            left_out = f"{len(found.overlong)} prompts leave no room for an answer in length {recipe.length}"
            warnings.warn(f"{self.records}: {left_out}; their rows are left out", stacklevel=5)
        kept = [prompt for prompt, met in zip(prompts, found.met, strict=True) if not met]
        if evaluation and not kept:
            raise InputError(
                f"{evaluation.prompts}: all {len(prompts)} prompts occur in training rows; give unseen ones"
            )
        if any(found.met):
            seen = f"{sum(found.met)} prompts occur in training rows and are left out"
            warnings.warn(f"{evaluation.prompts if evaluation else ''}: {seen}", stacklevel=5)
        return kept[: evaluation.limit] if evaluation else []

    def facts(self) -> dict[str, Any]:
        """What must not change between the calls of one run, beside the recipe."""
        digest = hashlib.sha256()
        for path in self.records.paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return {
            "answers": len(self.records),
            "answers_sha256": digest.hexdigest(),
            "held_out": len(self.held_out),
            "held_out_sha256": hashlib.sha256(repr(self.held_out).encode()).hexdigest(),
            "target": target_digest(self.target),
            "dtype": self.dtype.name,
        }

    def train(self) -> AlignReport:
        """All stages, from the newest checkpoint on."""
        step, restored = self.resume()
        params, stopped = place_drafter(self.drafter, self.mesh), False
        with MetricsLog(self.output, resumed_at=-1 if restored is None else step) as log:
            first = 0
            for number, stage in enumerate(self.stages):
                last = first + stage.steps
                if step > last:
                    first = last
                    continue
                state, examples = self.begin(number, stage, params) if restored is None else restored
                restored = None
                if step == 0 and self.recipe.evaluation and not self.checkpoints.newest_first():
                    self.save(step, state, examples, self.evaluate(step, state, log))
                step, state, stopped = self.run_stage(number, first, step, state, examples, log)
                if stopped:
                    break
                params, first = state.average or state.params, last
        measured = [found for found in self.checkpoints.newest_first() if found.acceptance_length is not None]
        best = max(measured, key=lambda found: (found.acceptance_length, found.step)).step if measured else None
        return AlignReport(
            output=self.output, step=step, steps=self.steps, finished=step == self.steps, best=best,
            evaluations=self.evaluations, tokens=self.tokens, seconds=self.seconds, data_seconds=self.data_seconds,
        )  # fmt: skip

    def begin(self, number: int, stage: Stage, params: Params) -> tuple[TrainState, Iterator]:
        """The first state of a stage, and its examples."""
        # Every stage and every seed has a stream of its own.
        seed = int(np.random.SeedSequence([self.recipe.seed, number]).generate_state(1)[0])
        examples = example_batches(
            self.records, stage.corruption, bidirectional=not self.drafter.method.cached, length=self.recipe.length,
            batch=self.recipe.batch, seed=seed,
        )  # fmt: skip
        return init_state(params, stage.optimizer, stage.steps), examples

    def resume(self) -> tuple[int, tuple[TrainState, Iterator] | None]:
        """The newest checkpoint that can be read: its step, state and examples. Damaged ones are set aside."""
        damaged: dict[int, str] = {}
        for found in self.checkpoints.newest_first():
            number, stage = self.stage_at(found.step)
            state, examples = self.begin(number, stage, place_drafter(self.drafter, self.mesh))
            shapes = _parts(jax.tree.map(_abstract, state), examples)
            del state  # its memory is needed for the one that is read
            try:
                parts = self.checkpoints.restore(found.step, shapes)
            except DAMAGED as error:
                while error.__cause__ is not None:
                    error = error.__cause__
                damaged[found.step] = " ".join(str(error).split())[:120]
                continue
            for step, why in damaged.items():
                aside = self.checkpoints.set_aside(step)
                what = f"the checkpoint of step {step} is damaged ({why}) and now at {aside}"
                warnings.warn(f"{what}; that of step {found.step} is taken", stacklevel=5)
            self.show(found.step, self.steps, f"going on from step {found.step:,}")
            state = TrainState(
                params=parts["params"], average=parts.get("average", {}), optimizer=parts["optimizer"]
            )  # fmt: skip
            return found.step, (state, parts["data"])
        if damaged:
            step, why = next(iter(damaged.items()))
            raise InputError(
                f"{self.output}: none of its {len(damaged)} checkpoints can be read, that of step {step} for: {why}; "
                "name another output to begin anew"
            )
        return 0, None

    def stage_at(self, step: int) -> tuple[int, Stage]:
        """The stage that a checkpoint of this step belongs to; at the border of two it is the one that ended."""
        last = 0
        for number, stage in enumerate(self.stages):
            last += stage.steps
            if step <= last:
                return number, stage
        raise InputError(f"{self.output}: has a checkpoint of step {step}, beyond the {last} steps of its recipe")

    def run_stage(
        self, number: int, first: int, step: int, state: TrainState, examples: Iterator, log: MetricsLog
    ) -> tuple[int, TrainState, bool]:
        """Steps of one stage: the last step, its state, and whether the run is to stop there."""
        stage, recipe = self.stages[number], self.recipe
        last = first + stage.steps
        rate = schedule(stage.optimizer, stage.steps)
        run_step = make_step(
            self.drafter.method, stage.optimizer, stage.steps, dtype=self.dtype, unroll=not scan_layers(),
            shardings=jax.tree.map(lambda x: x.sharding, state),
            teacher=self.target.config if stage.labels == "target" else None,
        )  # fmt: skip
        target = self.target.params if stage.labels == "target" else {}
        note, compiled = stage.corruption.stage, False
        begin, waited, tokens, before = time.perf_counter(), 0.0, 0, None
        while step < last:
            start = time.perf_counter()
            batch = next(examples)
            waited += time.perf_counter() - start
            tokens += int(batch["length"].sum())
            state, metrics = run_step(state, self.place(batch), target)
            if not compiled:  # the first step of a call compiles; the clock starts behind it
                jax.block_until_ready(metrics)
                begin, waited, tokens, compiled = time.perf_counter(), 0.0, 0, True
            if before is not None:
                jax.block_until_ready(before)  # one step may be on its way, not more
            before, step = metrics, step + 1
            stop = self.should_stop()
            measured = recipe.evaluation is not None and (step == last or step % recipe.evaluation.every == 0)
            saved = stop or measured or step == last or step % recipe.checkpoint_every == 0
            if saved or step % recipe.log_every == 0 or step == first + 1:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                seconds = time.perf_counter() - begin
                self.tokens, self.seconds, self.data_seconds = (
                    self.tokens + tokens, self.seconds + seconds, self.data_seconds + waited,
                )  # fmt: skip
                values["learning_rate"] = float(np.asarray(rate(step - first - 1)))
                speed = {"tokens_per_second": tokens / seconds, "data_share": waited / seconds} if tokens else {}
                log.write(step, {"stage": stage.corruption.stage, **values, **speed})
                note = f"{stage.corruption.stage}, loss {values['loss']:.3f}"
                note += f", {tokens / seconds:,.0f} tokens/s" if tokens else ""
                if not np.isfinite([values["loss"], values["gradient_norm"]]).all():
                    raise InputError(
                        f"{self.output}: step {step} has loss {values['loss']} and gradient norm "
                        f"{values['gradient_norm']}; lower learning_rate or alpha, in another output"
                    )
                if saved:
                    self.save(step, state, examples, self.evaluate(step, state, log) if measured else None)
                begin, waited, tokens, before = time.perf_counter(), 0.0, 0, None
            self.show(step, self.steps, note)
            if stop:
                return step, state, True
        return step, state, False

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch as micro-batches on the devices."""
        parts = self.recipe.accumulate
        placed = {}
        for name, value in batch.items():
            value = value.reshape(parts, -1, *value.shape[1:])
            placed[name] = jax.make_array_from_process_local_data(batch_placement(self.mesh), value)
        return placed

    def evaluate(self, step: int, state: TrainState, log: MetricsLog) -> list[Acceptance]:
        """Acceptance on the held-out prompts, also written to the metrics."""
        assert self.recipe.evaluation is not None
        drafter = usable_drafter(self.drafter, state.average or state.params, self.target)
        found = measure(
            self.target, drafter, self.held_out, self.recipe.evaluation, self.recipe.seed,
            lambda note: self.show(step, self.steps, note),
        )  # fmt: skip
        self.evaluations[step] = found
        log.write(step, {
            "acceptance_length": {each.name: each.acceptance_length for each in found},
            "repeated_8grams": {each.name: each.repeated_8grams for each in found},
            "evaluation": [dataclasses.asdict(each) for each in found],
        })  # fmt: skip
        return found

    def save(self, step: int, state: TrainState, examples: Iterator, found: list[Acceptance] | None) -> None:
        self.show(step, self.steps, "writing a checkpoint")
        self.checkpoints.save(step, _parts(state, examples), found[0].acceptance_length if found else None)


def _parts(state: TrainState, examples: Iterator) -> dict[str, Any]:
    parts: dict[str, Any] = {"params": state.params, "optimizer": state.optimizer, "data": examples}
    return parts | {"average": state.average} if state.average else parts


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def resolved(stage: Stage, drafter: StandaloneDrafter) -> Stage:
    """The stage with its width: that of the drafter's draft length unless the recipe says another."""
    width = stage.corruption.width or drafter.draft_length
    return dataclasses.replace(stage, corruption=dataclasses.replace(stage.corruption, width=width))


def essential(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe must not change while its run goes on; later versions' new keys count with their defaults."""
    values = to_mapping(recipe_from(recipe, "recipe.yaml"))
    for name in ("output", "log_every", "checkpoint_every", "keep", "mesh"):
        del values[name]
    if values["evaluation"]:
        del values["evaluation"]["batch_size"]
    return values


def check(
    recipe: Recipe, stages: list[Stage], target: Target, drafter: StandaloneDrafter, records: AnswerFiles
) -> None:
    """InputError for settings of the recipe that this drafter or these answers cannot have."""
    context, method = drafter.method.model.context, drafter.method
    if recipe.length > context:
        raise InputError(f"length {recipe.length} exceeds the drafter's context of {context}; lower length")
    if len(records) < recipe.batch:
        raise InputError(f"{records}: {len(records)} records are fewer than a batch of {recipe.batch}; lower batch")
    for number, stage in enumerate(stages):
        where, width, alone = f"stages[{number}]", stage.corruption.width, recipe.mesh == MeshShape()
        if stage.labels == "target" and recipe.length > target.config.context:
            raise InputError(
                f"{where}: labels: target needs length {recipe.length} within the target's context of "
                f"{target.config.context}; lower length"
            )
        if stage.labels == "target" and target.config.experts and not alone:
            raise InputError(f"{where}: labels: target of a mixture of experts runs on one device only; use tokens")
        if not method.cached:
            continue
        assert width is not None
        if width >= recipe.length:
            raise InputError(
                f"{where}: a block of width {width} does not fit into texts of length {recipe.length} behind its "
                f"anchor; width must be below length, which may be up to the context of {context}"
            )
        if width < drafter.draft_length:
            raise InputError(
                f"{where}: width {width} is less than the draft length {drafter.draft_length}, so the later tokens of "
                "a draft would not be trained; raise width or lower reading.draft_length"
            )
        if stage.corruption.next_token and method.config.head != "shifted":
            raise InputError(
                f"{where}: next_token {stage.corruption.next_token:g} trains the shifted head, and this drafter reads "
                "in place; set next_token: 0"
            )
