"""The worker of deer_jax, float32 on CPU; see run.py."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from worker import Jobs, serve

import deer_jax
from deer_jax.data.sources import read_prompts
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.drafters.prompt_lookup import lookup_first, prompt_lookup


def load(args: argparse.Namespace) -> Jobs:
    target = deer_jax.load_target(args.target, dtype="float32")
    drafters: dict[str, deer_jax.Drafter | None] = {"plain": None, "prompt-lookup": prompt_lookup(target)}
    if args.drafter is not None:
        drafter = deer_jax.load_drafter(args.drafter, target=target, dtype="float32")
        drafters |= {"drafter": drafter, "prompt-lookup+drafter": lookup_first(drafter)}
    if args.trunk is not None:
        drafters["trunk"] = deer_jax.load_drafter(args.trunk, target=target, dtype="float32")

    def about() -> dict[str, Any]:
        lengths = {name: drafter and drafter.draft_length for name, drafter in drafters.items()}
        return {"versions": {"jax": jax.__version__}, "stops": list(target.stop_ids), "draft_lengths": lengths}

    def encode(path: str, limit: int) -> dict[str, Any]:
        return {"prompts": encode_prompts(target, [row.content for row in read_prompts(path, chat=True, limit=limit)])}

    def answer(way: dict[str, Any], prompt: list[int], new_tokens: int, stops: list[int]) -> dict[str, Any]:
        begin = time.perf_counter()
        found = deer_jax.decode(
            target, [prompt], drafter=drafters[way["kind"]], draft_length=way["k"], max_new_tokens=new_tokens,
            batch_size=1,
        )  # fmt: skip
        seconds = time.perf_counter() - begin - found.stats.compile_seconds
        return {"tokens": found.tokens[0], "seconds": seconds, "passes": found.stats.rounds[0]}

    return {"about": about, "encode": encode, "answer": answer}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter")
    parser.add_argument("--trunk", type=Path)
    options = parser.parse_args()
    serve(lambda: load(options))
