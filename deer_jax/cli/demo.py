"""deer-jax demo: a pair in memory, decoding beside plain decoding."""

import dataclasses
from collections.abc import Sequence

from deer_jax.bench.report import table
from deer_jax.bench.runner import bench
from deer_jax.cli.common import show
from deer_jax.cli.options import parse
from deer_jax.cli.progress import Reporter
from deer_jax.decoding.engine import decode
from deer_jax.demo import PROMPTS, demo_pair

NEW_TOKENS = 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Decode a few prompts with a small pair, beside plain decoding. It takes no options."""


def run(argv: Sequence[str]) -> None:
    parse(Options, "demo", argv, "deer-jax demo")
    target, drafter = demo_pair()
    print("The weights of this pair are random: its text is noise and its speed says nothing about a trained pair.")
    drafted = decode(target, PROMPTS, drafter=drafter, max_new_tokens=NEW_TOKENS)
    plain = decode(target, PROMPTS, max_new_tokens=NEW_TOKENS)
    for i, prompt in enumerate(PROMPTS):
        answers = [result.texts[i] if result.texts else "" for result in (plain, drafted)]
        same = drafted.tokens[i] == plain.tokens[i]
        print(f"\nprompt   {prompt!r}\nplain    {answers[0]!r}\ndrafted  {answers[1]!r}")
        print(f"         {plain.stats.rounds[i]} rounds plain, {drafted.stats.rounds[i]} drafted, ", end="")
        print("token for token the same" if same else "DIFFERENT")
    with Reporter("measuring, runs") as reporter:
        report = bench(
            target, PROMPTS, drafters={drafter.name: drafter}, max_new_tokens=NEW_TOKENS, batch_size=len(PROMPTS),
            progress=reporter.show,
        )  # fmt: skip
    show(table(report))
