"""What a round costs in plain steps: a target's verification of k + 1 rows, and a drafter's pass, against one row.

    python benchmarks/round_cost.py [--repeats N] [--targets 4M 30M] [--lengths 4 8] [--json FILE]

Random weights (times do not depend on them), one row, greedy, a context of some 100 tokens. Every configuration is
measured in turn, several times over, in one process, and the fastest repeat counts: on a shared machine that is the
one least disturbed. `verify` drafts for nothing (constant tokens). The others add a drafter: a standalone one
(block-causal) with all of the target's layers or with one, or a conditioned one of one layer that reads two of the
target's: without a head (DFlash), with a path selector and convolutions (DFlash 2), with a Markov head (DSpark), and
without a head for a quarter of the ids. Beside them stand this machine's own limits: the time to read the weights once
from memory (caches may do better), and to multiply them with one row at the rate of a large product.
"""

import argparse
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

import deer_jax
from deer_jax.config import ModelConfig, Sampling
from deer_jax.decoding.engine import Engine
from deer_jax.drafters.conditioned import ConditionedReading, conditioned_drafter
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.heads import Markov, PathSelector
from deer_jax.drafters.protocol import Draft, Method
from deer_jax.models.transformer import init_params

TARGETS = {
    "4M": ModelConfig(family="llama", vocab_size=4096, width=256, layers=4, heads=8, kv_heads=4, head_width=32,
                      mlp_width=688, context=1024, tied=True),
    "30M": ModelConfig(family="llama", vocab_size=16384, width=512, layers=8, heads=8, kv_heads=4, head_width=64,
                       mlp_width=1376, context=1024, tied=True),
}  # fmt: skip
LENGTHS = (2, 4, 8, 16)
ROUNDS, PROMPT, CAPACITY = 25, 64, 512


@dataclasses.dataclass(frozen=True)
class ConstantMethod(Method):
    """Proposes token 0 for nothing, so that a round costs the target's pass only."""

    target_vocab: int
    draft_length: int = 99

    def propose(self, params, shared, state, row, k, pick):
        return Draft(jnp.zeros((row.length.shape[0], k), jnp.int32), None), state


def drafters_of(target: deer_jax.Target) -> dict[str, Drafter]:
    """A drafter of every kind, by what its row of the table is called."""
    V, layers = target.config.vocab_size, target.config.layers

    def conditioned(ids=None, layout="fill_in", **rest):
        count = None if ids is None else len(ids)
        reading = ConditionedReading(
            taps=(1, layers - 2), mask=V - 1, draft_length=max(LENGTHS), layout=layout, draft_vocab=count
        )
        return conditioned_drafter(target, reading, layers=1, ids=ids, **rest)

    return {
        "verify": Drafter(method=ConstantMethod(V), params={}),
        "standalone, all layers": deer_jax.drafter_from_target(target),
        "standalone, 1 layer": deer_jax.drafter_from_target(target, layers=(0,)),
        "DFlash": conditioned(),
        "DFlash 2": conditioned(head=PathSelector(rank=32, candidates=16), conv_kernel=2),
        "DSpark": conditioned(head=Markov(rank=32), layout="next_token"),
        "DFlash, a quarter of the ids": conditioned(range(V // 4)),
    }


def seconds_per_round(target, drafter, k: int) -> float:
    """Wall clock of one round, from ROUNDS rounds in one call of the compiled loop."""
    engine = Engine(target, drafter if k else None, k, Sampling(), 0, (), 1, CAPACITY)
    prompt = np.arange(PROMPT) % target.config.vocab_size
    engine.admit([prompt.tolist()], [CAPACITY - k - 1], [0], [0])
    engine.segment(1)
    before = engine.fetch(engine.state.rounds)[0]
    begin = time.perf_counter()
    after = engine.segment(ROUNDS)  # ends with a blocking fetch
    return (time.perf_counter() - begin) / float(after["rounds"][0] - before)


def fastest(function, *args) -> float:
    """Seconds of the fastest of ten calls."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return min(times)


def machine_limits() -> tuple[float, float]:
    """Bytes per second of reading memory, and float32 operations per second of a large product."""
    x = jnp.ones((64 << 20,), jnp.float32)
    a = jnp.ones((1024, 1024), jnp.float32)
    return x.nbytes / fastest(jax.jit(jnp.sum), x), 2 * 1024**3 / fastest(jax.jit(jnp.dot), a, a)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats; the fastest counts")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="draft lengths k")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    bandwidth, rate = machine_limits()
    print(
        f"{jax.default_backend()}, jax {jax.__version__}: "
        f"reads {bandwidth / 1e9:.1f} GB/s, computes {rate / 1e9:.0f} GFLOP/s"
    )
    rows = []
    for name in args.targets:
        config = TARGETS[name]
        scan = jax.default_backend() != "cpu"
        target = deer_jax.Target(config=config, params=init_params(config, 0, scan=scan))
        size = sum(x.size for x in jax.tree.leaves(target.params))
        drafters = drafters_of(target)
        cases = [("plain step", None, 0)]
        cases += [(label, drafter, k) for label, drafter in drafters.items() for k in args.lengths]
        times = {(label, k): [] for label, _, k in cases}
        for _ in range(args.repeats + 1):  # the first compiles
            for label, drafter, k in cases:
                times[label, k].append(seconds_per_round(target, drafter, k))
        best = {case: min(values[1:]) * 1e3 for case, values in times.items()}
        step = best["plain step", 0]
        reading, computing = size * 4 / bandwidth * 1e3, 2 * size / rate * 1e3
        print(f"\n{name} target, {size:,} parameters: plain step {step:.2f} ms")
        print(f"  floors: reading the weights {reading:.2f} ms a pass, computing {computing:.3f} ms a row")
        for label in drafters:
            cells = [f"k={k}: {best[label, k]:6.2f} ms = {best[label, k] / step:4.2f} steps" for k in args.lengths]
            print(f"  {label:28s} " + "   ".join(cells))
        rows += [
            {
                "target": name,
                "parameters": size,
                "what": label,
                "k": k,
                "ms": ms,
                "steps": ms / step,
                "read_floor_ms": reading,
                "compute_floor_ms": computing * (k + 1),
            }
            for (label, k), ms in best.items()
        ]
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"backend": jax.default_backend(), "jax": jax.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
