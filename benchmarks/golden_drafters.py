"""Writes `tests/drafters/golden`: tiny drafters of random weights and what the public packages compute with them.

    (an environment with torch, transformers, dflash and speculators: the lines in benchmarks/public_loaders.py)
    /tmp/public/bin/python benchmarks/golden_drafters.py [--only NAME] [--out FOLDER]

Recorded with dflash 0.1.0, speculators 0.9.0, torch 2.13.0 (CPU), transformers 5.15.0, numpy 2.4. Every number comes
out of the packages' own modules, in float32; the weights are multiples of bfloat16, in which the folders store them.
What the files hold is in the README beside them, which this script does not write.
"""

import argparse
import copy
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from public_loaders import UNSEEN, first_draft, is_speculators, load, outputs
from safetensors.torch import load_file, save_file

VOCABULARY, WIDTH, BLOCK, MASK = 64, 32, 8, 63
REDUCED = 32  # size of a reduced draft vocabulary
WINDOW = 5  # shorter than the longer context, and shorter than the block
CONTEXTS = (3, 11)
ROWS = 2

LAYER = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "rope_theta": 50000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
SLIDING = {"sliding_window": WINDOW, "use_sliding_window": True}
SELECTOR = {"conv_kernel_size": 3, "conv_group_size": 8, "selector_rank": 8, "selector_top_k": 6}

PARTS = ("ce", "tv", "unary", "selector", "confidence")

Arrays = dict[str, np.ndarray]


def layers(kinds: str) -> dict[str, Any]:
    """Returns the config keys of the layers named by one letter each: f(ull), s(liding)."""
    named = {"f": "full_attention", "s": "sliding_attention"}
    keys: dict[str, Any] = {"num_hidden_layers": len(kinds), "layer_types": [named[kind] for kind in kinds]}
    return keys | (SLIDING if "s" in kinds else {})


def zlab(kinds: str, draft: dict[str, Any], second: bool = False, **keys: Any) -> Any:
    """Returns a model of the package dflash."""
    import dflash
    from transformers import Qwen3Config

    model_class = dflash.DFlash2DraftModel if second else dflash.DFlashDraftModel
    config = Qwen3Config(
        dflash_config={"mask_token_id": MASK, **draft},
        architectures=[model_class.__name__],
        **({"num_target_layers": 8} | LAYER | layers(kinds) | keys),
    )
    return model_class(config)


def speculators(kind: str, kinds: str, taps: list[int], reduced: bool = False, **keys: Any) -> Any:
    """Returns a model of the package speculators."""
    from speculators import SpeculatorModel, SpeculatorModelConfig
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import Qwen3Config

    transformer = Qwen3Config(**LAYER, **layers(kinds))
    transformer._attn_implementation = "eager"
    sampled = keys.get("sample_from_anchor", kind == "dspark")
    config = SpeculatorModelConfig.from_dict(
        {
            "speculators_model_type": kind,
            "transformer_layer_config": transformer,
            "draft_vocab_size": REDUCED if reduced else VOCABULARY,
            "block_size": BLOCK,
            "aux_hidden_state_layer_ids": taps,
            "mask_token_id": MASK,
            "speculators_config": SpeculatorsConfig(
                algorithm=kind,
                proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=BLOCK - (0 if sampled else 1))],
                default_proposal_method="greedy",
                verifier=VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"]),
            ),
            **keys,
        }
    )
    return SpeculatorModel.registered_model_class_from_config(config)(config)


DPACE = {"loss": {"ce": 1.0}, "weights": "dpace"}
FIXED = {"loss": {"kl_div": 1.0}, "weights": "fixed-exp-decay"}
SPARK = {"loss": {"ce": 0.1, "tv": 0.9}, "weights": "fixed-exp-decay"}
SCALES = {"input_embedding_scale": 1.5, "output_multiplier": 0.75, "final_logit_softcapping": 4.0}
NONE = {"markov_rank": 0, "confidence_head_with_markov": False}

