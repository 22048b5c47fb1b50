"""Are the greedy answers of SmolLM2 those of transformers? With a drafter or without, as decoding is exact.

    python benchmarks/smollm2/as_transformers.py --target FOLDER --data DATA [--drafter SOURCE]

FOLDER is the Hugging Face folder of the model; needs torch. 40 prompts of HumanEval, GSM8K and MT-Bench as chat, each
templated by both, 128 new tokens, float32. Where an answer departs, the gap of the two tokens in transformers' logits
is printed: between passes of float32 a near-tie is below 1e-4.
"""

import argparse
from pathlib import Path

import jax
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import deer_jax
from deer_jax.data.sources import read_prompts
from deer_jax.decoding.prompts import encode_prompts

SETS = {"humaneval/humaneval_000_099.jsonl": 14, "gsm8k/test_0000_0999.jsonl": 13, "mt_bench/question.jsonl": 13}
NEW = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--drafter", help="as the command line takes it, prompt-lookup+FOLDER for one")
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "deer_jax" / "xla"))
    target = deer_jax.load_target(options.target)
    drafter = deer_jax.load_drafter(options.drafter, target=target) if options.drafter else None
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    model = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32).eval()
    chats = [
        prompt.content
        for name, count in SETS.items()
        for prompt in read_prompts(options.data / name, chat=True)[:count]
    ]
    ours = encode_prompts(target, chats)
    theirs = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    print(f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {len(chats)} prompts are templated the same")
    answers = deer_jax.decode(target, theirs, drafter=drafter, max_new_tokens=NEW).tokens
    same = 0
    for number, (prompt, answer) in enumerate(zip(theirs, answers, strict=True)):
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
            expected = whole[0, len(prompt) :].tolist()
            if answer == expected:
                same += 1
                continue
            at = next(i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b)
            logits = model(whole[:, : len(prompt) + at]).logits[0, -1]
            gap = (logits[expected[at]] - logits[answer[at]]).item()
        print(f"prompt {number}: departs at token {at}, by {gap:.2g} in transformers' logits")
    print(f"{same} of {len(chats)} answers are the same")


if __name__ == "__main__":
    main()
