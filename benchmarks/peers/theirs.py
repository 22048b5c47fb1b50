"""The worker of transformers and dflash, float32 on CPU; see run.py. Runs in the environment of make_env.sh."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from worker import Jobs, serve

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load(args: argparse.Namespace) -> Jobs:
    torch.set_num_threads(args.threads)
    target = transformers.AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    trunk = None if args.trunk is None else load_trunk(args.trunk)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    target.register_forward_hook(count)  # every pass of these loops commits a token, that over the prompt too

    def about() -> dict[str, Any]:
        found = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"versions": found, "draft_length": trunk and trunk.block_size - 1}

    def answer(way: dict[str, Any], prompt: list[int], new_tokens: int, stops: list[int]) -> dict[str, Any]:
        nonlocal passes
        ids, passes = torch.tensor([prompt]), 0
        begin = time.perf_counter()
        if way["kind"] == "trunk":
            from dflash.model import dflash_generate

            found = dflash_generate(trunk, target, ids, new_tokens, stops, block_size=way["k"] + 1)
        else:
            lookup = {"prompt_lookup_num_tokens": way["k"]} if way["kind"] == "prompt-lookup" else {}
            found = target.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                eos_token_id=stops, pad_token_id=stops[0], **lookup,
            )  # fmt: skip
        seconds = time.perf_counter() - begin
        return {"tokens": found[0, len(prompt) :].tolist(), "seconds": seconds, "passes": passes}

    def gap(text: list[int], tokens: list[int]) -> dict[str, Any]:
        """By how much the worst of `tokens` is below the best logit behind `text`."""
        with torch.inference_mode():
            scores = target(torch.tensor([text]), logits_to_keep=1).logits[0, -1]
        return {"gap": float(scores.max() - scores[tokens].min())}

    return {"about": about, "answer": answer, "gap": gap}


def load_trunk(folder: Path) -> Any:
    """The package's model of a folder; SystemExit for missing and unknown tensors, of which it would only warn."""
    import dflash

    second = "DFlash2DraftModel" in json.loads((folder / "config.json").read_text())["architectures"]
    kind = dflash.DFlash2DraftModel if second else dflash.DFlashDraftModel
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {name: sorted(report[name]) for name in ("missing_keys", "unexpected_keys") if report[name]}
    if problems:
        raise SystemExit(f"{folder}: {problems}")
    return model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--trunk", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    serve(lambda: load(options))
