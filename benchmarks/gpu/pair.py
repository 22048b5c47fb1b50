"""A real pair: the target answers prompts, a conditioned drafter is aligned to the answers, and both are measured.

All through the library's own calls, each as long as its share of the phase's time lasts. The drafter comes back in
bfloat16, without its tokenizer, which is the target's.
"""

import dataclasses
import io
import json
import random
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from card import Card, matrices, measure_card, pass_bytes, pass_flops
from results import Results
from shapes import shape_of

import deer_jax
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.config import ModelConfig
from deer_jax.data.sources import read_prompts
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.demo import FOLDER, PROMPTS
from deer_jax.drafters.conditioned import ConditionedMethod
from deer_jax.drafters.drafter import Drafter
from deer_jax.formats import read_yaml
from deer_jax.models.transformer import init_params
from deer_jax.training.recipe import as_recipe

# Shares of the phase's time, from its beginning, at which the answers, the training and the measurements end.
ANSWERED, TRAINED, MEASURED = 0.33, 0.72, 0.96
SETS = {"HumanEval": "humaneval.jsonl", "GSM8K": "gsm8k.jsonl", "MT-Bench": "mt_bench.jsonl"}
PIECE, PIECES = 15 << 20, 5  # bytes of a piece of the packed drafter, and how many there may be


class EnoughError(Exception):
    """The time of a part is over."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    batch: int = 256  # of the answers
    prompts: int = 16384
    longest: int = 256  # prompt in tokens
    new_tokens: int = 128
    texts: int = 64  # of a training step
    blocks: int = 16
    first_steps: int = 12  # that measure how many steps there is time for
    most_steps: int = 10**6
    measured: int = 16  # prompts of each set
    repeats: int = 1


TINY = Sizes(
    batch=4, prompts=12, longest=240, new_tokens=16, texts=2, blocks=4, first_steps=2, most_steps=3, measured=2
)


def run(results: Results, args: Any, deadline: float) -> None:
    """The whole phase."""
    sizes, begin = TINY if args.tiny else Sizes(), time.monotonic()
    at = {share: begin + share * (deadline - begin) for share in (ANSWERED, TRAINED, MEASURED)}
    card = measure_card(results, args.tiny)
    inputs = PROMPTS if args.tiny else args.inputs / "prompts.jsonl.gz"
    with tempfile.TemporaryDirectory() as folder:
        source = args.target or str(tiny_target(Path(folder) / "target"))
        target = deer_jax.load_target(source)
        results.say(f"{target}, loaded after {time.monotonic() - begin:.0f} s")
        prompts = training_prompts(target, inputs, sizes, args.tiny)
        files = answered(results, card, target, prompts, Path(folder), sizes, at[ANSWERED])
        values = recipe_of(args, source, Path(folder) / "answers.jsonl", sizes)
        usable_answers(results, values, target, files)
        drafter = aligned(results, card, target, values, Path(folder), sizes, at[TRAINED])
        packed(results, drafter, Path(folder) / "drafter")
    for name, file in SETS.items():
        path = PROMPTS if args.tiny else args.inputs / file
        measured(results, card, target, drafter, name, path, sizes, args.tiny, at[MEASURED])


def tiny_target(folder: Path) -> Path:
    """A folder of random weights with the tokenizer of the bundled target."""
    config = dataclasses.replace(shape_of("0.5b", tiny=True), vocab_size=2048, layers=2)
    save_folder(folder, config, init_params(config, 0), tokenizer_source=FOLDER / "target")
    return folder


def training_prompts(target: deer_jax.Target, path: Path, sizes: Sizes, tiny: bool) -> list[list[int]]:
    """Token ids of the prompts that are short enough, in random order, so that any beginning is a mixture."""
    texts = [prompt.content for prompt in read_prompts(path, chat=not tiny)]
    random.Random(0).shuffle(texts)
    found = encode_prompts(target, texts[: sizes.prompts])
    return [prompt for prompt in found if 0 < len(prompt) <= sizes.longest]


def answered(
    results: Results, card: Card, target: deer_jax.Target, prompts: list[list[int]], folder: Path, sizes: Sizes,
    until: float,
) -> list[Path]:  # fmt: skip
    """Files of answers: two thirds of the time greedy ones, then sampled ones to the prompts from the other end."""
    files, begin = [], time.monotonic()
    middle = begin + 2 / 3 * (until - begin)
    half = max(len(prompts) * 2 // 3, 1)
    for temperature, part, end in ((0.0, prompts[:half], middle), (0.7, prompts[half:], until)):
        said: dict[str, float] = {}

        def progress(done: int, total: int, speed: float, end=end, said=said) -> None:
            said |= {"answers": done, "tokens/s": speed}
            if time.monotonic() > end:
                raise EnoughError

        path = folder / f"answers-{temperature:g}.jsonl"
        try:
            report = deer_jax.answers(
                target, part, path, max_new_tokens=sizes.new_tokens, temperatures=(temperature,),
                batch_size=sizes.batch, progress=progress,
            )  # fmt: skip
            said["tokens/s"] = report.tokens_per_second
        except EnoughError:
            pass
        said["tokens"] = sum(len(json.loads(line)["answer"]) for line in path.open(encoding="utf-8"))
        batch = min(sizes.batch, len(part))
        context = int(np.mean([len(prompt) for prompt in part])) + sizes.new_tokens // 2
        size, flops = (count(target.config, batch, 1, context) for count in (pass_bytes, pass_flops))
        results.add(
            f"answers at T = {temperature:g}, batch {batch}", said, {"tokens/s": batch / card.seconds(size, flops)},
            card.why(size, flops) + "; small models are held up by launches instead",
        )  # fmt: skip
        files.append(path)
    return files


def usable_answers(results: Results, values: dict[str, Any], target: deer_jax.Target, files: list[Path]) -> None:
    """All answers in the file that the recipe names, but for those with the drafter's mask in them."""
    begun = as_recipe(values).conditioned
    assert begun is not None
    mask, kept, seen = begun.mask_of(target), 0, 0
    with Path(values["answers"]).open("w", encoding="utf-8") as output:
        for line in (line for path in files for line in path.open(encoding="utf-8")):
            row, seen = json.loads(line), seen + 1
            if mask not in row["prompt"] and mask not in row["answer"]:
                output.write(json.dumps(row | {"item": kept}) + "\n")  # items of one file differ
                kept += 1
    results.add("answers to train on", {"answers": kept, "with the mask in them": seen - kept},
                {"with the mask in them": 0}, "no text of the target has the mask in it")  # fmt: skip


