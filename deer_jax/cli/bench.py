"""deer-jax bench: plain decoding and drafters on the same prompts, measured in one run."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from deer_jax import processes
from deer_jax.bench.curves import read_curves
from deer_jax.bench.report import PLAIN, table
from deer_jax.bench.runner import bench
from deer_jax.cli.common import (
    DRAFTER_HELP,
    DecodeOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    check_distinct,
    check_writable,
    show,
    write_json,
)
from deer_jax.cli.options import Length, Source, parse
from deer_jax.cli.processes import ProcessOptions
from deer_jax.cli.progress import Reporter, silent
from deer_jax.cli.stopping import ending_together
from deer_jax.data.sources import placed
from deer_jax.errors import InputError

EXAMPLE = (
    "deer-jax bench --target deer_jax/pair/target --drafter deer_jax/pair/drafter --draft-lengths 2,4,8 "
    "--prompts deer_jax/pair/held_out.jsonl --limit 8 --max-new-tokens 64 --json report.json"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions, OutputOptions, DecodeOptions, PromptOptions, ModelOptions):
    """Measure acceptance length and speed of drafters against plain decoding, in one run on the same prompts."""

    drafter: Annotated[tuple[Source, ...], f"{DRAFTER_HELP}; repeatable", "[NAME=]SOURCE"]
    draft_lengths: Annotated[
        tuple[Length, ...] | None,
        "tokens drafted per round, as in 2,4,8,auto; by default what each drafter was trained for",
        "N,N",
    ] = None
    batch_size: Annotated[int, "prompts that run at once"] = 1
    repeats: Annotated[int, "measured runs of each method, after one that compiles; the methods take turns"] = 3
    plot: Annotated[
        Path | None,
        "write pictures into this folder: accepted tokens, acceptance by position, speed and cost against draft length",
        "FOLDER",
    ] = None
    curve: Annotated[
        tuple[Path, ...], "with --plot: also acceptance length while this align run learned; repeatable", "RUN"
    ] = ()


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "bench", argv, EXAMPLE)
    options.join()
    arguments = options.arguments() | {"template_arguments": options.template_arguments()}
    sources = named(options.drafter)
    prompts = processes.together(options.read)
    check_distinct([options.json], [options.prompts, options.config, options.target, *sources.values(), *options.curve])
    check_writable(options.json)
    if options.plot is not None:
        from deer_jax.bench import plots  # only here: matplotlib looks for fonts and a folder of its own

        plots.check_folder(options.plot)
        curves = read_curves(options.curve)
    elif options.curve:
        raise InputError("--curve is drawn into a folder: add --plot FOLDER")
    with ending_together("this run") as check:

        def progress(done: int, total: int, method: str) -> None:
            check()
            reporter.show(done, total, method)

        target, drafters = options.load(list(sources.values()))
        with placed(prompts), Reporter("measuring, runs") as reporter:
            report = bench(
                target, [prompt.content for prompt in prompts], drafters=dict(zip(sources, drafters, strict=True)),
                draft_lengths=options.draft_lengths, batch_size=options.batch_size, repeats=options.repeats,
                progress=progress, command=shlex.join(["deer-jax", "bench", *argv]), **arguments,
            )  # fmt: skip
    if silent():
        return
    show(table(report))
    if options.json:
        write_json(options.json, report.as_dict())
    if options.plot is not None:
        print(*plots.write(report, options.plot, curves), sep="\n")


def named(drafters: Sequence[str]) -> dict[str, str]:
    """Sources by name: NAME=SOURCE, or the last part of the source's path.

    runs/a/final -> final;  mine=runs/a/final -> mine
    """
    found: dict[str, str] = {}
    for text in drafters:
        name, equals, source = text.partition("=")
        if not equals or "/" in name:
            name, source = text.rstrip("/").rpartition("/")[2], text
        if not name or not source:
            raise InputError(f"--drafter: expected NAME=SOURCE or SOURCE, got '{text}'")
        if name in found or name == PLAIN:
            raise InputError(f"--drafter: the name '{name}' is taken; give another as NAME={source}")
        found[name] = source
    return found
