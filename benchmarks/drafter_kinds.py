"""Kinds of drafters on stories260k, with the same answers and text tokens: with their published losses, with DEER's.

    python benchmarks/align_stories.py data   --target FOLDER/stories260k --output stories
    python benchmarks/drafter_kinds.py run    --target FOLDER/stories260k --data stories --output kinds
    python benchmarks/drafter_kinds.py table  --output kinds
    python benchmarks/drafter_kinds.py others --target FOLDER/stories260k --data stories --output kinds

`run` trains and measures one cell, a row of the table with a seed, after the other; a cell that is finished is
skipped, one that was interrupted goes on. `--rows` and `--seeds` choose. `published`: every block wholly masked, the
loss and the weights of the kind's authors. `stages`: DEER's continuation (random masks, 1/t) and then refinement
(masked suffixes, alpha), with the same loss per token. What is counted: weights that are multiplied for each drafted
row, the output head included, look-ups not; predicted tokens and seconds of training.

Expected: about seven minutes for a cell on two quiet cores.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import deer_jax
from deer_jax.data.answers import AnswerFiles
from deer_jax.decoding.acceptance import acceptance_interval
from deer_jax.drafters.heads import Markov, PathSelector
from deer_jax.training.acceptance import survey

STEPS, SPLIT, BLOCKS, K, MASK, PROMPTS = 4000, 1000, 24, 8, 0, 104
COMMON = {"length": 176, "batch": 4, "checkpoint_every": 1000}
TAPS = [0, 2, 4]
MARKOV = {"head": "markov", "rank": 16, "layout": "next_token"}
FEW = MARKOV | {"rank": 64, "draft_vocab": 256, "taps": [0, 1, 2, 3, 4]}
CONVOLVED = FEW | {"conv_kernel": 2, "conv_group": 16}
PUBLISHED = {"ce": 0.1, "tv": 0.9, "decay": 4}  # the loss of DSpark
# Of each kind its beginning, its layers, and the loss of its authors.
KINDS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "dflash": ({}, "random:2", {"kl": 1, "decay": 4}),
    "dflash2": ({"head": "selector", "rank": 32, "candidates": 16, "conv_kernel": 2, "conv_group": 16}, "random:2",
                {"kl": 1, "selector": 1, "decay": 4}),
    "dspark": (MARKOV, "random:2", PUBLISHED),
    "combined": (CONVOLVED | {"rank": 96, "causal": True}, "from-target:3,4", PUBLISHED),
}  # fmt: skip
# With the published plan: other losses, and what leads from dspark to combined.
TRIALS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "dspark kl": (MARKOV, "random:2", {"kl": 1, "decay": 4}),
    "dspark pace": (MARKOV, "random:2", {"kl": 0.5, "tv": 0.5, "pace": True}),
    "started": (MARKOV, "from-target:3,4", PUBLISHED),
    "few ids": (FEW, "from-target:3,4", PUBLISHED),
    "few ids causal": (FEW | {"causal": True}, "from-target:3,4", PUBLISHED),
    "convolved": (CONVOLVED | {"rank": 32}, "from-target:3,4", PUBLISHED | {"decay": 6}),
}
UNTRAINED = "untrained"
STANDALONE: dict[str, dict[str, Any]] = {"standalone": {}, "standalone markov": {"kind": "markov", "rank": 16}}
# The published plan with DEER's refinement for its last quarter; and with half of the steps, so of the predictions.
REFINED, HALF = "combined refined", "combined half"
ROWS = [
    UNTRAINED, *STANDALONE, *(f"{kind} {how}" for kind in KINDS for how in ("published", "stages")), REFINED, HALF,
    *TRIALS,
]  # fmt: skip


def recipe(row: str, seed: int, target: str, data: Path, output: Path) -> dict[str, Any]:
    """What trains the drafter of a row."""
    values: dict[str, Any] = COMMON | {
        "target": target, "answers": [str(data / "sampled.jsonl"), str(data / "continued.jsonl")], "seed": seed,
        "output": str(output / f"{row.replace(' ', '-')}-{seed}"),
        "evaluation": {"prompts": str(data / "held_out.jsonl"), "every": STEPS, "limit": PROMPTS, "draft_lengths": [K],
                       "temperatures": [0, 1], "max_new_tokens": 64, "batch_size": 104},
    }  # fmt: skip
    optimizer = {"learning_rate": 2e-3, "blocks": BLOCKS}
    stages = [
        {"stage": "continuation", "steps": SPLIT, **optimizer},
        {"stage": "refinement", "steps": STEPS - SPLIT, **optimizer},
    ]
    if row in STANDALONE:
        head = {"draft_head": STANDALONE[row]} if STANDALONE[row] else {}
        return values | {"drafter": "from-target", "reading": {"draft_length": K}, "stages": stages} | head
    kind, how = (row, "published") if row in TRIALS else row.split()
    start, source, loss = TRIALS.get(kind) or KINDS[kind]
    if how == "published":
        stages = [{"stage": "continuation", "steps": STEPS, "least_rate": 1.0, **optimizer}]
    if how == "half":
        stages = [{"stage": "continuation", "steps": STEPS // 2, "least_rate": 1.0, **optimizer}]
    if how == "refined":
        stages = [
            {"stage": "continuation", "steps": STEPS - SPLIT, "least_rate": 1.0, **optimizer},
            {"stage": "refinement", "steps": SPLIT, **optimizer | {"learning_rate": 5e-4}},
        ]
    return values | {
        "drafter": source,
        "conditioned": {"taps": TAPS, "mask": MASK, "draft_length": K} | start,
        "stages": [stage | {"loss": loss} for stage in stages],
    }


def multiplied(method) -> int:
    """Weights that a drafted row is multiplied with."""
    shapes = method.shapes()
    count = sum(x.size for x in jax.tree.leaves(shapes["layers"]))
    vocabulary = getattr(method, "draft_vocab", method.target_vocab)
    count += vocabulary * method.shape.width
    head = getattr(method, "head", None)
    if isinstance(head, PathSelector):
        count += head.rank * method.shape.width + head.rank * head.candidates
    if isinstance(head, Markov):
        count += sum(x.size for name, x in shapes["draft_head"].items() if name != "w1")
    return count


def run_cell(row: str, seed: int, args) -> dict[str, Any]:
    """Train and measure one; the figures."""
    target = deer_jax.load_target(args.target)
    result: dict[str, Any] = {"row": row, "seed": seed, "predicted": 0, "cpu_seconds": 0}
    if row == UNTRAINED:
        drafter = deer_jax.load_drafter("from-target", target=target)
    else:
        values = recipe(row, seed, args.target, args.data, args.output)
        begun, began = (Path(values["output"]) / "metrics.jsonl").exists(), time.process_time()
        report = deer_jax.align(values, progress=lambda done, steps, note: show(row, seed, done, steps, note))
        result["cpu_seconds"] = None if begun else time.process_time() - began
        drafter = deer_jax.load_drafter(values["output"], target=target)
        metrics = [json.loads(line) for line in (Path(values["output"]) / "metrics.jsonl").open()]
        losses = [line for line in metrics if "loss" in line]
        result["predicted"] = int(sum(line["predicted"] for line in losses) / len(losses) * report.steps)
    prompts, found = unseen(target, args.data)[:PROMPTS], {}
    for k in (4, K, 16) if seed == 0 else (K,):
        for temperature in (0.0, 1.0):
            stats = decoded(target, drafter, prompts, k, temperature)
            interval = acceptance_interval(np.asarray(stats.accepted_histogram))
            found[f"k{k} T{temperature:g}"] = [stats.acceptance_length, *(interval or (None, None))]
    parameters = sum(x.size for x in jax.tree.leaves(drafter.params))
    return result | {"tau": found, "multiplied": multiplied(drafter.method), "parameters": parameters}


def decoded(
    target: deer_jax.Target, drafter: deer_jax.Drafter, prompts: list[list[int]], k: int, temperature: float, **options
):
    """The statistics of 64 new tokens after each prompt; further options as for `decode`."""
    return deer_jax.decode(
        target, prompts, drafter=drafter, draft_length=k, max_new_tokens=64, temperature=temperature, batch_size=128,
        seed=7, **options,
    ).stats  # fmt: skip


def unseen(target: deer_jax.Target, data: Path) -> list[list[int]]:
    """The held-out prompts that occur in no training row."""
    records = AnswerFiles([data / "sampled.jsonl", data / "continued.jsonl"], vocab_size=target.config.vocab_size)
    prompts = [json.loads(line)["tokens"] for line in (data / "held_out.jsonl").open()]
    met = survey(records, prompts, COMMON["length"]).met
    return [prompt for prompt, seen in zip(prompts, met, strict=True) if not seen]


def others(args) -> None:
    """Finished cells on the held-out prompts that no other figure is of."""
    target = deer_jax.load_target(args.target)
    prompts = unseen(target, args.data)[PROMPTS:]
    print(f"{len(prompts)} prompts")
    for row, seed in [(row, seed) for row in args.rows for seed in args.seeds]:
        run = args.output / f"{row.replace(' ', '-')}-{seed}"
        if not run.is_dir():
            continue
        drafter = deer_jax.load_drafter(run, target=target)
        found = [round(decoded(target, drafter, prompts, K, t).acceptance_length, 2) for t in (0.0, 1.0)]
        print(f"{row}, seed {seed}: {found}", flush=True)


def show(row: str, seed: int, done: int, steps: int, note: str) -> None:
    if done % 200 == 0:
        print(f"\r{row}, seed {seed}: {done} of {steps}, {note:60.60}", end="", file=sys.stderr, flush=True)


def run(args) -> None:
    cells = [(row, seed) for seed in args.seeds for row in args.rows]
    args.output.mkdir(parents=True, exist_ok=True)
    took: list[float] = []
    for number, (row, seed) in enumerate(cells):
        path = args.output / f"{row.replace(' ', '-')}-{seed}.json"
        if path.exists():
            continue
        begin = time.time()
        result = run_cell(row, seed, args)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        took.append(time.time() - begin)
        left = sum(not (args.output / f"{r.replace(' ', '-')}-{s}.json").exists() for r, s in cells[number + 1 :])
        shown = {name: round(values[0], 2) for name, values in result["tau"].items()}
        print(f"\n{row}, seed {seed}: {shown}; about {left * sum(took) / len(took) / 60:.0f} minutes left", flush=True)


def table(args) -> None:
    results = [json.loads(path.read_text()) for path in sorted(args.output.glob("*.json"))]
    print("| row | seed | tau k=8 T=0 | T=1 | k=4 | k=16 | multiplied | parameters | predicted | CPU seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for each in sorted(results, key=lambda each: (ROWS.index(each["row"]), each["seed"])):
        tau = each["tau"]

        def pair(k: int, tau=tau) -> str:
            values = [tau.get(f"k{k} T{t}") for t in (0, 1)]
            return " / ".join(f"{value[0]:.2f}" for value in values if value) or "-"

        zero, one = (f"{tau[f'k8 T{t}'][0]:.2f} [{tau[f'k8 T{t}'][1]:.2f}, {tau[f'k8 T{t}'][2]:.2f}]" for t in (0, 1))
        seconds = "-" if each["cpu_seconds"] is None else f"{each['cpu_seconds']:.0f}"
        print(f"| {each['row']} | {each['seed']} | {zero} | {one} | {pair(4)} | {pair(16)} | {each['multiplied']:,} | "
              f"{each['parameters']:,} | {each['predicted']:,} | {seconds} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "others", "table"))
    parser.add_argument("--target", help="the folder of stories260k")
    parser.add_argument("--data", type=Path, help="the folder that align_stories.py made")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the runs and their figures")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    if args.what == "table":
        return table(args)
    if not args.target or not args.data:
        parser.error(f"{args.what} needs --target and --data")
    (run if args.what == "run" else others)(args)


if __name__ == "__main__":
    main()