# name -> (model, training recipe). The taps of the z-lab folders are theirs or, where not said, the default ids.
CASES: dict[str, Any] = {
    "zlab-dflash": lambda: (zlab("ff", {}, block_size=BLOCK), None),
    "zlab-dflash-one-layer": lambda: (zlab("f", {"block_size": BLOCK, **SCALES}, attention_bias=True), None),
    "zlab-dflash-sliding": lambda: (zlab("sfs", {"block_size": BLOCK, "target_layer_ids": [0, 3]}), None),
    "zlab-dflash-sliding-both-ways": lambda: (
        zlab("sf", {"block_size": BLOCK, "target_layer_ids": [2, 4]}, is_causal=False),
        None,
    ),
    # A sliding layer without a window: causal in this package.
    "zlab-dflash-no-window": lambda: (zlab("s", {"block_size": BLOCK}, use_sliding_window=False), None),
    "zlab-dflash-causal": lambda: (
        zlab("fs", {"block_size": BLOCK, "target_layer_ids": [1, 5]}, is_causal=True),
        None,
    ),
    "zlab-dflash2": lambda: (
        zlab("fs", {"block_size": BLOCK, "target_layer_ids": [0, 2, 5], **SELECTOR}, second=True),
        None,
    ),
    "zlab-dflash2-capped": lambda: (
        zlab("f", {"block_size": BLOCK, "target_layer_ids": [2, 5], **SELECTOR, **SCALES}, second=True),
        None,
    ),
    "speculators-dflash": lambda: (speculators("dflash", "ff", [2, 4, 6]), DPACE),
    "speculators-dflash-sliding": lambda: (speculators("dflash", "sf", [1, 5]), FIXED),
    "speculators-dflash-sliding-both-ways": lambda: (
        speculators("dflash", "fs", [1, 5], sliding_window_non_causal=True),
        FIXED,
    ),
    "speculators-dflash-reduced": lambda: (speculators("dflash", "ff", [1, 5], reduced=True), FIXED),
    "speculators-dflash-next-token": lambda: (
        speculators("dflash", "sf", [0, 5], reduced=True, sample_from_anchor=True),
        DPACE,
    ),
    "speculators-dflash2": lambda: (speculators("dflash2", "fs", [1, 3], **SELECTOR), FIXED),
    "speculators-dflash2-causal": lambda: (
        speculators("dflash2", "s", [1, 3], sliding_window_non_causal=False, **SELECTOR),
        DPACE,
    ),
    "speculators-dspark": lambda: (speculators("dspark", "ff", [1, 3], markov_rank=8), SPARK),
    "speculators-dspark-sliding": lambda: (speculators("dspark", "sf", [1, 3], markov_rank=8), FIXED),
    "speculators-dspark-gated": lambda: (
        speculators(
            "dspark",
            "f",
            [1, 3],
            reduced=True,
            markov_rank=8,
            markov_head_type="gated",
            confidence_head_with_markov=False,
        ),
        SPARK,
    ),
    "speculators-dspark-rnn": lambda: (
        speculators("dspark", "f", [1, 3], reduced=True, markov_rank=8, markov_head_type="rnn"),
        SPARK,
    ),
    "speculators-dspark-rnn-fill-in": lambda: (
        speculators("dspark", "f", [1, 3], markov_rank=8, markov_head_type="rnn", sample_from_anchor=False),
        SPARK,
    ),
    "speculators-dspark-no-markov": lambda: (speculators("dspark", "f", [1, 3], **NONE), SPARK),
}


def randomise(model: Any, rng: np.random.Generator) -> None:
    """Gives every tensor of `model` random values that bfloat16 holds, large enough for each part to show."""
    for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
        if name == "d2t":
            chosen = np.sort(rng.choice(VOCABULARY, REDUCED, replace=False))
            tensor.copy_(torch.tensor(chosen - np.arange(REDUCED)))
            model.t2d.zero_()
            model.t2d[torch.tensor(chosen)] = True
        elif name != "t2d" and not name.startswith("rotary_emb"):
            spread = {True: 0.2, False: 1.2 / np.sqrt(tensor.shape[-1])}[tensor.ndim == 1]
            if "codebook" in name or "markov_w" in name:
                spread = 0.8
            if "kernel_projection" in name:  # products of these with what they act on amplify every rounding
                spread /= 3
            value = rng.normal(size=tensor.shape) * spread
            if name.endswith("norm.weight"):
                value += 1
            if name.endswith("base_kernel"):
                value[:, 0] += 1
            tensor.data = rounded(value)


