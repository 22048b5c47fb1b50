"""One answer while it is made: as pieces of text, or round by round as blocks of tokens."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deer_jax.config import Sampling, Verification
from deer_jax.decoding.auto import DraftLength
from deer_jax.decoding.checks import check_models, prepare
from deer_jax.decoding.decode import answer_text, decoded, statistics
from deer_jax.decoding.engine import Engine, serve
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.decoding.state import DecodeStats
from deer_jax.drafters.drafter import Drafter
from deer_jax.errors import InputError
from deer_jax.models.target import Target

ROUNDS_PER_PIECE = 2


def stream(
    target: Target,
    prompt: Any,
    *,
    drafter: Drafter | None = None,
    draft_length: DraftLength = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    draft_temperature: float | None = None,
    verification: Verification = "token",
    seed: int = 0,
    ignore_stop: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
    finished: Callable[[DecodeStats], Any] | None = None,
) -> Iterator[str]:
    """Pieces of one answer as they are committed; joined they equal the text of `decode` with the same arguments.

    finished: called after the last piece with what `decode` would report.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, draft_temperature=draft_temperature,
        verification=verification,
    )  # fmt: skip
    check_models(target, drafter)
    if target.tokenizer is None:
        raise InputError(f"{target.name} has no tokenizer, so there is no text to stream: use stream_blocks")
    encoded = _one(encode_prompts(target, prompt, template_arguments))
    engine, limits = prepare(target, encoded, drafter, draft_length, max_new_tokens, sampling, seed, 1, ignore_stop)
    return _pieces(engine, encoded, limits, () if ignore_stop else target.stop_ids, finished)


def stream_blocks(
    target: Target,
    prompt: Any,
    *,
    drafter: Drafter | None = None,
    draft_length: DraftLength = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    draft_temperature: float | None = None,
    verification: Verification = "token",
    seed: int = 0,
    ignore_stop: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
) -> Iterator[list[int]]:
    """The tokens that each round commits, as soon as it has; joined they equal the tokens of `decode`.

    The last token of a round is the target's own, those before it are accepted drafts, unless a stop token or
    `max_new_tokens` ends the answer inside the block. The host waits after every round, so this is for looking at, not
    for speed.

        k = 4:  [12, 7, 31], [5], [9, 9, 40, 2, 8]   2 drafts accepted, none, all 4
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, draft_temperature=draft_temperature,
        verification=verification,
    )  # fmt: skip
    check_models(target, drafter)
    encoded = _one(encode_prompts(target, prompt, template_arguments))
    engine, limits = prepare(target, encoded, drafter, draft_length, max_new_tokens, sampling, seed, 1, ignore_stop)
    return _rounds(engine, encoded, limits, 1)


def _one(encoded: list[list[int]]) -> list[list[int]]:
    if len(encoded) != 1:
        raise InputError(f"streaming takes one prompt, got {len(encoded)}: use decode")
    return encoded


def _rounds(
    engine: Engine,
    encoded: list[list[int]],
    limits: list[int],
    rounds: int,
    finished: Callable[[DecodeStats], Any] | None = None,
) -> Iterator[list[int]]:
    """The tokens of every so many rounds, to the end of the answer."""
    seen, begin = len(encoded[0]), time.perf_counter()
    for ended, running in serve(engine, encoded, limits, [0], max_rounds=rounds):
        row = (ended | running)[0]
        yield row["tokens"][seen : row["length"]].tolist()
        seen = int(row["length"])
        if ended and finished is not None:
            seconds = time.perf_counter() - begin - engine.compile_seconds
            finished(statistics(engine, [decoded(row, len(encoded[0]))], seconds))


def _pieces(
    engine: Engine,
    encoded: list[list[int]],
    limits: list[int],
    stop_ids: Sequence[int],
    finished: Callable[[DecodeStats], Any] | None,
) -> Iterator[str]:
    tokenizer = engine.target.tokenizer
    assert tokenizer is not None
    shown, tokens, stats = "", [], []
    for fresh in _rounds(engine, encoded, limits, ROUNDS_PER_PIECE, stats.append):
        tokens += fresh
        # Bytes may still become part of a character, or be found to be none.
        text = answer_text(engine.target, tokens[: tokenizer.settled(tokens)], stop_ids)
        text = text.rstrip("\ufffd")  # the start of a character whose other bytes are still to come
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    if rest := answer_text(engine.target, tokens, stop_ids)[len(shown) :]:
        yield rest
    if finished is not None:
        finished(stats[0])
