"""Alignment: a drafter learns to say what its target would, through DEER's two stages."""

import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deer_jax.checkpoints.claims import WHOLE, Claim, claimed
from deer_jax.checkpoints.drafters import (
    describe_drafter,
    drafter_shapes,
    kept_by_runs,
    load_drafter,
    place_drafter,
    trainable,
    usable_drafter,
)
from deer_jax.checkpoints.hub import resolve_folder
from deer_jax.checkpoints.huggingface import deciding_files
from deer_jax.checkpoints.load import load_target
from deer_jax.checkpoints.records import DRAFTER, RECORD
from deer_jax.checkpoints.runs import best_checkpoint, is_run
from deer_jax.data.answers import AnswerFiles
from deer_jax.data.examples import example_batches
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.decoding.finite import NAMED, broken_weights
from deer_jax.digests import Digests, Stamp
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.protocol import Trainable
from deer_jax.drafters.start import FROM_TARGET, RANDOM, started_layers
from deer_jax.errors import InputError, RunError
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params
from deer_jax.stores import place
from deer_jax.training.acceptance import Acceptance, Survey, measure, read_held_out, survey
from deer_jax.training.loop import Batches, Progress, StagePlan, Trainer, TrainReport, Work, run_mesh, stage_seed
from deer_jax.training.objectives import drafter_loss, fixed_params, reads_target
from deer_jax.training.outlook import break_even, described
from deer_jax.training.recipe import INESSENTIAL, Recipe, Stage, as_recipe, recipe_from, to_mapping
from deer_jax.training.target_states import TargetStates


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignReport(TrainReport):
    """What a call of `align` did; `load_drafter` reads its output.

    Attributes:
      evaluations: by step, in order, those of this call.
    """

    evaluations: dict[int, list[Acceptance]]


