"""Writes `tests/drafters/golden/zlab-decode*` and their target: greedy decodings by the package dflash.

    /tmp/public/bin/python benchmarks/golden_decode.py [--out FOLDER]      (the environment of golden_drafters.py)

Round by round. A tiny random target, and drafters trained on its own continuations for some seconds, so that rounds
accept some drafts and not others. Another machine trains other drafters: the files are one recording, of texts in
which every choice is clear.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import dflash.model
import numpy as np
import torch
from golden_drafters import BLOCK, LAYER, MASK, SELECTOR, randomise, rounded, write_folder, zlab
from public_loaders import selector_outputs
from transformers import Qwen3Config, Qwen3ForCausalLM

TARGET = "zlab-decode-target"
LAYERS, TAPS = 4, [0, 2]
PROMPT, NEW, TEXTS, ROWS = 7, 40, 6, 24
DRAFT = {"block_size": BLOCK, "target_layer_ids": TAPS}
CASES: dict[str, Any] = {
    "zlab-decode": lambda: zlab("sf", DRAFT, num_target_layers=LAYERS),
    "zlab-decode2": lambda: zlab("fs", DRAFT | SELECTOR, second=True, num_target_layers=LAYERS),
}


def tiny_target() -> Any:
    """Returns a random target with weights that bfloat16 holds."""
    rng = np.random.default_rng(5)
    target = Qwen3ForCausalLM(Qwen3Config(**LAYER, num_hidden_layers=LAYERS, tie_word_embeddings=False))
    for name, tensor in target.named_parameters():
        spread = 0.2 if tensor.ndim == 1 else 1.2 / np.sqrt(tensor.shape[-1])
        tensor.data = rounded(rng.normal(size=tensor.shape) * (1.0 if "embed" in name else spread) + (tensor.ndim == 1))
    target.lm_head.weight.data[MASK] = 0  # the mask is never a token of a text
    return target.eval()


def train(draft: Any, target: Any, steps: int) -> None:
    """Trains `draft` on continuations of `target`: cross-entropy of each slot."""
    torch.manual_seed(0)
    prompts = torch.randint(0, MASK, (192, 4))
    texts = target.generate(prompts, max_new_tokens=60, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        listed = target(texts, output_hidden_states=True).hidden_states
    states = dflash.model.extract_context_feature(listed, TAPS)
    embedding, head = target.model.embed_tokens.weight.detach(), target.lm_head.weight.detach()
    optimiser = torch.optim.Adam(draft.parameters(), lr=3e-3)
    for step in range(steps):
        rows, anchor = torch.randint(0, len(texts), (ROWS,)), int(torch.randint(3, texts.shape[1] - BLOCK, ()))
        block = torch.full((ROWS, BLOCK), MASK)
        block[:, 0] = texts[rows, anchor]
        hidden = draft(
            position_ids=torch.arange(anchor + BLOCK)[None],
            noise_embedding=embedding[block],
            target_hidden=states[rows, :anchor],
        )
        labels = texts[rows, anchor + 1 : anchor + BLOCK]
        loss = torch.nn.functional.cross_entropy((hidden[:, 1:] @ head.T).flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 200 == 0:
            print(f"step {step}: {loss.item():.2f}")
    for tensor in draft.parameters():
        tensor.data = rounded(tensor.detach().numpy())


def decode(draft: Any, target: Any, prompt: torch.Tensor) -> tuple[list[int], list[int], np.ndarray, float]:
    """Returns the new tokens, the tokens that each round committed, the blocks that the target verified [rounds, W],
    and the smallest lead of a choice over the next best one, of the target's and the drafter's."""
    blocks: list[list[int]] = []
    leads: list[float] = []

    def lead(logits: torch.Tensor) -> None:
        best = logits.topk(2).values
        leads.append(float((best[..., 0] - best[..., 1]).min()))

    def verified(_: Any, arguments: Any, options: Any, output: Any) -> None:
        lead(output.logits)
        if "logits_to_keep" not in options:  # not the prompt
            blocks.append(arguments[0][0].tolist())

    scores = type(draft).compute_logits

    def noted(self: Any, hidden: torch.Tensor, head: Any) -> torch.Tensor:
        logits = scores(self, hidden, head)
        if not hasattr(self, "candidate_selector"):
            lead(logits)
        return logits

    def proposed(self: Any, hidden: torch.Tensor, anchor: torch.Tensor, head: Any, temperature: float) -> Any:
        lead(selector_outputs(self, hidden, scores(self, hidden, head), anchor, None)["greedy_log_q"])
        return self.candidate_selector.select(hidden, scores(self, hidden, head), anchor, temperature)

    hook = target.register_forward_hook(verified, with_kwargs=True)
    with (
        mock.patch.object(dflash.model, "_cuda_time", time.perf_counter),
        mock.patch.object(type(draft), "compute_logits", noted),
        mock.patch.object(dflash.model.DFlash2DraftModel, "propose", proposed),
    ):
        found = dflash.model.dflash_generate(draft, target, prompt[None], NEW, None, return_stats=True)
    hook.remove()
    tokens = found.output_ids[0, len(prompt) :].tolist()
    plain = target.generate(prompt[None], max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert tokens == plain[0, len(prompt) :].tolist() or min(leads) < 1e-4, (tokens, plain, min(leads))
    whole = np.array([block + [-1] * (BLOCK - len(block)) for block in blocks], np.int32)
    return tokens, found.acceptance_lengths, whole, min(leads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests/drafters/golden")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = tiny_target()
    shutil.rmtree(options.out / TARGET, ignore_errors=True)
    write_folder(target, options.out / TARGET)
    for name, make in CASES.items():
        draft = make()
        randomise(draft, np.random.default_rng(1))
        train(draft, target, options.steps)
        draft.eval()
        given = np.random.default_rng(2).integers(0, MASK, (60, PROMPT))
        kept: list[tuple[Any, ...]] = []
        for prompt in given:
            tokens, lengths, blocks, clear = decode(draft, target, torch.tensor(prompt))
            if clear > 2e-3 and len(set(lengths)) > 2:
                kept.append((prompt, tokens, lengths, blocks))
            if len(kept) == TEXTS:
                break
        assert len(kept) == TEXTS, f"{len(kept)} texts of clear choices"
        folder = options.out / name
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(draft, folder)
        most = max(len(lengths) for _, _, lengths, _ in kept)
        np.savez_compressed(
            folder / "golden.npz",
            prompts=np.array([prompt for prompt, *_ in kept], np.int32),
            tokens=np.array([tokens for _, tokens, *_ in kept], np.int32),
            committed=np.array([[*lengths, *[0] * (most - len(lengths))] for *_, lengths, _ in kept], np.int32),
            blocks=np.stack([np.pad(b, ((0, most - len(b)), (0, 0)), constant_values=-1) for *_, b in kept]),
        )
        print(name, [lengths for *_, lengths, _ in kept])


if __name__ == "__main__":
    main()
