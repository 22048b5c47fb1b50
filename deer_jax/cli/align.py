"""deer-jax align: train a drafter from a recipe."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from deer_jax import processes
from deer_jax.cli.common import show
from deer_jax.cli.docstrings import recipe_help
from deer_jax.cli.options import parse
from deer_jax.cli.processes import ProcessOptions
from deer_jax.cli.progress import Reporter, silent, tell
from deer_jax.cli.stopping import asked_to_stop
from deer_jax.cli.training import RecipeOptions, report_end
from deer_jax.training.align import align
from deer_jax.training.metrics import read_metrics
from deer_jax.training.recipe import Recipe, recipe_from

EXAMPLE = "deer-jax align --recipe configs/first.yaml  # the example of answers makes its answers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions, ProcessOptions):
    """Train a drafter for a target from the target's answers: continuation, then refinement (DEER).

    Everything is in the recipe, a YAML file; its keys are below, complete ones in configs/. The run's folder gets
    checkpoints, metrics.jsonl and TensorBoard files. Ctrl-C writes a checkpoint and stops; the same command goes on,
    also after a crash. Then: deer-jax bench --drafter OUTPUT.
    """


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "align", argv, EXAMPLE, lambda: recipe_help(Recipe))
    options.join()
    recipe = processes.together(lambda: recipe_from(options.read(), str(options.recipe)))
    with asked_to_stop() as stopping, Reporter("aligning, steps", guess=False) as reporter:
        report = align(
            recipe, progress=reporter.show, tell=tell, should_stop=stopping.is_set, verify=options.verify
        )  # fmt: skip
    if not silent():
        found = {line["step"]: line["evaluation"] for line in read_metrics(report.output) if line.get("evaluation")}
        if found:
            show(table(found, report.best))
    report_end(options, report, stopping)


def table(evaluations: Mapping[int, list[dict[str, Any]]], best: int | None) -> Table:
    """τ of each evaluation of a run, also of earlier calls; those of a step as in metrics.jsonl."""
    first = next(iter(evaluations.values()))
    caption = f"τ on {first[0]['prompts']} held-out prompts"
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    result.add_column("step", justify="right")
    for each in first:
        result.add_column(f"k={each['draft_length']} T={each['temperature']:g}", justify="right")
    result.add_column("repeated\n8-grams", justify="right")
    for step, found in evaluations.items():
        cells = [
            f"{each['acceptance_length']:.2f}" + (" [{:.2f}, {:.2f}]".format(*each["ci95"]) if each["ci95"] else "")
            for each in found
        ]
        repeated = found[0]["repeated_8grams"]
        mark = " best" if step == best else ""
        result.add_row(f"{step:,}{mark}", *cells, "-" if repeated is None else f"{100 * repeated:.1f} %")
    return result
