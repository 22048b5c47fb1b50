"""The target answers prompts, by plain decoding: the training set of its drafter, in a file that grows."""

import dataclasses
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deer_jax import processes
from deer_jax.config import Sampling
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.decoding.checks import check_count, check_models, check_run
from deer_jax.decoding.decode import ROUNDS_PER_SEGMENT, decoded, names_of, prompts_digest
from deer_jax.decoding.engine import Engine, serve
from deer_jax.decoding.output import Output
from deer_jax.decoding.programs import capacity_for
from deer_jax.decoding.prompts import encode_prompts, is_whole
from deer_jax.digests import Digests
from deer_jax.errors import InputError, NotFiniteError
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
    verify: bool = False,
    progress: Progress | None = None,
) -> AnswersReport:
    """Let the target answer prompts, and append each answer to a file as it is finished, one JSON object per line.

        {"id": "7", "item": 13, "prompt": [ids], "answer": [ids], "ended": true, "temperature": 0.0, "tokenizer": ...}

    Answer number `item` is sample item % samples of prompt item // samples, at temperatures[item % len(temperatures)].
    Random choices depend on the seed and the item alone, so the lines are the same, up to rounding and their order,
    whatever the batch and however often the run was stopped: the same call on the same output goes on where it was,
    with the answers that were under way. What it needs for that is in OUTPUT.state.json.

    Several processes, with a target on the devices of all of them, each write a shard of their own beside the output:
    item i of n processes is in that of process i % n, answers.shard-2.jsonl of answers.jsonl; process 0 writes the
    output itself. Another number of processes goes on from all of them.

    Args:
      prompts: as for `decode`; None continues from BOS alone, `samples` times. Empty prompts, and those that exceed the
        context with max_new_tokens, are skipped and counted.
      ids: names of the prompts in the file; by default their numbers from 1.
      temperatures: dealt out in turn, so a value given twice has twice the share. They are decoded one after another.
      samples: answers to each prompt.
      prefix: (least, most): continue the first n tokens of each prompt (BOS included), n drawn evenly from this range;
        all of a shorter one, without a stop token at its end.
      batch_size: slots that run at once.
      verify: read all files of the target, to see that they are what they were when the output was begun; otherwise
        those of the same size and time of change are taken to be.
      progress: called before the first segment and after each.

    Raises:
      InputError: anything wrong with the arguments, before any work is done; an output that was made with other
        settings, by something else, or that another process writes.
      RunError: logits that are not finite, a full disk, an output that was changed meanwhile; what is in the file
        stays.
    """
    check_models(target)
    temperatures = list(temperatures)
    samplings = [Sampling(temperature=value, top_k=top_k, top_p=top_p) for value in temperatures]
    if not samplings:
        raise InputError("temperatures is empty: give at least one, 0 is greedy")
    check_run(seed, batch_size)
    for name, value in (("max_new_tokens", max_new_tokens), ("samples", samples)):
        if not is_whole(value) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    if prefix is not None:
        _check_prefix(prefix, prompts)
    processes.same({"batch_size": batch_size, "verify": verify})
    with Output(output, sharded=True) as writer:
        work = _Work(
            target,
            [_opening(target)] if prompts is None else _texts(target, prompts, template_arguments, writer.begun),
            ids, samplings, max_new_tokens, samples, prefix, seed, batch_size,
        )  # fmt: skip
        if verify:
            target = dataclasses.replace(target, digests=Digests(verify=True))
        target.digests.know(writer.files)
        settings = work.settings(target)
        writer.files = target.digests.records()
        writer.begin(settings, work.starts)
        work.check_begun(writer)
        return work.run(writer, progress or (lambda *_: None))


