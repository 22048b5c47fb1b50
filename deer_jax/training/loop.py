"""A training run: stages of steps, evaluations in between, checkpoints from which it goes on bit for bit."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from deer_jax import processes
from deer_jax.build import Build, compiling
from deer_jax.checkpoints.records import DamagedError
from deer_jax.checkpoints.runs import Checkpoints, best_of
from deer_jax.errors import InputError, RunError, duration
from deer_jax.models.transformer import Params
from deer_jax.sharding import batch_placement, make_mesh, on_mesh
from deer_jax.spools import Guard
from deer_jax.stores import place
from deer_jax.training.metrics import MetricsLog
from deer_jax.training.objectives import Loss
from deer_jax.training.recipe import RunSettings
from deer_jax.training.step import OptimizerConfig, TrainState, abstract_state, init_state, make_step, schedule

Progress = Callable[[int, int, str], Any]  # finished steps, all steps, what else is known
Batches = Iterator[dict[str, np.ndarray]]  # endless, with `length` [B] and `total`


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage as the loop sees it.

    Attributes:
      name: in the metrics.
      examples: the stage's batches from this number on, of each only these rows.
      with_states: adds the target's states of the texts to a batch; None: the loss computes what it needs.
      fixed: parameters that the loss is handed and that stay.
    """

    name: str
    steps: int
    optimizer: OptimizerConfig
    loss: Loss
    examples: Callable[[int, np.ndarray], Batches]
    with_states: Callable[[dict[str, np.ndarray], processes.Share], dict[str, np.ndarray]] | None = None
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

    def described(self) -> str:
        """In a few words."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a run trains.

    Attributes:
      mesh: the devices of all processes. build: how programs are made for them.
      params: what is trained, as shapes with their places on the mesh.
      start: the values that training starts from, so placed.
      evaluate: how good parameters are; its second argument is told what is being done.
      evaluate_every: steps; None never evaluates.
    """

    mesh: Mesh
    build: Build
    stages: Sequence[StagePlan]
    params: Params
    start: Callable[[], Params]
    evaluate: Callable[[Params, Callable[[str], Any]], Evaluated]
    evaluate_every: int | None


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


class _Clock:
    """What the steps since it was started took.

    Attributes:
      waited: seconds for examples. steps: begun. tokens: of texts, those that this process counts.
    """

    def __init__(self):
        self.begin, self.waited, self.steps, self.tokens = time.perf_counter(), 0.0, 0, 0

    def next(self, examples: Batches) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        batch = next(examples)
        self.waited += time.perf_counter() - start
        self.steps += 1
        return batch

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin


