"""One table: EAGLE-3 and the block drafters on one target, with the same answers and text tokens.

    python benchmarks/align_stories.py data --target FOLDER/stories260k --output stories
    python benchmarks/comparison/run.py run   --plan stories260k --target FOLDER/stories260k --data stories --work runs
    python benchmarks/comparison/run.py time  --plan stories260k --target FOLDER/stories260k --data stories --work runs
    python benchmarks/comparison/run.py table --plan stories260k

`run` trains and measures one cell, a row of the plan with a seed, after the other. A cell that is finished, a JSON file
of --output (default: benchmarks/comparison/PLAN), is skipped, and one that was interrupted goes on from its run in
--work; so `run` may be called as often as wanted, with --rows and --seeds or without, and two at a time with other
rows. `others` measures finished runs on the held-out prompts behind those of the cells, which nothing was chosen by.
`time`, on a quiet machine, adds tokens/s and speedup of the rows whose runs are there. `table` prints what there is,
with the speedup that tau and the bytes of compiled rounds (tpu.json) give for Qwen3-8B on 8 v5e.

The plans `stories260k`, `kinds` and `ablations` have the data of align_stories.py; `smollm2` that of
benchmarks/smollm2/README.md, held_out.jsonl and of its answers the first 3,032 lines:

    gunzip -c benchmarks/smollm2/smollm2.jsonl.gz | head -n 3032 > smol/answers.jsonl

Counted are the weights that one pass over a row multiplies, the output head included, and the passes for a draft of 8;
look-ups are not. The last checkpoint is measured. CPU seconds are those of `align`, with compilation; the first row of
smollm2 that reads the target does so for all, and keeps what it says in --work (7 GB).

Expected on one core: 7 to 20 minutes for a cell of stories260k, 5 to 8 for one of the ablations, 25 to 50 for one of
smollm2, 90 for its standalone drafter, and another hour for the first; `time` of smollm2 takes half an hour for each
temperature.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rows import PLANS, ROUNDS, K, Plan, SharedStates, multiplied, patched, untrained

import deer_jax
from deer_jax.data.answers import AnswerFiles
from deer_jax.data.sources import read_prompts
from deer_jax.decoding.acceptance import acceptance_by_depth, acceptance_interval
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.drafters.eagle3 import Eagle3Method
from deer_jax.training.acceptance import survey

HERE = Path(__file__).resolve().parent


def folder_of(row: str, seed: int) -> str:
    return f"{row.replace(', ', '-').replace(' ', '-').replace('+', '-')}-{seed}"


def recipe(plan: Plan, name: str, seed: int, args) -> dict[str, Any]:
    """What trains the drafter of a row."""
    row = plan.rows[name]
    source = row.source
    if row.after:
        if (found := finished(args, row.after, seed)) is None:
            sys.exit(
                f"{name} goes on from the run of {row.after!r}, which is not in {args.work} or not finished: "
                f"run that row first, where {args.output} has its figures already with another --output"
            )
        source = str(found)
    return plan.common | row.begin | {
        "target": args.target, "answers": [str(args.data / file) for file in plan.answers], "seed": seed,
        "drafter": source, "stages": list(row.stages), "output": str(args.work / folder_of(name, seed)),
    }  # fmt: skip


def finished(args, name: str, seed: int) -> Path | None:
    """The run of a cell, if both are there."""
    folder, cell = args.work / folder_of(name, seed), args.output / f"{folder_of(name, seed)}.json"
    return folder if folder.is_dir() and cell.is_file() else None


def rule_of(temperature: float, verification: str) -> str:
    return f"T={temperature:g}" + (", block" if verification == "block" else "")


def unseen(plan: Plan, target: deer_jax.Target, data: Path) -> list[list[int]]:
    """The held-out prompts that occur in no training row; cells are of the first `plan.prompts` of them."""
    prompts = encode_prompts(target, [prompt.content for prompt in read_prompts(data / "held_out.jsonl")])
    records = AnswerFiles([data / file for file in plan.answers], vocab_size=target.config.vocab_size)
    met = survey(records, prompts, plan.common["length"]).met
    return [prompt for prompt, seen in zip(prompts, met, strict=True) if not seen]


def show(name: str, seed: int, done: int, steps: int, note: str) -> None:
    if done % 100 == 0:
        print(f"\r{name}, seed {seed}: {done} of {steps}, {note:60.60}", end="", file=sys.stderr, flush=True)


def run_cell(plan: Plan, name: str, seed: int, args) -> dict[str, Any]:
    """Train and measure one; the figures."""
    target, row = deer_jax.load_target(args.target), plan.rows[name]
    result: dict[str, Any] = {"row": name, "seed": seed, "predicted": 0, "cpu_seconds": 0}
    if untrained(row):
        drafter = deer_jax.load_drafter(row.source, target=target)
    else:
        values = recipe(plan, name, seed, args)
        metrics = Path(values["output"]) / "metrics.jsonl"
        begun, began = metrics.exists(), time.process_time()
        with patched(plan, row):
            report = deer_jax.align(values, progress=lambda done, steps, note: show(name, seed, done, steps, note))
        result["cpu_seconds"] = None if begun else time.process_time() - began
        drafter = deer_jax.load_drafter(values["output"], target=target)
        losses = [line for line in map(json.loads, metrics.open()) if "loss" in line]
        result["predicted"] = int(sum(line["predicted"] for line in losses) / len(losses) * report.steps)
    prompts = unseen(plan, target, args.data)[: plan.prompts]
    found = measured(plan, target, drafter, prompts, plan.lengths if seed == 0 else (K,))
    method = drafter.method
    passes = K if isinstance(method, Eagle3Method) else 0 if row.source == "prompt-lookup" else 1
    return result | {
        "tau": found,
        "multiplied": multiplied(method) if passes else 0,
        "passes": passes,
        "parameters": sum(x.size for x in jax.tree.leaves(drafter.params)),
    }


def measured(plan: Plan, target: deer_jax.Target, drafter: deer_jax.Drafter, prompts, lengths) -> dict[str, Any]:
    """Tau with its interval and by depth, by k, temperature and rule."""
    found = {}
    for k in lengths:
        for temperature, verification in plan.rules:
            if verification == "block" and k not in plan.block_lengths:
                continue
            stats = deer_jax.decode(
                target, prompts, drafter=drafter, draft_length=k, max_new_tokens=64, temperature=temperature,
                batch_size=plan.batch, seed=7, verification=verification,
            ).stats  # fmt: skip
            histograms = np.asarray(stats.accepted_histogram)
            found[f"k={k} {rule_of(temperature, verification)}"] = {
                "tau": stats.acceptance_length, "ci95": acceptance_interval(histograms),
                "by_depth": acceptance_by_depth(histograms.sum(axis=0)),
            }  # fmt: skip
    return found


def run(plan: Plan, args) -> None:
    rows = [(name, seed) for seed in args.seeds for name in args.rows]
    cells = [(name, seed) for name, seed in rows if seed == 0 or not untrained(plan.rows[name])]
    args.output.mkdir(parents=True, exist_ok=True)
    paths = {cell: args.output / f"{folder_of(*cell)}.json" for cell in cells}
    took: list[float] = []
    for (name, seed), path in paths.items():
        if path.exists():
            continue
        begin = time.time()
        result = run_cell(plan, name, seed, args)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        took.append(time.time() - begin)
        left = sum(not other.exists() for other in paths.values())
        shown = {rule: round(each["tau"], 2) for rule, each in result["tau"].items() if f"k={K} " in rule}
        print(f"\n{name}, seed {seed}: {shown}; about {left * sum(took) / len(took) / 60:.0f} minutes left", flush=True)


def others(plan: Plan, args) -> None:
    """The finished runs on the held-out prompts that no cell is of, and nothing was chosen by."""
    target = deer_jax.load_target(args.target)
    prompts = unseen(plan, target, args.data)[plan.prompts :]
    print(f"{len(prompts)} prompts, k = {K}")
    for name, seed in [(name, seed) for name in args.rows for seed in args.seeds]:
        if folder := finished(args, name, seed):
            found = measured(plan, target, deer_jax.load_drafter(folder, target=target), prompts, (K,))
            print(line([name, str(seed), *(interval(each) for each in found.values())]), flush=True)


def timed(plan: Plan, args) -> None:
    """Adds tokens/s and speedup, all rows in turns: one prompt at a time, 64 tokens, greedy and sampled."""
    target = deer_jax.load_target(args.target)
    found = {}
    for name in args.rows:
        row = plan.rows[name]
        if source := row.source if untrained(row) else finished(args, name, 0):
            found[name] = deer_jax.load_drafter(source, target=target)
    prompts = unseen(plan, target, args.data)[: plan.timed]
    for temperature in (0.0, 1.0):
        report = deer_jax.bench(
            target, prompts, drafters=found, draft_lengths=[4, K], max_new_tokens=64,
            temperature=temperature, repeats=3,
        )  # fmt: skip
        kept = {name: value for name, value in report.as_dict().items() if name in ("methods", "machine", "date")}
        text = json.dumps(kept, indent=1) + "\n"
        (args.output / f"time-T{temperature:g}.json").write_text(text, encoding="utf-8")
    speeds(args.output)


# Tables


def cells_of(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """What is finished, in the order of the rows."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [each for each in files if each.get("row") in plan.rows]
    return sorted(found, key=lambda each: ([*plan.rows].index(each["row"]), each["seed"]))


