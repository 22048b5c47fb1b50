r"""Beside what people use: transformers, the dflash package and deer_jax answer the same prompts in turns.

    sh benchmarks/peers/make_env.sh ENV
    python benchmarks/peers/run.py --target MODEL --data DATA --python ENV/bin/python --json FILE \
        [--drafter FOLDER] [--trunk FOLDER]

Greedy, batch 1, float32, CPU. Each environment has one process; one prompt goes to one of them at a time, and the other
sleeps meanwhile. See README.md.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SETS = {  # in DATA
    "HumanEval": "humaneval/humaneval_000_099.jsonl",
    "GSM8K": "gsm8k/test_0000_0999.jsonl",
    "MT-Bench": "mt_bench/question.jsonl",
}
Way = dict[str, Any]  # worker, kind, k


class Worker:
    """A process that does one job at a time."""

    def __init__(self, python: str, script: str, options: dict[str, Any]):
        given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
        self.name, self.busy = script, 0.0  # seconds of processor time used while waiting
        command = [python, str(HERE / script), *given]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, do: str, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # where it has ended, as the empty answer says
            print(json.dumps({"do": do} | job), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; what it said is above")
        answer = json.loads(line)
        self.busy += answer.pop("waiting")
        return answer


def ways_of(lengths: dict[str, int], trunk: int | None, lookup: int) -> dict[str, Way]:
    """Every row of the table by its name; lengths: of our drafters, trunk: of the package's."""
    rows = [("transformers", "plain", 0), ("transformers", "prompt-lookup", lookup)]
    rows += [("dflash", "trunk", trunk)] * (trunk is not None)
    rows += [("deer_jax", "plain", 0), ("deer_jax", "prompt-lookup", lookup)]
    for kind in ("drafter", "prompt-lookup+drafter"):
        rows += [("deer_jax", kind, k) for k in (lengths.get(kind), "auto")] * (kind in lengths)
    rows += [("deer_jax", "trunk", trunk)] * (trunk is not None)
    return {
        f"{package} {kind}" + (f", k = {k}" if k else ""): {
            "worker": "ours" if package == "deer_jax" else "theirs",
            "kind": kind,
            "k": k,
        }
        for package, kind, k in rows
    }


def summary(runs: list[list[dict[str, Any]]], beside: list[list[dict[str, Any]]], right: list[list[int]]) -> dict:
    """One row of the table: runs [repeats][prompts] beside those of transformers' plain answers."""

    def speed(repeat: list[dict[str, Any]]) -> float:
        return sum(len(run["tokens"]) for run in repeat) / sum(run["seconds"] for run in repeat)

    speeds = [speed(repeat) for repeat in runs]
    ratios = [ours / speed(theirs) for ours, theirs in zip(speeds, beside, strict=True)]
    every = [run for repeat in runs for run in repeat]
    return {
        "tokens_per_second": statistics.median(speeds), "range": [min(speeds), max(speeds)],
        "times_transformers": statistics.median(ratios), "times_range": [min(ratios), max(ratios)],
        "tau": sum(len(run["tokens"]) for run in every) / sum(run["passes"] for run in every),
        "exact": sum(all(r[i]["tokens"] == tokens for r in runs) for i, tokens in enumerate(right)),
    }  # fmt: skip


