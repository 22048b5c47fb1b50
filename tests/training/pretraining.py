"""A few small texts on disk, and recipes for pretraining runs of a few steps on them."""

from pathlib import Path

HELD_OUT = "omega.py"
NAMES = ("alpha", "beta", "gamma", "delta", "epsilon")
MODEL = {
    "family": "llama", "vocab_size": 288, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 8,
    "mlp_width": 24, "context": 64, "tied": True,
}  # fmt: skip


def text(name: str) -> str:
    """Paragraphs alike in all texts, of which no line stands in two of them."""
    paragraphs = (
        f"def step_{name}_{i}(value):\n    first_{name} = combine(value, {i})\n    return first_{name} + {i}\n"
        for i in range(16)
    )
    return "\n\n".join(paragraphs)


def prepare(folder: Path) -> Path:
    """texts/ in the folder: five to train on, one to keep apart."""
    (folder / "texts").mkdir()
    for name in (*NAMES, "omega"):
        (folder / "texts" / f"{name}.py").write_text(text(name))
    return folder


def recipe(folder: Path, output: str = "run", **changes) -> dict:
    """Twelve steps, an average, evaluations and checkpoints in between."""
    return {
        "texts": str(folder / "texts"),
        "held_out": [HELD_OUT],
        "output": str(folder / output),
        "model": MODEL,
        "length": 32,
        "steps": 12,
        "batch": 4,
        "accumulate": 2,
        "learning_rate": 3e-2,
        "warmup": 2,
        "ema": 0.5,
        "log_every": 1,
        "evaluate_every": 4,
        "checkpoint_every": 2,
        "keep": 2,
        "prompts": 20,
    } | changes
