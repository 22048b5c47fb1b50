"""What a training run adds to its steps: `align` against a bare jitted step on a batch that lies on the device.

    python benchmarks/step_overhead.py --target FOLDER/stories260k [--smollm2 FOLDER] [--steps 100] [--repeats 5]

The shapes are those of configs/align_stories260k.yaml, and with --smollm2 of a drafter of two layers for
SmolLM2-135M. The bare step is the loss, its gradient, clipping and AdamW in one jitted function; runs and bare steps
take turns, and both are the fastest of all turns, without the first step, which compiles. Also: how long examples take
to make, against the step. Nothing else should run beside it.
"""

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax

import deer_jax
from deer_jax.build import Build
from deer_jax.checkpoints.drafters import place_drafter
from deer_jax.data.answers import AnswerFiles
from deer_jax.data.examples import example_batches
from deer_jax.sharding import make_mesh, on_mesh
from deer_jax.training.align import with_width
from deer_jax.training.objectives import drafter_loss
from deer_jax.training.recipe import recipe_from
from deer_jax.training.step import computing, make_optimizer

STORIES = {"drafter": "from-target", "reading": {"draft_length": 8}, "length": 176, "batch": 4, "blocks": 24}
SMOLLM2 = {"drafter": "from-target:0,29", "reading": {"draft_length": 4}, "length": 192, "batch": 4, "blocks": 16}


def recipe_for(target: str, shapes: dict, folder: Path, steps: int, name: str) -> dict:
    """A recipe of one stage without evaluations, and with no checkpoint but the last."""
    stage = {"steps": steps, "stage": "refinement", "blocks": shapes["blocks"], "learning_rate": 1e-4}
    return {
        "target": target, "answers": str(folder / "answers.jsonl"), "output": str(folder / name), "stages": [stage],
        "checkpoint_every": 10**6, "log_every": 20, **{key: shapes[key] for key in shapes if key != "blocks"},
    }  # fmt: skip


def bare(values: dict, steps: int):
    """The state, a batch on the device, a step over both, and the examples."""
    recipe, mesh = recipe_from(values, "recipe"), make_mesh()
    target = deer_jax.load_target(recipe.target, mesh=mesh)
    drafter = deer_jax.load_drafter(recipe.drafter, target=target, dtype="float32", config=recipe.reading)
    stage = with_width(recipe.stages[0], drafter)
    loss, build = drafter_loss(drafter.method), Build.here(mesh)
    optimizer = make_optimizer(stage.optimizer, steps)

    def step(params, state, batch):
        def loss_of(params):
            total, _ = loss(computing(params, build), batch, {})
            return total / batch["total"].sum()

        value, gradients = jax.value_and_grad(loss_of)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

    records = AnswerFiles([Path(path) for path in recipe.answers], vocab_size=target.config.vocab_size)
    examples = example_batches(
        records, stage.corruption, bidirectional=False, length=recipe.length, batch=recipe.batch, seed=0, first=0,
        rows=np.arange(recipe.batch),
    )  # fmt: skip
    with on_mesh(mesh):
        params = jax.tree.map(lambda x: x.copy(), place_drafter(drafter, mesh))
        state = jax.jit(optimizer.init)(params)
        batch = jax.device_put(next(examples))
        return mesh, jax.jit(step, donate_argnums=(0, 1)), params, state, batch, examples


def measure(name: str, target: str, shapes: dict, steps: int, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack():
        folder = Path(temporary)
        loaded = deer_jax.load_target(target)
        deer_jax.answers(
            loaded, [f"Number {i}:" for i in range(64)], folder / "answers.jsonl",
            max_new_tokens=shapes["length"] - 8, temperatures=(1.0,),
        )  # fmt: skip
        mesh, step, params, state, batch, examples = bare(recipe_for(target, shapes, folder, steps, "bare"), steps)
        ours, alone = [], []
        with on_mesh(mesh):
            params, state, value = step(params, state, batch)
            jax.block_until_ready(value)
        for turn in range(repeats):
            report = deer_jax.align(recipe_for(target, shapes, folder, steps, f"run{turn}"))
            ours.append(report.seconds / (steps - 1))
            with on_mesh(mesh):
                begin = time.perf_counter()
                for _ in range(steps):
                    params, state, value = step(params, state, batch)
                jax.block_until_ready((params, value))
            alone.append((time.perf_counter() - begin) / steps)
        begin = time.perf_counter()
        for _ in range(steps):
            next(examples)
        making = (time.perf_counter() - begin) / steps
    row = {"name": name, "align_ms": 1e3 * min(ours), "bare_ms": 1e3 * min(alone), "ratio": min(ours) / min(alone),
           "median_ratio": float(np.median(np.array(ours) / np.array(alone))), "example_ms": 1e3 * making,
           "pipeline": min(alone) / making}  # fmt: skip
    print(f"{name:10} align {row['align_ms']:.2f} ms a step, bare {row['bare_ms']:.2f}: {row['ratio']:.3f} (median of "
          f"turns {row['median_ratio']:.3f}); a batch is made in {row['example_ms']:.2f} ms, "
          f"{row['pipeline']:.0f} times as fast as the step", flush=True)  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the folder of stories260k")
    parser.add_argument("--smollm2", help="the folder of SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=100, help="of each turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {args.steps} steps, {args.repeats} turns")
    rows = [measure("stories260k", args.target, STORIES, args.steps, args.repeats)]
    if args.smollm2:
        rows.append(measure("SmolLM2", args.smollm2, SMOLLM2, max(args.steps // 5, 10), args.repeats))
    if args.json:
        Path(args.json).write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
