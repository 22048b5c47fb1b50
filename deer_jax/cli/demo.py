"""deer-jax demo: the bundled pair at work, beside plain decoding."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text

from deer_jax.bench.report import table
from deer_jax.bench.runner import bench
from deer_jax.cli.common import check_writable, show
from deer_jax.cli.options import parse
from deer_jax.cli.progress import Reporter
from deer_jax.data.sources import read_prompts
from deer_jax.decoding.decode import decode
from deer_jax.decoding.stream import stream_blocks
from deer_jax.demo import PROMPTS, demo_pair
from deer_jax.drafters.drafter import Drafter
from deer_jax.errors import InputError
from deer_jax.files import replaceable
from deer_jax.models.target import Target

SHOWN = 3  # prompts whose answers are shown; the last one is sampled, as greedy text of so small a model soon loops
TEMPERATURE = 0.8
MEASURED = 8
NEW_TOKENS = 64
DRAFT_LENGTHS = (2, 4, 8)
BLOCKS = ("black on #9ad1f5", "black on #f5d08a")  # of one round and the next; blue and orange differ for everyone
EXAMPLE = 'deer-jax demo --prompt "class Stack:"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Decode a few prompts with the bundled pair, round by round, then measure it beside plain decoding.

    The target has 2.8 M parameters and has read the standard library's source; the prompts are from modules that it has
    not read. Under a minute on two cores. No option is needed.
    """

    prompt: Annotated[tuple[str, ...], "a prompt of your own, Python source to go on with; repeatable"] = ()
    picture: Annotated[Path, "the picture to write: speed, and what a round costs, by draft length"] = Path(
        "deer_jax_demo.png"
    )


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "demo", argv, EXAMPLE)
    check_writable(options.picture)
    if options.picture.suffix != ".png" and replaceable(options.picture) != "special":
        raise InputError(f"--picture: {options.picture} must end in .png")
    if not all(options.prompt):
        raise InputError("--prompt is empty: give some text")
    target, drafter = demo_pair()
    bundled = [str(prompt.content) for prompt in read_prompts(PROMPTS)]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    legend = Text("Accepted drafts are coloured", style="bold")
    legend.append(", each round in another colour than the one before; the target's own token follows uncoloured.\n")
    console.print(legend)
    prompts = options.prompt or bundled[:SHOWN]
    for number, prompt in enumerate(prompts, 1):
        sampled = not options.prompt and number == SHOWN
        show_blocks(console, target, drafter, prompt, TEMPERATURE if sampled else 0.0)
    with Reporter("measuring, runs") as reporter:
        report = bench(
            target, list(options.prompt) or bundled[:MEASURED], drafters={"drafter": drafter},
            draft_lengths=DRAFT_LENGTHS, max_new_tokens=NEW_TOKENS, repeats=2, progress=reporter.show,
            command="deer-jax demo",
        )  # fmt: skip
    show(table(report))
    faster = max(report.methods.values(), key=lambda method: method.speedup)
    best = "plain decoding" if faster.drafter is None else f"k = {faster.draft_length}"
    print(
        f"On this machine {best} is the fastest: a draft length pays where tau is above its round/step. A CPU pays for "
        "every further row of a pass; an accelerator reads the weights once for all of them (docs/numbers.md)."
    )
    from deer_jax.bench import plots  # only here: matplotlib looks for fonts and a folder of its own

    sys.stdout.flush()
    plots.save(plots.speed(report), options.picture)
    print(options.picture)


def show_blocks(console: Console, target: Target, drafter: Drafter, prompt: str, temperature: float) -> None:
    """One answer as its rounds commit it, and what it took."""
    assert target.tokenizer is not None
    console.print(Text(prompt, style="dim"), end="")
    tokens, rounds = [], 0
    blocks = stream_blocks(target, prompt, drafter=drafter, max_new_tokens=NEW_TOKENS, temperature=temperature)
    for rounds, block in enumerate(blocks, 1):
        tokens += block
        text = Text(target.tokenizer.decode(block[:-1]), style=BLOCKS[rounds % 2])
        text.append(target.tokenizer.decode(block[-1:]), style="default on default")
        console.print(text, end="", soft_wrap=True)
    if temperature:
        same = f"sampled at temperature {temperature:g}: exactly the target's distribution"
    elif decode(target, prompt, max_new_tokens=NEW_TOKENS).tokens == [tokens]:
        same = "greedy: the same tokens as plain decoding's"
    else:
        same = "greedy: other tokens than plain decoding's, from a near-tie on (docs/numbers.md)"
    line = f"\n\n{len(tokens)} tokens in {rounds} rounds (plain: one round each), {same}\n"
    console.print(Text(line, style="italic"))
