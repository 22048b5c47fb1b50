"""deer-jax demo: a pair at work, beside plain decoding."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from rich.console import Console
from rich.text import Text

from deer_jax.bench.report import PLAIN, table
from deer_jax.bench.runner import bench
from deer_jax.cli.common import check_writable, show
from deer_jax.cli.options import Source, parse
from deer_jax.cli.progress import Reporter, say
from deer_jax.data.chats import as_chat
from deer_jax.data.sources import read_prompts
from deer_jax.decoding.auto import AUTO
from deer_jax.decoding.decode import decode
from deer_jax.decoding.stream import stream_blocks
from deer_jax.demo import PROMPTS, demo_pair
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.prompt_lookup import lookup_first
from deer_jax.errors import InputError, RunError
from deer_jax.files import replaceable
from deer_jax.models.target import Target

SHOWN = 3  # bundled prompts whose answers are shown; the last is sampled, as greedy text of so small a model soon loops
TEMPERATURE = 0.8
MEASURED = 8
NEW_TOKENS = 64
DRAFT_LENGTHS = (2, 4, 8)
# What SmolLM2 is asked: code, mathematics, everyday; each is shown and measured.
QUESTIONS = (
    "Write a Python function that returns the first n Fibonacci numbers, with a docstring and two examples.",
    "A baker makes 24 muffins an hour for 6 hours and sells each for 3 dollars. A quarter of them is left over. How "
    "much does the baker earn?",
    "What should I pack for a weekend of hiking in autumn?",
)
CHAT_TOKENS = 96
CHAT_LENGTHS = (4, AUTO)
BLOCKS = ("black on #9ad1f5", "black on #f5d08a")  # of one round and the next; blue and orange differ for everyone
EXAMPLE = 'deer-jax demo --prompt "How do I read a file in Python?"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Answer a few prompts in blocks, round by round, then measure that beside plain decoding.

    The target is SmolLM2-135M-Instruct, a public chat model, which is downloaded once (93 MB); the drafter, which was
    aligned to it, is in this package. Without a network a small pair is shown instead, all of it in this package: 2.8 M
    parameters that have read the standard library's source. About a minute on two cores. No option is needed.
    """

    pair: Annotated[
        Literal["smollm2", "bundled"] | None,
        "which pair to show; by default smollm2, or bundled where it cannot be had",
    ] = None
    target: Annotated[
        Source | None, "a folder, hub id or GGUF file of SmolLM2-135M-Instruct, instead of the download", "FOLDER"
    ] = None
    prompt: Annotated[
        tuple[str, ...],
        "a prompt of your own: a question, or for the bundled pair Python source to go on with; repeatable",
    ] = ()
    picture: Annotated[Path, "the picture to write: speed, and what a round costs, by draft length"] = Path(
        "deer_jax_demo.png"
    )


class Shown(NamedTuple):
    """What is shown of a pair."""

    target: Target
    drafter: Drafter
    prompts: Sequence[Any]  # as `decode` takes them
    texts: Sequence[str]  # the same, as they are printed
    temperatures: Sequence[float]  # of each prompt that is shown
    draft_length: Literal["auto"] | None  # of what is shown
    measured: Sequence[Any]
    draft_lengths: Sequence[Any]
    new_tokens: int


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "demo", argv, EXAMPLE)
    check_writable(options.picture)
    if options.picture.suffix != ".png" and replaceable(options.picture) != "special":
        raise InputError(f"--picture: {options.picture} must end in .png")
    if not all(options.prompt):
        raise InputError("--prompt is empty: give some text")
    shown = chosen(options)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    legend = Text("Accepted drafts are coloured", style="bold")
    legend.append(", each round in another colour than the one before; the target's own token follows uncoloured.\n")
    console.print(legend)
    for prompt, text, temperature in zip(shown.prompts, shown.texts, shown.temperatures, strict=True):
        show_blocks(console, shown, prompt, text, temperature)
    with Reporter("measuring, runs") as reporter:
        report = bench(
            shown.target, list(shown.measured), drafters={"drafter": shown.drafter}, draft_lengths=shown.draft_lengths,
            max_new_tokens=shown.new_tokens, repeats=1, progress=reporter.show, command="deer-jax demo",
        )  # fmt: skip
    show(table(report))
    best = max(report.methods, key=lambda name: report.methods[name].speedup)
    fastest = "plain decoding" if best == PLAIN else best
    print(
        f"On this machine {fastest} is the fastest: a draft length pays where tau is above its round/step. A CPU pays "
        "for every further row of a pass; an accelerator reads the weights once for all of them (docs/numbers.md)."
    )
    from deer_jax.bench import plots  # only here: matplotlib looks for fonts and a folder of its own

    sys.stdout.flush()
    plots.save(plots.speed(report), options.picture)
    print(options.picture)


def chosen(options: Options) -> Shown:
    """The pair that is asked for, or the one that can be had."""
    if options.pair != "bundled":
        try:
            with Reporter("loading, bytes") as reporter:
                target, drafter = demo_pair("smollm2", target=options.target, say=say, progress=reporter.show)
        except RunError as error:
            if options.pair is not None or options.target is not None:
                raise
            say(f"{error}; here is the small pair that comes with this package")
        else:
            texts = options.prompt or QUESTIONS
            chats = [as_chat(text) for text in texts]
            return Shown(
                target, lookup_first(drafter), chats, [f"{text}\n" for text in texts], [0.0] * len(texts), AUTO, chats,
                CHAT_LENGTHS, CHAT_TOKENS,
            )  # fmt: skip
    target, drafter = demo_pair("bundled", target=options.target)
    bundled = [str(prompt.content) for prompt in read_prompts(PROMPTS)]
    texts = options.prompt or bundled[:SHOWN]
    temperatures = [0.0] * len(texts) if options.prompt else [*[0.0] * (SHOWN - 1), TEMPERATURE]
    return Shown(
        target, drafter, texts, texts, temperatures, None, options.prompt or bundled[:MEASURED], DRAFT_LENGTHS,
        NEW_TOKENS,
    )  # fmt: skip


def show_blocks(console: Console, shown: Shown, prompt: Any, text: str, temperature: float) -> None:
    """One answer as its rounds commit it, and what it took."""
    target, limit = shown.target, shown.new_tokens
    assert target.tokenizer is not None
    console.print(Text(text, style="dim"), end="")
    tokens, rounds = [], 0
    blocks = stream_blocks(
        target, prompt, drafter=shown.drafter, draft_length=shown.draft_length, max_new_tokens=limit,
        temperature=temperature,
    )  # fmt: skip
    for rounds, block in enumerate(blocks, 1):
        tokens += block
        piece = Text(target.tokenizer.decode(block[:-1]), style=BLOCKS[rounds % 2])
        piece.append(target.tokenizer.decode(block[-1:]), style="default on default")
        console.print(piece, end="", soft_wrap=True)
    if temperature:
        same = f"sampled at temperature {temperature:g}: exactly the target's distribution"
    elif decode(target, prompt, max_new_tokens=limit).tokens == [tokens]:
        same = "greedy: the same tokens as plain decoding's"
    else:
        same = "greedy: other tokens than plain decoding's, from a near-tie on (docs/numbers.md)"
    line = f"\n\n{len(tokens)} tokens in {rounds} rounds (plain: one round each), {same}\n"
    console.print(Text(line, style="italic"))
