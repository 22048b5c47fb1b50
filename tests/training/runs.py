"""A small target on disk, its answers, and recipes for runs of a few steps."""

import json
from pathlib import Path

import jax
import numpy as np
import yaml
from orbax.checkpoint import v1 as ocp

from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.checkpoints.runs import CHECKPOINTS
from deer_jax.training.metrics import read_metrics
from tests.tiny import random_params, tiny

V = 32
MODEL = tiny("qwen3", vocab_size=V, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24, context=64)
UNTIMED = ("tokens_per_second", "data_share")


def prepare(folder: Path) -> Path:
    """target/, answers.jsonl and held_out.jsonl in the folder."""
    save_folder(folder / "target", MODEL, random_params(MODEL, 3))
    rng = np.random.default_rng(0)
    starts = rng.integers(0, V, (48, 4)).tolist()
    # Rows count up from their start, so that there is something to learn.
    rows = [{"prompt": s, "answer": [(s[-1] + i) % V for i in range(1, 20)], "ended": False} for s in starts[:40]]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{"tokens": s} for s in starts[38:]]  # two of them start a training row
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return folder


def recipe(folder: Path, output: str = "run", **changes) -> dict:
    """Two stages of six steps each, an average in the second, evaluations and checkpoints in between."""
    stage = {"steps": 6, "learning_rate": 1e-2, "warmup": 2, "blocks": 4}
    return {
        "target": str(folder / "target"),
        "answers": [str(folder / "answers.jsonl")],
        "output": str(folder / output),
        "drafter": "from-target:0,1",
        "reading": {"draft_length": 4},
        "length": 24,
        "batch": 4,
        "accumulate": 2,
        "log_every": 1,
        "checkpoint_every": 2,
        "keep": 2,
        "evaluation": {"prompts": str(folder / "held_out.jsonl"), "every": 4, "max_new_tokens": 8},
        "stages": [stage | {"stage": "continuation"}, stage | {"stage": "refinement", "ema": 0.5}],
    } | changes  # fmt: skip


def averaged(folder: Path) -> list[dict]:
    """The two stages with an average in both, so that one compiled step serves both."""
    return [stage | {"ema": 0.5} for stage in recipe(folder)["stages"]]


def long(folder: Path) -> list[dict]:
    """Two stages of thirty steps each."""
    return [stage | {"steps": 30} for stage in recipe(folder)["stages"]]


def write(values: dict) -> Path:
    """The recipe as a file beside its output."""
    path = Path(values["output"] + ".yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def everything(values: dict, last: int = 12) -> dict:
    """What must be the same after any number of interruptions: the last checkpoint's arrays, and the metrics."""
    folder = Path(values["output"])
    lines = [{k: v for k, v in line.items() if k not in UNTIMED} for line in read_metrics(folder)]
    for line in lines:
        for found in line.get("evaluation", ()):
            del found["seconds"]
    steps = sorted(int(found.name) for found in (folder / CHECKPOINTS).iterdir())
    assert steps[-1] == last
    newest = str((folder / CHECKPOINTS / str(last)).absolute())
    shapes = ocp.checkpointables_metadata(newest).metadata
    names = [name for name in ("params", "optimizer", "average") if name in shapes]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # not where the run had them, perhaps another host
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), {n: shapes[n] for n in names})
    parts = ocp.load_checkpointables(newest, like)
    arrays = [np.asarray(x) for x in jax.tree.leaves(parts)]
    return {"arrays": arrays, "lines": lines}


def assert_same_run(one: dict, other: dict) -> None:
    assert one["lines"] == other["lines"]
    for a, b in zip(one["arrays"], other["arrays"], strict=True):
        np.testing.assert_array_equal(a, b)
