"""Real acceptance while a drafter learns: held-out prompts, decoded as users decode them."""

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deer_jax.data.answers import AnswerFiles
from deer_jax.data.sources import placed, read_prompts, template_arguments
from deer_jax.decoding.acceptance import acceptance_by_depth, acceptance_interval, repeated_windows
from deer_jax.decoding.decode import decode
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.drafters.drafter import Drafter
from deer_jax.errors import NotFiniteError, PromptError, RunError
from deer_jax.models.target import Target
from deer_jax.training.recipe import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceptance:
    """How a drafter fares at one draft length and temperature; the fields are those of `bench.report.MethodReport`."""

    draft_length: int
    temperature: float
    acceptance_length: float
    ci95: tuple[float, float] | None
    acceptance_by_depth: list[float | None]
    accepted_histogram: list[int]
    repeated_8grams: float | None
    prompts: int
    new_tokens: int
    seconds: float

    @property
    def interval(self) -> str:
        """The interval behind a space, as in ` [1.92, 2.31]`; nothing where there is none."""
        return "" if self.ci95 is None else f" [{self.ci95[0]:.2f}, {self.ci95[1]:.2f}]"

    @property
    def name(self) -> str:
        return f"k{self.draft_length}_T{self.temperature:g}"


def read_held_out(target: Target, evaluation: Evaluation, now: datetime.datetime | None = None) -> list[list[int]]:
    """The evaluation's prompts as token ids, all of them. now: for chat templates that write a date; None is now."""
    found = read_prompts(evaluation.prompts, field=evaluation.field, chat=evaluation.chat)
    arguments = template_arguments(evaluation.template, "evaluation: template")
    with placed(found):
        encoded = encode_prompts(target, [prompt.content for prompt in found], arguments, now)
        for number, prompt in enumerate(encoded):
            if len(prompt) + evaluation.max_new_tokens > target.config.context:
                raise PromptError(
                    number,
                    f"{len(prompt)} tokens and {evaluation.max_new_tokens} new ones exceed the context of "
                    f"{target.config.context}; lower evaluation.max_new_tokens or remove the prompt",
                )
    return encoded


@dataclasses.dataclass(frozen=True)
class Survey:
    """What reading every training row once has shown.

    Attributes:
      met: which prompts occur in a row, token by token, at its start or inside.
      cut: how many rows are longer than there is room, of those whose answer has some.
      overlong: numbers of the rows whose prompt leaves no room for an answer.
      counts: int64 [V] how often each id occurs in the answers.
      first: int64 [V] number of the first row whose text has each id, as far as there is room; -1: none has.
    """

    met: list[bool]
    cut: int
    overlong: list[int]
    counts: np.ndarray
    first: np.ndarray


def survey(records: AnswerFiles, prompts: Sequence[Sequence[int]], room: int) -> Survey:
    """Read every row: InputError at the first that is no answer of the target. room: tokens of prompt and answer."""
    needles = [np.asarray(prompt, np.int32).tobytes() for prompt in prompts]
    met, cut, overlong = [False] * len(prompts), 0, []
    counts, first = np.zeros(records.vocab_size, np.int64), np.full(records.vocab_size, -1)
    for number in range(len(records)):
        record = records[number]
        prompt, text = len(record["prompt"]), np.asarray(record["prompt"] + record["answer"], np.int32)
        np.add.at(counts, text[prompt:], 1)
        if prompt >= room:
            overlong.append(number)
            continue
        cut += len(text) > room
        read = text[:room]
        first[read[first[read] < 0]] = number
        row = text.tobytes()
        for i, needle in enumerate(needles):
            if not met[i]:
                met[i] = _at_token(row, needle)
    return Survey(met, cut, overlong, counts, first)


def _at_token(row: bytes, needle: bytes) -> bool:
    """Whether the bytes of some tokens occur in those of a row, beginning at a token (4 bytes each)."""
    place = row.find(needle)
    while place % 4 and place >= 0:
        place = row.find(needle, place + 1)
    return place >= 0


def measure(
    target: Target,
    drafter: Drafter,
    prompts: list[list[int]],
    evaluation: Evaluation,
    seed: int,
    progress: Callable[[str], Any],
) -> list[Acceptance]:
    """Acceptance at every draft length and temperature of the evaluation, in this order. RunError for logits that are
    not finite, with the prompt's number from 1."""
    result = []
    for k in evaluation.draft_lengths or (drafter.draft_length,):
        for temperature in evaluation.temperatures:
            note = f"evaluating k = {k}, T = {temperature:g}"
            try:
                found = decode(
                    target, prompts, drafter=drafter, draft_length=k, max_new_tokens=evaluation.max_new_tokens,
                    temperature=temperature, seed=seed, batch_size=evaluation.batch_size,
                    progress=lambda done, total, _, note=note: progress(f"{note}: {done} of {total}"),
                )  # fmt: skip
            except NotFiniteError as error:
                raise RunError(f"{note}: held-out prompt {error.index + 1}: {error.reason}") from None
            histograms = np.asarray(found.stats.accepted_histogram)
            result.append(
                Acceptance(
                    draft_length=k,
                    temperature=temperature,
                    acceptance_length=found.stats.acceptance_length,
                    ci95=acceptance_interval(histograms),
                    acceptance_by_depth=acceptance_by_depth(histograms.sum(axis=0)),
                    accepted_histogram=histograms.sum(axis=0).tolist(),
                    repeated_8grams=repeated_windows(found.tokens),
                    prompts=len(prompts),
                    new_tokens=sum(found.stats.new_tokens),
                    seconds=found.stats.seconds,
                )
            )
    return result
