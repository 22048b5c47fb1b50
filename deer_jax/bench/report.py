"""What a bench measured: the numbers by their definitions, as JSON and as a table."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from rich import box
from rich.table import Table

from deer_jax.config import check_choice
from deer_jax.decoding.acceptance import acceptance_by_depth, acceptance_interval, repeated_windows
from deer_jax.decoding.agreement import Agreement
from deer_jax.decoding.state import DecodeResult, acceptance_length

PLAIN = "plain"
NOISE = 0.2  # by which repeats of one method may differ before a line says so


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodReport:
    """One method, over all prompts and repeats.

    Attributes:
      drafter: its name in the report; None is plain decoding.
      draft_length: k, the largest where it was chosen; 0 is plain decoding.
      rounds_at: rounds by the number of drafts that were verified, where it was chosen; None where it was given.
      acceptance_length: tokens committed over rounds, each summed before dividing.
      ci95: 95 % bootstrap interval of it over prompts; None for a single prompt.
      round_cost: decode seconds per round over plain decoding's per step, prefill excluded: what a round costs in plain
        steps. Decoding is faster than plain where acceptance_length, as far as no limit cuts the answers, is above it.
        Rounds are those of the rows, so where batch_size rows run at once, both are shares of what the batch takes.
      tokens_per_second: new tokens over wall clock, prefill included, compilation excluded.
      decode_tokens_per_second: the same without prefill.
      speedup: tokens_per_second over plain decoding's.
      speedup_range: the least and the most of it among the repeats, each beside plain decoding's of the same turn.
      speed_range: of tokens_per_second, among the repeats.
      exact_match: share of prompts whose tokens equal plain decoding's; None when sampling.
      rows_differing: how many prompts differ; None when sampling.
      near_ties: how many of these depart where the target's best logits are closer than rounding; None when sampling.
      accepted_histogram: [k+1] rounds that accepted i drafts.
      acceptance_by_depth: [k] share of accepted i-th drafts among rounds that accepted all before it; None where no
        round got there. A round that a stop token ends counts as rejecting what follows it.
      repeated_8grams: share of 8-token windows that occurred before in the same answer; None if all are shorter.
      seconds, prefill_seconds, new_tokens, rounds: totals.
      compile_seconds: spent before measuring; in no other number.
    """

    drafter: str | None
    draft_length: int
    temperature: float
    batch_size: int
    acceptance_length: float
    ci95: tuple[float, float] | None
    round_cost: float
    tokens_per_second: float
    decode_tokens_per_second: float
    speedup: float
    speedup_range: tuple[float, float]
    speed_range: tuple[float, float]
    exact_match: float | None
    rows_differing: int | None
    near_ties: int | None
    accepted_histogram: list[int]
    acceptance_by_depth: list[float | None]
    repeated_8grams: float | None
    seconds: float
    prefill_seconds: float
    compile_seconds: float
    new_tokens: int
    rounds: int
    rounds_at: dict[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Several methods on the same prompts in one run.

    Attributes:
      methods: by name, plain decoding first.
      machine: platform, device kind, devices, cores, jax version.
      settings: the other arguments of the run.
    """

    methods: dict[str, MethodReport]
    machine: dict[str, Any]
    date: str
    command: str
    target: str
    prompts: int
    repeats: int
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return dataclasses.asdict(self)

    def table(self) -> Table:
        """The report as `deer-jax bench` prints it; a notebook shows it too."""
        return table(self)

    def picture(self, name: Literal["histogram", "depth", "speed"] = "speed") -> Any:
        """One of the pictures of `bench --plot`, a matplotlib Figure: accepted tokens, acceptance by position, or speed
        and cost of a round against the draft length. InputError for a report of plain decoding alone."""
        from deer_jax.bench import plots  # only here: matplotlib looks for fonts and a folder of its own

        check_choice("name", name, plots.PICTURES)
        return plots.PICTURES[name](self)


