"""Greedy speculative decoding against plain decoding over draft lengths, batch sizes, drafters and limits.

    python benchmarks/exactness_grid.py            the full grid, half an hour on two busy cores
    python benchmarks/exactness_grid.py --quick    a part of it, about a minute

A departure from plain decoding is a failure unless the target's two best logits are closer there, in float64, than the
rounding of a full forward explains. Prints one line per target, draft length and drafter; the exit status is 1 after a
failure.
"""
# ruff: noqa: E402  (the folder of the tests has to be found first)

import argparse
import collections
import dataclasses
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the tests' drafters and their rule of agreement

import jax
import numpy as np

from deer_jax import DrafterConfig, Target, decode, drafter_from_target
from deer_jax.checkpoints.load import load_target
from deer_jax.decoding import programs
from tests.decoding.agreement import assert_same_greedy
from tests.doubles import table_drafters
from tests.tiny import random_params, tiny

DATA = Path(os.environ.get("DEER_JAX_DATA") or ROOT.parent / "shared" / "data")
programs.PREFILL_CHUNK = 16  # long prompts take several passes, and there are few shapes to compile
LENGTHS = (70, 1, 66, 33, 2, 17, 64, 65, 5, 40, 3, 16, 70, 8, 12, 50, 1, 1, 1, 1)
# Which prompts a batch size decodes. What refills its slots is of one token, so that no prefill is compiled for it;
# alone in its slot, any prompt is.
ROWS = {1: range(20), 3: (0, 2, 5, 16, 17, 18, 19), 16: range(20)}
MODES = {
    f"{attention} {head}": DrafterConfig(attention=attention, head=head, draft_length=32)
    for attention in ("block_causal", "bidirectional")
    for head in ("shifted", "in_place")
}


@dataclasses.dataclass
class Count:
    """What a line of the table adds up."""

    rows: int = 0
    tokens: int = 0
    near_ties: int = 0
    failures: int = 0

    def add(self, other: "Count"):
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def line(self, label: str, seconds: float) -> str:
        numbers = "".join(f"{value:10,}" for value in dataclasses.astuple(self))
        return f"{label:58}{numbers}{seconds:9.1f}"


def tiny_target(family: str) -> Target:
    config = tiny(family)
    return Target(config=config, params=random_params(config, 5, scan=False), name=f"tiny {family}")


def prompts_for(target: Target, rng) -> list[list[int]]:
    """Ragged prompts of 1 to 70 tokens: the target's own text where it has a tokenizer, else random ids."""
    V = target.config.vocab_size
    if target.tokenizer is None:
        return [rng.integers(0, V, n).tolist() for n in LENGTHS]
    start = target.tokenizer.encode("Once upon a time")[:1]
    said = decode(target, [start] * len(LENGTHS), max_new_tokens=80, temperature=1.0, ignore_stop=True).tokens
    return [(start + answer)[:n] for answer, n in zip(said, LENGTHS, strict=True)]


def with_inner_stop(target: Target, answers: list[list[int]]) -> Target:
    """The target with a stop id beside its own: one that occurs inside few answers."""
    holders = collections.Counter(token for answer in answers for token in set(answer))
    inner = [token for answer in answers for token in answer[2:-2] if token not in answer[:2]]
    return dataclasses.replace(
        target, stop_ids=(*target.stop_ids, min(inner, key=lambda token: (holders[token], token)))
    )


def drafters_for(target: Target, prompts, plain) -> dict[str, object]:
    """Every drafter of the grid by name."""
    found: dict[str, object] = dict(table_drafters(target, prompts, plain))
    for name, config in MODES.items():
        found[f"from target, {name}"] = drafter = drafter_from_target(target, config)
        weights = random_params(target.config, 99, scan=False) | {"special": drafter.params["special"]}
        found[f"random, {name}"] = dataclasses.replace(drafter, params=weights)
    return found


def compare(target: Target, prompts, plain, limits, drafter, k: int, batch: int) -> Count:
    """One decode of the prompts that a batch size takes, row by row against plain decoding."""
    rows = ROWS[batch]
    drafter = for_rows(drafter, rows)
    prompts, plain, limits = ([values[row] for row in rows] for values in (prompts, plain, limits))
    result = decode(target, prompts, drafter=drafter, draft_length=k, max_new_tokens=limits, batch_size=batch)
    count = Count(rows=len(rows))
    for row, prompt, ours, theirs in zip(rows, prompts, plain, result.tokens, strict=True):
        try:
            agreement = assert_same_greedy(target, [prompt], [ours], [theirs], near_ties=1)
        except AssertionError as error:
            print(f"FAILED k {k}, batch {batch}, prompt {row}: {error}", file=sys.stderr, flush=True)
            count.failures += 1
        else:
            count.tokens += agreement.same_tokens
            count.near_ties += agreement.near_ties
    return count


def for_rows(drafter, rows):
    """A drafter that reads a table by prompt number, for some of the prompts."""
    if "table" not in drafter.params:
        return drafter
    return dataclasses.replace(drafter, params={"table": drafter.params["table"][np.array(rows)]})


def run(target: Target, lengths, batches, names, new_tokens: int) -> Count:
    """The grid of one target, a line per draft length and drafter."""
    rng, total = np.random.default_rng(0), Count()
    prompts = prompts_for(target, rng)
    limits = [int(n) for n in rng.integers(1, new_tokens + 1, len(prompts))]
    free = decode(target, prompts, max_new_tokens=limits, ignore_stop=True).tokens
    target = with_inner_stop(target, free)
    plain = decode(target, prompts, max_new_tokens=limits).tokens
    drafters = drafters_for(target, prompts, plain)
    for k in lengths:
        for name in names or drafters:
            begin, line = time.perf_counter(), Count()
            for batch in batches:
                line.add(compare(target, prompts, plain, limits, drafters[name], k, batch))
            print(line.line(f"{target.name}, k {k}, {name}", time.perf_counter() - begin), flush=True)
            total.add(line)
        # Drafters share the programs of one k; those of all k together would exceed the memory maps of a process.
        programs._compiled.clear()
        jax.clear_caches()
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=Path, default=DATA / "models" / "stories260k", help="folder of a real target")
    parser.add_argument("--quick", action="store_true", help="a part of the grid, about a minute")
    options = parser.parse_args()

    targets = [tiny_target("qwen3")]
    if options.target.is_dir():
        targets.append(load_target(options.target, "float32"))
    else:
        print(f"no {options.target}: tiny random targets only (--target, DEER_JAX_DATA)", file=sys.stderr)
    lengths, batches, names, new_tokens = (1, 2, 3, 5, 8, 16, 32), (1, 3, 16), None, 40
    if options.quick:
        lengths, batches, new_tokens = (3, 16), (16,), 24
        names = ("right", "wrong", "second", "from target, block_causal shifted", "random, bidirectional in_place")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores; greedy, float32")
    print(f"{'':58}{'rows':>10}{'tokens':>10}{'near-ties':>10}{'failures':>10}{'seconds':>9}")
    begin, total = time.perf_counter(), Count()
    for target in targets:
        total.add(run(target, lengths, batches, names, new_tokens))
    print(total.line("all", time.perf_counter() - begin))
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