def departures(theirs: Worker, name: str, prompts: list, repeats: list, right: list) -> list[dict[str, Any]]:
    """Where answers are others, and how far the two tokens are from each other there, in logits."""
    found = []
    for i, (prompt, tokens) in enumerate(zip(prompts, right, strict=True)):
        for other in {tuple(repeat[i]["tokens"]) for repeat in repeats} - {tuple(tokens)}:
            at = next((j for j, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), None)
            gap = None  # one is the beginning of the other
            if at is not None:
                gap = theirs("gap", text=[*prompt, *tokens[:at]], tokens=[tokens[at], other[at]])["gap"]
            found.append({"way": name, "prompt": i, "at": at, "gap": gap})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="a folder of the model")
    parser.add_argument("--data", type=Path, required=True, help=f"a folder that has {', '.join(SETS.values())}")
    parser.add_argument("--python", required=True, help="of the environment that make_env.sh made")
    parser.add_argument("--drafter", help="of deer_jax, in any layout")
    parser.add_argument("--trunk", type=Path, help="a drafter that both loops run, as trunk.py makes it")
    parser.add_argument("--prompts", type=int, default=10, help="of each set")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="that count; one more goes before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lookup", type=int, default=8, help="tokens that prompt lookup proposes")
    parser.add_argument("--json", type=Path, required=True, help="the file for all figures and answers")
    args = parser.parse_args()

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # of the workers too, so of jax's threads
    workers = {
        "ours": Worker(sys.executable, "ours.py", vars_of(args, "target", "drafter", "trunk")),
        "theirs": Worker(args.python, "theirs.py", vars_of(args, "target", "trunk", "threads")),
    }
    ours, theirs = (workers[name]("about") for name in ("ours", "theirs"))
    ways = ways_of(ours["draft_lengths"], theirs["draft_length"], args.lookup)
    stops, plain = ours["stops"], next(iter(ways))
    prompts = {
        name: workers["ours"]("encode", path=str(args.data / path), limit=args.prompts)["prompts"]
        for name, path in SETS.items()
    }

    def turn(repeat: int) -> dict[str, dict[str, list]]:
        """Every way's answer to every prompt, by way and set; which way begins changes from prompt to prompt."""
        found: dict[str, dict[str, list]] = {way: {name: [] for name in prompts} for way in ways}
        order, number = list(ways), repeat
        for name, texts in prompts.items():
            for prompt in texts:
                number += 1
                first = number % len(order)
                for way in order[first:] + order[:first]:
                    job = {"way": ways[way], "prompt": prompt, "new_tokens": args.new_tokens, "stops": stops}
                    found[way][name].append(workers[ways[way]["worker"]]("answer", **job))
        print(f"repeat {repeat} of {args.repeats} is done", file=sys.stderr, flush=True)
        return found

    before, repeats = turn(0), []  # compiles; its plain answers are what the others are compared with
    right = {name: [run["tokens"] for run in before[plain][name]] for name in prompts}
    notes = args.trunk / "trunk.json" if args.trunk else None
    report: dict[str, Any] = {
        "command": " ".join(sys.argv[1:]), "machine": f"{platform.machine()}, {args.threads} threads",
        "versions": ours["versions"] | theirs["versions"], "settings": {"new_tokens": args.new_tokens},
        "trunk": json.loads(notes.read_text()) if notes and notes.exists() else None, "right": right,
    }  # fmt: skip
    for repeat in range(1, args.repeats + 1):
        repeats.append(turn(repeat))
        report["rows"] = {
            name: {
                way: summary([r[way][name] for r in repeats], [r[plain][name] for r in repeats], right[name])
                for way in ways
            }
            for name in prompts
        }
        report["repeats"] = repeats
        args.json.write_text(json.dumps(report))
    report["departures"] = {
        name: [each for way in ways
               for each in departures(workers["theirs"], way, texts, [r[way][name] for r in repeats], right[name])]
        for name, texts in prompts.items()
    }  # fmt: skip
    report["busy_while_waiting"] = {name: worker.busy for name, worker in workers.items()}
    args.json.write_text(json.dumps(report))
    show(report)


def vars_of(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def show(report: dict[str, Any]) -> None:
    print(f"{report['machine']}; {report['versions']}")
    for name, rows in report["rows"].items():
        print(f"\n{name:42}  tokens/s (range)       x transformers (range)  tau    exact")
        for way, row in rows.items():
            low, high = row["range"]
            least, most = row["times_range"]
            print(
                f"{way:42}  {row['tokens_per_second']:6.2f} ({low:.2f}-{high:.2f})".ljust(67)
                + f"{row['times_transformers']:5.2f} ({least:.2f}-{most:.2f})".ljust(24)
                + f"{row['tau']:5.2f}  {row['exact']}/{len(report['right'][name])}"
            )
        for each in report["departures"][name]:
            print(f"  other answer: {each['way']}, prompt {each['prompt']} at {each['at']}, gap {each['gap']}")
    if report["trunk"]:
        left_out = ", ".join(report["trunk"]["left_out"]) or "nothing"
        print(f"\ntrunk: {report['trunk']['of']}; left out on both sides: {left_out}")
    print("\nprocessor seconds used while waiting: ", report["busy_while_waiting"])


if __name__ == "__main__":
    main()
