"""deer-jax decode: answers of a target to prompts, with or without a drafter."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

from deer_jax.cli.common import (
    DRAFTER_HELP,
    DecodeOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    check_distinct,
    check_writable,
    write_json,
    write_text,
)
from deer_jax.cli.options import Source, parse
from deer_jax.cli.progress import Reporter
from deer_jax.data.sources import Prompt, placed
from deer_jax.decoding.engine import decode
from deer_jax.decoding.state import DecodeResult
from deer_jax.decoding.stream import stream
from deer_jax.errors import InputError

EXAMPLE = 'deer-jax decode --target models/stories260k --drafter from-target --prompt "Once upon a time"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(OutputOptions, DecodeOptions, PromptOptions, ModelOptions):
    """Decode prompts with a target. A drafter makes it faster and leaves the answers as they are."""

    drafter: Annotated[Source | None, f"{DRAFTER_HELP}; without one, plain decoding", "SOURCE"] = None
    draft_length: Annotated[int | None, "tokens drafted per round; by default what the drafter was trained for"] = None
    batch_size: Annotated[int | None, "prompts that run at once (default: up to 16)"] = None
    output: Annotated[Path | None, "write the answers here, one JSON object per line, instead of printing them"] = None
    stream: Annotated[bool, "print the answer to a single prompt while it is made"] = False


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "decode", argv, EXAMPLE)
    arguments = options.arguments() | {"template_arguments": options.template_arguments()}
    prompts = options.read()
    check_distinct([options.output, options.json], [options.prompts, options.config, options.target, options.drafter])
    check_writable(options.output)
    check_writable(options.json)
    if options.stream and (len(prompts) != 1 or options.output or options.json or options.batch_size):
        raise InputError("--stream prints the answer to one prompt: without --output, --json and --batch-size")
    target, drafters = options.load([options.drafter] if options.drafter else [])
    arguments |= {"drafter": drafters[0] if drafters else None, "draft_length": options.draft_length}
    contents = [prompt.content for prompt in prompts]

    if options.stream:
        with placed(prompts):
            for piece in stream(target, contents, **arguments):
                print(piece, end="", flush=True)
        print()
        return
    with placed(prompts), Reporter("decoding") as reporter:
        result = decode(
            target, contents, **arguments, batch_size=options.batch_size, time_prefill=True,
            progress=lambda done, total, tokens: reporter.show(done, total, f"{tokens:,} tokens"),
        )  # fmt: skip
    if options.output:
        write_text(options.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(prompts, result)))
    else:
        for row in rows(prompts, result):
            print(f"== {row['id']} ({row['new_tokens']} tokens, {row['rounds']} rounds)")
            print(row["tokens"] if row["text"] is None else row["text"])
    stats = result.stats
    if options.json:
        write_json(options.json, statistics(result) | {"target": target.name, "drafter": options.drafter})
    print(
        f"deer-jax: τ {stats.acceptance_length:.2f}, {stats.tokens_per_second:,.1f} tokens/s, "
        f"{sum(stats.rounds):,} rounds in {stats.seconds:.1f} s ({stats.compile_seconds:.1f} s of compiling excluded)",
        file=sys.stderr,
    )


def rows(prompts: Sequence[Prompt], result: DecodeResult) -> list[dict]:
    """One record per prompt, as `--output` writes them."""
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
