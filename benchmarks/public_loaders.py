"""A drafter's folder, loaded by the public package that defines its format: do both give the same draft logits?

    python3 -m venv /tmp/public && /tmp/public/bin/pip install torch==2.13.0 transformers==5.15.0 \
        pydantic pydantic-settings 'openai>=2' 'datasets>=4,<=5.1.0' 'loguru<=0.7.3' aiohttp httpx psutil rich typer
    /tmp/public/bin/pip install --no-deps dflash==0.1.0 speculators==0.9.0 hs-connectors==0.9.0
    /tmp/public/bin/python benchmarks/public_loaders.py FOLDER FILE.npz [--tolerance 1e-4]

FOLDER is a folder of z-lab (`dflash`, `dflash2`) or of speculators (`dflash`, `dflash2`, `dspark`), as `export` writes
it. FILE.npz holds what the drafter was given and what it answered, in the layout of `tests/drafters/golden/README.md`:
`embedding`, `head`, and for each context i = 0, 1, ... `states_i`, `anchor_i` (and `predecessors_i` for a head that
reads them), beside any of the outputs. Prints the largest difference of each output that the file has; ends with 1 if
one is above the tolerance, or if the folder lacks a tensor or has one that the package does not know.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

UNSEEN = 7.0  # state of positions that a block must not see: the anchor's own and those after it

Arrays = dict[str, np.ndarray]


def load(folder: Path) -> Any:
    """Returns the package's model of `folder` in float32, without the target's embedding and head (see `give_target`).

    Raises SystemExit where tensors are missing or unknown: the packages themselves would only warn, and go on with
    random weights."""
    config = json.loads((folder / "config.json").read_text())
    if "speculators_model_type" in config:
        from speculators import SpeculatorModel, SpeculatorModelConfig

        parsed = SpeculatorModelConfig.from_pretrained(folder)
        if parsed.speculators_config is not None:
            parsed.speculators_config.verifier.name_or_path = None  # the target's tensors come from the input file
        parsed.transformer_layer_config._attn_implementation = "eager"
        model, report = SpeculatorModel.from_pretrained(
            folder, config=parsed, dtype=torch.float32, output_loading_info=True
        )
        if model.t2d is not None and int(model.t2d.sum()) != model.draft_vocab_size:
            sys.exit(f"{folder}: t2d marks {int(model.t2d.sum())} ids, draft_vocab_size is {model.draft_vocab_size}")
    else:
        import dflash

        second = "DFlash2DraftModel" in config.get("architectures", [])
        kind = dflash.DFlash2DraftModel if second else dflash.DFlashDraftModel
        model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {name: sorted(report[name]) for name in ("missing_keys", "unexpected_keys") if report[name]}
    if problems:
        sys.exit(f"{folder}: {problems}")
    return model.eval()


def give_target(model: Any, embedding: np.ndarray, head: np.ndarray) -> None:
    """Sets the target's embedding and head (both [V, D]) in `model`; a stored reduced head stays."""
    model.target_embedding, model.target_head = torch.tensor(embedding), torch.tensor(head)
    if is_speculators(model):
        model.embed_tokens.weight.data = model.target_embedding
        if not model.use_draft_vocab:
            model.lm_head.weight.data = model.target_head


def is_speculators(model: Any) -> bool:
    """Returns whether `model` is of the package speculators."""
    return hasattr(model, "verifier_lm_head")


def first_draft(model: Any) -> int:
    """Returns the first slot that drafts a token: 0 in the next-token layout, 1 in the fill-in layout."""
    return 0 if is_speculators(model) and model.config.sample_from_anchor else 1


