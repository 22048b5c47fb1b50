"""Training and decoding on eight virtual devices, every mesh against one device: the numbers must be the same.

    python benchmarks/mesh_grid.py [--steps 20] [--meshes 8x1x1,2x2x2] [--json FILE]

Twenty steps of each stage, a dense model and a mixture of experts, both attention modes, labels of both kinds, float32:
the largest difference of a loss (relative) and of a parameter (absolute). Then six prompts decoded, greedy and sampled:
the tokens must be equal.
"""
# ruff: noqa: E402  (the folder of the tests has to be found first, and the devices said before jax is imported)

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the tests' models and steps

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import numpy as np

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation

from tests.meshes import decoded, mesh_of, trained

MESHES = ("8x1x1", "1x8x1", "2x2x2", "1x1x8", "2x1x4")
FAMILIES = ("qwen3", "qwen3_moe")
BOUND = 1e-5


def difference(found, expected) -> tuple[float, float]:
    """The largest of the losses, relative, and of the parameters."""
    losses = np.max(np.abs(found["losses"] / expected["losses"] - 1))
    params = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), found["params"], expected["params"])
    return float(losses), max(jax.tree.leaves(params))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of each stage")
    parser.add_argument("--meshes", default=",".join(MESHES), help="data x fsdp x tensor of each, separated by commas")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    meshes, rows = args.meshes.split(","), []
    print(f"jax {jax.__version__}, {len(jax.devices())} virtual devices, float32, {args.steps} steps")
    for family, attention, stage, labels in itertools.product(
        FAMILIES, ("block_causal", "bidirectional"), ("continuation", "refinement"), ("tokens", "target")
    ):
        if (stage == "continuation") != (labels == "tokens"):  # each stage with one kind of labels
            continue
        expected, _ = trained(family, mesh_of("1x1x1"), attention, stage, labels, args.steps)
        for mesh in meshes:
            begin = time.perf_counter()
            found, _ = trained(family, mesh_of(mesh), attention, stage, labels, args.steps)
            losses, params = difference(found, expected)
            row = {"family": family, "attention": attention, "stage": stage, "labels": labels, "mesh": mesh,
                   "losses": losses, "params": params, "same": max(losses, params) <= BOUND}  # fmt: skip
            rows.append(row)
            seconds = time.perf_counter() - begin
            print(f"{family:10} {attention:13} {stage:12} {mesh}: losses {losses:.1e}, parameters {params:.1e}"
                  f"{'' if row['same'] else '  NOT WITHIN 1e-5'}  ({seconds:.0f} s)", flush=True)  # fmt: skip
    for family, temperature in itertools.product(FAMILIES, (0.0, 1.0)):
        expected = decoded(family, None, temperature)
        for mesh in meshes:
            same = decoded(family, mesh_of(mesh), temperature) == expected
            rows.append({"family": family, "temperature": temperature, "mesh": mesh, "same": same})
            said = "the same" if same else "NOT THE SAME"
            print(f"{family:10} decoding, temperature {temperature:g}, {mesh}: {said}", flush=True)
    wrong = sum(not row["same"] for row in rows)
    print(f"{len(rows)} cases, {wrong} differ")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"jax": jax.__version__, "steps": args.steps, "rows": rows}, file, indent=1)
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