def recipe_of(args: Any, source: str, answers: Path, sizes: Sizes) -> dict[str, Any]:
    """The recipe's drafter and stages, on these answers, without evaluations."""
    values = read_yaml(args.recipe)
    values |= {
        "target": source, "answers": str(answers), "length": sizes.longest + sizes.new_tokens, "batch": sizes.texts,
        "log_every": 20, "checkpoint_every": 10**6, "evaluation": None, "keep_states": None,
    }  # fmt: skip
    values["stages"] = [stage | {"blocks": sizes.blocks} for stage in values["stages"]]
    if args.tiny and not args.target:  # which has neither so many layers nor such a mask
        tiny = {"mask_token": None, "mask": 2047, "draft_vocab": 512, "rank": 8, "taps": None}
        values |= {"drafter": "from-target:1", "conditioned": values["conditioned"] | tiny}
    return values


def aligned(
    results: Results, card: Card, target: deer_jax.Target, values: dict[str, Any], folder: Path, sizes: Sizes,
    until: float,
) -> Drafter:  # fmt: skip
    """The drafter after as many steps as there is time for; a few steps before it say how many that are."""

    def train(name: str, stages: list[dict[str, Any]]) -> deer_jax.AlignReport:
        recipe = values | {"stages": stages, "output": str(folder / name)}
        return deer_jax.align(recipe, should_stop=lambda: time.monotonic() > until)

    first = train("first", [values["stages"][0] | {"steps": sizes.first_steps}])
    each = first.seconds / max(first.step - 1, 1)
    left = until - time.monotonic()
    starting = min(20.0, left / 4)  # loading and compiling once more
    steps = int(np.clip((left - starting) / max(each, 1e-6), 2 * len(values["stages"]), sizes.most_steps))
    planned = sum(stage["steps"] for stage in values["stages"])
    stages = [stage | {"steps": max(2, round(steps * stage["steps"] / planned))} for stage in values["stages"]]
    report = train("run", stages)
    drafter = deer_jax.load_drafter(report.output, target=target)
    losses = [json.loads(line) for line in (report.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in losses if "loss" in row]
    speed = report.tokens / report.seconds
    flops = flops_per_token(target.config, drafter.method, values)
    results.add(
        f"align, {drafter.method}",
        {"steps": report.step, "tokens": report.tokens, "tokens/s": speed,
         "share of the rate": speed * flops / card.rate, "first loss": losses[0], "last loss": losses[-1],
         "finished": report.finished},
        {"tokens/s": card.rate / flops, "share of the rate": 1.0, "finished": True},
        f"{flops / 1e9:.4g} GFLOP a token at {card.rate / 1e12:.3g} TFLOP/s: the target forward, the drafter's blocks "
        "forward and twice back",
    )  # fmt: skip
    return drafter


def flops_per_token(config: ModelConfig, method: Any, values: dict[str, Any]) -> float:
    """Of training, per token of full texts, without attention."""
    assert isinstance(method, ConditionedMethod)
    blocks = values["stages"][0]["blocks"] * method.draft_length / values["length"]  # rows of blocks per token
    rows = 3 * 2 * matrices(method.shape) + 2 * 2 * method.draft_vocab * config.width
    return 2 * matrices(config) + 3 * 2 * method.shape.tapped_width * config.width + blocks * rows


def packed(results: Results, drafter: Drafter, folder: Path) -> None:
    """The drafter's folder in the results, in bfloat16, as pieces of one archive."""
    params = {name: _bfloat16(value) for name, value in drafter.params.items()}
    deer_jax.save_drafter(folder, dataclasses.replace(drafter, params=params, tokenizer=None))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(folder, "drafter")
    data = archive.getvalue()
    pieces = [data[at : at + PIECE] for at in range(0, len(data), PIECE)]
    results.add("the drafter's folder", {"MB": len(data) / 1e6, "pieces": len(pieces)})
    if len(pieces) > PIECES:
        raise SystemExit(f"the drafter makes {len(pieces)} pieces, more than {PIECES}: choose a smaller one")
    for number, piece in enumerate(pieces):
        (results.out / f"drafter.tar.{number}").write_bytes(piece)


def _bfloat16(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _bfloat16(each) for name, each in value.items()}
    return value.astype(jnp.bfloat16)


def measured(
    results: Results, card: Card, target: deer_jax.Target, drafter: Drafter, name: str, path: Path, sizes: Sizes,
    tiny: bool, until: float,
) -> None:  # fmt: skip
    """Plain decoding and the drafter on one set of prompts as chat, greedy, batch 1."""

    def progress(*_: Any) -> None:
        if time.monotonic() > until:
            raise EnoughError

    texts = [prompt.content for prompt in read_prompts(path, chat=not tiny)][: 4 * sizes.measured]
    fitting = [prompt for prompt in encode_prompts(target, texts) if len(prompt) <= sizes.longest]
    prompts = fitting[: sizes.measured]
    try:
        report = deer_jax.bench(
            target, prompts, drafters={"aligned": drafter}, max_new_tokens=sizes.new_tokens, repeats=sizes.repeats,
            progress=progress,
        )  # fmt: skip
    except EnoughError:
        return results.leave_out(name, "no time is left")
    plain, ours = report.methods.values()
    context = int(np.mean([len(prompt) for prompt in prompts])) + sizes.new_tokens // 2
    method, config, rows = drafter.method, target.config, drafter.draft_length + 1
    size, flops = (count(config, 1, 1, context) for count in (pass_bytes, pass_flops))
    step = card.seconds(size, flops)
    more, work = (count(config, 1, rows, context) for count in (pass_bytes, pass_flops))
    own = 2 * (matrices(method.shape) + method.draft_vocab * config.width + config.width * method.shape.tapped_width)
    cost = card.seconds(more + own, work + rows * own) / step
    tau = ours.acceptance_length
    results.add(
        f"{name}, {len(prompts)} prompts as chat, k = {drafter.draft_length}",
        {"tau": tau, "tau interval": ours.ci95, "round/step": ours.round_cost, "tokens/s": ours.tokens_per_second,
         "plain tokens/s": plain.tokens_per_second, "speedup": ours.speedup, "exact match": ours.exact_match},
        {"round/step": cost, "plain tokens/s": 1 / step, "tokens/s": tau / cost / step, "speedup": tau / cost},
        f"plain: {card.why(size, flops)}; a round adds the drafter's {own / 1e6:.4g} MB; speedup is tau / (round/step)",
    )  # fmt: skip
