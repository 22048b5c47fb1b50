"""deer-jax decode: answers of a target to prompts, with or without a drafter."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np

from deer_jax import processes
from deer_jax.build import described
from deer_jax.cli.common import (
    DRAFTER_HELP,
    DecodeOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    check_distinct,
    check_writable,
    known_digests,
    write_json,
)
from deer_jax.cli.options import Length, Source, parse
from deer_jax.cli.processes import ProcessOptions
from deer_jax.cli.progress import Reporter, say, silent
from deer_jax.cli.stopping import ending_together, interrupted
from deer_jax.data.answer_writer import state_path
from deer_jax.data.sources import Prompt, placed
from deer_jax.decoding.decode import decode
from deer_jax.decoding.state import DecodeResult, DecodeStats
from deer_jax.decoding.stream import stream
from deer_jax.errors import InputError

EXAMPLE = (
    "deer-jax decode --target deer_jax/pair/target --drafter deer_jax/pair/drafter "
    '--prompt "def main():" --max-new-tokens 64'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions, OutputOptions, DecodeOptions, PromptOptions, ModelOptions):
    """Decode prompts with a target. A drafter makes it faster and leaves the answers as they are."""

    drafter: Annotated[Source | None, f"{DRAFTER_HELP}; without one, plain decoding", "SOURCE"] = None
    draft_length: Annotated[
        Length | None,
        "tokens drafted per round, or auto: chosen again and again, by what rounds cost and commit here; by default "
        "what the drafter was trained for",
        "N",
    ] = None
    batch_size: Annotated[int | None, "prompts that run at once (default: up to 16)"] = None
    output: Annotated[
        Path | None,
        "append each answer here as it finishes, one JSON object per line, instead of printing it; the same command "
        "goes on where it was stopped; FILE.state.json is put beside it",
    ] = None
    verify: Annotated[
        bool,
        "with --output: read all files of the models again before going on; otherwise, those of another size or time "
        "of change",
    ] = False
    stream: Annotated[bool, "print the answer to a single prompt while it is made"] = False


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "decode", argv, EXAMPLE)
    options.join()
    arguments = options.arguments() | {"template_arguments": options.template_arguments()}
    prompts = processes.together(options.read)
    companion = state_path(options.output) if options.output and options.output.name else None
    check_distinct(
        [options.output, companion, options.json], [options.prompts, options.config, options.target, options.drafter]
    )
    check_writable(options.output)
    check_writable(options.json)
    if options.stream and (len(prompts) != 1 or options.output or options.json or options.batch_size):
        raise InputError("--stream prints the answer to one prompt: without --output, --json and --batch-size")
    if options.verify and not options.output:
        raise InputError("--verify is about going on with an --output: add it")
    kept = f"{options.output} keeps what is done; the same command goes on from there" if options.output else ""
    with ending_together("this part of the answers", kept) as check:

        def show(done: int, total: int, tokens: int) -> None:
            check()
            reporter.show(done, total, f"{tokens:,} tokens")

        digests = known_digests(options.output, verify=options.verify) if options.output else None
        target, drafters = options.load([options.drafter] if options.drafter else [], digests)
        arguments |= {"drafter": drafters[0] if drafters else None, "draft_length": options.draft_length}
        contents = [prompt.content for prompt in prompts]
        if options.stream:
            with placed(prompts):
                pieces = stream(
                    target, contents, **arguments, finished=lambda stats: report(stats, target.devices, "\n")
                )  # fmt: skip
                with Reporter("decoding"):  # up to the first words, as it compiles until then
                    first = next(pieces, "")
                for piece in itertools.chain([first], pieces):
                    check()
                    if not silent():
                        print(piece, end="", flush=True)
            return
        with placed(prompts), Reporter("decoding") as reporter, interrupted(kept):
            result = decode(
                target, contents, **arguments, batch_size=options.batch_size, time_prefill=True,
                output=options.output, ids=[prompt.id for prompt in prompts] if options.output else None,
                progress=show,
            )  # fmt: skip
    if silent():
        return
    if not options.output:
        for row in rows(prompts, result):
            print(f"== {row['id']} ({row['new_tokens']} tokens, {row['rounds']} rounds)")
            print(row["tokens"] if row["text"] is None else row["text"])
    if options.json:
        write_json(options.json, statistics(result) | {"target": target.name, "drafter": options.drafter})
    report(result.stats, target.devices, output=options.output)


def report(stats: DecodeStats, devices: Sequence[jax.Device], before: str = "", output: Path | None = None) -> None:
    """The numbers, on one line of stderr; `before` ends the answer on stdout."""
    if silent():
        return
    print(before, end="", flush=True)
    made = sum(stats.new_tokens) - stats.resumed_tokens
    count = f"{len(stats.new_tokens):,} answers"
    if output and not made:
        say(f"{output}: is complete, {count}, nothing to do")
        return
    parts = [f"{output}: {count}"] if output else []
    if stats.draft_length:
        parts.append(f"τ {stats.acceptance_length:.2f}")
    parts.append(f"{stats.tokens_per_second:,.1f} tokens/s")
    of = f" (of {sum(stats.new_tokens):,}, the others from before)" if stats.resumed_tokens else ""
    compiling = f"({stats.compile_seconds:.1f} s of compiling excluded)"
    parts.append(f"{made:,} tokens{of} in {stats.seconds:.1f} s {compiling}")
    parts.append(f"on {described(devices)}")
    say(f"{', '.join(parts)}")


def rows(prompts: Sequence[Prompt], result: DecodeResult) -> list[dict]:
    """What is printed of each prompt."""
    return [
        {
            "id": prompt.id,
            "text": None if result.texts is None else result.texts[i],
            "tokens": result.tokens[i],
            "new_tokens": result.stats.new_tokens[i],
            "rounds": result.stats.rounds[i],
        }
        for i, prompt in enumerate(prompts)
    ]


def statistics(result: DecodeResult) -> dict:
    """What `--json` writes: totals over the prompts."""
    stats = result.stats
    return {
        "prompts": len(stats.rounds),
        "draft_length": stats.draft_length,
        "acceptance_length": stats.acceptance_length,
        "accepted_histogram": np.sum(stats.accepted_histogram, axis=0).tolist(),
        "new_tokens": sum(stats.new_tokens),
        "rounds": sum(stats.rounds),
        "tokens_per_second": stats.tokens_per_second,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "seconds": stats.seconds,
        "prefill_seconds": stats.prefill_seconds,
        "compile_seconds": stats.compile_seconds,
    }
