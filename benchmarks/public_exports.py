"""Folders that `save_drafter` writes, loaded by the public packages: do both give the same draft logits?

    python benchmarks/public_exports.py --python /tmp/public/bin/python [--output FOLDER]

PYTHON is that of an environment with the packages, see `public_loaders.py`. Every golden folder is loaded and written
again in its own layout, and drafters with random weights that begin here are written in each layout that can say them.
Prints the largest difference of each output, float32 on a CPU; ends with 1 if one is above 1e-4, or if the package
misses a tensor of a folder or does not know one.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the tests' files and comparisons

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

import deer_jax
from deer_jax.drafters.conditioned import ConditionedReading, conditioned_drafter
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.heads import Head, Markov, PathSelector
from tests.drafters.test_golden import CASES, EMBEDDING_TAPPED, GOLDEN, differences, target_of
from tests.tiny import tiny

LOADER = Path(__file__).with_name("public_loaders.py")
TOLERANCE = 1e-4
FILL = ConditionedReading(taps=(4, 1), mask=63, draft_length=7)
NEXT = dataclasses.replace(FILL, layout="next_token")
CONVOLVED = {"conv_kernel": 3, "conv_group": 4}
SCALED = dataclasses.replace(FILL, input_scale=1.5, output_scale=0.5, softcap=6.0)
IDS = [*range(3, 40), 61, 63]
REDUCED = dataclasses.replace(NEXT, draft_vocab=len(IDS))
WINDOWS = {"windows": (5, 0), "causal": (True, False)}
BEGUN: dict[str, tuple[str, ConditionedReading, Head | None, dict[str, Any]]] = {
    "begun dflash, llama3 rope": ("dflash", FILL, None, {"rope": tiny("llama").rope}),
    "begun dflash, windows, scales": ("dflash", SCALED, None, WINDOWS),
    "begun dflash, biases, causal": (
        "dflash", FILL, None, {"qkv_bias": True, "o_bias": True, "causal": (True, True)}
    ),
    "begun dflash2": ("dflash", FILL, PathSelector(rank=5, candidates=4), CONVOLVED | WINDOWS),
    "begun speculators dflash, reduced": ("speculators", REDUCED, None, WINDOWS | {"window_from": "anchor"}),
    "begun speculators dflash2": ("speculators", FILL, PathSelector(rank=5, candidates=4), CONVOLVED),
    "begun speculators dspark": (
        "speculators", REDUCED, Markov(rank=5, form="rnn", has_confidence=True),
        {"windows": (5, 5), "window_from": "anchor"},
    ),
}  # fmt: skip


def random_target(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A target's embedding and head, and the mask's id."""
    return {name: rng.normal(size=(64, 32)).astype(np.float32) for name in ("embedding", "head")} | {"mask_id": 63}


def begun(name: str, rng: np.random.Generator) -> tuple[Drafter, dict[str, np.ndarray]]:
    """A drafter of random weights, and what it is given."""
    _, reading, head, shape = BEGUN[name]
    given = random_target(rng)
    ids = None if reading.draft_vocab is None else IDS
    drafter = conditioned_drafter(target_of(given), reading, layers=2, head=head, ids=ids, **shape)
    params = jax.tree.map(  # those that begin as zeros and ones too
        lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape).astype(np.float32)), drafter.params
    )
    for i, length in enumerate((3, 11)):
        given[f"states_{i}"] = rng.normal(size=(2, length, 64)).astype(np.float32)
        given[f"anchor_{i}"] = rng.integers(0, 63, 2)
        given[f"predecessors_{i}"] = np.concatenate(
            [given[f"anchor_{i}"][:, None], rng.integers(0, 63, (2, reading.draft_length - 1))], axis=1
        )
    return dataclasses.replace(drafter, params=params), given


def check(name: str, drafter: Drafter, layout: str, given: dict[str, np.ndarray], python: Path, output: Path) -> float:
    """The largest difference; prints them all."""
    folder, inputs, answers = (output / f"{name}{ending}".replace(", ", "-").replace(" ", "-")
                               for ending in ("", ".inputs.npz", ".npz"))  # fmt: skip
    deer_jax.save_drafter(folder, drafter, layout=layout, target=target_of(given))
    kept = ("embedding", "head", "mask_id", "states_", "anchor_", "predecessors_")
    np.savez(inputs, **{key: value for key, value in given.items() if key.startswith(kept)})
    subprocess.run([python, LOADER, folder, inputs, "--write", answers], check=True)
    again = deer_jax.load_drafter(folder, target=target_of(given), dtype="float32")
    found = differences(again, dict(np.load(answers)))
    print(f"{name:32} {', '.join(f'{key} {value:.1e}' for key, value in found.items())}", flush=True)
    return max(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="keeps the folders there")
    options = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    largest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or Path(scratch)
        output.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            if case == EMBEDDING_TAPPED:
                continue
            given = dict(np.load(GOLDEN / case / "golden.npz"))
            drafter = deer_jax.load_drafter(GOLDEN / case, target=target_of(given), dtype="float32")
            layout = "dflash" if case.startswith("zlab") else "speculators"
            largest = max(largest, check(case, drafter, layout, given, options.python, output))
        for number, name in enumerate(BEGUN):
            drafter, given = begun(name, np.random.default_rng(number))
            largest = max(largest, check(name, drafter, BEGUN[name][0], given, options.python, output))
    print(f"largest difference {largest:.1e}")
    sys.exit(0 if largest < TOLERANCE else 1)


if __name__ == "__main__":
    main()
