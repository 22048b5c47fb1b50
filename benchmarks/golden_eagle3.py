"""Writes the EAGLE-3 folders of `tests/drafters/golden`: random weights and what speculators computes with them.

    (an environment with torch, transformers and speculators: the lines in benchmarks/public_loaders.py)
    /tmp/public/bin/python benchmarks/golden_eagle3.py [--out FOLDER]

Recorded with speculators 0.9.0, torch 2.13.0 (CPU), transformers 5.15.0, eager attention, float32: the features of a
text, and the logits of every step of the training-time test, each on the text's own tokens and on the states that the
step before has given. What the files hold is in the README beside them.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_drafters import LAYER, MASK, REDUCED, VOCABULARY, WIDTH, randomise, rounded, write_folder

STEPS, TEXT, TAPS = 5, 13, [2, 4, 5]
# name -> the layer's family, whether the vocabulary is reduced, and what else the config says
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "eagle3": ("llama", True, {}),
    "eagle3-residual": ("llama", False, {"norm_before_residual": True}),
    "eagle3-normed": ("qwen3", True, {"norm_before_fc": True, "norm_output": True}),
}


def model_of(family: str, reduced: bool, keys: dict[str, Any]) -> Any:
    """Returns a model of the package, its weights random."""
    from speculators import SpeculatorModel, SpeculatorModelConfig
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig, Qwen3Config

    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[family]
    layer = kind(**LAYER, num_hidden_layers=1)
    layer._attn_implementation = "eager"
    config = SpeculatorModelConfig.from_dict(
        {
            "speculators_model_type": "eagle3",
            "transformer_layer_config": layer,
            "draft_vocab_size": REDUCED if reduced else VOCABULARY,
            "eagle_aux_hidden_state_layer_ids": TAPS,
            "speculators_config": SpeculatorsConfig(
                algorithm="eagle3",
                proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
                default_proposal_method="greedy",
                verifier=VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"]),
            ),
            **keys,
        }
    )
    return SpeculatorModel.registered_model_class_from_config(config)(config)


def run(model: Any, given: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the logits [STEPS, TEXT, V'] of the steps at all places."""
    found = []
    hook = model.lm_head.register_forward_hook(lambda _module, _inputs, output: found.append(output[0].detach()))
    model.embed_tokens.weight.data = torch.tensor(given["embedding"])
    with torch.no_grad():
        # The package pairs the state of a token with the token behind it.
        model(
            torch.tensor(given["states"][None, :-1]),
            torch.tensor(given["tokens"][None, 1:].astype(np.int64)),
            torch.zeros((1, TEXT), dtype=torch.long),
            ttt_steps=STEPS,
        )
    hook.remove()
    return torch.stack(found).numpy()


def write_case(name: str, out: Path) -> None:
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng([*name.encode()])
    torch.manual_seed(0)
    model = model_of(*CASES[name]).eval()
    randomise(model, rng)
    given = {
        "embedding": rounded(rng.normal(size=(VOCABULARY, WIDTH))).numpy(),
        "states": rounded(rng.normal(size=(TEXT + 1, len(TAPS) * WIDTH))).numpy(),
        "tokens": rng.integers(0, MASK, TEXT + 1).astype(np.int32),
    }
    logits = run(model, given)
    write_folder(model, folder)
    np.savez_compressed(folder / "golden.npz", **given, logits=logits, head=model.lm_head.weight.detach().numpy())
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name:20} {size / 1000:.0f} kB, to {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests/drafters/golden")
    options = parser.parse_args()
    for case in CASES:
        write_case(case, options.out)
