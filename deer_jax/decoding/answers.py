"""The target answers prompts, by plain decoding: the training set of its drafter, in a file that grows."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deer_jax.config import Sampling
from deer_jax.data.answers import AnswerWriter
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.decoding.engine import ROUNDS_PER_SEGMENT, Engine, capacity_for, check_run, serve
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.errors import InputError
from deer_jax.models.target import Target

Progress = Callable[[int, int, float], None]  # finished answers, all of them, tokens per second of this run


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersReport:
    """What a call of `answers` did.

    Attributes:
      written: answers that it added to the file.
      ended: how many of these end with a stop token; the others were cut at max_new_tokens.
      new_tokens: that it made, stop tokens included.
      resumed: answers that the file had before.
      skipped_overlong: answers not made because prompt and max_new_tokens exceed the context.
      skipped_empty: answers not made because the prompt is empty.
      seconds: wall clock of decoding and writing, compilation excluded.
    """

    written: int
    ended: int
    new_tokens: int
    resumed: int
    skipped_overlong: int
    skipped_empty: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0


def answers(
    target: Target,
    prompts: Any,
    output: str | Path,
    *,
    ids: Sequence[str] | None = None,
    max_new_tokens: int = 512,
    temperatures: Sequence[float] = (0.0,),
    top_k: int = 0,
    top_p: float = 1.0,
    samples: int = 1,
    prefix: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    template_arguments: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> AnswersReport:
    """Let the target answer prompts, and append each answer to a file as it is finished, one JSON object per line.

        {"id": "7", "item": 13, "prompt": [ids], "answer": [ids], "ended": true, "temperature": 0.0, "tokenizer": ...}

    Answer number `item` is sample item % samples of prompt item // samples, at temperatures[item % len(temperatures)].
    Random choices depend on the seed and the item alone, so the lines are the same, up to rounding and their order,
    whatever the batch and however often the run was stopped: the same call on the same output goes on where it was,
    with the answers that were under way. What it needs for that is in OUTPUT.state.json.

    Args:
      prompts: as for `decode`; None continues from BOS alone, `samples` times. Empty prompts, and those that exceed the
        context with max_new_tokens, are skipped and counted.
      ids: names of the prompts in the file; by default their numbers from 1.
      temperatures: dealt out in turn, so a value given twice has twice the share. They are decoded one after another.
      samples: answers to each prompt.
      prefix: (least, most): continue the first n tokens of each prompt (BOS included), n drawn evenly from this range;
        all of a shorter one, without a stop token at its end.
      batch_size: slots that run at once.
      progress: called before the first segment and after each.

    Raises:
      InputError: anything wrong with the arguments, before any work is done; an output that was made with other
        settings, or by something else; a full disk.
    """
    temperatures = list(temperatures)
    samplings = [Sampling(temperature=value, top_k=top_k, top_p=top_p) for value in temperatures]
    if not samplings:
        raise InputError("temperatures is empty: give at least one, 0 is greedy")
    check_run(seed, batch_size)
    for name, value in (("max_new_tokens", max_new_tokens), ("samples", samples)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    if prefix is not None:
        _check_prefix(prefix, prompts)
    texts = [_opening(target)] if prompts is None else _texts(target, prompts, template_arguments)
    names = [str(number) for number in range(1, len(texts) + 1)] if ids is None else list(ids)
    if len(names) != len(texts):
        raise InputError(f"ids has {len(names)} entries for {len(texts)} prompts")

    starts: dict[int, list[int]] = {}  # what each item continues
    empty = overlong = 0
    for item in range(len(texts) * samples):
        text = texts[item // samples]
        start = text if prefix is None else beginning(text, prefix, seed, item, target.stop_ids)
        if not start:
            empty += 1
        elif len(start) + max_new_tokens > target.config.context:
            overlong += 1
        else:
            starts[item] = start

    fingerprint = target.tokenizer.fingerprint if isinstance(target.tokenizer, Tokenizer) else None
    settings = {
        "target": target_digest(target), "tokenizer": fingerprint, "prompts": prompts_digest(names, texts),
        "max_new_tokens": int(max_new_tokens), "temperatures": list(map(float, temperatures)), "top_k": int(top_k),
        "top_p": float(top_p), "samples": int(samples), "prefix": None if prefix is None else list(map(int, prefix)),
        "seed": int(seed),
    }  # fmt: skip
    writer = AnswerWriter(output, settings)
    resumed = len(writer.items)

    def record(item: int, tokens: list[int]) -> dict[str, Any]:
        found = {
            "id": names[item // samples], "item": item, "prompt": starts[item], "answer": tokens,
            "ended": tokens[-1] in target.stop_ids, "temperature": float(temperatures[item % len(temperatures)]),
        }  # fmt: skip
        return found if fingerprint is None else found | {"tokenizer": fingerprint}

    begin, compiled = time.perf_counter(), 0.0
    written = ended = new_tokens = 0
    if progress:
        progress(resumed, len(starts), 0.0)
    for sampling in dict.fromkeys(samplings):
        mine = [item for item in starts if samplings[item % len(samplings)] == sampling]
        left = sorted(set(mine) - writer.items, key=lambda item: (item not in writer.running, item))
        if not left:
            continue
        begun = {item: writer.running[item] for item in left if item in writer.running}
        # Shapes depend on all items, not on those left, so that a run that goes on computes what it would have.
        limits = {item: len(starts[item]) + max_new_tokens for item in mine}
        capacity = capacity_for([starts[item] for item in mine], list(limits.values()), 0)
        engine = Engine(target, None, 0, sampling, seed, target.stop_ids, min(batch_size, len(mine)), capacity)
        for segment in serve(
            engine,
            [starts[item] + begun[item] if item in begun else starts[item] for item in left],
            [limits[item] for item in left],
            indices=left,
            rounds=[len(begun.get(item, ())) for item in left],
            max_rounds=ROUNDS_PER_SEGMENT,
        ):
            finished, running = (
                {left[i]: row["tokens"][len(starts[left[i]]) : row["length"]].tolist() for i, row in rows.items()}
                for rows in segment
            )
            before = {item: len(writer.running.get(item, ())) for item in (*finished, *running)}
            new_tokens += sum(len(tokens) - before[item] for item, tokens in (*finished.items(), *running.items()))
            records = [record(item, tokens) for item, tokens in finished.items()]
            writer.save(records, running)
            written += len(records)
            ended += sum(made["ended"] for made in records)
            if progress:
                seconds = time.perf_counter() - begin - compiled - engine.compile_seconds
                progress(resumed + written, len(starts), new_tokens / seconds)
        compiled += engine.compile_seconds
        del engine  # its cache makes room for the next one's
    return AnswersReport(
        written=written, ended=ended, new_tokens=new_tokens, resumed=resumed, skipped_overlong=overlong,
        skipped_empty=empty, seconds=time.perf_counter() - begin - compiled,
    )  # fmt: skip


def beginning(text: list[int], prefix: Sequence[int], seed: int, item: int, stop_ids: Sequence[int]) -> list[int]:
    """The first n tokens of a text, n drawn evenly from the range `prefix` by (seed, item); see `answers`."""
    length = int(np.random.default_rng((seed, item)).integers(prefix[0], prefix[1], endpoint=True))
    ended = len(text) <= length and text[-1:] and text[-1] in stop_ids
    return text[:-1] if ended else text[:length]


def prompts_digest(names: Sequence[str], texts: Sequence[Sequence[int]]) -> str:
    """Of names and token ids."""
    found = hashlib.sha256(repr(names).encode())
    for text in texts:
        found.update(np.asarray([len(text), *text], np.int32).tobytes())
    return found.hexdigest()[:12]


def target_digest(target: Target) -> str:
    """The target's name, dtype, and a digest of its configuration, stop ids and a few of its weights."""
    few = jax.device_get((target.params["norm"], target.params["embed"][:16]))
    found = hashlib.sha256(repr((target.config, target.stop_ids)).encode())
    for weights in few:
        found.update(np.asarray(weights, np.float32).tobytes())
    return f"{Path(target.name).name} {few[1].dtype} {found.hexdigest()[:12]}"


