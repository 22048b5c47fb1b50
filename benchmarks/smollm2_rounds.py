"""What a pass of SmolLM2-135M over k + 1 rows costs on a CPU, with weights [out, in] alone and with both ways.

    python benchmarks/smollm2_rounds.py --target FOLDER [--lengths 0 1 2 4 8] [--repeats 5] [--json FILE]

One row, greedy, float32, a context of some 200 tokens, nothing drafted (constant tokens), so a round is the target's
pass. Each figure is the difference of 20 and 4 rounds in one call of the compiled loop, so that what a call costs once
is left out; the configurations take turns and the fastest of the repeats counts. Beside them stands a bare product of
the same shapes: all of a pass's weights, both ways, one after the other, with nothing in between.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from round_cost import ConstantMethod

import deer_jax
from deer_jax.config import Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.engine import Engine
from deer_jax.drafters.drafter import Drafter
from deer_jax.models.layers import product

PROMPT, CAPACITY, FEW, MANY = 150, 512, 4, 20


def rounds_of(target: deer_jax.Target, k: int, *, both_ways: bool) -> Callable[[], float]:
    """Measures one round, in seconds."""
    drafter = Drafter(method=ConstantMethod(target.config.vocab_size), params={})
    engine = Engine(target, drafter if k else None, k, Sampling(), 0, (), 1, CAPACITY)
    engine.weights = loop.Weights(target.two_ways if both_ways else target.params, {}, {})

    def seconds(rounds: int) -> float:
        engine.admit([list(range(100, 100 + PROMPT))], [CAPACITY - k - 1], [0], [0])
        jax.block_until_ready(engine.state)
        begin = time.perf_counter()
        engine.segment(rounds)
        return time.perf_counter() - begin

    seconds(FEW)
    return lambda: (seconds(MANY) - seconds(FEW)) / (MANY - FEW)


def products_of(target: deer_jax.Target, rows: int, *, both_ways: bool) -> Callable[[], float]:
    """Measures the products of a pass alone, in seconds."""
    config, params = target.config, target.two_ways if both_ways else target.params
    layers = [layer for _, layer in sorted(params["layers"].items())]
    tables = [layer[name] for layer in layers for name in ("q", "k", "v", "o", "gate", "up", "down")]
    tables.append(params["embed" if config.tied else "head"])

    @jax.jit
    def run(x, tables):
        found = []
        for table in tables:
            width = (table.rows if both_ways else table).shape[1]
            found.append(product(jnp.resize(x, (rows, width)), table, jnp.float32)[:, :1])
        return found

    x = jax.random.normal(jax.random.key(0), (rows, config.width))
    jax.block_until_ready(run(x, tables))

    def seconds() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(run(x, tables))
        return time.perf_counter() - begin

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 1, 2, 4, 6, 7, 8, 14, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = deer_jax.load_target(options.target, dtype="float32")
    columns = {
        "[out, in]": lambda k: rounds_of(target, k, both_ways=False),
        "both ways": lambda k: rounds_of(target, k, both_ways=True),
        "products [out, in]": lambda k: products_of(target, k + 1, both_ways=False),
        "products both ways": lambda k: products_of(target, k + 1, both_ways=True),
    }
    measures = {(k, name): make(k) for k in options.lengths for name, make in columns.items()}
    best = dict.fromkeys(measures, np.inf)
    for _ in range(options.repeats):
        for key, measure in measures.items():
            best[key] = min(best[key], measure())
    plain = best[options.lengths[0], "both ways"]
    print(f"ms, and in steps of k = {options.lengths[0]} both ways; {jax.__version__}, {target.devices[0].device_kind}")
    print("| k | " + " | ".join(columns) + " |")
    for k in options.lengths:
        cells = (f"{best[k, name] * 1e3:.1f} ({best[k, name] / plain:.2f})" for name in columns)
        print(f"| {k} | " + " | ".join(cells) + " |")
    if options.json:
        options.json.write_text(json.dumps([{"k": k, "way": name, "ms": t * 1e3} for (k, name), t in best.items()]))


if __name__ == "__main__":
    main()
