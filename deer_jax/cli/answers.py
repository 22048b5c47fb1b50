"""deer-jax answers: what a target answers to prompts, as the training set of its drafter."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from deer_jax import processes
from deer_jax.cli.common import (
    ConfigOptions,
    PromptOptions,
    TargetOptions,
    check_distinct,
    check_writable,
    known_digests,
)
from deer_jax.cli.options import parse
from deer_jax.cli.processes import ProcessOptions
from deer_jax.cli.progress import Reporter, say, silent
from deer_jax.cli.stopping import ending_together, interrupted
from deer_jax.data.answer_writer import state_path
from deer_jax.data.answers import shard_numbers, shard_path
from deer_jax.data.sources import Prompt, placed
from deer_jax.decoding.answers import AnswersReport, answers
from deer_jax.errors import InputError

FROM_BOS = Prompt("BOS", [], "from BOS")
EXAMPLE = (
    "deer-jax answers --target deer_jax/pair/target --from-bos --samples 256 --temperatures 0.6,1 --max-new-tokens 96 "
    "--batch-size 32 --output first-answers.jsonl"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions, ConfigOptions, PromptOptions, TargetOptions):
    """Let a target answer prompts, by plain decoding: the training set of its drafter.

    Answers are appended to the output as they are finished. A run that was stopped goes on when the same command is
    given again. Of several processes each writes a shard beside the output, answers.shard-1.jsonl and so on; align
    reads them all when it is given the output."""

    output: Annotated[
        Path, "append the answers to this file, one JSON object per line; FILE.state.json is put beside it"
    ]
    from_bos: Annotated[bool, "continue from BOS alone instead of prompts"] = False
    samples: Annotated[int, "answers to each prompt, or from BOS"] = 1
    prefix: Annotated[
        tuple[int, ...] | None,
        "continue the first N tokens of each prompt, N drawn evenly from this range; of a line of an answer file, its "
        "prompt and answer together",
        "MIN,MAX",
    ] = None
    max_new_tokens: Annotated[int, "stop an answer after this many tokens"] = 512
    temperatures: Annotated[
        tuple[float, ...], "dealt out to the answers in turn, as in 0,0.7,1; 0 takes the likeliest token", "X,X"
    ] = (0.0,)
    top_k: Annotated[int, "sample among the N likeliest tokens; 0: among all"] = 0
    top_p: Annotated[float, "sample among the likeliest tokens that together have this probability; 1: all"] = 1.0
    seed: Annotated[int, "fixes every random choice"] = 0
    batch_size: Annotated[int, "answers made at once"] = 64
    verify: Annotated[
        bool, "read all files of the target again before going on; otherwise, those of another size or time of change"
    ] = False


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "answers", argv, EXAMPLE)
    options.join()
    prompts = None
    if not options.from_bos:
        prompts = processes.together(lambda: options.read(whole=options.prefix is not None, allow_empty=True))
    elif any(getattr(options, field.name) != field.default for field in dataclasses.fields(PromptOptions)):
        raise InputError("--from-bos continues from BOS alone: without options about prompts")
    check_distinct(files(options.output), [options.prompts, options.config, options.target])
    check_writable(options.output)
    kept = f"{options.output} keeps what is done; the same command goes on from there"
    with ending_together("this part of the answers", kept) as check:

        def show(done: int, total: int, speed: float) -> None:
            check()
            reporter.show(done, total, f"{speed:,.0f} tokens/s")

        target = options.load_target(known_digests(options.output, verify=options.verify))
        with placed(prompts or [FROM_BOS]), Reporter("answering") as reporter, interrupted(kept):
            report = answers(
                target,
                None if prompts is None else [prompt.content for prompt in prompts],
                options.output,
                ids=None if prompts is None else [prompt.id for prompt in prompts],
                max_new_tokens=options.max_new_tokens,
                temperatures=options.temperatures,
                top_k=options.top_k,
                top_p=options.top_p,
                samples=options.samples,
                prefix=options.prefix,
                seed=options.seed,
                batch_size=options.batch_size,
                template_arguments=options.template_arguments(),
                progress=show,
            )
    if not silent():
        say(f"{options.output}: {summary(report, options, target.config.context)}")


def files(output: Path) -> list[Path]:
    """An output with its shards and what is kept beside them."""
    if not output.name:
        return [output]
    shards = [shard_path(output, number) for number in (0, *shard_numbers(output))]
    return [path for shard in shards for path in (shard, state_path(shard))]


def summary(report: AnswersReport, options: Options, context: int) -> str:
    """What was done, on one line."""
    if report.written:
        parts = [
            f"{report.written:,} answers" + (f" and {report.resumed:,} from before" if report.resumed else ""),
            f"{report.tokens_per_second:,.1f} tokens/s",
            f"{report.ended / report.written:.0%} ended with a stop token",
        ]
    elif report.resumed:
        parts = [f"is complete, {report.resumed:,} answers, nothing to do"]
    else:
        parts = ["no answers"]
    if report.skipped_empty:
        parts.append(f"{report.skipped_empty:,} skipped: empty prompts")
    if report.skipped_overlong:
        parts.append(
            f"{report.skipped_overlong:,} skipped: the prompt and {options.max_new_tokens} new tokens exceed the "
            f"context of {context}"
        )
    return ", ".join(parts)
