"""deer-jax pretrain: train a small target from text."""

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
from deer_jax.training.metrics import read_metrics
from deer_jax.training.pretrain import pretrain
from deer_jax.training.recipe import PretrainRecipe, pretrain_recipe_from

EXAMPLE = "deer-jax pretrain --recipe configs/first_target.yaml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions, ProcessOptions):
    """Train a small autoregressive target from folders of text, with a tokenizer of its own.

    For demonstrations, tests and research; a real target comes from Hugging Face. The run's folder gets checkpoints,
    metrics.jsonl, TensorBoard files, and prompts for the next steps: prompts.jsonl from the training texts and
    held_out.jsonl from those kept apart. Ctrl-C writes a checkpoint and stops; the same command goes on. Then:
    deer-jax export --source OUTPUT --output FOLDER.
    """


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "pretrain", argv, EXAMPLE, lambda: recipe_help(PretrainRecipe))
    options.join()
    recipe = processes.together(lambda: pretrain_recipe_from(options.read(), str(options.recipe)))
    with asked_to_stop() as stopping, Reporter("pretraining, steps", guess=False) as reporter:
        report = pretrain(
            recipe, progress=reporter.show, tell=tell, should_stop=stopping.is_set, verify=options.verify
        )  # fmt: skip
    if not silent():
        found = {line["step"]: line["held_out"] for line in read_metrics(report.output) if line.get("held_out")}
        if found:
            show(table(found, report.best))
    report_end(options, report, stopping)


def table(evaluations: Mapping[int, dict[str, Any]], best: int | None) -> Table:
    """The held-out loss of each evaluation of a run, also of earlier calls; that of a step as in metrics.jsonl."""
    tokens = next(iter(evaluations.values()))["tokens"]
    caption = f"on {tokens:,} held-out tokens"
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    for name in ("step", "loss (nats/token)", "bits per byte"):
        result.add_column(name, justify="right")
    for step, found in evaluations.items():
        mark = " best" if step == best else ""
        result.add_row(f"{step:,}{mark}", f"{found['loss']:.3f}", f"{found['bits_per_byte']:.3f}")
    return result