def _check_prefix(prefix: Sequence[int], prompts: Any) -> None:
    whole = all(isinstance(length, int | np.integer) for length in prefix)
    if len(prefix) != 2 or not whole or not 1 <= prefix[0] <= prefix[1]:
        given = ",".join(map(str, prefix))
        raise InputError(f"prefix must be two whole numbers, MIN,MAX with 1 <= MIN <= MAX, got {given}")
    if prompts is None:
        raise InputError("prefix cuts prompts, and there are none when continuing from BOS: give prompts or no prefix")


def _opening(target: Target) -> list[int]:
    """BOS, or whatever else the tokenizer puts before every text."""
    if target.tokenizer is None:
        raise InputError(f"{target.name} has no tokenizer, so its BOS is not known: give prompts of token ids")
    found = target.tokenizer.encode("")
    if not found:
        raise InputError(f"the tokenizer of {target.name} puts no BOS before a text: give prompts")
    return encode_prompts(target, [found])[0]  # refuses ids that the model does not have


def _texts(target: Target, prompts: Any, template_arguments: Mapping[str, Any] | None) -> list[list[int]]:
    """Token ids of each prompt, none for an empty one."""
    if not isinstance(prompts, list | tuple) or not prompts:
        return encode_prompts(target, prompts, template_arguments)
    empty = [isinstance(prompt, Sequence | np.ndarray) and len(prompt) == 0 for prompt in prompts]
    filled = [[0] if nothing else prompt for prompt, nothing in zip(prompts, empty, strict=True)]
    encoded = encode_prompts(target, filled, template_arguments)
    return [[] if empty[i] else tokens for i, tokens in enumerate(encoded)]
