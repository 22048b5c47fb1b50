"""What the verbs that train share: a recipe's options, stopping on request, and the last line."""

import dataclasses
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from deer_jax import processes
from deer_jax.cli.common import check_distinct, check_writable, write_json
from deer_jax.cli.progress import say, silent
from deer_jax.errors import Terminated
from deer_jax.formats import read_yaml
from deer_jax.training.loop import TrainReport
from deer_jax.training.recipe import with_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """recipe"""

    recipe: Annotated[Path, "the YAML file that says what to train, on what, and how"]
    set: Annotated[
        tuple[str, ...], "replace a value of the recipe, as in stages.0.steps=100; repeatable", "KEY=VALUE"
    ] = ()
    verify: Annotated[
        bool, "when a run goes on, read every file again instead of trusting its size and time of change"
    ] = False
    json: Annotated[Path | None, "write the final numbers to this file"] = None

    def read(self) -> dict[str, Any]:
        """The recipe's plain values."""
        check_distinct([self.json], [self.recipe])
        check_writable(self.json)
        return with_settings(read_yaml(self.recipe), self.set)


class Stopping:
    """Whether the program was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def is_set(self) -> bool:
        return self.signal is not None

    def agree(self) -> None:
        """All processes end alike, whichever was told: by SIGTERM, if one was."""
        if processes.agree(self.signal == signal.SIGTERM):
            self.signal = signal.SIGTERM

    def interruption(self, line: str) -> KeyboardInterrupt:
        """What to raise: it decides the exit status."""
        return Terminated(line) if self.signal == signal.SIGTERM else KeyboardInterrupt(line)


def report_end(options: RecipeOptions, report: TrainReport, stopping: Stopping) -> None:
    """Write the numbers, and say on one line what was done; an interruption, with its line, if it is not finished."""
    stopping.agree()
    if options.json and not silent():
        write_json(options.json, dataclasses.asdict(report) | {"output": str(report.output)})
    if not report.finished:
        processes.leave()
        raise stopping.interruption(
            f"step {report.step:,} of {report.steps:,} is written to {report.output}; the same command goes on from it"
        )
    speed = "nothing was left to do"
    if report.seconds:
        waiting = 100 * report.data_seconds / report.seconds
        speed = f"{report.tokens / report.seconds:,.0f} tokens/s, {waiting:.1f} % of the time waiting for examples"
    best = "" if report.best is None else f"; the best checkpoint is that of step {report.best:,}"
    if not silent():
        say(f"{report.output}: {report.step:,} steps done, {speed}{best}")


@contextmanager
def asked_to_stop() -> Iterator[Stopping]:
    """What Ctrl-C or SIGTERM sets; a second one interrupts at once."""
    stopping = Stopping()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.getsignal(each) for each in signals}

    def ask(number, frame):
        again, stopping.signal = stopping.is_set(), number
        if again:
            raise stopping.interruption("the same command goes on from the newest checkpoint")
        say("stopping when this step or evaluation is done; once more stops at once")

    if threading.current_thread() is not threading.main_thread():  # which alone hears of signals
        yield stopping
        return
    for each in signals:
        signal.signal(each, ask)
    try:
        yield stopping
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