def align(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    progress: Progress | None = None,
    tell: Callable[[str], Any] | None = None,
    should_stop: Callable[[], bool] | None = None,
    verify: bool = False,
) -> AlignReport:
    """Train a drafter through the stages of a recipe, or go on with the run in its output folder.

    Args:
      recipe: a Recipe, its plain values, or a YAML file of them.
      progress: called after every step, and during evaluations.
      tell: given lines worth keeping: before the first step what the run will take, and what a round costs here; then
        τ at each evaluation, and how long the rest takes. Of several processes all have one, or none.
      should_stop: asked after every step; True writes a checkpoint and returns.
      verify: when a run goes on, read the target, the start drafter and the answers in full for their digests, instead
        of trusting the size and time of change of files.

    Raises:
      InputError: anything wrong with the recipe or the files it names, an output that another process writes, or one
        that was begun with another recipe or with files that have changed; before any work is done.
      RunError: a full disk, a loss that is not finite, no checkpoint that can be read, the output removed meanwhile.
    """
    recipe = as_recipe(recipe)
    steps, show = sum(stage.steps for stage in recipe.stages), progress or (lambda *_: None)
    with claimed(place(recipe.output), to_mapping(recipe), kind=DRAFTER, essential=essential, verify=verify) as claim:
        inputs = read_inputs(recipe, claim, lambda note: show(0, steps, note))
        stages = [with_width(stage, inputs.drafter) for stage in recipe.stages]
        check(recipe, stages, inputs)
        claim.settle(
            identity(inputs, claim.digests),
            lambda folder: describe_drafter(folder, inputs.drafter, inputs.target.stop_ids),
        )
        run = Trainer(
            work_of(recipe, stages, inputs), recipe, lock=claim.lock, show=show, tell=tell or (lambda _: None),
            should_stop=should_stop or (lambda: False),
        )  # fmt: skip
        if tell:
            say_before(recipe, stages, inputs, run, tell)
        report = run.train()
    evaluations = {step: found.results for step, found in run.evaluations.items()}
    return AlignReport(**vars(report), evaluations=evaluations)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Acceptance at every draft length and temperature; the first one decides."""

    results: list[Acceptance]

    @property
    def score(self) -> float:
        return self.results[0].acceptance_length

    def described(self) -> str:
        return "τ " + ", ".join(
            f"{each.acceptance_length:.2f}{each.interval} at k = {each.draft_length}, T = {each.temperature:g}"
            for each in self.results
        )

    def metrics(self) -> dict[str, Any]:
        return {
            "acceptance_length": {each.name: each.acceptance_length for each in self.results},
            "repeated_8grams": {each.name: each.repeated_8grams for each in self.results},
            "evaluation": [dataclasses.asdict(each) for each in self.results],
        }


class Inputs(NamedTuple):
    """What a run reads.

    Attributes:
      target: on the run's mesh. drafter: what training starts from; start: the digests of its files, by name.
      records: the training rows; cut: how many of them are longer than the recipe's `length`.
      held_out: prompts to evaluate on, as token ids.
    """

    target: Target
    drafter: Drafter
    start: dict[str, str]
    records: AnswerFiles
    cut: int
    held_out: list[list[int]]


def read_inputs(recipe: Recipe, claim: Claim, say: Callable[[str], Any]) -> Inputs:
    """All that a recipe names, every training row once: what is wrong with one is said before any work."""

    def say_bytes(done: int, total: int) -> None:
        say(f"loading, {done:,} of {total:,} bytes")

    mesh = run_mesh(recipe)
    target = load_target(recipe.target, recipe.dtype, mesh, progress=say_bytes, digests=claim.digests)
    tokenizer = target.tokenizer
    records = AnswerFiles(
        recipe.answers,
        vocab_size=target.config.vocab_size,
        tokenizer=tokenizer.fingerprint if isinstance(tokenizer, Tokenizer) else None,
    )
    source, begun = recipe.drafter, recipe.conditioned or recipe.eagle3
    start = start_digests(source, claim.digests)
    if begun is None:
        drafter = load_drafter(source, target=target, dtype="float32", config=recipe.reading, progress=say_bytes)
        if start_digests(source, claim.digests) != start:
            raise RunError(f"{source}: was changed while it was loaded; start again")
        drafter = kept_by_runs(drafter, target)
        if recipe.draft_head is not None:
            drafter = recipe.draft_head.begin(drafter, recipe.seed)
        layers, cut = (), trainable(drafter).examples == "cut"
    else:
        drafter, layers, cut = None, started_layers(source), False
        begun.check(target, layers)  # before every row is read
    say("reading the training rows")
    prompts = read_held_out(target, recipe.evaluation, claim.begun) if recipe.evaluation else []
    found = survey(records, prompts, recipe.length - cut)  # a cut text has its separator in it
    if drafter is None:
        assert begun is not None
        drafter = begun.begin(target, layers, found.counts, recipe.seed)
    if broken := broken_weights(drafter.params):
        raise RunError(f"{source}: of its weights these are not finite: {', '.join(broken[:NAMED])}")
    check_texts(trainable(drafter), records, found)
    held_out = usable_rows(recipe, records, prompts, found)
    return Inputs(target, drafter, start, records, found.cut, held_out)


def say_before(
    recipe: Recipe, stages: Sequence[Stage], inputs: Inputs, run: Trainer, tell: Callable[[str], Any]
) -> None:
    """What the run will take; for one that begins, also what a round costs on this machine."""
    target, drafter, held_out = inputs.target, inputs.drafter, inputs.held_out
    done = max(run.checkpoints.steps(), default=-1)
    if done == run.steps:
        return
    for line in described(recipe, stages, target, drafter, len(inputs.records), inputs.cut, len(held_out)):
        tell(line)
    if recipe.evaluation is not None and done < 0:
        assert target.mesh is not None
        run.show(0, run.steps, "timing a round against a plain step")
        usable = usable_drafter(drafter, place_drafter(drafter, target.mesh), target)
        if line := break_even(target, usable, held_out, recipe):
            tell(line)


def check_texts(method: Trainable, records: AnswerFiles, found: Survey) -> None:
    """InputError for a training text with an id that is a mask to the drafter."""
    for token in method.reserved:
        if (number := int(found.first[token])) >= 0:
            raise InputError(
                f"{records[number]['where']}: has id {token} in it, which is the drafter's mask; remove the line, or "
                "begin a drafter with a mask that no text contains"
            )


def usable_rows(recipe: Recipe, records: AnswerFiles, prompts: list[list[int]], found: Survey) -> list[list[int]]:
    """Leave out the rows that have no room for an answer; the held-out prompts to use."""
    evaluation = recipe.evaluation
    if found.overlong:
        records.leave_out(found.overlong)
        left_out = f"{len(found.overlong)} prompts leave no room for an answer in length {recipe.length}"
        warnings.warn(f"{records}: {left_out}; their rows are left out", stacklevel=5)
    kept = [prompt for prompt, met in zip(prompts, found.met, strict=True) if not met]
    if evaluation and not kept:
        raise InputError(f"{evaluation.prompts}: all {len(prompts)} prompts occur in training rows; give unseen ones")
    if any(found.met):
        seen = f"{sum(found.met)} prompts occur in training rows and are left out"
        warnings.warn(f"{evaluation.prompts if evaluation else ''}: {seen}", stacklevel=5)
    return kept[: evaluation.limit] if evaluation else []


def identity(inputs: Inputs, digests: Digests) -> dict[str, Any]:
    """What must not change between the calls of one run, beside the recipe."""
    target, records = inputs.target, inputs.records
    return {
        "target": {WHOLE: target.digest(), **{stamp.path.name: digests.of(stamp) for stamp in target.files}},
        "start drafter": inputs.start,
        "answers": {
            os.fspath(path): digests.of(stamp) for path, stamp in zip(records.paths, records.stamps, strict=True)
        },
        "held-out prompts": hashlib.sha256(repr(inputs.held_out).encode()).hexdigest(),
        "dtype": target.dtype.name,
    }


def work_of(recipe: Recipe, stages: Sequence[Stage], inputs: Inputs) -> Work:
    """What the loop trains."""
    target, drafter, evaluation = inputs.target, inputs.drafter, recipe.evaluation
    method = trainable(drafter)
    assert target.mesh is not None
    kept = None
    if recipe.keep_states is not None:
        hidden = any(stage.loss.reads_target for stage in stages)
        kept = TargetStates(target, method.taps, hidden, recipe.keep_states)

    def plan(number: int, stage: Stage) -> StagePlan:
        def examples(first: int, rows: np.ndarray) -> Batches:
            return example_batches(
                inputs.records, stage.corruption, bidirectional=method.examples == "cut", length=recipe.length,
                batch=recipe.batch, seed=stage_seed(recipe.seed, number), first=first, rows=rows,
            )  # fmt: skip

        states = None
        if kept is not None and reads_target(method, stage.loss):
            states = functools.partial(kept.add, hidden=stage.loss.reads_target)
        return StagePlan(
            name=stage.corruption.stage, steps=stage.steps, optimizer=stage.optimizer,
            loss=drafter_loss(
                method, target.config, stage.loss, recipe.remat or target.build.remat, own=stage.own
            ),
            examples=examples, with_states=states,
            fixed=fixed_params(method, target.config, stage.loss, target.params, drafter.shared),
        )  # fmt: skip

    def evaluate(params: Params, show: Callable[[str], Any]) -> _Measured:
        assert evaluation is not None
        learned = usable_drafter(drafter, params, target)
        return _Measured(measure(target, learned, inputs.held_out, evaluation, recipe.seed, show))

    return Work(
        mesh=target.mesh, build=target.build, stages=[plan(*each) for each in enumerate(stages)],
        params=drafter_shapes(method, target.mesh), start=lambda: place_drafter(drafter, target.mesh),
        evaluate=evaluate, evaluate_every=None if evaluation is None else evaluation.every,
    )  # fmt: skip


def start_digests(source: str, digests: Digests) -> dict[str, str]:
    """What decides the drafter that a run starts from, by file; nothing more than the target for `from-target`."""
    if source.partition(":")[0] in (FROM_TARGET, RANDOM):
        return {}
    folder, found = resolve_folder(source), {}
    if is_run(folder, DRAFTER):
        found[RECORD] = best_checkpoint(folder)[1]["sha256"]  # which has the digests of all its files
        stamps = [Stamp.of(path) for path in sorted((folder / DRAFTER).iterdir()) if path.is_file()]
    else:
        stamps = deciding_files(folder)
    return found | {stamp.path.name: digests.of(stamp) for stamp in stamps}


def with_width(stage: Stage, drafter: Drafter) -> Stage:
    """The stage with its width: that of the drafter's draft length unless the recipe says another."""
    width = stage.corruption.width or drafter.draft_length
    return dataclasses.replace(stage, corruption=dataclasses.replace(stage.corruption, width=width))


