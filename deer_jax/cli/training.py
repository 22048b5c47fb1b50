"""What the verbs that train share: a recipe's options, and the last line."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from deer_jax import processes
from deer_jax.cli.common import check_distinct, check_writable, write_json
from deer_jax.cli.progress import say, silent
from deer_jax.cli.stopping import Stopping
from deer_jax.formats import read_yaml
from deer_jax.sharding import MeshShape
from deer_jax.training.loop import TrainReport
from deer_jax.training.recipe import with_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """recipe"""

    recipe: Annotated[Path, "the YAML file that says what to train, on what, and how"]
    set: Annotated[
        tuple[str, ...], "replace a value of the recipe, as in stages.0.steps=100; repeatable", "KEY=VALUE"
    ] = ()
    mesh: Annotated[
        MeshShape | None, "devices to train on, instead of the recipe's `mesh`, as in fsdp=4,tensor=2", "AXES"
    ] = None
    verify: Annotated[
        bool, "when a run goes on, read every file again instead of trusting its size and time of change"
    ] = False
    json: Annotated[Path | None, "write the final numbers to this file"] = None

    def read(self) -> dict[str, Any]:
        """The recipe's plain values."""
        check_distinct([self.json], [self.recipe])
        check_writable(self.json)
        values = with_settings(read_yaml(self.recipe), self.set)
        return values if self.mesh is None else values | {"mesh": dataclasses.asdict(self.mesh)}


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
