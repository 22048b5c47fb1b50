"""Decoding as users call it: prompts in any form, answers out, and into a file as they finish."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deer_jax import processes
from deer_jax.config import Sampling, Verification
from deer_jax.decoding.auto import AUTO, DraftLength
from deer_jax.decoding.checks import check_models, prepare
from deer_jax.decoding.engine import Engine, Row, serve
from deer_jax.decoding.output import Output
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.decoding.state import DecodeResult, DecodeStats
from deer_jax.digests import combined
from deer_jax.drafters.drafter import Drafter
from deer_jax.errors import InputError, NotFiniteError
from deer_jax.models.target import Target, params_digests

DEFAULT_SLOTS = 16
ROUNDS_PER_SEGMENT = 32  # when progress is shown or kept: the time until it moves, or until Ctrl-C is served

Progress = Callable[[int, int, int], None]  # finished prompts, all prompts, new tokens of finished ones


def decode(
    target: Target,
    prompts: Any,
    *,
    drafter: Drafter | None = None,
    draft_length: DraftLength = None,
    max_new_tokens: int | Sequence[int] = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    draft_temperature: float | None = None,
    verification: Verification = "token",
    seed: int = 0,
    batch_size: int | None = None,
    ignore_stop: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    ids: Sequence[str] | None = None,
    progress: Progress | None = None,
    time_prefill: bool = False,
) -> DecodeResult:
    """Answers of the target, drafted in blocks if a drafter is given, and the same with or without it.

    Greedy (temperature 0) the tokens are those of plain decoding, up to near-ties of the target's two best logits;
    sampling, their distribution is.

    Args:
      prompts: a string, a chat (list of messages), or a list of strings, chats or token-id lists; any number.
      drafter: proposes blocks; None decodes plainly, in the same loop with k = 0.
      draft_length: k drafted tokens per round; 0 is plain, None what the drafter was trained for. "auto" chooses it
        again and again, up to that, by what rounds have cost and committed on this machine, verifies no draft that is
        too uncertain for its cost, and decodes plainly where drafting does not pay: as exact, but which of the possible
        answers a seed gives may differ from run to run.
      max_new_tokens: one number, or one per prompt.
      temperature: 0 is greedy. top_k: 0 keeps all. top_p: 1 keeps all. Applied in this order, to both models.
      draft_temperature: None is the temperature, 0 drafts the argmax; any value is exact.
      verification: of sampled drafts, `token` by token, or as a `block`, which keeps as much or more; both are exact.
      seed: with the prompt's number it fixes every random choice, whatever the batch.
      batch_size: slots that run at once (default up to 16); a finished slot takes the next prompt.
      ignore_stop: run to max_new_tokens whatever the target says.
      template_arguments: passed on to the chat template, as in {"enable_thinking": False}.
      output: append each answer to this file as it finishes, one JSON object per line; the same call goes on where it
        was stopped. What it needs for that is in OUTPUT.state.json. The result has all answers, and the numbers count
        all but for seconds and tokens per second, which are this call's.
      ids: names of the prompts in the output; by default their numbers from 1.
      progress: called with (finished prompts, all prompts, new tokens of finished ones); the loop then runs in short
        segments, so that Ctrl-C is served.
      time_prefill: wait after each prefill (one wait more per refill), to fill in `stats.prefill_seconds`.

    Raises:
      InputError: anything wrong with the arguments, before any work is done; an output that was made with other
        settings, by something else, or that another process writes.
      RunError: logits that are not finite; an output that cannot be written.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, draft_temperature=draft_temperature,
        verification=verification,
    )  # fmt: skip
    check_models(target, drafter)
    if ids is not None and output is None:
        raise InputError("ids name the lines of an output: give output too")
    slots = DEFAULT_SLOTS if batch_size is None else batch_size
    with contextlib.ExitStack() as stack:
        writer = None if output is None else stack.enter_context(Output(output, sharded=False))
        encoded = encode_prompts(target, prompts, template_arguments, now=writer.begun if writer else None)
        engine, limits = prepare(
            target, encoded, drafter, draft_length, max_new_tokens, sampling, seed, slots, ignore_stop
        )
        k, stops = engine.plan.k, () if ignore_stop else target.stop_ids
        done: dict[int, Decoded] = {}
        names: list[str] = []
        if writer is not None:
            names = names_of(ids, len(encoded))
            target.digests.know(writer.files)
            new = [limit - len(prompt) for limit, prompt in zip(limits, encoded, strict=True)]
            settings = {
                "target": target.digest(), "drafter": drafter_digest(drafter) if k else None,
                "prompts": prompts_digest(names, encoded), "draft_length": AUTO if engine.auto else int(k),
                "max_new_tokens": new[0] if len(set(new)) == 1 else combined({"each": new})[:16],
                **settings_of(sampling), "seed": int(seed), "ignore_stop": bool(ignore_stop),
            }  # fmt: skip
            writer.files = target.digests.records()
            writer.begin(
                settings, range(len(encoded)),
                lambda row, where: done.__setitem__(row["item"], decoded_in(row, where, k, target.config.vocab_size)),
            )  # fmt: skip
            if processes.count() > 1:
                done = {item: Decoded(*row) for item, row in json.loads(processes.share(json.dumps([*done.items()])))}
        left = [i for i in range(len(encoded)) if i not in done]
        resumed_tokens = new_tokens = sum(len(row.tokens) for row in done.values())

        begin = time.perf_counter()
        segments = serve(
            engine, [encoded[i] for i in left], [limits[i] for i in left], left,
            max_rounds=ROUNDS_PER_SEGMENT if progress or writer else None, time_prefill=time_prefill,
        )  # fmt: skip
        if progress and writer:
            progress(len(done), len(encoded), new_tokens)
        try:
            for finished, _ in segments:
                fresh = {left[place]: decoded(row, len(encoded[left[place]])) for place, row in finished.items()}
                done |= fresh
                new_tokens += sum(len(row.tokens) for row in fresh.values())
                if writer is not None:
                    records = [record_of(target, i, names[i], row, stops) for i, row in fresh.items()]
                    writer.save(records, {})
                if progress:
                    progress(len(done), len(encoded), new_tokens)
        except NotFiniteError as error:
            raise NotFiniteError(left[error.index], error.reason) from None
        seconds = time.perf_counter() - begin - engine.compile_seconds

    rows = [done[i] for i in range(len(encoded))]
    stats = statistics(engine, rows, seconds, resumed_tokens)
    tokens = [row.tokens for row in rows]
    texts = None if target.tokenizer is None else [answer_text(target, answer, stops) for answer in tokens]
    return DecodeResult(texts=texts, tokens=tokens, stats=stats)


