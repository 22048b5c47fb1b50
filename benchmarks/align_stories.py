"""Alignment on stories260k: the training answers and held-out prompts, and acceptance of the drafters trained on them.

    python benchmarks/align_stories.py data    --target FOLDER/stories260k --output stories
    python benchmarks/align_stories.py measure --target FOLDER/stories260k --held-out stories/held_out.jsonl RUN...

`data` lets the target answer: 60 % of the rows from BOS (three at temperature 1, then one at 0.6), 40 % continued from
the first 4 to 64 tokens of its own samples (three greedy, then one at 0.6). The held-out prompts are the first 17 to 32
tokens of samples of another seed; `align` leaves out those that occur in training rows, and `measure` takes the same.

`measure` decodes them with each drafter, a run of `deer-jax align` or any drafter, at k = 4, 8, 16, T = 0 and 1, for 64
and 128 new tokens. τ is a ratio of sums over prompts with its bootstrap interval.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import deer_jax
from deer_jax.data.answers import AnswerFiles
from deer_jax.decoding.acceptance import acceptance_by_depth, acceptance_interval, repeated_windows
from deer_jax.training.acceptance import survey

ROWS, TOKENS, OPENING = 8192, 191, 64
HELD_OUT, LEAST, MOST = 400, 17, 32


def data(target, folder: Path) -> None:
    """The files of `data`."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {"batch_size": 256, "progress": progress}
    sampled = ROWS * 3 // 5
    deer_jax.answers(
        target, None, folder / "sampled.jsonl", samples=sampled, max_new_tokens=TOKENS,
        temperatures=(1.0, 1.0, 1.0, 0.6), seed=1, **common,
    )  # fmt: skip
    openings = folder / "openings.jsonl"
    deer_jax.answers(
        target, None, openings, samples=ROWS - sampled, max_new_tokens=OPENING, temperatures=(1.0,), seed=2, **common
    )
    whole = [record["prompt"] + record["answer"] for record in map(json.loads, openings.open())]
    deer_jax.answers(
        target, whole, folder / "continued.jsonl", prefix=(5, OPENING + 1), max_new_tokens=TOKENS - OPENING,
        temperatures=(0.0, 0.0, 0.0, 0.6), seed=3, **common,
    )  # fmt: skip
    unseen = deer_jax.decode(
        target, [[1]] * HELD_OUT, max_new_tokens=MOST - 1, temperature=1.0, seed=4, batch_size=HELD_OUT
    )
    lengths = np.random.default_rng(5).integers(LEAST, MOST + 1, HELD_OUT)
    lines = [
        {"tokens": ([1, *tokens])[:length]}
        for tokens, length in zip(unseen.tokens, lengths.tolist(), strict=True)
        if len(tokens) >= length
    ]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def measure(target, held_out: Path, runs: list[str], limit: int, rows: int) -> None:
    """The table of `measure`, and everything behind it as JSON lines on stdout."""
    files = [held_out.parent / name for name in ("sampled.jsonl", "continued.jsonl")]
    records = AnswerFiles(files, vocab_size=target.config.vocab_size)
    prompts = [json.loads(line)["tokens"] for line in held_out.open()]
    met = survey(records, prompts, room=TOKENS).met
    prompts = [prompt for prompt, seen in zip(prompts, met, strict=True) if not seen][:limit]
    print(f"{len(prompts)} prompts, {sum(met)} others occur in {len(records)} training rows", file=sys.stderr)
    for run in runs:
        name, _, attention = run.partition("@")
        config = deer_jax.DrafterConfig(attention=attention) if attention else None
        drafter = deer_jax.load_drafter(name, target=target, config=config)
        for new_tokens in (64, 128):
            for k in (4, 8, 16):
                for temperature in (0.0, 1.0):
                    found = deer_jax.decode(
                        target, prompts, drafter=drafter, draft_length=k, max_new_tokens=new_tokens,
                        temperature=temperature, batch_size=rows, ignore_stop=True,
                    )  # fmt: skip
                    histograms = np.asarray(found.stats.accepted_histogram)
                    low, high = acceptance_interval(histograms)
                    depths = acceptance_by_depth(histograms.sum(axis=0))
                    line = {
                        "run": run, "new_tokens": new_tokens, "k": k, "T": temperature,
                        "tau": round(found.stats.acceptance_length, 3), "ci95": [round(low, 3), round(high, 3)],
                        "by_depth": [None if x is None else round(x, 2) for x in depths],
                        "repeated_8grams": round(repeated_windows(found.tokens), 3), "prompts": len(prompts),
                    }  # fmt: skip
                    print(json.dumps(line), flush=True)


def progress(*numbers) -> None:
    print("\r" + " ".join(map(str, numbers)), end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("data", "measure"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--target", required=True, help="the folder of stories260k")
        if verb == "data":
            sub.add_argument("--output", type=Path, required=True, help="the folder to write")
        else:
            sub.add_argument("--held-out", type=Path, required=True)
            sub.add_argument("--limit", type=int, default=104, help="prompts")
            sub.add_argument("--rows", type=int, default=104, help="prompts decoded at once")
            sub.add_argument("runs", nargs="+", help="runs or drafters; NAME@bidirectional reads so")
    arguments = parser.parse_args()
    target = deer_jax.load_target(arguments.target)
    if arguments.verb == "data":
        data(target, arguments.output)
    else:
        measure(target, arguments.held_out, arguments.runs, arguments.limit, arguments.rows)
