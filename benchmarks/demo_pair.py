"""The bundled pair: acceptance length and speed at every draft length, greedy and sampled, on three kinds of prompts.

    python benchmarks/demo_pair.py --data FOLDER [--prompts N] [--new-tokens N] [--repeats N] [--json FILE] [--plot DIR]

FOLDER holds humaneval/ and mbpp/ as published. Prompts that do not fit the pair's context with the new tokens are left
out and counted. The untrained drafter beside it is made of the same layers of the target. One process; within each
table the methods take turns.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import deer_jax
from deer_jax.bench import plots
from deer_jax.data.sources import read_prompts
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.demo import PROMPTS

LENGTHS = (2, 4, 8, 16)
UNTRAINED_LAYERS = (0, 2, 5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=32, help="of each kind at most")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="write the greedy pictures of the held-out modules to this folder")
    args = parser.parse_args()
    target, drafter = deer_jax.demo_pair()
    drafters = {
        "drafter": drafter,
        "untrained": deer_jax.drafter_from_target(target, drafter.method.reading, layers=UNTRAINED_LAYERS),
    }
    files = {
        "HumanEval": args.data / "humaneval" / "humaneval_000_099.jsonl",
        "MBPP": args.data / "mbpp" / "mbpp_nontest.jsonl",
        "held-out modules": PROMPTS,
    }
    found = {}
    for kind, file in files.items():
        encoded = encode_prompts(target, [prompt.content for prompt in read_prompts(file)])
        fitting = [prompt for prompt in encoded if len(prompt) + args.new_tokens <= target.config.context]
        prompts = fitting[: args.prompts]
        for temperature in (0.0, 1.0):
            report = deer_jax.bench(
                target, prompts, drafters=drafters, draft_lengths=LENGTHS, max_new_tokens=args.new_tokens,
                temperature=temperature, repeats=args.repeats,
            )  # fmt: skip
            left_out = len(encoded) - len(fitting)
            title = f"{kind}, T = {temperature:g}, {len(prompts)} prompts ({left_out} of {len(encoded)} do not fit)"
            print(f"\n{title}\n\n{markdown(report)}", flush=True)
            found[title] = report.as_dict()
            if args.plot and kind == "held-out modules" and not temperature:
                plots.write(report, args.plot)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def markdown(report) -> str:
    """The table as BENCHMARKS.md has it."""
    lines = [
        "| method | τ [95 %] | round/step | tokens/s | decode tokens/s | speedup | exact match | repeated 8-grams |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, method in report.methods.items():
        values = dataclasses.asdict(method)
        low, high = values["ci95"] or (values["acceptance_length"],) * 2
        exact = "" if values["exact_match"] is None else f"{100 * values['exact_match']:.1f} %"
        lines.append(
            f"| {name} | {values['acceptance_length']:.2f} [{low:.2f}, {high:.2f}] | {values['round_cost']:.2f} "
            f"| {values['tokens_per_second']:,.0f} | {values['decode_tokens_per_second']:,.0f} "
            f"| {values['speedup']:.2f}x | {exact} | {100 * (values['repeated_8grams'] or 0):.1f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
