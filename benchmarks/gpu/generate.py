"""transformers' `generate` for the same 8 B target, random weights, bfloat16, batch 1: to compare a plain step with.

Needs torch with CUDA; left out elsewhere.
"""

import time
from typing import Any

from card import BYTES, pass_bytes
from results import Results
from rounds import SHORT
from shapes import shape_of

NEW = 64


def run(results: Results, args: Any, deadline: float) -> None:
    """The whole phase."""
    what = f"transformers' generate, 8b, batch 1, context {SHORT}"
    if args.tiny:
        return results.leave_out(what, "it has no tiny form")
    try:
        import torch
        from transformers import AutoModelForCausalLM, Qwen3Config
    except ImportError as error:
        return results.leave_out(what, f"{error}")
    if not torch.cuda.is_available():
        return results.leave_out(what, "torch finds no CUDA")
    config = shape_of("8b", tiny=False)
    values = {
        "vocab_size": config.vocab_size, "hidden_size": config.width, "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_width,
        "max_position_embeddings": config.context, "tie_word_embeddings": config.tied,
    }  # fmt: skip

    def seconds(function, *functions_args) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function(*functions_args)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    with torch.device("cuda"), torch.inference_mode():
        source = torch.ones(1 << 28)
        copy = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / min(seconds(copy.copy_, source) for _ in range(5))
        del source, copy
        model = AutoModelForCausalLM.from_config(Qwen3Config(**values), dtype=torch.bfloat16).eval()
        prompt = torch.randint(0, config.vocab_size, (1, SHORT))

        def answer(count: int) -> None:
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip

        answer(2)
        short, long = seconds(answer, 2), seconds(answer, 2 + NEW)
    size = pass_bytes(config, 1, 1, SHORT)
    results.add(
        what, {"ms": 1e3 * (long - short) / NEW}, {"ms": 1e3 * size / bandwidth},
        f"{size / 1e9:.4g} GB at {bandwidth / 1e12:.3g} TB/s, as for our plain step; with kernels launched one by one "
        f"some 20 ms, whatever is read ({BYTES} bytes a number)",
    )  # fmt: skip