def outputs(model: Any, given: Arrays) -> Arrays:
    """Returns what `model` answers to `given`: for each context i `hidden_i` [B, W, D] and `logits_i` [B, W, V draft],
    and what its head makes of them."""
    give_target(model, given["embedding"], given["head"])
    answer: Arrays = {}
    with torch.no_grad():
        for i in range(sum(name.startswith("states_") for name in given)):
            states, anchor = torch.tensor(given[f"states_{i}"]), torch.tensor(given[f"anchor_{i}"]).long()
            hidden, logits = (speculators_block if is_speculators(model) else zlab_block)(model, states, anchor)
            found = {"hidden": hidden, "logits": logits}
            predecessors = given.get(f"predecessors_{i}")
            steps = None if predecessors is None else torch.tensor(predecessors).long()
            found |= head_outputs(model, hidden, logits, anchor, steps)
            answer |= {f"{name}_{i}": value.numpy() for name, value in found.items()}
    return answer


def zlab_block(model: Any, states: torch.Tensor, anchor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns final hidden states [B, W, D] and logits [B, W, V] of one block after `states` [B, S, n D]."""
    from dflash.model import _draft_value

    tokens = torch.full((len(anchor), model.block_size), model.mask_token_id)
    tokens[:, 0] = anchor
    scale = float(_draft_value(model.config, "input_embedding_scale", 1.0))
    hidden = model(
        position_ids=torch.arange(states.shape[1] + model.block_size)[None],
        noise_embedding=model.target_embedding[tokens] * scale,
        target_hidden=states,
    )
    return hidden, model.compute_logits(hidden, lambda rows: rows @ model.target_head.T)


def speculators_block(model: Any, states: torch.Tensor, anchor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the same as `zlab_block`. The package has no decode loop: the rows are documents of one packed text,
    with one anchor each."""
    rows, length, width = *states.shape[:2], model.block_size
    span = length + width
    total = rows * span + width  # the last W positions of a text are never anchors
    packed = torch.full((1, total, states.shape[-1]), UNSEEN)
    ids, anchors = torch.zeros((1, total), dtype=torch.long), torch.zeros((1, total), dtype=torch.bool)
    documents = torch.full((1, total), -1)
    for row in range(rows):
        start = row * span
        packed[0, start : start + length] = states[row]
        ids[0, start + length] = anchor[row]
        anchors[0, start + length] = True
        documents[0, start : start + span] = row
    positions = (torch.arange(total) % span)[None]
    hidden, logits, *_ = model._backbone_forward(
        packed, ids, anchors, torch.zeros((1, total, model.hidden_size)), documents, positions, max_anchors=rows
    )
    return hidden.view(rows, width, -1), logits.view(rows, width, -1)


def head_outputs(
    model: Any, hidden: torch.Tensor, logits: torch.Tensor, anchor: torch.Tensor, predecessors: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Returns the outputs of the drafter's head on the drafting slots, by name; see the README of the golden files.
    `predecessors` [B, drafts] is each slot's predecessor; without it the greedy path alone is computed."""
    first = first_draft(model)
    if hasattr(model, "candidate_selector"):
        return selector_outputs(model, hidden[:, first:], logits[:, first:], anchor, predecessors)
    if hasattr(model, "markov_head"):
        return markov_outputs(model, hidden, logits, anchor, predecessors)
    return {"greedy_path": target_ids(model, logits[:, first:].argmax(-1))}


def target_ids(model: Any, draft_ids: torch.Tensor) -> torch.Tensor:
    """Returns the target's ids of `draft_ids`."""
    d2t = getattr(model, "d2t", None)
    return draft_ids if d2t is None else draft_ids + d2t[draft_ids]


def selector_outputs(
    model: Any, hidden: torch.Tensor, logits: torch.Tensor, anchor: torch.Tensor, predecessors: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Returns `candidates` [B, drafts, K] by falling logit, `log_q` (over them, temperature 1) given `predecessors`,
    `greedy_path` [B, drafts] and `greedy_log_q` along it."""

    def slot(j: int, predecessor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if is_speculators(model):
            ids, scores = model.candidate_selector.select(
                logits[:, j : j + 1], hidden[:, j : j + 1], predecessor[:, None]
            )
            log_q = scores.log_softmax(-1)
        else:
            _, ids, q = model.candidate_selector.select(hidden[:, j : j + 1], logits[:, j : j + 1], predecessor, 1.0)
            log_q = q.log()
        order = logits[:, j].gather(-1, ids[:, 0]).argsort(-1, descending=True)
        return ids[:, 0].gather(-1, order), log_q[:, 0].gather(-1, order)

    drafts, predecessor, path, candidates, greedy = logits.shape[1], anchor, [], [], []
    for j in range(drafts):
        ids, log_q = slot(j, predecessor)
        predecessor = ids.gather(-1, log_q.argmax(-1, keepdim=True))[:, 0]
        path, candidates, greedy = [*path, predecessor], [*candidates, ids], [*greedy, log_q]
    found = {name: torch.stack(value, 1) for name, value in (("greedy_path", path), ("candidates", candidates))}
    found["greedy_log_q"] = torch.stack(greedy, 1)
    if not is_speculators(model):
        own = model.candidate_selector.select(hidden, logits, anchor, 0.0)[0]
        assert torch.equal(own, found["greedy_path"]), "slot by slot is not what the package picks"
    if predecessors is not None:
        found["log_q"] = torch.stack([slot(j, predecessors[:, j])[1] for j in range(drafts)], 1)
    return found


def markov_outputs(
    model: Any, hidden: torch.Tensor, logits: torch.Tensor, anchor: torch.Tensor, predecessors: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Returns `corrected` [B, drafts, V draft] and `confidence` [B, drafts] given `predecessors`, `greedy_path`
    [B, drafts] in the target's ids and `greedy_corrected` along it."""
    first = first_draft(model)

    def corrected(steps: torch.Tensor) -> torch.Tensor:
        if model.markov_head is None:
            return logits
        return logits + model.markov_head.block_bias(prev_token_ids=steps, hidden_states=hidden)

    def whole(steps: torch.Tensor) -> torch.Tensor:  # slot 0 of the fill-in layout has the anchor too
        return torch.cat([anchor[:, None]] * first + [steps], 1)

    steps = anchor[:, None].repeat(1, logits.shape[1] - first)
    for j in range(steps.shape[1]):
        token = target_ids(model, corrected(whole(steps))[:, first + j].argmax(-1))
        if j + 1 < steps.shape[1]:
            steps[:, j + 1] = token
    found = {
        "greedy_path": torch.cat([steps[:, 1:], token[:, None]], 1),
        "greedy_corrected": corrected(whole(steps))[:, first:],
    }
    if predecessors is not None:
        found["corrected"] = corrected(whole(predecessors))[:, first:]
        if model.confidence_head is not None:
            features = hidden
            if model.config.confidence_head_with_markov:
                features = torch.cat([hidden, model.markov_head.prev_embeddings(whole(predecessors))], -1)
            found["confidence"] = model.confidence_head(features).sigmoid()[:, first:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--write", type=Path, help="a file for the inputs and the package's outputs; compares nothing")
    options = parser.parse_args()
    given = dict(np.load(options.file))
    compared, wrong, answer = 0, [], outputs(load(options.folder), given)
    if options.write:
        np.savez(options.write, **given | answer)
        return
    for name, found in answer.items():
        if name not in given:
            continue
        compared += 1
        if given[name].shape != found.shape:
            sys.exit(f"{name}: {given[name].shape} in the file, {found.shape} from the package")
        if found.dtype.kind == "f":
            difference = float(np.abs(found - given[name]).max())
            print(f"{name:20} largest difference {difference:.2e} (values to {np.abs(found).max():.3g})")
            fine = difference <= options.tolerance  # false for NaN
        else:
            other = int((found != given[name]).sum())
            print(f"{name:20} {other} of {found.size} ids differ")
            fine = other == 0
        wrong += [] if fine else [name]
    if wrong or not compared:
        sys.exit(f"different: {', '.join(wrong)}" if wrong else f"{options.file} holds no outputs to compare")


if __name__ == "__main__":
    main()
