"""The aligned drafter on prompts of three sets as chat, plain decoding beside it: batch 1, greedy."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from card import Card, matrices, measure_card, pass_bytes, pass_flops
from results import Results
from target import real_target

import deer_jax
from deer_jax.data.sources import read_prompts
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.demo import PROMPTS
from deer_jax.drafters.conditioned import ConditionedMethod
from deer_jax.drafters.drafter import Drafter

SETS = {"HumanEval": "humaneval.jsonl", "GSM8K": "gsm8k.jsonl", "MT-Bench": "mt_bench.jsonl"}
COUNT, LONGEST, NEW = 12, 256, 128  # prompts of a set, of at most so many tokens, and new tokens
K = 4


class EnoughError(Exception):
    """The time is over."""


def run(results: Results, args: Any, deadline: float) -> None:
    """The whole phase."""
    card = measure_card(results, args.tiny)
    target = deer_jax.load_target(real_target(args))
    drafter = deer_jax.load_drafter(args.work / args.recipe.stem / "drafter", target=target)
    for name, file in SETS.items():
        path = PROMPTS if args.tiny else args.inputs / file
        measured(results, card, target, drafter, name, path, args.tiny, deadline)


def measured(
    results: Results, card: Card, target: deer_jax.Target, drafter: Drafter, name: str, path: Path, tiny: bool,
    until: float,
) -> None:  # fmt: skip
    """One set."""

    def progress(*_: Any) -> None:
        if time.monotonic() > until - 5:
            raise EnoughError

    number, new = (2, 16) if tiny else (COUNT, NEW)
    texts = [prompt.content for prompt in read_prompts(path, chat=not tiny)][: 4 * number]
    prompts = [prompt for prompt in encode_prompts(target, texts) if len(prompt) <= LONGEST][:number]
    try:
        report = deer_jax.bench(
            target, prompts, drafters={"aligned": drafter}, draft_lengths=[K], max_new_tokens=new, repeats=1,
            progress=progress,
        )  # fmt: skip
    except EnoughError:
        return results.leave_out(name, "no time is left")
    plain, ours = report.methods.values()
    context = int(np.mean([len(prompt) for prompt in prompts])) + new // 2
    method, config, rows = drafter.method, target.config, K + 1
    assert isinstance(method, ConditionedMethod)
    size, flops = (count(config, 1, 1, context) for count in (pass_bytes, pass_flops))
    step = card.seconds(size, flops)
    more, work = (count(config, 1, rows, context) for count in (pass_bytes, pass_flops))
    own = 2 * (matrices(method.shape) + method.draft_vocab * config.width + config.width * method.shape.tapped_width)
    cost = card.seconds(more + own, work + rows * own) / step
    tau = ours.acceptance_length
    results.add(
        f"{name}, {len(prompts)} prompts as chat, k = {K}",
        {"tau": tau, "tau interval": ours.ci95, "round/step": ours.round_cost, "tokens/s": ours.tokens_per_second,
         "plain tokens/s": plain.tokens_per_second, "speedup": ours.speedup, "exact match": ours.exact_match},
        {"round/step": cost, "plain tokens/s": 1 / step, "tokens/s": tau / cost / step, "speedup": tau / cost},
        f"plain: {card.why(size, flops)}; a round adds the drafter's {own / 1e6:.4g} MB; speedup is tau / (round/step)",
    )  # fmt: skip