def interval(each: dict[str, Any]) -> str:
    low, high = each["ci95"] or (each["tau"],) * 2
    return f"{each['tau']:.2f} ± {(high - low) / 2:.2f}"


def table(plan: Plan, args) -> None:
    cells = cells_of(plan, args.output)
    names = [rule_of(*rule) for rule in plan.rules]
    others = [k for k in plan.lengths if k != K]
    heads = ["row", "seed", *(name.replace("=", " = ") for name in names), *(f"k = {k}" for k in others),
             "weights x passes", "own parameters", "predicted", "CPU s"]  # fmt: skip
    print(line(heads), line(["---"] * len(heads)), sep="\n")
    for each in cells:
        tau = each["tau"]
        at = [[tau[f"k={k} {rule}"]["tau"] for rule in names if f"k={k} {rule}" in tau] for k in others]
        seconds = f"{each['cpu_seconds']:.0f}" if each["cpu_seconds"] else "-"
        print(line([each["row"], str(each["seed"]), *(interval(tau[f"k={K} {rule}"]) for rule in names),
                    *(" / ".join(f"{x:.2f}" for x in found) or "-" for found in at),
                    f"{each['multiplied']:,} x {each['passes']}", f"{each['parameters']:,}",
                    f"{each['predicted'] / 1e6:.1f} M", seconds]))  # fmt: skip
    print("\nAcceptance by depth, k = 8, seed 0: T = 0, T = 1\n")
    for each in cells:
        if each["seed"] == 0:
            depths = [each["tau"][f"k={K} T={t}"]["by_depth"] for t in (0, 1)]
            shown = [" ".join("-" if x is None else f"{x:.2f}" for x in depth) for depth in depths]
            print(line([each["row"], *shown]))
    computed(cells)
    speeds(args.output)