class Trainer:
    """One call's part of a run, in a folder that is the run's and locked; see `checkpoints.claims`.

    Attributes:
      evaluations: by step, in order, those of this call.
      step_seconds, evaluation_seconds: of the last ones; None before one was timed.
    """

    def __init__(
        self, work: Work, settings: RunSettings, *, lock: Guard, show: Progress, tell: Callable[[str], Any],
        should_stop: Callable[[], bool],
    ):  # fmt: skip
        """lock: of the run's folder. tell: is given the lines that are worth keeping."""
        self.work, self.settings, self.lock, self.show, self.tell = work, settings, lock, show, tell
        self.step_seconds: float | None = None
        self.evaluation_seconds: float | None = None
        self.should_stop = processes.agreed(should_stop)
        self.share = processes.Share(batch_placement(work.mesh), settings.accumulate, settings.batch)
        self.output, self.steps = place(settings.output), sum(stage.steps for stage in work.stages)
        self.checkpoints = Checkpoints(self.output, keep=settings.keep, lock=lock)
        self.log: MetricsLog | None = None  # the lead's
        self.evaluations: dict[int, Any] = {}
        self.tokens, self.seconds, self.data_seconds = 0, 0.0, 0.0
        self.read = 0  # text tokens since the run began

    def train(self) -> TrainReport:
        """All stages, from the newest checkpoint on."""
        with contextlib.ExitStack() as open_files:
            open_files.enter_context(self.checkpoints)
            step, state = self.resume()

            def open_log() -> str:
                at = -1 if state is None else step
                self.log = open_files.enter_context(MetricsLog(self.output, resumed_at=at, lock=self.lock))
                return str(self.log.tokens)

            self.read = int(processes.led(open_log))
            step = self.run_stages(step, state)
            self.checkpoints.wait()
            best = best_of(self.checkpoints.newest_first())
        return TrainReport(
            output=self.output, step=step, steps=self.steps, finished=step == self.steps,
            best=None if best is None else best.step, tokens=self.tokens, seconds=self.seconds,
            data_seconds=self.data_seconds,
        )  # fmt: skip

    def run_stages(self, step: int, state: TrainState | None) -> int:
        """From a step on, with its state, or from the start; the last step done."""
        params, first = self.work.start() if state is None else {}, 0
        for number, stage in enumerate(self.work.stages):
            last = first + stage.steps
            if step > last:
                first = last
                continue
            if state is None:
                with on_mesh(self.work.mesh):
                    state = init_state(params, stage.optimizer, stage.steps)
            if step == 0 and self.work.evaluate_every and not self.checkpoints.newest_first():
                self.save(step, state, self.evaluate(step, state).score)
            step, state, stopped = self.run_stage(number, first, step, state)
            if stopped:
                break
            params, state, first = state.average or state.params, None, last
        return step

    def resume(self) -> tuple[int, TrainState | None]:
        """The newest checkpoint that is whole: its step and state. Damaged ones are set aside."""
        sound, damaged = {found.step for found in self.checkpoints.newest_first()}, {}
        for step in self.checkpoints.steps():
            stage = self.work.stages[self.stage_at(step) if step in sound else 0]
            state = abstract_state(self.work.params, stage.optimizer, stage.steps)
            try:
                parts = self.checkpoints.restore(step, _parts(state))
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
            return step, TrainState(
                params=parts["params"], average=parts.get("average", {}), optimizer=parts["optimizer"]
            )
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

    def run_stage(self, number: int, first: int, step: int, state: TrainState) -> tuple[int, TrainState, bool]:
        """Steps of one stage: the last step, its state, and whether the run is to stop there."""
        stage, settings, every = self.work.stages[number], self.settings, self.work.evaluate_every
        last = first + stage.steps
        rate = schedule(stage.optimizer, stage.steps)
        examples = stage.examples(step - first, self.share.rows)
        run_step = make_step(
            stage.loss, stage.optimizer, stage.steps, build=self.work.build,
            shardings=jax.tree.map(lambda x: x.sharding, state),
        )  # fmt: skip
        note, compiled, before = stage.name, False, None
        clock, untimed = _Clock(), 0
        while step < last:
            batch = clock.next(examples)
            clock.tokens += int(batch["length"][self.share.own].sum())
            with contextlib.nullcontext() if compiled else compiling():
                if stage.with_states is not None:
                    batch = stage.with_states(batch, self.share)
                with on_mesh(self.work.mesh):
                    state, metrics = run_step(state, self.share.place(batch), stage.fixed)
            if not compiled:  # the first step of a call compiles; the clock starts behind it
                jax.block_until_ready(metrics)
                untimed, clock, compiled = clock.tokens, _Clock(), True
            if before is not None:
                jax.block_until_ready(before)  # one step may be on its way, not more
            before, step = metrics, step + 1
            stop = self.should_stop()
            measured = every is not None and (step == last or step % every == 0)
            saved = stop or measured or step == last or step % settings.checkpoint_every == 0
            if saved or step % settings.log_every == 0 or step == first + 1:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                seconds = clock.seconds
                tokens, more = processes.total(clock.tokens, untimed)
                self.read += tokens + more
                self.tokens, self.seconds, self.data_seconds = (
                    self.tokens + tokens, self.seconds + seconds, self.data_seconds + clock.waited,
                )  # fmt: skip
                if not np.isfinite([values["loss"], values["gradient_norm"]]).all():
                    raise RunError(
                        f"{self.output}: step {step} has loss {values['loss']} and gradient norm "
                        f"{values['gradient_norm']}; lower the learning rate, or alpha, in another output"
                    )
                values["learning_rate"] = float(np.asarray(rate(step - first - 1)))
                speed = {"tokens_per_second": tokens / seconds, "data_share": clock.waited / seconds} if tokens else {}
                self.write(step, {"stage": stage.name, "tokens": self.read, **values, **speed})
                note = f"{stage.name}, loss {values['loss']:.3f}"
                if tokens:
                    first_timed, self.step_seconds = self.step_seconds is None, seconds / clock.steps
                    left = self.left(step)
                    note += f", {tokens / seconds:,.0f} tokens/s" + (f", {left}" if left else "")
                    if first_timed and left and not measured:
                        self.tell(f"step {step:,}: {left}")
                if saved:
                    score = self.evaluate(step, state).score if measured else None
                    self.save(step, state, score)
                clock, untimed, before = _Clock(), 0, None
            self.show(step, self.steps, note)
            if stop:
                return step, state, True
        return step, state, False

    def save(self, step: int, state: TrainState, score: float | None) -> None:
        """Begin to write a checkpoint, behind its metrics."""
        self.show(step, self.steps, "writing a checkpoint")
        if self.log is not None:
            self.log.put()
        self.checkpoints.begin(step, _parts(state), score)

    def evaluate(self, step: int, state: TrainState) -> Evaluated:
        """How good the parameters are, also written to the metrics."""
        begin = time.perf_counter()
        found = self.work.evaluate(state.average or state.params, lambda note: self.show(step, self.steps, note))
        self.evaluation_seconds = time.perf_counter() - begin
        if not np.isfinite(found.score):
            raise RunError(f"{self.output}: the evaluation at step {step} gives {found.score}; lower the learning rate")
        self.evaluations[step] = found
        self.write(step, {"tokens": self.read, **found.metrics()})
        self.tell(f"step {step:,}: {found.described()}" + (f"; {left}" if (left := self.left(step)) else ""))
        return found

    def left(self, step: int) -> str:
        """How long the rest of the run takes, evaluations included; empty where there is none, or no step was timed."""
        if self.step_seconds is None or step >= self.steps:
            return ""
        every, lengths = self.work.evaluate_every, [stage.steps for stage in self.work.stages]
        ahead = 0 if every is None else evaluations_after(step, lengths, every)
        seconds = (self.steps - step) * self.step_seconds + ahead * (self.evaluation_seconds or 0.0)
        unknown = " without the time of its evaluations" if ahead and self.evaluation_seconds is None else ""
        return f"{self.step_seconds:.2g} s a step, about {duration(seconds)} left{unknown}"

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of the metrics, by the lead."""
        if self.log is not None:
            self.log.write(step, values)


def run_mesh(settings: RunSettings) -> Mesh:
    """The devices that a run trains on; of several processes each has some of them."""
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    if processes.count() > 1 and mesh.size != jax.device_count():
        raise InputError(
            f"mesh has {mesh.size} devices, the {processes.count()} processes have {jax.device_count()} together; "
            "several processes use them all"
        )
    return mesh


def evaluations_after(step: int, stages: Sequence[int], every: int) -> int:
    """How many evaluations follow a step of a run whose stages have so many steps: at multiples of `every`, and at the
    end of each stage.

    0, (6, 6), 4 -> 4: at 4, 6, 8 and 12
    """
    ends = np.cumsum(stages).tolist()
    return len({each for each in {*range(0, ends[-1] + 1, every), *ends} if each > step})


def stage_seed(seed: int, number: int) -> int:
    """Every stage and every seed has a stream of examples of its own."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _parts(state: TrainState) -> dict[str, Any]:
    """Of a checkpoint. The position in the data is the step: batch n of a stage depends on nothing else."""
    parts: dict[str, Any] = {"params": state.params, "optimizer": state.optimizer}
    return parts | {"average": state.average} if state.average else parts
