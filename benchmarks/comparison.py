"""One table: EAGLE-3 and the block drafters on one target, with the same answers in the same order and text tokens.

    python benchmarks/align_stories.py data --target FOLDER/stories260k --output stories
    python benchmarks/comparison.py run   --target FOLDER/stories260k --data stories --output CELLS --work runs
    python benchmarks/comparison.py time  --target FOLDER/stories260k --data stories --output CELLS --work runs
    python benchmarks/comparison.py table --output CELLS

`run` trains and measures one cell, a row of the table with a seed, after the other. A cell that is finished, a JSON
file of --output (those of BENCHMARKS.md are in benchmarks/comparison/stories260k), is skipped, and one that was
interrupted goes on from its run in --work; so `run` may be called as often as wanted, with --rows and --seeds or
without. `time`, on a quiet machine, adds tokens/s and speedup of the rows whose runs are there. `table` prints what
there is.

All rows are trained on the same tokens, 4,000 steps of 4 texts with 24 blocks of 8, and the last checkpoint is
measured. `I`, `I+II`: DEER's continuation, and then its refinement; `published`: every block masked whole, with the
loss of the kind's authors; `III`: 1,000 steps of the third stage, `more`: as many of what was before instead. Counted
are the weights that one pass over a row multiplies, the output head included, and the passes for a draft of 8;
look-ups are not.

Expected: 3 to 9 minutes for a cell on two quiet cores.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from drafter_kinds import BLOCKS, COMMON, KINDS, MASK, PROMPTS, SPLIT, STEPS, TAPS, K, decoded, multiplied, show, unseen

import deer_jax
from deer_jax.decoding.acceptance import acceptance_by_depth, acceptance_interval
from deer_jax.drafters.eagle3 import Eagle3Method

THIRD = 1000  # steps of the third stage
LENGTHS, TEMPERATURES = (4, K, 16), (0.0, 1.0)
DFLASH, DFLASH2, DSPARK, BEST = (KINDS[kind] for kind in ("dflash", "dflash2", "dspark", "combined"))


def conditioned(kind: tuple[dict[str, Any], str, dict[str, Any]], plan: str):
    """The row of a kind of `drafter_kinds`."""
    start, source, loss = kind
    return {"conditioned": {"taps": TAPS} | start}, source, plan, loss


# Row -> what begins the drafter, from what, its plan and its loss.
ROWS: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    "prompt-lookup": ({}, "prompt-lookup", "", {}),
    "untrained": ({}, "from-target", "", {}),
    "EAGLE-3": ({"eagle3": {"taps": [0, 2, 4], "mlp_width": 172}}, "random:1", "published", {"kl": 1}),
    "EAGLE-3, wide": ({"eagle3": {"taps": [0, 2, 4], "mlp_width": 820}}, "random:1", "published", {"kl": 1}),
    "EAGLE-3, 256 ids": ({"eagle3": {"taps": [0, 2, 4], "draft_vocab": 256}}, "random:1", "published", {"kl": 1}),
    "standalone I": ({"reading": {}}, "from-target", "I", {}),
    "standalone I+II": ({"reading": {}}, "from-target", "I+II", {}),
    "standalone markov I+II": (
        {"reading": {}, "draft_head": {"kind": "markov", "rank": 16}},
        "from-target",
        "I+II",
        {},
    ),
    "DFlash I+II": conditioned(DFLASH, "I+II"),
    "DFlash 2 I+II": conditioned(DFLASH2, "I+II"),
    "DSpark I+II": conditioned(DSPARK, "I+II"),
    "best": conditioned(BEST, "published"),
    "best, III": conditioned(BEST, "published+III"),
    "best, more": conditioned(BEST, "published+more"),
}
UNTRAINED = ("prompt-lookup", "untrained")


def recipe(row: str, seed: int, args) -> dict[str, Any]:
    """What trains the drafter of a row."""
    begin, source, plan, loss = ROWS[row]
    begin = {key: dict(value) for key, value in begin.items()}
    for key in ("conditioned", "eagle3", "reading"):
        if key in begin:
            begin[key]["draft_length"] = K
    if "conditioned" in begin:
        begin["conditioned"]["mask"] = MASK
    common = {"learning_rate": 2e-3, "blocks": BLOCKS} | ({"loss": loss} if loss else {})
    first, second = common | {"stage": "continuation"}, common | {"stage": "refinement"}
    own_rate = {"learning_rate": 5e-4, "least_rate": 1.0}
    own = {"stage": "acceptance", "steps": THIRD, "blocks": BLOCKS, "learning_rate": 5e-4}
    stages = {
        "published": [first | {"steps": STEPS, "least_rate": 1.0}],
        # The third stage, and instead of it as many steps of what was before.
        "published+III": [first | {"steps": STEPS, "least_rate": 1.0}, own],
        "published+more": [first | {"steps": STEPS, "least_rate": 1.0}, first | own_rate | {"steps": THIRD}],
        "I": [first | {"steps": STEPS}],
        "I+II": [first | {"steps": SPLIT}, second | {"steps": STEPS - SPLIT}],
    }[plan]
    return COMMON | begin | {
        "target": args.target, "answers": [str(args.data / name) for name in ("sampled.jsonl", "continued.jsonl")],
        "seed": seed, "drafter": source, "stages": stages, "output": str(args.work / name_of(row, seed)),
    }  # fmt: skip


def name_of(row: str, seed: int) -> str:
    return f"{row.replace(', ', '-').replace(' ', '-').replace('+', '-')}-{seed}"


def run_cell(row: str, seed: int, args) -> dict[str, Any]:
    """Train and measure one; the figures."""
    target = deer_jax.load_target(args.target)
    result: dict[str, Any] = {"row": row, "seed": seed, "predicted": 0, "cpu_seconds": 0}
    if row in UNTRAINED:
        drafter = deer_jax.load_drafter(ROWS[row][1], target=target)
    else:
        values = recipe(row, seed, args)
        metrics = Path(values["output"]) / "metrics.jsonl"
        begun, began = metrics.exists(), time.process_time()
        report = deer_jax.align(values, progress=lambda done, steps, note: show(row, seed, done, steps, note))
        result["cpu_seconds"] = None if begun else time.process_time() - began
        drafter = deer_jax.load_drafter(values["output"], target=target)
        losses = [line for line in map(json.loads, metrics.open()) if "loss" in line]
        result["predicted"] = int(sum(line["predicted"] for line in losses) / len(losses) * report.steps)
    prompts, found = unseen(target, args.data)[:PROMPTS], {}
    for k in LENGTHS if seed == 0 else (K,):
        for temperature, verification in ((0.0, "token"), (1.0, "token"), (1.0, "block")):
            stats = decoded(target, drafter, prompts, k, temperature, verification=verification)
            histograms = np.asarray(stats.accepted_histogram)
            rule = ", block" if verification == "block" else ""
            found[f"k={k} T={temperature:g}{rule}"] = {
                "tau": stats.acceptance_length, "ci95": acceptance_interval(histograms),
                "by_depth": acceptance_by_depth(histograms.sum(axis=0)),
            }  # fmt: skip
    method = drafter.method
    passes = K if isinstance(method, Eagle3Method) else 0 if row == "prompt-lookup" else 1
    parameters = sum(x.size for x in jax.tree.leaves(drafter.params))
    return result | {
        "tau": found,
        "multiplied": multiplied(method) if passes else 0,
        "passes": passes,
        "parameters": parameters,
    }


def run(args) -> None:
    cells = [(row, seed) for seed in args.seeds for row in args.rows if seed == 0 or row not in UNTRAINED]
    args.output.mkdir(parents=True, exist_ok=True)
    paths = {cell: args.output / f"{name_of(*cell)}.json" for cell in cells}
    took: list[float] = []
    for (row, seed), path in paths.items():
        if path.exists():
            continue
        begin = time.time()
        result = run_cell(row, seed, args)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        took.append(time.time() - begin)
        left = sum(not other.exists() for other in paths.values())
        shown = {name: round(each["tau"], 2) for name, each in result["tau"].items() if f"k={K} " in name}
        print(f"\n{row}, seed {seed}: {shown}; about {left * sum(took) / len(took) / 60:.0f} minutes left", flush=True)


def timed(args) -> None:
    """Adds tokens/s and speedup, all rows in turns: one prompt at a time, 64 tokens, greedy and sampled."""
    target = deer_jax.load_target(args.target)
    found = {}
    for row in args.rows:
        folder = args.work / name_of(row, 0)
        if row in UNTRAINED or folder.is_dir():
            found[row] = deer_jax.load_drafter(ROWS[row][1] if row in UNTRAINED else folder, target=target)
    for temperature in TEMPERATURES:
        report = deer_jax.bench(
            target, unseen(target, args.data)[:16], drafters=found, draft_lengths=[4, K], max_new_tokens=64,
            temperature=temperature, repeats=3,
        )  # fmt: skip
        text = json.dumps(report.as_dict(), indent=1) + "\n"
        (args.output / f"time-T{temperature:g}.json").write_text(text, encoding="utf-8")
        print(report.table())


def table(args) -> None:
    results = [json.loads(path.read_text()) for path in sorted(args.output.glob("*.json"))]
    results = sorted(
        (each for each in results if "row" in each), key=lambda each: ([*ROWS].index(each["row"]), each["seed"])
    )
    heads = (
        "row", "seed", "T = 0", "T = 1", "block, T = 1", "k = 4", "k = 16", "weights x passes", "own parameters",
        "predicted", "CPU s",
    )  # fmt: skip
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for each in results:
        tau = each["tau"]

        def interval(name: str, tau=tau) -> str:
            low, high = tau[name]["ci95"] or (tau[name]["tau"],) * 2
            return f"{tau[name]['tau']:.2f} ± {(high - low) / 2:.2f}"

        def both(k: int, tau=tau) -> str:
            names = [f"k={k} T=0", f"k={k} T=1", f"k={k} T=1, block"]
            return " / ".join(f"{tau[name]['tau']:.2f}" for name in names if name in tau) or "-"

        seconds = "-" if not each["cpu_seconds"] else f"{each['cpu_seconds']:.0f}"
        columns = [f"k={K} T=0", f"k={K} T=1", f"k={K} T=1, block"]
        print(f"| {each['row']} | {each['seed']} | {' | '.join(map(interval, columns))} | {both(4)} | {both(16)} | "
              f"{each['multiplied']:,} x {each['passes']} | {each['parameters']:,} | {each['predicted'] / 1e6:.1f} M | "
              f"{seconds} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "time", "table"))
    parser.add_argument("--target", help="the folder of stories260k")
    parser.add_argument("--data", type=Path, help="the folder that align_stories.py made")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the figures, one file for each cell")
    parser.add_argument("--work", type=Path, help="a folder for the runs (default: --output)")
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    if args.what == "table":
        return table(args)
    if not args.target or not args.data:
        parser.error(f"{args.what} needs --target and --data")
    args.work = args.work or args.output
    (run if args.what == "run" else timed)(args)


if __name__ == "__main__":
    main()
