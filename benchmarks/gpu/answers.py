"""The target answers the training prompts, as `deer-jax answers` does, each greedily and at temperature 0.7.

It goes on from the answers that benchmarks/smollm2 keeps. They come back as `answers.tar`, packed and with the state of
each file, from which that command goes on.
"""

import gzip
import io
import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from card import measure_card, pass_bytes, pass_flops
from results import Results, in_pieces
from target import real_target

import deer_jax
from deer_jax.data.sources import read_prompts
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.demo import PROMPTS

# By file: temperatures, dealt out in turn, and the seed. So every prompt has a greedy answer and one at 0.7.
RUNS = {"smollm2": ((0.0, 0.0, 0.7), 0), "smollm2_again": ((0.7, 0.7, 0.0), 1)}
NEW, BATCH = 128, 1024
FILES = "answers"  # their folder in the phases' working folder
KEPT = Path(__file__).resolve().parents[1] / "smollm2"


class EnoughError(Exception):
    """The time is over."""


def run(results: Results, args: Any, deadline: float) -> None:
    """The whole phase."""
    card, begin, new = measure_card(results, args.tiny), time.monotonic(), 16 if args.tiny else NEW
    target = deer_jax.load_target(real_target(args))
    prompts = read_prompts(PROMPTS if args.tiny else args.inputs / "prompts.jsonl.gz", chat=not args.tiny)
    prompts, batch = (prompts[:12], 4) if args.tiny else (prompts, BATCH)
    encoded = encode_prompts(target, [prompt.content for prompt in prompts])
    folder = args.work / FILES
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    results.say(f"{target}, {len(prompts):,} prompts, after {time.monotonic() - begin:.0f} s")

    for name, (temperatures, seed) in RUNS.items():
        path = folder / f"{name}.jsonl"
        before = 0 if args.tiny else begun(path)
        said: dict[str, float] = {}

        def progress(done: int, total: int, speed: float, said=said) -> None:
            said |= {"answers": done, "tokens/s": speed}
            if time.monotonic() > deadline - 30:  # it is asked when answers are done, at this batch every ten seconds
                raise EnoughError

        try:
            report = deer_jax.answers(
                target, encoded, path, ids=[prompt.id for prompt in prompts],
                max_new_tokens=new, temperatures=temperatures, seed=seed, batch_size=batch, progress=progress,
            )  # fmt: skip
            said["tokens/s"] = report.tokens_per_second
        except EnoughError:
            pass
        lengths = [[len(row[part]) for part in ("prompt", "answer")] for row in map(json.loads, path.open())]
        if not lengths:
            for each in folder.glob(f"{path.name}*"):
                each.unlink()
            results.leave_out(path.name, "no time is left")
            continue
        context = int(np.sum(np.mean(lengths, 0) * (1, 0.5)))
        size, flops = (count(target.config, batch, 1, context) for count in (pass_bytes, pass_flops))
        results.add(
            f"{name}.jsonl, batch {batch}", said | {"tokens": int(np.sum(lengths, 0)[1]), "answers before": before},
            {"tokens/s": batch / card.seconds(size, flops)},
            card.why(size, flops) + ", for steps alone; launches and prompts come on top",
        )  # fmt: skip
    packed(results, folder)


def begun(path: Path) -> int:
    """How many answers of this file there are already, which are put in its place."""
    kept = KEPT / f"{path.name}.gz"
    if not kept.exists():
        return 0
    path.write_bytes(gzip.decompress(kept.read_bytes()))
    shutil.copy(KEPT / f"{path.name}.state.json", path.parent)
    return path.read_bytes().count(b"\n")


def packed(results: Results, folder: Path) -> None:
    """The files in the results."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(each for each in folder.iterdir() if not each.name.startswith(".")):
            data, name = path.read_bytes(), path.name
            if path.suffix == ".jsonl":
                data, name = gzip.compress(data, mtime=0), f"{name}.gz"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    in_pieces(results, "answers.tar", archive.getvalue())