def rounded(value: np.ndarray) -> torch.Tensor:
    """Returns `value` in float32, rounded to bfloat16."""
    return torch.tensor(value, dtype=torch.float32).bfloat16().float()


def write_folder(model: Any, folder: Path) -> None:
    """Saves `model` with its package's own writer, in bfloat16; z-lab's codebooks under the names of its folders."""
    stored = copy.deepcopy(model).to(torch.bfloat16)
    if is_speculators(model):
        stored.config.speculators_config.verifier.name_or_path = "example/target"
    stored.save_pretrained(folder)
    for source in folder.glob("*.py"):  # speculators copies the source of its config class into each folder
        source.unlink()
    file = folder / "model.safetensors"
    tensors = {name.replace("codebook.weight", "codebook"): value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


def inputs(model: Any, rng: np.random.Generator) -> Arrays:
    """Returns random contexts, anchors and predecessors, and the target's embedding and head."""
    taps = model.fc.in_features // WIDTH
    given: Arrays = {
        "embedding": rounded(rng.normal(size=(VOCABULARY, WIDTH))).numpy(),
        "head": rounded(rng.normal(size=(VOCABULARY, WIDTH)) * 0.3).numpy(),
        "mask_id": np.array(MASK, np.int32),
    }
    drafts = BLOCK - first_draft(model)
    for i, length in enumerate(CONTEXTS):
        given[f"states_{i}"] = rounded(rng.normal(size=(ROWS, length, taps * WIDTH))).numpy()
        steps = rng.integers(0, MASK, (ROWS, drafts)).astype(np.int32)
        given[f"anchor_{i}"] = steps[:, 0]
        given[f"predecessors_{i}"] = steps
        given[f"positions_{i}"] = np.arange(length, length + BLOCK, dtype=np.int32)
    return given


def training(model: Any, recipe: dict[str, Any], rng: np.random.Generator) -> Arrays:
    """Returns one training step of `model` on two packed documents: what went in, the loss and its parts, and the
    gradients of two norms."""
    import speculators.models.dflash.core as core
    from speculators.losses import resolve_loss_config
    from speculators.losses.eager import tv_loss

    lengths = (21, 17)
    total = sum(lengths) + 2  # two positions of padding
    documents = np.concatenate([np.full(n, i) for i, n in enumerate(lengths)] + [np.full(2, -1)])
    positions = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(2, int)])
    mask = np.concatenate([np.ones(sum(lengths), bool), np.zeros(2, bool)])
    mask[[9, 28]] = False  # positions that count for no loss
    anchors, valid = np.array([4, 6, 11, 24, 29, 0]), np.array([True] * 5 + [False])
    taps = model.fc.in_features // WIDTH
    states = rounded(rng.normal(size=(total, taps * WIDTH)))
    last = torch.nn.functional.rms_norm(rounded(rng.normal(size=(total, WIDTH))), (WIDTH,))
    tokens = rng.integers(0, MASK, total)

    # The model norms the target's last states itself: a norm that changes nothing, so that the file holds normed ones.
    model.verifier_norm = torch.nn.Identity()
    rows = model.target_head if model.t2d is None else model.target_head[model.t2d]
    model.verifier_lm_head.weight.data = rows
    labels: list[torch.Tensor] = []
    backbone = model._backbone_forward

    def noted(*arguments: Any, **options: Any) -> Any:
        found = backbone(*arguments, **options)
        labels.append(found[3])
        return found

    model._backbone_forward = noted
    model.zero_grad()
    options = {
        "loss_config": resolve_loss_config(json.dumps(recipe["loss"]), "eager"),
        "per_position_loss_weight": recipe["weights"],
        "gamma": 4.0,
        "max_anchors": len(anchors),
    }
    if hasattr(model, "candidate_selector") or hasattr(model, "markov_head"):
        options["tv_loss_fn"] = tv_loss
    with mock.patch.object(core, "select_anchors", return_value=(torch.tensor(anchors), torch.tensor(valid))):
        _, loss, metrics = model(
            states[None],
            torch.tensor(tokens)[None],
            torch.tensor(mask)[None],
            last[None],
            torch.tensor(documents)[None],
            torch.tensor(positions)[None],
            **options,
        )
    loss.backward()
    found = {
        "train_recipe": np.array(json.dumps(recipe | {"gamma": 4.0, "dpace_alpha": 0.5})),
        "train_states": states.numpy(),
        "train_tokens": tokens.astype(np.int32),
        "train_documents": documents.astype(np.int32),
        "train_positions": positions.astype(np.int32),
        "train_anchors": anchors.astype(np.int32),
        "train_anchor_counts": valid,
        "train_slot_counts": labels[0].view(len(anchors), BLOCK).numpy().astype(bool),
        "train_target_hidden": last.numpy(),
        "train_loss": loss.detach().numpy(),
        "train_gradient_hidden_norm": model.hidden_norm.weight.grad.numpy(),
        "train_gradient_norm": model.norm.weight.grad.numpy(),
    }
    for part in PARTS:
        if f"{part}_loss_sum" in metrics:
            found[f"train_{part}_loss"] = metrics[f"{part}_loss_sum"].numpy()
    model.zero_grad()
    return found