def computed(cells: list[dict[str, Any]]) -> None:
    """Speedup for Qwen3-8B on 8 v5e: tau times the bytes of a plain step over those of a round with a drafter of the
    row's kind, as compiled programs have them, one row and 4,096 tokens:

        python benchmarks/tpu_programs.py --case '8b-*-b1-4k-v5e' --json benchmarks/comparison/tpu.json
    """
    path = HERE / "tpu.json"
    if not path.is_file():
        return
    bytes_of = {
        each["case"].split("-")[1]: each["round_gb"]
        for each in json.loads(path.read_text())["results"]
        if "prefill" not in each["case"]
    }
    print("\nComputed, Qwen3-8B on 8 v5e: GB of a round, speedup at T = 0, T = 1, T = 1 as a block\n")
    for each in cells:
        kind = ROUNDS.get(each["row"])
        if kind is None or each["seed"]:
            continue
        rules = [rule for rule in each["tau"] if rule.startswith(f"k={K} ")]
        speed = [f"{each['tau'][rule]['tau'] * bytes_of['plain'] / bytes_of[kind]:.2f}" for rule in rules]
        print(line([each["row"], f"{bytes_of[kind]:.3f}", *speed]))


def speeds(folder: Path) -> None:
    """What `time` has measured."""
    paths = {temperature: folder / f"time-T{temperature}.json" for temperature in (0, 1)}
    found = {each: json.loads(path.read_text())["methods"] for each, path in paths.items() if path.is_file()}
    if not found:
        return
    at = " and ".join(f"T = {temperature}" for temperature in found)
    print(f"\nMeasured, one prompt at a time: k, then at {at} tokens/s, speedup, round in plain steps\n")
    for name, method in next(iter(found.values())).items():
        shown = [
            text
            for m in (each[name] for each in found.values())
            for text in (f"{m['tokens_per_second']:,.0f}", f"{m['speedup']:.2f}", f"{m['round_cost']:.2f}")
        ]
        print(line([method["drafter"] or "plain", str(method["draft_length"]), *shown]))


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "others", "time", "table"))
    parser.add_argument("--plan", choices=PLANS, default="stories260k")
    parser.add_argument("--target", help="the target's folder")
    parser.add_argument("--data", type=Path, help="the folder with the answers and held-out prompts")
    parser.add_argument("--output", type=Path, help="a folder for the figures, one file for each cell")
    parser.add_argument("--work", type=Path, help="a folder for the runs")
    parser.add_argument("--rows", nargs="+", help="default: all of the plan")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    plan, args.work = PLANS[args.plan], args.work and args.work / args.plan
    SharedStates.folder = args.work and args.work / "states"
    args.output = args.output or HERE / args.plan
    args.rows = args.rows or [*plan.rows]
    if unknown := [name for name in args.rows if name not in plan.rows]:
        parser.error(f"{unknown[0]!r} is no row of {args.plan}; there are: {', '.join(plan.rows)}")
    if args.what == "table":
        return table(plan, args)
    if not args.target or not args.data or not args.work:
        parser.error(f"{args.what} needs --target, --data and --work")
    {"run": run, "others": others, "time": timed}[args.what](plan, args)


if __name__ == "__main__":
    main()