def measure(
    repeats: Sequence[DecodeResult],
    plain: Sequence[DecodeResult],
    drafter: str | None,
    temperature: float,
    batch_size: int,
    compile_seconds: float,
    agreements: Sequence[Agreement] | None,
) -> MethodReport:
    """The numbers of one method from its repeats and plain decoding's, which took turns with them.

    agreements: each repeat's answers compared with plain decoding's; None when sampling.
    """
    histograms = np.sum([result.stats.accepted_histogram for result in repeats], axis=0)  # [prompts, k+1]
    total = histograms.sum(axis=0)
    exact, differing, near_ties = None, None, None
    if agreements is not None:
        departures = [departure for agreement in agreements for departure in agreement.departures]
        rows = {departure.row for departure in departures}  # in any repeat
        differing, exact = len(rows), 1 - len(rows) / agreements[0].rows
        near_ties = differing - len({departure.row for departure in departures if not departure.near_tie})
    speed, speeds = _speed(repeats), [_speed([each]) for each in repeats]
    speedups = [each / _speed([other]) for each, other in zip(speeds, plain, strict=True)]
    return MethodReport(
        drafter=drafter,
        draft_length=repeats[0].stats.draft_length,
        rounds_at=_rounds_at(repeats),
        temperature=temperature,
        batch_size=batch_size,
        acceptance_length=acceptance_length(histograms.tolist()),
        ci95=acceptance_interval(histograms),
        round_cost=_round_seconds(repeats) / _round_seconds(plain),
        tokens_per_second=speed,
        decode_tokens_per_second=_speed(repeats, prefill=False),
        speedup=speed / _speed(plain),
        speedup_range=(min(speedups), max(speedups)),
        speed_range=(min(speeds), max(speeds)),
        exact_match=exact,
        rows_differing=differing,
        near_ties=near_ties,
        accepted_histogram=total.tolist(),
        acceptance_by_depth=acceptance_by_depth(total),
        repeated_8grams=repeated_windows([answer for result in repeats for answer in result.tokens]),
        seconds=sum(result.stats.seconds for result in repeats),
        prefill_seconds=sum(result.stats.prefill_seconds or 0.0 for result in repeats),
        compile_seconds=compile_seconds,
        new_tokens=sum(sum(result.stats.new_tokens) for result in repeats),
        rounds=sum(sum(result.stats.rounds) for result in repeats),
    )


def _rounds_at(repeats: Sequence[DecodeResult]) -> dict[int, int] | None:
    found = [result.stats.rounds_at for result in repeats if result.stats.rounds_at is not None]
    return {k: sum(each.get(k, 0) for each in found) for k in sorted(set().union(*found))} if found else None


def _speed(repeats: Sequence[DecodeResult], prefill: bool = True) -> float:
    tokens = sum(sum(result.stats.new_tokens) for result in repeats)
    return tokens / (sum(result.stats.seconds for result in repeats) if prefill else _decode_seconds(repeats))


def _round_seconds(repeats: Sequence[DecodeResult]) -> float:
    return _decode_seconds(repeats) / sum(sum(result.stats.rounds) for result in repeats)


def _decode_seconds(repeats: Sequence[DecodeResult]) -> float:
    return sum(result.stats.seconds - (result.stats.prefill_seconds or 0.0) for result in repeats)


def table(report: BenchReport) -> Table:
    """The report for a terminal."""
    title = "\n".join([*measured_on(report), *remarks(report)])
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 0)}
    result = Table(caption=title, caption_justify="left", **style)
    result.add_column("method")
    heads = (
        "τ [95 %]", "round/\nstep", "tokens\nper s", "decode\nper s", "speed-\nup", "least..\nmost", "exact\nmatch",
        "repeat\n8-gram",
    )  # fmt: skip
    for head in heads:
        result.add_column(head, justify="right", no_wrap=True)
    for name, method in report.methods.items():
        interval = "" if method.ci95 is None else f" [{method.ci95[0]:.2f}, {method.ci95[1]:.2f}]"
        result.add_row(
            name,
            f"{method.acceptance_length:.2f}{interval}",
            f"{method.round_cost:.2f}",
            _rate(method.tokens_per_second),
            _rate(method.decode_tokens_per_second),
            f"{method.speedup:.2f}x",
            "{:.2f}..{:.2f}".format(*method.speedup_range),
            _percent(method.exact_match),
            _percent(method.repeated_8grams),
        )
    return result


def measured_on(report: BenchReport) -> list[str]:
    """What a report's numbers were measured on, in two lines."""
    method, machine = next(iter(report.methods.values())), report.machine
    decoding = f"T={method.temperature:g}, {report.settings['dtype']}, batch {method.batch_size}"
    hardware = f"{machine['devices']} x {machine['device_kind']}, {machine['cores']} cores, jax {machine['jax']}"
    return [
        f"target {report.target}, {report.prompts} prompts x {report.repeats} repeats, {decoding}",
        f"{hardware}, {report.date}",
    ]


def remarks(report: BenchReport) -> list[str]:
    """What a reader of a report has to know beside its numbers, a line each."""
    lines = []
    for name, method in report.methods.items():
        if method.rows_differing:
            lines.append(f"{name}: {method.near_ties} of {method.rows_differing} departures are near-ties")
    for name, method in report.methods.items():
        least, most = method.speed_range
        if most > (1 + NOISE) * least:
            lines.append(
                f"{name}: its repeats differ by {most / least - 1:.0%}, {_rate(least)} to {_rate(most)} tokens/s; "
                "measure again on a quiet machine"
            )
    return lines


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return "100 %" if share == 1 else f"{100 * share:.1f} %"
