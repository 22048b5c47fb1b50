"""deer-jax align: train a drafter from a recipe."""

import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from rich import box
from rich.table import Table

from deer_jax.cli.common import check_distinct, check_writable, show, write_json
from deer_jax.cli.options import parse
from deer_jax.cli.progress import Reporter
from deer_jax.config import read_yaml
from deer_jax.training.loop import AlignReport, align
from deer_jax.training.recipe import recipe_from, with_settings

EXAMPLE = "deer-jax align --recipe configs/align_stories260k.yaml --set output=runs/mine --set stages.0.steps=200"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Train a drafter for a target from the target's answers: continuation, then refinement (DEER).

    Everything is in the recipe, a YAML file; see configs/ for complete ones. The run's folder gets checkpoints,
    metrics.jsonl and TensorBoard files. Ctrl-C writes a checkpoint and stops; the same command goes on, also after a
    crash. Then: deer-jax bench --drafter OUTPUT.
    """

    recipe: Annotated[Path, "the YAML file that says what to train, on what, and how"]
    set: Annotated[
        tuple[str, ...], "replace a value of the recipe, as in stages.0.steps=100; repeatable", "KEY=VALUE"
    ] = ()
    json: Annotated[Path | None, "write the final numbers to this file"] = None


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "align", argv, EXAMPLE)
    check_distinct([options.json], [options.recipe])
    check_writable(options.json)
    recipe = recipe_from(with_settings(read_yaml(options.recipe), options.set), str(options.recipe))
    with asked_to_stop() as stopping, Reporter("aligning, steps") as reporter:
        report = align(recipe, progress=reporter.show, should_stop=stopping.is_set)
    if options.json:
        write_json(options.json, as_dict(report))
    if report.evaluations:
        show(table(report))
    if not report.finished:
        raise KeyboardInterrupt(
            f"step {report.step:,} of {report.steps:,} is written to {report.output}; the same command goes on from it"
        )
    speed = "nothing was left to do"
    if report.seconds:
        waiting = 100 * report.data_seconds / report.seconds
        speed = f"{report.tokens / report.seconds:,.0f} tokens/s, {waiting:.1f} % of the time waiting for examples"
    best = "" if report.best is None else f"; the best checkpoint is that of step {report.best:,}"
    print(f"deer-jax: {report.output}: {report.step:,} steps done, {speed}{best}", file=sys.stderr)


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second one interrupts at once."""
    event = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.getsignal(each) for each in signals}

    def ask(number, frame):
        if event.is_set():
            raise KeyboardInterrupt("the same command goes on from the newest checkpoint")
        event.set()
        print(
            "deer-jax: stopping when this step or evaluation is done; once more stops at once",
            file=sys.stderr,
            flush=True,
        )

    for each in signals:
        signal.signal(each, ask)
    try:
        yield event
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def as_dict(report: AlignReport) -> dict:
    """The report as JSON holds it."""
    return dataclasses.asdict(report) | {"output": str(report.output)}


def table(report: AlignReport) -> Table:
    """τ of each evaluation of this call."""
    first = next(iter(report.evaluations.values()))
    result = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, caption=f"τ on {first[0].prompts} held-out prompts", caption_justify="left"
    )
    result.add_column("step", justify="right")
    for each in first:
        result.add_column(f"k={each.draft_length} T={each.temperature:g}", justify="right")
    result.add_column("repeated\n8-grams", justify="right")
    for step, found in report.evaluations.items():
        cells = [
            f"{each.acceptance_length:.2f}"
            + ("" if each.ci95 is None else f" [{each.ci95[0]:.2f}, {each.ci95[1]:.2f}]")
            for each in found
        ]
        repeated = found[0].repeated_8grams
        mark = " best" if step == report.best else ""
        result.add_row(f"{step:,}{mark}", *cells, "-" if repeated is None else f"{100 * repeated:.1f} %")
    return result
