"""What it costs to notice logits that are not finite: rounds with and without the checks, in turn, in one process.

    python benchmarks/finite_cost.py [--repeats N] [--targets 4M 30M]

Random weights, greedy, one row and sixteen, k = 0 and 8 with a drafter started from the target's first layer. "Without"
leaves out the flags of both models' logits and what keeps values in the cache finite.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from round_cost import CAPACITY, PROMPT, ROUNDS, TARGETS

import deer_jax
from deer_jax.config import Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.engine import Engine
from deer_jax.models import transformer
from deer_jax.models.transformer import init_params


def engine_for(target, drafter, k: int, rows: int) -> Engine:
    """An engine whose loop is compiled."""
    engine = Engine(target, drafter if k else None, k, Sampling(), 0, (), rows, CAPACITY)
    admit(engine, rows, k)
    engine.segment(1)
    return engine


def admit(engine: Engine, rows: int, k: int) -> None:
    prompt = (np.arange(PROMPT) % engine.target.config.vocab_size).tolist()
    engine.admit([prompt] * rows, [CAPACITY - k - 1] * rows, range(rows), range(rows))


def seconds_per_round(engine: Engine, rows: int, k: int) -> float:
    """Wall clock of one round, from ROUNDS rounds in one call of the compiled loop."""
    admit(engine, rows, k)
    before = engine.fetch(engine.state.rounds)[0]
    begin = time.perf_counter()
    after = engine.segment(ROUNDS)
    return (time.perf_counter() - begin) / float(after["rounds"][0] - before)


def without_checks() -> None:
    """Compile what follows without the checks."""
    loop.faults_of = lambda best, draft: jnp.zeros(best.shape, jnp.int32)
    pick = loop.pick_draft
    loop.pick_draft = lambda *args, **options: pick(*args, **options)._replace(finite=None)
    transformer.with_finite_values = lambda k, v: (k, v)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21, help="interleaved repeats of each")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    args = parser.parse_args()
    cases = {}
    for checked in (True, False):
        if not checked:
            without_checks()
        for name in args.targets:
            # Another context is another program: tracing is remembered by what is static.
            config = dataclasses.replace(TARGETS[name], context=TARGETS[name].context + (not checked))
            target = deer_jax.Target(config=config, params=init_params(config, 0, scan=jax.default_backend() != "cpu"))
            drafter = deer_jax.drafter_from_target(target, layers=(0,))
            for rows in (1, 16):
                for k in (0, 8):
                    cases[name, rows, k, checked] = engine_for(target, drafter, k, rows)
    times = {case: [] for case in cases}
    for _ in range(args.repeats):
        for name, rows, k, _ in list(cases)[: len(cases) // 2]:
            for checked in (True, False):  # one right after the other
                engine = cases[name, rows, k, checked]
                times[name, rows, k, checked].append(seconds_per_round(engine, rows, k) * 1e3)
    print(f"{jax.default_backend()}, jax {jax.__version__}; ms per round, fastest and median of {args.repeats}")
    for name, rows, k, checked in cases:
        if checked:
            ours, bare = (times[name, rows, k, flag] for flag in (True, False))
            print(
                f"{name:4s} rows {rows:2d} k {k}: with {min(ours):7.3f} / {statistics.median(ours):7.3f}, "
                f"without {min(bare):7.3f} / {statistics.median(bare):7.3f}: {min(ours) / min(bare) - 1:+.1%} / "
                f"{statistics.median(ours) / statistics.median(bare) - 1:+.1%}"
            )


if __name__ == "__main__":
    main()