def settings_of(sampling: Sampling) -> dict[str, Any]:
    """As an output keeps them: numbers, and how drafts are verified where that is not token by token."""
    values = dict(vars(sampling))
    verification = values.pop("verification")
    found = {name: None if value is None else float(value) for name, value in values.items()}
    return found if verification == "token" else found | {"verification": verification}


class Decoded(NamedTuple):
    """One finished answer; see `DecodeStats`."""

    tokens: list[int]
    rounds: int
    histogram: list[int]


def decoded(row: Row, prompt: int) -> Decoded:
    """The answer in a finished row whose prompt has so many tokens."""
    return Decoded(row["tokens"][prompt : row["length"]].tolist(), int(row["rounds"]), row["histogram"].tolist())


def statistics(engine: Engine, rows: Sequence[Decoded], seconds: float, resumed_tokens: int = 0) -> DecodeStats:
    """What the rows and the engine that made them say."""
    return DecodeStats(
        draft_length=engine.plan.k,
        rounds_at=dict(sorted(engine.rounds_at.items())) if engine.auto else None,
        new_tokens=[len(row.tokens) for row in rows],
        rounds=[row.rounds for row in rows],
        accepted_histogram=[row.histogram for row in rows],
        seconds=seconds,
        prefill_seconds=engine.prefill_seconds,
        compile_seconds=engine.compile_seconds,
        fetches=engine.fetches,
        resumed_tokens=resumed_tokens,
    )


def record_of(target: Target, item: int, name: str, row: Decoded, stop_ids: Sequence[int]) -> dict[str, Any]:
    """A line of an output."""
    return {
        "id": name,
        "item": item,
        "text": None if target.tokenizer is None else answer_text(target, row.tokens, stop_ids),
        "tokens": row.tokens,
        "new_tokens": len(row.tokens),
        "rounds": row.rounds,
        "accepted_histogram": row.histogram,
    }


def decoded_in(record: Mapping[str, Any], where: str, k: int, vocab_size: int) -> Decoded:
    """What a line of an output says; InputError if it is none."""
    tokens, rounds, histogram = (record.get(name, []) for name in ("tokens", "rounds", "accepted_histogram"))
    for numbers, most in ((tokens, vocab_size - 1), (histogram, 2**31), ([rounds], 2**31)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n <= most for n in numbers):
            raise InputError(f"{where}: is no answer of this run; write to another output")
    if not tokens or len(histogram) != k + 1:
        raise InputError(f"{where}: is no answer of this run; write to another output")
    return Decoded(tokens, rounds, histogram)


def names_of(ids: Sequence[str] | None, count: int) -> list[str]:
    """The names of so many prompts: those given, or numbers from 1."""
    names = [str(number) for number in range(1, count + 1)] if ids is None else list(ids)
    if len(names) != count:
        raise InputError(f"ids has {len(names)} entries for {count} prompts")
    if not all(isinstance(name, str) for name in names):
        raise InputError("ids must be texts, one per prompt")
    return names


def prompts_digest(names: Sequence[str], texts: Sequence[Sequence[int]]) -> str:
    """SHA-256 of names and token ids, hexadecimal."""
    found = hashlib.sha256(repr(list(names)).encode(errors="surrogatepass"))
    for text in texts:
        found.update(np.asarray([len(text), *text], np.int32).tobytes())
    return found.hexdigest()


def drafter_digest(drafter: Drafter | None) -> str | None:
    """SHA-256, hexadecimal, of a drafter's method and parameters; its name is not part of it."""
    if drafter is None:
        return None
    return combined({"method": drafter.method} | params_digests(drafter.params))


def answer_text(target: Target, tokens: Sequence[int], stop_ids: Sequence[int]) -> str:
    """The text of new tokens, without the stop token that may end them."""
    assert target.tokenizer is not None
    stopped = bool(tokens) and tokens[-1] in stop_ids
    return target.tokenizer.decode(tokens[:-1] if stopped else tokens)
