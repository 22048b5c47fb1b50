"""What one GPU gives: correctness, the cost of rounds, a real pair and training, each within a time of its own.

    python benchmarks/gpu/run.py OUT [--target MODEL.gguf --inputs FOLDER] [--phases rounds training] [--tiny]

Every phase runs in a process of its own and is ended when its time is over, so that one that crashes, hangs or runs out
of memory costs what it has left and no more; the others go on. Each figure is written to OUT the moment it is known,
beside what should come out and why:

    results.jsonl    one figure a line: phase, what, measured, expected, because
    report.txt       the same to read, with what failed and what was left out
    log.txt          what the phases said
    answers.tar.N    the target's answers, in pieces: cat answers.tar.* | tar x
    RECIPE.tar.N     the drafter of a recipe in bfloat16, likewise

The exit status is 1 if a phase failed. --tiny runs everything with tiny shapes, on CPU too, to see that it runs; its
figures mean nothing. See README.md beside this file for the phases and how to get everything to such a machine.
"""

import argparse
import contextlib
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from results import Results

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
SECONDS = {"correct": 60, "rounds": 115, "generate": 35, "answers": 150, "align": 180, "pair": 100, "training": 60}
LOG, LOG_BYTES = "log.txt", 8 << 20  # only the end of a longer log is kept
WORDS = 300  # of what a failed phase said last


@dataclasses.dataclass(frozen=True)
class Phase:
    """A program with the seconds that it may take."""

    name: str
    seconds: float
    command: Sequence[str]


def run_phases(out: Path, phases: Sequence[Phase]) -> list[str]:
    """Run one after the other; the names of those that failed."""
    out.mkdir(parents=True, exist_ok=True)
    return [phase.name for phase in phases if not run_phase(out, phase)]


def run_phase(out: Path, phase: Phase) -> bool:
    """Run a phase to its end, or to the end of its time; whether it ended well."""
    results, log = Results(out, phase.name), out / LOG
    results.say(f"\n== {phase.name}, at most {phase.seconds:g} s")
    begin = time.perf_counter()
    with log.open("ab") as file:
        file.write(f"\n== {phase.name}\n".encode())
        file.flush()
        start = file.tell()
        # A session of its own, so that what the phase has started ends with it.
        process = subprocess.Popen(
            phase.command, stdout=file, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
        try:
            status = process.wait(phase.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_group(process)
    said = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    seconds = time.perf_counter() - begin
    if status == 0:
        outcome = "done"
    elif status is None:
        outcome = f"ended after its {phase.seconds:g} s; what was known by then is above"
    else:
        outcome = f"failed with status {status}: {said[-1][-WORDS:] if said else 'it said nothing'}"
    results.ended(outcome, seconds, ok=status == 0)
    whole = log.read_bytes()
    if len(whole) > LOG_BYTES:
        log.write_bytes(whole[-LOG_BYTES:])
    return status == 0


def end_group(process: subprocess.Popen) -> None:
    """End a phase and everything that it has started."""
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, str]:
    """Of every phase: most of the card's memory, compiled programs kept for the next, and this library."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    kept = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
        "JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache" / "deer_jax" / "xla"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return kept | os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def phases_of(args: argparse.Namespace, argv: Sequence[str]) -> list[Phase]:
    """Those asked for, each as this program with --only."""
    return [
        Phase(name, args.seconds or SECONDS[name], [sys.executable, str(FOLDER / "run.py"), *argv, "--only", name])
        for name in args.phases
    ]


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--phases", nargs="+", default=list(SECONDS), choices=list(SECONDS))
    parser.add_argument("--target", help="of the pair: a GGUF file or a Hugging Face folder")
    parser.add_argument("--inputs", type=Path, help="folder of its prompts: prompts.jsonl.gz to train on; "
                        "held_out.jsonl, humaneval.jsonl, gsm8k.jsonl and mt_bench.jsonl to measure on")  # fmt: skip
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs" / "smollm2_drafter.yaml",
                        help="of the drafter that is aligned and measured")  # fmt: skip
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "gpu" / "work",
                        help="folder of what one phase makes for the next")  # fmt: skip
    parser.add_argument("--seconds", type=float, help="of every phase, instead of its own")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--only", choices=list(SECONDS), help=argparse.SUPPRESS)  # the process of this phase
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parsed(argv)
    if args.only:
        phase = importlib.import_module(args.only)
        phase.run(Results(args.out, args.only), args, time.monotonic() + (args.seconds or SECONDS[args.only]))
        return 0
    real = [name for name in args.phases if name in ("answers", "align", "pair")]
    if not args.tiny and real and not (args.target and args.inputs):
        sys.exit(f"{', '.join(real)}: needs --target and --inputs; or --phases correct rounds generate training")
    failed = run_phases(args.out, phases_of(args, argv))
    print(f"\n{args.out}: " + (f"failed: {', '.join(failed)}" if failed else "all phases done"))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