def essential(recipe: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What of a recipe must not change while its run goes on; later versions' new keys count with their defaults."""
    values = to_mapping(recipe_from(recipe, where))
    for name in INESSENTIAL:
        del values[name]
    if values["evaluation"]:
        del values["evaluation"]["batch_size"]
    return values


def check(recipe: Recipe, stages: Sequence[Stage], inputs: Inputs) -> None:
    """InputError for settings of the recipe that this drafter or these answers cannot have."""
    target, drafter, records = inputs.target, inputs.drafter, inputs.records
    method = trainable(drafter)
    context = method.shape.context
    if recipe.length > context:
        raise InputError(f"length {recipe.length} exceeds the drafter's context of {context}; lower length")
    if len(records) < recipe.batch:  # before the output becomes a run, whose batch could not be changed
        raise InputError(f"{records}: {len(records)} records are fewer than a batch of {recipe.batch}; lower batch")
    if recipe.keep_states is not None and not any(reads_target(method, stage.loss) for stage in stages):
        raise InputError("keep_states: no stage reads the target's states, so there is nothing to keep; leave it out")
    weighed = any(stage.loss.confidence for stage in stages)
    begun = recipe.conditioned or recipe.draft_head
    if weighed and not method.has_confidence:
        raise InputError("loss: confidence is for drafters that have a confidence head, and this one has none")
    if begun is not None and begun.confidence and not weighed:
        raise InputError(
            "confidence: true begins a head that no stage trains; give `confidence` a weight in the loss of a stage"
        )
    for number, stage in enumerate(stages):
        where, width = f"stages[{number}]", stage.corruption.width
        if reads_target(method, stage.loss) and recipe.length > target.config.context:
            raise InputError(
                f"{where}: the target reads the texts, so length {recipe.length} must be within its context of "
                f"{target.config.context}; lower length"
            )
        if stage.own and not method.draws:
            raise InputError(
                f"{where}: the stage acceptance is for block drafters that read the text causally or their target, "
                "with no head or a Markov head"
            )
        try:
            method.check(stage.corruption)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if method.examples == "cut":
            if stage.loss.decay is not None:
                raise InputError(f"{where}: loss: decay is for blocks, which this drafter is not trained on")
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