def check(model: Any, answer: Arrays) -> None:
    """The numbers must not hang on a tie: the choices that the outputs name are clear."""
    for i in range(len(CONTEXTS)):
        scores = answer.get(f"greedy_log_q_{i}", answer.get(f"greedy_corrected_{i}", answer[f"logits_{i}"]))
        first = first_draft(model) if scores.shape[1] == BLOCK else 0
        best = np.sort(scores[:, first:], -1)
        assert (best[..., -1] - best[..., -2]).min() > 1e-3, "a tie: another seed"
        if f"candidates_{i}" in answer:
            edge = np.sort(answer[f"logits_{i}"][:, first_draft(model) :], -1)[..., ::-1]
            assert np.abs(np.diff(edge[..., : SELECTOR["selector_top_k"] + 1])).min() > 1e-4, "a tie: another seed"


def write_case(name: str, out: Path) -> None:
    """Writes the folder and the golden file of one case."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    for seed in range(20):
        rng = np.random.default_rng([seed, *name.encode()])
        torch.manual_seed(seed)
        model, recipe = CASES[name]()
        randomise(model.eval(), rng)
        given = inputs(model, rng)
        answer = outputs(model, given)
        try:
            check(model, answer)
        except AssertionError:
            continue
        break
    write_folder(model, folder)
    again = outputs(load(folder), given)
    for key, value in answer.items():
        np.testing.assert_array_equal(again[key], value, err_msg=f"{name}: {key} of the stored folder")
    if recipe is not None:
        given |= training(model, recipe, rng)
    assert UNSEEN not in given["states_0"]
    np.savez_compressed(folder / "golden.npz", **given, **answer)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name:40} seed {seed}, {size / 1000:.0f} kB, logits to {np.abs(answer['logits_1']).max():.2f}")


def losses() -> Arrays:
    """Returns small inputs of the packages' losses and what they make of them: per slot, weighted, and gradients."""
    from speculators.losses import dflash_loss_decay, dpace_loss_decay, eager, resolve_loss_config
    from speculators.models.dflash.metrics import compute_metrics as dflash_loss
    from speculators.models.dflash2.metrics import compute_metrics as dflash2_loss
    from speculators.models.dflash2.metrics import selector_training_candidates
    from speculators.models.dspark.metrics import compute_metrics as dspark_loss

    rng = np.random.default_rng(0)
    blocks, width, vocabulary, kept = 3, 4, 12, 4
    shape = (1, blocks * width)

    def array(*tail: int, spread: float = 1.0) -> torch.Tensor:
        return torch.tensor(rng.normal(size=(*shape, *tail)) * spread, dtype=torch.float32)

    logits, target = array(vocabulary, spread=1.5), array(vocabulary, spread=2.0)
    transitions, confidence = array(vocabulary), array()
    counts = torch.ones(shape)
    counts[0, [6, 7, 11]] = 0
    slot = torch.arange(blocks * width)[None] % width
    layouts = {"fill_in": counts * (slot > 0), "next_token": counts}

    found: dict[str, torch.Tensor] = {
        "logits": logits,
        "target_logits": target,
        "transitions": transitions,
        "confidence_logits": confidence,
    }
    for name in ("kl_div", "rkl", "jsd", "ce", "tv", "nla", "lk_hybrid"):
        function = resolve_loss_config(name, "eager")[name][0]
        found[name] = function(logits, target)
    for layout, mask in layouts.items():
        found[f"counts_{layout}"] = mask.bool()
        for gamma in (4.0, 7.0):
            found[f"weights_{layout}_{gamma:.0f}"] = dflash_loss_decay(slot.float(), gamma, layout == "next_token")
        found[f"weights_{layout}_dpace"] = dpace_loss_decay(
            slot, loss_mask=mask, block_size=width, dpace_alpha=0.5, elementwise_loss=found["ce"] * mask
        )

    def total(name: str, loss: Any, **leaves: torch.Tensor) -> None:
        """Adds the value of `loss` and its gradients with respect to `leaves`."""
        own = {leaf: value.clone().requires_grad_() for leaf, value in leaves.items()}
        value, metrics = loss(**own)
        found[name] = value.detach()
        found.update({f"{name}_{part}": metrics[f"{part}_loss_sum"] for part in PARTS if f"{part}_loss_sum" in metrics})
        gradients = torch.autograd.grad(value, list(own.values()))
        found.update({f"{name}_gradient_{leaf}": g for leaf, g in zip(own, gradients, strict=True)})

    def spec(text: str) -> Any:
        return resolve_loss_config(text, "eager")

    for layout, mask in layouts.items():
        common = {"sample_from_anchor": layout == "next_token", "gamma": 4.0}
        for name, text, weights in (
            ("kl", "kl_div", "fixed-exp-decay"),
            ("ce", "ce", "fixed-exp-decay"),
            ("ce_dpace", "ce", "dpace"),
        ):
            options = {**common, "loss_config": spec(text), "per_position_loss_weight": weights}
            total(
                f"dflash_{layout}_{name}",
                lambda logits, mask=mask, options=options: dflash_loss(logits, target, mask, width, **options),
                logits=logits,
            )
        total(
            f"dspark_{layout}",
            lambda logits, confidence, mask=mask, common=common: dspark_loss(
                logits,
                target,
                confidence,
                mask,
                width,
                loss_config=spec('{"ce": 0.1, "tv": 0.9}'),
                tv_loss_fn=eager.tv_loss,
                **common,
            ),
            logits=logits,
            confidence=confidence,
        )
    candidates, positions, contained = selector_training_candidates(logits.topk(kept, -1).indices, target.argmax(-1))
    assert contained.any()
    assert not contained.all()
    found |= {"candidates": candidates, "target_candidates": positions, "target_was_candidate": contained}
    for weights in ("fixed-exp-decay", "dpace"):
        total(
            f"dflash2_{weights.replace('-', '_')}",
            lambda logits, transitions, weights=weights: dflash2_loss(
                logits,
                target,
                candidates,
                logits.gather(-1, candidates) + transitions.gather(-1, candidates),
                positions,
                contained,
                layouts["fill_in"],
                width,
                kept,
                loss_config=spec("ce" if weights == "dpace" else "kl_div"),
                tv_loss_fn=eager.tv_loss,
                per_position_loss_weight=weights,
            ),
            logits=logits,
            transitions=transitions,
        )
    return {
        name: (value.detach().reshape(blocks, width, *value.shape[2:]) if value.ndim else value).numpy()
        for name, value in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests/drafters/golden")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        if options.only in (None, name):
            write_case(name, options.out)
    if options.only in (None, "losses"):
        np.savez_compressed(options.out / "losses.npz", **losses())


if __name__ == "__main__":
    main()
