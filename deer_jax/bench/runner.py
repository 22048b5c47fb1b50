"""Several ways to decode the same prompts, measured side by side in one run."""

import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from deer_jax.bench.report import PLAIN, BenchReport, measure
from deer_jax.config import Verification
from deer_jax.decoding.agreement import Agreement, compare_greedy
from deer_jax.decoding.auto import AUTO
from deer_jax.decoding.checks import check_models
from deer_jax.decoding.decode import decode
from deer_jax.decoding.prompts import encode_prompts, is_whole
from deer_jax.decoding.state import DecodeResult
from deer_jax.drafters.drafter import Drafter
from deer_jax.errors import InputError, NotFiniteError
from deer_jax.models.target import Target

Progress = Callable[[int, int, str], None]  # finished runs, all runs, the method that runs next


class Way(NamedTuple):
    """One method: a drafter and how many tokens it drafts per round."""

    name: str | None  # the drafter's
    drafter: Drafter | None
    k: int | Literal["auto"]


def bench(
    target: Target,
    prompts: Any,
    *,
    drafters: Mapping[str, Drafter],
    draft_lengths: Sequence[int | Literal["auto"]] | None = None,
    max_new_tokens: int | Sequence[int] = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    draft_temperature: float | None = None,
    verification: Verification = "token",
    batch_size: int = 1,
    repeats: int = 3,
    seed: int = 0,
    ignore_stop: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> BenchReport:
    """Plain decoding and every drafter at every draft length, on the same prompts.

    Each method runs once to compile, then `repeats` times more, the methods taking turns so that a machine that speeds
    up or slows down does so for all of them. Numbers are totals over the repeats; when sampling, each repeat has a seed
    of its own.

    Args:
      prompts: as for `decode`.
      drafters: by the name they have in the report; their methods are called "NAME k=8".
      draft_lengths: k to try with every drafter; None is what each was trained for. "auto": see `decode`.
      progress: called before each run.
      command: what to record as the command that made the report.

    Returns:
      the report; its `table()`, and `picture("speed")`, "histogram" or "depth", show it.

    Raises:
      InputError: anything wrong with the arguments.
      NotFiniteError: logits that are not finite, whose and in which method.
    """
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, got {repeats}")
    if not isinstance(drafters, Mapping):
        raise InputError(
            f'drafters must be loaded ones by their names, as in {{"mine": drafter}}, got a {type(drafters).__name__}'
        )
    for drafter in (None, *drafters.values()):
        check_models(target, drafter)
    ways = _ways(drafters, draft_lengths)
    encoded = encode_prompts(target, prompts, template_arguments)
    total = len(ways) * (1 + repeats)
    finished = 0

    def run(name: str, seed: int) -> DecodeResult:
        nonlocal finished
        if progress:
            progress(finished, total, name)
        way = ways[name]
        try:
            result = decode(
                target, encoded, drafter=way.drafter, draft_length=way.k, max_new_tokens=max_new_tokens,
                temperature=temperature, top_k=top_k, top_p=top_p, draft_temperature=draft_temperature,
                verification=verification, seed=seed, batch_size=batch_size, ignore_stop=ignore_stop, time_prefill=True,
            )  # fmt: skip
        except NotFiniteError as error:
            raise NotFiniteError(error.index, f"{name}: {error.reason}") from None
        finished += 1
        return result

    names = list(ways)
    compile_seconds = {name: run(name, seed).stats.compile_seconds for name in names}
    repeated: dict[str, list[DecodeResult]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            repeated[name].append(run(name, seed + repeat))
    agreements: dict[str, list[Agreement] | None] = dict.fromkeys(names)
    if temperature == 0:
        for name in names:
            if progress and name != PLAIN:
                progress(finished, total, f"comparing {name}")
            agreements[name] = _agreements(
                target, encoded, repeated[PLAIN], repeated[name], repeated[name][0].stats.draft_length, batch_size
            )
    if progress:
        progress(finished, total, "")

    return BenchReport(
        methods={
            name: measure(
                repeated[name],
                repeated[PLAIN],
                drafter=ways[name].name,
                temperature=temperature,
                batch_size=batch_size,
                compile_seconds=compile_seconds[name],
                agreements=agreements[name],
            )
            for name in names
        },
        machine=machine(target),
        date=datetime.date.today().isoformat(),
        command=command,
        target=target.name,
        prompts=len(encoded),
        repeats=repeats,
        settings={
            "dtype": str(target.dtype),
            "max_new_tokens": max_new_tokens,
            "top_k": top_k,
            "top_p": top_p,
            "draft_temperature": draft_temperature,
            "verification": verification,
            "seed": seed,
            "ignore_stop": ignore_stop,
        },
    )


def _agreements(
    target: Target, prompts: list[list[int]], plain: list[DecodeResult], ours: list[DecodeResult], k: int, slots: int
) -> list[Agreement]:
    """Each repeat compared with plain decoding's; one that says what the one before said is not looked at again."""
    found: list[Agreement] = []
    for i, (one, other) in enumerate(zip(plain, ours, strict=True)):
        if i and one.tokens == plain[i - 1].tokens and other.tokens == ours[i - 1].tokens:
            found.append(found[-1])
        else:
            batch = min(slots, len(prompts))
            found.append(compare_greedy(target, prompts, one.tokens, other.tokens, k=k, batch=batch))
    return found


def _ways(drafters: Mapping[str, Drafter], draft_lengths: Sequence[int | Literal["auto"]] | None) -> dict[str, Way]:
    if isinstance(draft_lengths, int):
        raise InputError(f"draft_lengths must be a list, as in [{draft_lengths}], got {draft_lengths}")
    numbers = [k for k in draft_lengths or () if k != AUTO]
    if draft_lengths is not None and (not draft_lengths or not all(is_whole(k) and k >= 1 for k in numbers)):
        raise InputError(f"draft_lengths must be 1 or more each, got {list(draft_lengths)}; plain decoding always runs")
    ways = {PLAIN: Way(None, None, 0)}
    for name, drafter in drafters.items():
        for k in draft_lengths or [drafter.draft_length]:
            ways[f"{name} {k}" if k == AUTO else f"{name} k={k}"] = Way(name, drafter, k)
    return ways


def machine(target: Target) -> dict[str, Any]:
    """What the numbers were measured on."""
    device = target.devices[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": len(target.devices),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
    }
