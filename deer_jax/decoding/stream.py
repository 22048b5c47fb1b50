"""One answer in pieces of text, shown while it is made."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deer_jax.config import InputError, Sampling
from deer_jax.decoding.engine import Engine, answer_text, prepare
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.drafters.protocol import Drafter
from deer_jax.models.target import Target

ROUNDS_PER_PIECE = 2


def stream(
    target: Target,
    prompt: Any,
    *,
    drafter: Drafter | None = None,
    draft_length: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    draft_temperature: float | None = None,
    seed: int = 0,
    ignore_stop: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Pieces of one answer as they are committed; joined they equal the text of `decode` with the same arguments."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, draft_temperature=draft_temperature)
    if target.tokenizer is None:
        raise InputError(f"{target.name} has no tokenizer, so there is no text to stream: use decode")
    encoded = encode_prompts(target, prompt, template_arguments)
    if len(encoded) != 1:
        raise InputError(f"stream takes one prompt, got {len(encoded)}: use decode")
    engine, limits = prepare(target, encoded, drafter, draft_length, max_new_tokens, sampling, seed, 1, ignore_stop)
    return _pieces(engine, encoded, limits, () if ignore_stop else target.stop_ids)


def _pieces(engine: Engine, encoded: list[list[int]], limits: list[int], stop_ids: Sequence[int]) -> Iterator[str]:
    engine.admit(encoded, limits, [0], [0])
    shown, done, tokenizer = "", False, engine.target.tokenizer
    assert tokenizer is not None
    while not done:
        after = engine.segment(ROUNDS_PER_PIECE)
        done = bool(after["done"][0])
        tokens = after["tokens"][0, len(encoded[0]) : after["length"][0]].tolist()
        if not done:  # bytes may still become part of a character, or be found to be none
            tokens = tokens[: tokenizer.settled(tokens)]
        text = answer_text(engine.target, tokens, stop_ids)
        if not done:
            text = text.rstrip("\ufffd")  # the start of a character whose other bytes are still to come
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