class _Work:
    """The answers that a call is to make."""

    def __init__(
        self, target: Target, texts: list[list[int]], ids: Sequence[str] | None, samplings: list[Sampling],
        max_new_tokens: int, samples: int, prefix: Sequence[int] | None, seed: int, batch_size: int,
    ):  # fmt: skip
        check_count(len(texts), samples)
        self.target, self.texts, self.samplings, self.samples = target, texts, samplings, samples
        self.max_new_tokens, self.prefix, self.seed, self.batch_size = max_new_tokens, prefix, seed, batch_size
        self.names = names_of(ids, len(texts))
        tokenizer = target.tokenizer
        self.fingerprint = tokenizer.fingerprint if isinstance(tokenizer, Tokenizer) else None
        self.starts: dict[int, list[int]] = {}  # what each item continues
        self.empty = self.overlong = 0
        for item in range(len(texts) * samples):
            text = texts[item // samples]
            start = text if prefix is None else beginning(text, prefix, seed, item, target.stop_ids)
            if not start:
                self.empty += 1
            elif len(start) + max_new_tokens > target.config.context:
                self.overlong += 1
            else:
                self.starts[item] = start

    def settings(self, target: Target) -> dict[str, Any]:
        """What the answers depend on."""
        first = self.samplings[0]
        return {
            "target": target.digest(), "prompts": prompts_digest(self.names, self.texts),
            "max_new_tokens": int(self.max_new_tokens), "temperatures": [float(x.temperature) for x in self.samplings],
            "top_k": int(first.top_k), "top_p": float(first.top_p), "samples": int(self.samples),
            "prefix": None if self.prefix is None else list(map(int, self.prefix)), "seed": int(self.seed),
        }  # fmt: skip

    def check_begun(self, writer: Output) -> None:
        """InputError if what runs, as the state has it, cannot be the beginning of an answer."""
        for item, tokens in writer.running.items():
            ids = tokens and (max(tokens) >= self.target.config.vocab_size or set(tokens) & set(self.target.stop_ids))
            if ids or len(tokens) >= self.max_new_tokens:
                raise InputError(
                    f"{writer.state}: is not the state of this run, by item {item}; write to another output"
                )

    def record(self, item: int, tokens: list[int]) -> dict[str, Any]:
        """A line of the output."""
        found = {
            "id": self.names[item // self.samples], "item": item, "prompt": self.starts[item], "answer": tokens,
            "ended": tokens[-1] in self.target.stop_ids,
            "temperature": float(self.samplings[item % len(self.samplings)].temperature),
        }  # fmt: skip
        return found if self.fingerprint is None else found | {"tokenizer": self.fingerprint}

    def run(self, writer: Output, progress: Progress) -> AnswersReport:
        """Make the answers that the file lacks."""
        target, starts, samplings = self.target, self.starts, self.samplings
        resumed = len(writer.items)
        begin, compiled = time.perf_counter(), 0.0
        written = ended = new_tokens = 0
        progress(resumed, len(starts), 0.0)
        for sampling in dict.fromkeys(samplings):
            mine = [item for item in starts if samplings[item % len(samplings)] == sampling]
            left = sorted(set(mine) - writer.items, key=lambda item: (item not in writer.running, item))
            if not left:
                continue
            begun = {item: writer.running[item] for item in left if item in writer.running}
            # Shapes depend on all items, not on those left, so that a run that goes on computes what it would have.
            limits = {item: len(starts[item]) + self.max_new_tokens for item in mine}
            slots, capacity = min(self.batch_size, len(mine)), capacity_for(list(limits.values()), 0)
            engine = Engine(target, None, 0, sampling, self.seed, target.stop_ids, slots, capacity)
            segments = serve(
                engine,
                [starts[item] + begun[item] if item in begun else starts[item] for item in left],
                [limits[item] for item in left],
                indices=left,
                rounds=[len(begun.get(item, ())) for item in left],
                max_rounds=ROUNDS_PER_SEGMENT,
            )
            try:
                for segment in segments:
                    finished, running = (
                        {left[i]: decoded(row, len(starts[left[i]])).tokens for i, row in part.items()}
                        for part in segment
                    )
                    before = {item: len(writer.running.get(item, ())) for item in (*finished, *running)}
                    made = [*finished.items(), *running.items()]
                    new_tokens += sum(len(tokens) - before[item] for item, tokens in made)
                    records = [self.record(item, tokens) for item, tokens in finished.items()]
                    writer.save(records, running)
                    written += len(records)
                    ended += sum(record["ended"] for record in records)
                    seconds = time.perf_counter() - begin - compiled - engine.compile_seconds
                    progress(resumed + written, len(starts), new_tokens / seconds)
            except NotFiniteError as error:
                raise NotFiniteError(left[error.index] // self.samples, error.reason) from None
            compiled += engine.compile_seconds
            del engine, segments  # its cache makes room for the next one's
        return AnswersReport(
            written=written, ended=ended, new_tokens=new_tokens, resumed=resumed, skipped_overlong=self.overlong,
            skipped_empty=self.empty, seconds=time.perf_counter() - begin - compiled,
        )  # fmt: skip


def beginning(text: list[int], prefix: Sequence[int], seed: int, item: int, stop_ids: Sequence[int]) -> list[int]:
    """The first n tokens of a text, n drawn evenly from the range `prefix` by (seed, item); see `answers`."""
    length = int(np.random.default_rng((seed, item)).integers(prefix[0], prefix[1], endpoint=True))
    ended = len(text) <= length and text[-1:] and text[-1] in stop_ids
    return text[:-1] if ended else text[:length]


def _check_prefix(prefix: Sequence[int], prompts: Any) -> None:
    whole = all(is_whole(length) for length in prefix)
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


def _texts(
    target: Target, prompts: Any, template_arguments: Mapping[str, Any] | None, now: datetime.datetime
) -> list[list[int]]:
    """Token ids of each prompt, none for an empty one."""
    if not isinstance(prompts, list | tuple) or not prompts:
        return encode_prompts(target, prompts, template_arguments, now)
    empty = [isinstance(prompt, Sequence | np.ndarray) and len(prompt) == 0 for prompt in prompts]
    filled = [[0] if nothing else prompt for prompt, nothing in zip(prompts, empty, strict=True)]
    encoded = encode_prompts(target, filled, template_arguments, now)
    return [[] if empty[i] else tokens for i, tokens in enumerate(encoded)]
