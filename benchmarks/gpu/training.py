"""Training throughput: the trainer's step over both stages, a standalone drafter of 0.5 B parameters, length 2048.

A step must do every product of the forward pass once and of the backward pass twice. What it computes again to save
memory is not counted, so the share of the card's rate that comes out is that of useful work.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from card import filled, matrices, measure_card
from results import Results
from shapes import shape_of

from deer_jax.build import Build
from deer_jax.config import DrafterConfig, ModelConfig
from deer_jax.data.answers import AnswerFiles
from deer_jax.data.examples import example_batches
from deer_jax.diffusion.corruption import Corruption
from deer_jax.drafters.standalone import StandaloneMethod
from deer_jax.training.objectives import drafter_loss
from deer_jax.training.step import OptimizerConfig, init_state, make_step

STEPS = 8  # timed, of each stage


def flops_of(config: ModelConfig, batch: dict[str, np.ndarray], length: int, width: int) -> float:
    """Of a step: rows are those of the texts and of the blocks with their separators."""
    texts, blocks = batch["anchor"].shape
    rows = blocks * (width + 1)
    predicted = int((batch["weight"] != 0).sum() + (batch["text_weight"] != 0).sum())
    pairs = length * length / 2 + rows * length / 2 + rows * (width + 1)  # texts are causal, blocks see what is before
    forward = texts * 2 * matrices(config) * (length + rows) + 2 * config.vocab_size * config.width * predicted
    forward += texts * 4 * config.layers * config.heads * config.head_width * pairs
    return 3 * forward


def run(results: Results, args: Any, deadline: float) -> None:
    """The whole phase."""
    card, config = measure_card(results, args.tiny), shape_of("0.5b", args.tiny)
    texts, length, blocks, width = (2, 64, 4, 8) if args.tiny else (8, 2048, 24, 32)
    method = StandaloneMethod(config, DrafterConfig(draft_length=width), config.vocab_size)
    build, optimizer = Build.of("gpu"), OptimizerConfig()
    step = make_step(drafter_loss(method, remat=build.remat), optimizer, 1000, build=build)
    params = jax.device_put(filled(method.shapes()), jax.devices()[0])  # placed, as all that a step returns
    state = init_state(params, optimizer, 1000)
    with tempfile.TemporaryDirectory() as folder:
        records = AnswerFiles([write_answers(Path(folder), config, 4 * texts, length)], vocab_size=config.vocab_size)
        for stage in ("continuation", "refinement"):
            if time.monotonic() > deadline - 5:
                results.leave_out(stage, "no time is left")
                continue
            examples = example_batches(
                records, Corruption(stage=stage, width=width, blocks=blocks), bidirectional=False, length=length,
                batch=texts, seed=0,
            )  # fmt: skip
            batches = [next(examples) for _ in range(STEPS)]
            placed = [jax.device_put({name: x[None] for name, x in batch.items()}) for batch in batches]
            begin = time.perf_counter()
            state, metrics = step(state, placed[0], {})
            jax.block_until_ready(metrics)
            first = time.perf_counter() - begin
            begin = time.perf_counter()
            for batch in placed:
                state, metrics = step(state, batch, {})
            loss = float(metrics["loss"])
            seconds = (time.perf_counter() - begin) / STEPS
            flops = float(np.mean([flops_of(config, batch, length, width) for batch in batches]))
            if not np.isfinite(loss):
                raise FloatingPointError(f"{stage}: loss {loss}")
            results.add(
                f"{stage}, {texts} texts of {length} tokens",
                {"ms": 1e3 * seconds, "tokens/s": texts * length / seconds,
                 "share of the rate": flops / seconds / card.rate, "loss": loss, "first step s": first},
                {"ms": 1e3 * flops / card.rate, "tokens/s": texts * length * card.rate / flops,
                 "share of the rate": 1.0},
                f"{flops / 1e12:.4g} TFLOP at {card.rate / 1e12:.3g} TFLOP/s; every product once forward, twice back",
            )  # fmt: skip


def write_answers(folder: Path, config: ModelConfig, count: int, length: int) -> Path:
    """Random texts that fill their length."""
    rng, path = np.random.default_rng(0), folder / "answers.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for item in range(count):
            text = rng.integers(0, config.vocab_size, length).tolist()
            row = {"id": str(item), "item": item, "prompt": text[:16], "answer": text[16:], "ended": False,
                   "temperature": 0.0}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return path
