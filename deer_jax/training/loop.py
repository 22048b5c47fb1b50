"""A training run: stages of steps, evaluations in between, checkpoints from which it goes on bit for bit."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from deer_jax.build import Build
from deer_jax.checkpoints.runs import Checkpoints, DamagedError, best_of
from deer_jax.errors import InputError, RunError
from deer_jax.files import Lock
from deer_jax.models.transformer import Params
from deer_jax.sharding import batch_placement
from deer_jax.training.metrics import MetricsLog
from deer_jax.training.objectives import Loss
from deer_jax.training.recipe import RunSettings
from deer_jax.training.step import OptimizerConfig, TrainState, abstract_state, init_state, make_step, schedule

Progress = Callable[[int, int, str], Any]  # finished steps, all steps, what else is known


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage as the loop sees it: its name in the metrics, its length, its optimiser and its loss."""

    name: str
    steps: int
    optimizer: OptimizerConfig
    loss: Loss
    fixed: Params = dataclasses.field(default_factory=dict)


class Evaluated(Protocol):
    """What an evaluation found."""

    @property
    def score(self) -> float:
        """The checkpoint of the largest is the best."""
        ...

    def metrics(self) -> Mapping[str, Any]:
        """For metrics.jsonl."""
        ...


class Work(Protocol):
    """What a run trains."""

    stages: Sequence[StagePlan]
    evaluate_every: int | None  # steps; None never evaluates

    def first_params(self) -> Params:
        """What training starts from, placed on the mesh."""
        ...

    def examples(self, number: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches of a stage, endless: a grain iterator, with `length` [B] and `total`."""
        ...

    def evaluate(self, params: Params, show: Callable[[str], Any]) -> Evaluated:
        """show: called with what is being done."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a call did.

    Attributes:
      output: the run's folder.
      step: the last step done; `steps`: of all stages.
      finished: whether all steps are done; False if `should_stop` said so before.
      best: step of the best checkpoint, if there were evaluations.
      tokens: text tokens read in this call; blocks, padding and the steps that compile not counted.
      seconds: of training alone, without compilation, evaluations and checkpoints.
      data_seconds: the part of it that training waited for examples.
    """

    output: Path
    step: int
    steps: int
    finished: bool
    best: int | None
    tokens: int
    seconds: float
    data_seconds: float


class Trainer:
    """One call's part of a run, in a folder that is the run's and locked; see `checkpoints.claims`.

    Attributes:
      evaluations: by step, in order, those of this call.
    """

    def __init__(
        self,
        work: Work,
        settings: RunSettings,
        *,
        lock: Lock,
        mesh: Mesh,
        build: Build,
        show: Progress,
        should_stop: Callable[[], bool],
    ):
        """lock: of the run's folder."""
        self.work, self.settings, self.lock, self.mesh, self.build = work, settings, lock, mesh, build
        self.show, self.should_stop = show, should_stop
        self.output, self.steps = Path(settings.output), sum(stage.steps for stage in work.stages)
        self.checkpoints = Checkpoints(self.output, keep=settings.keep, lock=lock)
        self.evaluations: dict[int, Any] = {}
        self.tokens, self.seconds, self.data_seconds = 0, 0.0, 0.0
        self.read = 0  # text tokens since the run began

    def train(self) -> TrainReport:
        """All stages, from the newest checkpoint on."""
        step, restored = self.resume()
        params, stopped = self.work.first_params() if restored is None else {}, False
        with MetricsLog(self.output, resumed_at=-1 if restored is None else step, lock=self.lock) as log:
            self.read, first = log.tokens, 0
            for number, stage in enumerate(self.work.stages):
                last = first + stage.steps
                if step > last:
                    first = last
                    continue
                state, examples = self.begin(number, params) if restored is None else restored
                restored = None
                if step == 0 and self.work.evaluate_every and not self.checkpoints.newest_first():
                    self.save(step, state, examples, self.evaluate(step, state, log))
                step, state, stopped = self.run_stage(number, first, step, state, examples, log)
                if stopped:
                    break
                params, first = state.average or state.params, last
        best = best_of(self.checkpoints.newest_first())
        return TrainReport(
            output=self.output, step=step, steps=self.steps, finished=step == self.steps,
            best=None if best is None else best.step, tokens=self.tokens, seconds=self.seconds,
            data_seconds=self.data_seconds,
        )  # fmt: skip

    def begin(self, number: int, params: Params) -> tuple[TrainState, Iterator]:
        """The first state of a stage, and its examples."""
        stage = self.work.stages[number]
        return init_state(params, stage.optimizer, stage.steps), self.work.examples(number)

    def resume(self) -> tuple[int, tuple[TrainState, Iterator] | None]:
        """The newest checkpoint that is whole: its step, state and examples. Damaged ones are set aside."""
        sound, damaged = {found.step for found in self.checkpoints.newest_first()}, {}
        for step in self.checkpoints.steps():
            number = self.stage_at(step) if step in sound else 0
            stage, examples = self.work.stages[number], self.work.examples(number)
            state = abstract_state(self.work.first_params(), stage.optimizer, stage.steps)
            try:
                parts = self.checkpoints.restore(step, _parts(state, examples))
            except DamagedError as error:
                damaged[step] = str(error).removeprefix(f"{self.checkpoints.folder}/")
                continue
            # Older ones too, if it is their record that is damaged: they may be the best, and cannot be told from it.
            damaged |= {each: "its record" for each in self.checkpoints.steps() if each not in sound | damaged.keys()}
            for each, why in damaged.items():
                aside = self.checkpoints.set_aside(each)
                what = f"the checkpoint of step {each} is damaged ({why:.200}) and now at {aside}"
                warnings.warn(f"{what}; that of step {step} is taken", stacklevel=5)
            self.show(step, self.steps, f"going on from step {step:,}")
            state = TrainState(
                params=parts["params"], average=parts.get("average", {}), optimizer=parts["optimizer"]
            )  # fmt: skip
            return step, (state, parts["data"])
        if damaged:
            step, why = next(iter(damaged.items()))
            raise RunError(
                f"{self.output}: none of its {len(damaged)} checkpoints can be read, that of step {step} for: "
                f"{why:.300}; name another output to begin anew"
            )
        return 0, None

    def stage_at(self, step: int) -> int:
        """The stage that a checkpoint of this step belongs to; at the border of two it is the one that ended."""
        last = 0
        for number, stage in enumerate(self.work.stages):
            last += stage.steps
            if step <= last:
                return number
        raise InputError(f"{self.output}: has a checkpoint of step {step}, beyond the {last} steps of its recipe")

    def run_stage(
        self, number: int, first: int, step: int, state: TrainState, examples: Iterator, log: MetricsLog
    ) -> tuple[int, TrainState, bool]:
        """Steps of one stage: the last step, its state, and whether the run is to stop there."""
        stage, settings, every = self.work.stages[number], self.settings, self.work.evaluate_every
        last = first + stage.steps
        rate = schedule(stage.optimizer, stage.steps)
        run_step = make_step(
            stage.loss, stage.optimizer, stage.steps, build=self.build,
            shardings=jax.tree.map(lambda x: x.sharding, state),
        )  # fmt: skip
        note, compiled = stage.name, False
        begin, waited, tokens, before = time.perf_counter(), 0.0, 0, None
        while step < last:
            start = time.perf_counter()
            batch = next(examples)
            waited += time.perf_counter() - start
            tokens += int(batch["length"].sum())
            self.read += int(batch["length"].sum())
            state, metrics = run_step(state, self.place(batch), stage.fixed)
            if not compiled:  # the first step of a call compiles; the clock starts behind it
                jax.block_until_ready(metrics)
                begin, waited, tokens, compiled = time.perf_counter(), 0.0, 0, True
            if before is not None:
                jax.block_until_ready(before)  # one step may be on its way, not more
            before, step = metrics, step + 1
            stop = self.should_stop()
            measured = every is not None and (step == last or step % every == 0)
            saved = stop or measured or step == last or step % settings.checkpoint_every == 0
            if saved or step % settings.log_every == 0 or step == first + 1:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                seconds = time.perf_counter() - begin
                self.tokens, self.seconds, self.data_seconds = (
                    self.tokens + tokens, self.seconds + seconds, self.data_seconds + waited,
                )  # fmt: skip
                if not np.isfinite([values["loss"], values["gradient_norm"]]).all():
                    raise RunError(
                        f"{self.output}: step {step} has loss {values['loss']} and gradient norm "
                        f"{values['gradient_norm']}; lower the learning rate, or alpha, in another output"
                    )
                values["learning_rate"] = float(np.asarray(rate(step - first - 1)))
                speed = {"tokens_per_second": tokens / seconds, "data_share": waited / seconds} if tokens else {}
                log.write(step, {"stage": stage.name, "tokens": self.read, **values, **speed})
                note = f"{stage.name}, loss {values['loss']:.3f}"
                note += f", {tokens / seconds:,.0f} tokens/s" if tokens else ""
                if saved:
                    self.save(step, state, examples, self.evaluate(step, state, log) if measured else None)
                begin, waited, tokens, before = time.perf_counter(), 0.0, 0, None
            self.show(step, self.steps, note)
            if stop:
                return step, state, True
        return step, state, False

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch as micro-batches on the devices."""
        parts = self.settings.accumulate
        placed = {}
        for name, value in batch.items():
            value = value.reshape(parts, -1, *value.shape[1:])
            placed[name] = jax.make_array_from_process_local_data(batch_placement(self.mesh), value)
        return placed

    def evaluate(self, step: int, state: TrainState, log: MetricsLog) -> Evaluated:
        """How good the parameters are, also written to the metrics."""
        found = self.work.evaluate(state.average or state.params, lambda note: self.show(step, self.steps, note))
        if not np.isfinite(found.score):
            raise RunError(f"{self.output}: the evaluation at step {step} gives {found.score}; lower the learning rate")
        self.evaluations[step] = found
        log.write(step, {"tokens": self.read, **found.metrics()})
        return found

    def save(self, step: int, state: TrainState, examples: Iterator, found: Evaluated | None) -> None:
        self.show(step, self.steps, "writing a checkpoint")
        self.checkpoints.save(step, _parts(state, examples), None if found is None else found.score)


def stage_seed(seed: int, number: int) -> int:
    """Every stage and every seed has a stream of examples of its own."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _parts(state: TrainState, examples: Iterator) -> dict[str, Any]:
    parts: dict[str, Any] = {"params": state.params, "optimizer": state.optimizer, "data": examples}
    return parts | {"average": state.average} if state.average else parts
