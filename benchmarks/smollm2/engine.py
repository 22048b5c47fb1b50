"""How fast an engine made for 4-bit weights answers on the same GGUF file: llama.cpp, in an environment of its own.

    python -m venv ENV && ENV/bin/python -m pip install llama_cpp_cffi==0.4.42
    ENV/bin/python benchmarks/smollm2/engine.py MODEL.gguf PROMPTS.json

PROMPTS.json has a list of token ids for each prompt, as `deer_jax.decode` takes them. Greedy, 128 new tokens whatever
is said, two threads, one call after the other; the first one is not counted.
"""

import json
import sys
import time

from llama.llama_cpp import ffi, lib  # pyrefly: ignore
from llama.util import _common_batch_add, _common_batch_clear, _decode_tokens, _llama_decode  # pyrefly: ignore

NEW, THREADS, CONTEXT = 128, 2, 1024


def answer(model, prompt: list[int]) -> tuple[float, float]:
    """Seconds for the prompt and for the answer."""
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = CONTEXT, 512, THREADS, THREADS
    context = lib.llama_init_from_model(model, params)
    batch, sampler = lib.llama_batch_init(512, 0, 1), lib.llama_sampler_init_greedy()
    begin = time.perf_counter()
    at = _decode_tokens(context, batch, prompt, [0], 0, 0)
    read = time.perf_counter()
    for _ in range(NEW):
        token = lib.llama_sampler_sample(sampler, context, -1)
        _common_batch_clear(batch)
        _common_batch_add(batch, token, at, [0], True)
        at += 1
        if _llama_decode(context, batch):
            raise SystemExit("the engine failed")
    end = time.perf_counter()
    lib.llama_free(context)
    return read - begin, end - read


def main(file: str, prompts: str) -> None:
    lib.llama_log_set(lib.llama_cpp_cffi_ggml_log_callback, ffi.NULL)
    model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
    if model == ffi.NULL:
        raise SystemExit(f"{file}: cannot be loaded")
    with open(prompts, encoding="utf-8") as stream:
        texts = json.load(stream)
    answer(model, texts[0])
    reading, answering = map(sum, zip(*(answer(model, text) for text in texts), strict=True))
    tokens = NEW * len(texts)
    print(f"{tokens / (reading + answering):.1f} tokens/s, {tokens / answering:.1f} without the prompts")


if __name__ == "__main__":
    main(*sys.argv[1:])
