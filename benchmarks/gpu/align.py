"""A drafter is aligned to the answers as long as the phase's time lasts.

A few steps say how many that are, and the recipe's schedule is laid over them. The drafter comes back in bfloat16,
without its tokenizer, which is the target's.
"""

import io
import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from answers import FILES, RUNS
from card import matrices
from results import Results, in_pieces
from target import real_target

import deer_jax
from deer_jax.checkpoints.drafters import trainable
from deer_jax.config import ModelConfig
from deer_jax.data.answers import AnswerFiles
from deer_jax.data.sources import read_prompts
from deer_jax.demo import PROMPTS
from deer_jax.drafters.conditioned import ConditionedMethod
from deer_jax.drafters.drafter import Drafter
from deer_jax.formats import read_yaml
from deer_jax.training.recipe import as_recipe

BEHIND = 35  # seconds of the phase behind training, for what comes of it
SAFE = 0.92  # of the steps that there seems to be time for
FIRST = 24  # steps that measure how many there is time for


def run(results: Results, args: Any, deadline: float) -> None:
    """The whole phase."""
    until = deadline - BEHIND
    recipe = args.recipe
    source, folder = real_target(args), args.work / recipe.stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target = deer_jax.load_target(source)
    values = recipe_of(args, recipe, source, folder / "texts.jsonl")
    texts_of(results, args, recipe.stem, target, values)
    aligned(results, recipe.stem, target, values, folder, args.tiny, until)
    packed(results, folder / "run", folder / "drafter", recipe.stem)
    accepted(results, args, recipe.stem, target, deer_jax.load_drafter(folder / "drafter", target=target))


def recipe_of(args: Any, recipe: Path, source: str, texts: Path) -> dict[str, Any]:
    """The recipe on these answers, without evaluations."""
    values = read_yaml(recipe)
    values |= {
        "target": source, "answers": str(texts), "log_every": 20, "checkpoint_every": 10**6,
        "evaluation": None, "keep_states": None,
    }  # fmt: skip
    if args.tiny:
        values |= {"batch": 2}
        values["stages"] = [stage | {"blocks": 4} for stage in values["stages"]]
        if not args.target:  # which has neither so many layers nor such a mask
            tiny = {"mask_token": None, "mask": 2047, "draft_vocab": 512, "rank": 8, "taps": None}
            values |= {"drafter": "from-target:1", "conditioned": values["conditioned"] | tiny}
    return values


def texts_of(results: Results, args: Any, name: str, target: deer_jax.Target, values: dict[str, Any]) -> None:
    """All answers in the file that the recipe names, but for those with the mask in them."""
    recipe = as_recipe(values)
    if recipe.conditioned is None:  # goes on with a drafter
        (mask,) = trainable(deer_jax.load_drafter(recipe.drafter, target=target)).reserved
    else:
        mask = recipe.conditioned.mask_of(target)
    kept = masked = 0
    files = [path for run in RUNS if (path := args.work / FILES / f"{run}.jsonl").exists()]
    with Path(values["answers"]).open("w", encoding="utf-8") as output:
        for row in AnswerFiles(files, vocab_size=target.config.vocab_size):
            if mask in row["prompt"] or mask in row["answer"]:
                masked += 1
            else:
                row = {key: value for key, value in row.items() if key != "where"}
                output.write(json.dumps(row | {"item": kept}) + "\n")  # items of one file differ
                kept += 1
    results.add(
        f"{name}: answers to train on", {"answers": kept, "with the mask in them": masked},
        {"with the mask in them": 0}, "no text of the target has the mask in it",
    )  # fmt: skip


def aligned(
    results: Results, name: str, target: deer_jax.Target, values: dict[str, Any], folder: Path, tiny: bool, until: float
) -> None:  # fmt: skip
    """A run of as many steps as there is time for; a few steps before it say how many that is."""

    def train(output: str, stages: list[dict[str, Any]]) -> deer_jax.AlignReport:
        recipe = values | {"stages": stages, "output": str(folder / output)}
        return deer_jax.align(recipe, should_stop=lambda: time.monotonic() > until)

    begin = time.monotonic()
    first = train("first", [values["stages"][0] | {"steps": 2 if tiny else FIRST}])
    each = first.seconds / max(first.step - 1, 1)
    starting = max(time.monotonic() - begin - first.seconds, 0)  # loading and compiling, which come once more
    left = SAFE * (until - time.monotonic() - starting)
    planned = sum(stage["steps"] for stage in values["stages"])
    steps = 3 if tiny else int(np.clip(left / max(each, 1e-6), 2 * len(values["stages"]), planned))
    stages = [stage | {"steps": max(2, round(steps * stage["steps"] / planned))} for stage in values["stages"]]
    results.say(f"{name}: {each * 1e3:.4g} ms a step, {starting:.0f} s to begin, {steps} steps of {planned} planned")
    report = train("run", stages)
    method = deer_jax.load_drafter(report.output, target=target).method
    losses = [json.loads(line) for line in (report.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in losses if "loss" in row]
    speed = report.tokens / report.seconds
    results.add(
        f"{name}: align",
        {"steps": report.step, "texts": report.step * values["batch"], "tokens": report.tokens, "tokens/s": speed,
         "seconds": report.seconds, "TFLOP/s": speed * flops_per_token(target.config, method, values) / 1e12,
         "waited for examples": report.data_seconds / report.seconds, "first loss": losses[0],
         "last loss": losses[-1], "finished": report.finished},
        {"waited for examples": 0.0, "finished": True},
        "batches are read ahead, and the schedule fits the time",
    )  # fmt: skip


def accepted(results: Results, args: Any, name: str, target: deer_jax.Target, drafter: Drafter) -> None:
    """Greedy answers to held-out prompts: the acceptance length at any k."""
    prompts = read_prompts(PROMPTS if args.tiny else args.inputs / "held_out.jsonl", chat=not args.tiny)
    prompts = [prompt.content for prompt in prompts][: 2 if args.tiny else None]
    stats = deer_jax.decode(
        target, prompts, drafter=drafter, max_new_tokens=16 if args.tiny else 128, batch_size=len(prompts)
    ).stats  # fmt: skip
    rounds = np.sum(stats.accepted_histogram, 0)  # by accepted drafts
    lengths = {f"tau at k = {k}": 1 + float(np.minimum(np.arange(len(rounds)), k) @ rounds / rounds.sum())
               for k in range(1, len(rounds))}  # fmt: skip
    results.add(f"{name}: {len(prompts)} held-out prompts, greedy", lengths)


def flops_per_token(config: ModelConfig, method: Any, values: dict[str, Any]) -> float:
    """Of training, per token of full texts, without attention."""
    assert isinstance(method, ConditionedMethod)
    blocks = values["stages"][0]["blocks"] * method.draft_length / values["length"]  # rows of blocks per token
    rows = 3 * 2 * (matrices(method.shape) + method.draft_vocab * config.width) + 2 * config.vocab_size * config.width
    return 2 * matrices(config) + 3 * 2 * method.shape.tapped_width * config.width + blocks * rows


def packed(results: Results, source: Path, folder: Path, name: str) -> None:
    """The run's drafter as a folder, also in the results as pieces of an archive, where the target's tokenizer is left
    out."""
    deer_jax.export(source, folder)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            if not path.name.startswith("tokenizer"):
                tar.add(path, f"{name}/{path.name}")
    in_pieces(results, f"{name}.tar", archive.getvalue())
