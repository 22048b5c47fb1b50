"""Pictures of a bench and of training runs: what a round accepts, what it costs, and how a drafter learned.

Every function returns a Figure and touches nothing global; a notebook shows it after `%matplotlib inline`. Drafters and
methods differ by colour (Okabe and Ito's, which the colour-blind tell apart), marker and line style, so that a grey
print can be read too.
"""

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from deer_jax.bench.curves import Curve
from deer_jax.bench.report import BenchReport, MethodReport, measured_on, remarks
from deer_jax.errors import InputError
from deer_jax.files import disk_error
from deer_jax.stores import check_file, is_store, place
from deer_jax.stores import write as write_file

DPI = 150
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
GAIN: dict[str, Any] = {"facecolor": "#009E73", "alpha": 0.25, "linewidth": 0}
LOSS: dict[str, Any] = {"facecolor": "none", "edgecolor": "#D55E00", "alpha": 0.55, "linewidth": 0, "hatch": "////"}
COST: dict[str, Any] = {"color": "black", "marker": "x", "markersize": 6, "linewidth": 1.3}
HOLLOW: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "white"}
ONE: dict[str, Any] = {"color": "0.45", "linewidth": 1}
SMALL, MEDIUM, LARGE = 7, 9, 12  # points
COLUMNS, PANEL = 3, (3.3, 2.6)  # panels per row; inches of one, without its title
LEAST_WIDTH, GAP = 6.6, 0.12  # inches, of a picture and between what stands above and below the panels
LONGEST = 40  # letters of a name on one line
FEW = 30  # rounds per repeat: a share of fewer is drawn hollow


class Style(NamedTuple):
    """How one line looks. No two of the first 35 are alike in grey, of the first 210 in colour."""

    color: str
    marker: str
    linestyle: Any

    @classmethod
    def number(cls, i: int) -> "Style":
        return cls(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])

    def line(self) -> dict[str, Any]:
        return {**self._asdict(), "linewidth": 1.5, "markersize": 5}


def histogram(report: BenchReport) -> Figure:
    """A panel per drafted method: share of its rounds by how many draft tokens they accepted, 0..k, and the mean."""
    methods = _drafted(report)
    figure, panels = _figure(len(methods))
    top = max(max(method.accepted_histogram) / method.rounds for method in methods.values())
    for i, (axes, (name, method)) in enumerate(zip(panels, methods.items(), strict=True)):
        share = np.asarray(method.accepted_histogram) / method.rounds
        color = Style.number(i).color
        axes.bar(range(len(share)), share, color=color, edgecolor="black", linewidth=0.5)
        axes.axvline(method.acceptance_length - 1, color="black", linestyle="--", linewidth=1.2)
        if method.ci95 is not None:
            low, high = method.ci95
            axes.axvspan(low - 1, high - 1, color="black", alpha=0.15, linewidth=0)
        _panel_title(axes, name, f"τ {_interval(method)}, {method.rounds:,} rounds")
        axes.set_xlim(-0.6, method.draft_length + 0.6)
        axes.set_ylim(0, 1.05 * top)
        _percents(axes, "share of rounds")
        _whole(axes, "accepted draft tokens, of k")
    mean = Line2D([], [], color="black", linestyle="--", linewidth=1.2)
    legend: dict[str, Artist] = {"mean: τ − 1 (the target adds one)": mean}
    if any(method.ci95 for method in methods.values()):
        legend["its 95 % interval over prompts"] = Patch(facecolor="black", alpha=0.15)
    return _finish(figure, "How many draft tokens a round accepts", legend, measured_on(report))


def depth(report: BenchReport) -> Figure:
    """Acceptance by position i = 1..k of the draft, a line per drafted method.

    Left: P(draft i accepted | all before it accepted). Right: P(at least i drafts accepted), which sums to τ - 1.
    """
    figure, (left, right) = _figure(2, columns=2)
    legend: dict[str, Artist] = {}
    hollow, methods = False, _drafted(report)
    for i, (name, method) in enumerate(methods.items()):
        # Lines of one drafter often coincide: a shorter one lies above, the longer ones look out behind its end.
        line = Style.number(i).line() | {"zorder": 3 - method.draft_length / 1000}
        reached = np.cumsum(method.accepted_histogram[::-1])[::-1]  # [k+1] rounds that accepted at least i drafts
        places = np.arange(1, method.draft_length + 1)
        chance = np.array([math.nan if share is None else share for share in method.acceptance_by_depth])
        (legend[name],) = left.plot(places, chance, **line)
        few = (reached[:-1] < FEW * report.repeats) & ~np.isnan(chance)
        left.plot(places[few], chance[few], **line | HOLLOW)
        right.plot(places, reached[1:] / reached[0], **line)
        hollow |= bool(few.any())
    _panel_title(left, "Draft i is accepted,", "given that all before it were")
    _panel_title(right, "Drafts 1 to i are all accepted", "(the sum over i is τ − 1)")
    _percents(left, "share of rounds that got to i")
    _percents(right, "share of all rounds")
    for axes in (left, right):
        axes.set_xlim(0.4, max(method.draft_length for method in methods.values()) + 0.6)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
        _whole(axes, "draft position i, of k")
    if hollow:
        label = f"hollow: fewer than {FEW} rounds per repeat"
        legend[label] = Line2D([], [], color="0.3", marker="o", **HOLLOW)
    return _finish(figure, "Acceptance by position in the draft", legend, measured_on(report))


def speed(report: BenchReport) -> Figure:
    """Speedup against k, and for each drafter what a round commits (τ) and costs (in plain steps) against k.

    τ over cost is how many times as fast as plain decoding a drafter is, prefill excluded and as far as no limit cuts
    the answers: where τ lies above the cost, it gains. The speedup includes prefill, as everywhere.
    """
    drafters: dict[str, list[MethodReport]] = {}
    chosen = {name: method for name, method in _drafted(report).items() if method.rounds_at is not None}
    fixed = [method for method in _drafted(report).values() if method.rounds_at is None]
    if not fixed:
        raise InputError("the report is of chosen draft lengths alone: bench some fixed ones")
    for method in fixed:
        drafters.setdefault(str(method.drafter), []).append(method)
    figure, (first, *panels) = _figure(1 + len(drafters))
    legend: dict[str, Artist] = {}
    top = 0.0
    for i, (axes, (name, methods)) in enumerate(zip(panels, drafters.items(), strict=True)):
        methods = sorted(methods, key=lambda method: method.draft_length)
        style = Style.number(i)
        lengths = [method.draft_length for method in methods]
        tau = np.array([method.acceptance_length for method in methods])
        cost = np.array([method.round_cost for method in methods])
        (legend[name],) = first.plot(lengths, [method.speedup for method in methods], **style.line())
        least, most = np.transpose([method.speedup_range for method in methods])
        first.vlines(lengths, least, most, color=style.color, linewidth=1)
        bars = [(t - m.ci95[0], m.ci95[1] - t) if m.ci95 else (0.0, 0.0) for t, m in zip(tau, methods, strict=True)]
        axes.errorbar(lengths, tau, yerr=np.transpose(bars), capsize=3, elinewidth=1, **style.line())
        axes.plot(lengths, cost, **COST)
        _shade(axes, lengths, tau, cost)
        axes.axhline(1, **ONE)
        _panel_title(axes, name, "tokens and cost of a round")
        axes.set_ylabel("τ [tokens], cost [plain steps]", fontsize=MEDIUM)
        _lengths(axes, lengths)
        top = max(top, *tau, *cost, *(method.ci95[1] for method in methods if method.ci95))
    for axes in panels:
        axes.set_ylim(0, 1.1 * top)
    first.axhline(1, **ONE)
    first.set_ylim(0, 1.1 * max(1.0, *(method.speedup_range[1] for method in report.methods.values())))
    first.set_ylabel("tokens/s over plain decoding's", fontsize=MEDIUM)
    _panel_title(first, "speedup", "prefill included")
    for i, (name, method) in enumerate(chosen.items()):
        legend[name] = first.axhline(method.speedup, color=Style.number(i).color, linestyle=":")
    _lengths(first, {method.draft_length for method in fixed})
    legend["round cost, prefill excluded"] = Line2D([], [], **COST)
    legend["plain decoding"] = Line2D([], [], **ONE)
    legend["bars of the speedup: least and most of the repeats"] = Line2D([], [], color="0.3", linewidth=1)
    legend["gain: τ above cost"], legend["loss"] = Patch(**GAIN), Patch(**LOSS)
    if any(method.ci95 for method in _drafted(report).values()):
        legend["bars: 95 % interval of τ over prompts"] = Line2D([], [], color="0.3", marker="|", linestyle="none")
    title = (
        "Speed against draft length: drafting gains where\na round commits more tokens (τ) than it costs plain steps"
    )
    return _finish(figure, title, legend, [*measured_on(report), *remarks(report)])


def curve(curves: Sequence[Curve]) -> Figure:
    """τ against the text tokens that training has read; against steps if a run does not count them."""
    if not curves:
        raise InputError("no curves: give those of read_curves")
    figure, (axes,) = _figure(1, panel=(LEAST_WIDTH, 3.6))
    counted = all(each.tokens is not None for each in curves)
    legend: dict[str, Artist] = {}
    for i, each in enumerate(curves):
        style, x = Style.number(i), each.tokens if counted and each.tokens is not None else each.steps
        (legend[each.name],) = axes.plot(x, each.acceptance_length, **style.line())
        low, high = np.transpose([(math.nan, math.nan) if pair is None else pair for pair in each.ci95])
        axes.fill_between(x, low, high, color=style.color, alpha=0.15, linewidth=0)
    axes.axhline(1, **ONE)
    legend["plain decoding: τ = 1"] = Line2D([], [], **ONE)
    if any(pair for each in curves for pair in each.ci95):
        legend["band: 95 % interval over prompts"] = Patch(facecolor="0.3", alpha=0.15)
    label = "text tokens read in training" if counted else "optimiser steps (not all runs count tokens)"
    axes.set_xlabel(label, fontsize=MEDIUM)
    axes.set_ylabel("acceptance length τ [tokens per round]", fontsize=MEDIUM)
    axes.tick_params(labelsize=SMALL + 1)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    settings: dict[str, list[str]] = {}
    for each in curves:
        runs = settings.setdefault(f"target {each.target}, {each.prompts} held-out prompts, {each.date}", [])
        runs += [each.run] * (each.run not in runs)
    footer = [f"{', '.join(runs)}: {setting}" for setting, runs in settings.items()]
    return _finish(figure, "Acceptance length while the drafter learns", legend, footer)


PICTURES = {"histogram": histogram, "depth": depth, "speed": speed}  # of a report


def check_folder(folder: Path) -> None:
    """Refuse a folder for pictures before any work is done for them; it need not exist yet."""
    if is_store(folder):
        return check_file(folder / "histogram.png")
    parent = folder.absolute().parent
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder")
    if not parent.is_dir():
        raise InputError(f"{folder}: no folder {parent} to make it in")
    if folder.is_symlink() and not folder.exists():
        raise InputError(f"{folder}: is a link to nothing; name a folder")
    check_file((folder if folder.is_dir() else parent) / "histogram.png")


def write(report: BenchReport, folder: str | Path, curves: Sequence[Curve] = ()) -> list[Path]:
    """Write the pictures that a report and curves support into a folder, as PNG; the paths of them.

    Raises:
      InputError: the folder cannot be written; RunError: the disk is full.
    """
    folder = place(folder)
    check_folder(folder)
    figures = {}
    if len(report.methods) > 1:
        figures = {name: draw(report) for name, draw in PICTURES.items()}
    if curves:
        figures["curve"] = curve(curves)
    paths = []
    try:
        if not is_store(folder):
            folder.mkdir(exist_ok=True)
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
            paths.append(folder / f"{name}.png")
    except OSError as error:
        raise disk_error(folder, error) from None
    return paths


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG: all of it, or nothing."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    write_file(path, picture.getvalue())


def _drafted(report: BenchReport) -> dict[str, MethodReport]:
    methods = {name: method for name, method in report.methods.items() if method.drafter is not None}
    if not methods:
        raise InputError("the report is of plain decoding alone: bench some drafters")
    return methods


def _figure(
    count: int, columns: int = COLUMNS, panel: tuple[float, float] = PANEL
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """Panels in rows; the picture is as high as one of them until `_finish` adds up what it needs."""
    columns = min(count, columns)
    figure = Figure(figsize=(max(LEAST_WIDTH, columns * panel[0]), panel[1]), layout="constrained")
    return figure, [figure.add_subplot(-(-count // columns), columns, i + 1) for i in range(count)]


def _finish(figure: Figure, title: str, legend: dict[str, Artist], footer: Sequence[str]) -> Figure:
    """Add title, legend and footer, and make the picture as high as all of it needs."""
    (width, panel), renderer = figure.get_size_inches(), FigureCanvasAgg(figure).get_renderer()

    def inches(artist: Artist) -> float:
        return artist.get_window_extent(renderer).height / figure.dpi

    heading = figure.suptitle(title, fontsize=LARGE)
    note = figure.text(0, 0, _text("\n".join(footer), 16 * width), fontsize=SMALL, color="0.35", va="bottom")
    labels = [_text(label) for label in legend]
    longest = max(len(line) for label in labels for line in label.splitlines())
    keys = figure.legend(
        list(legend.values()), labels, loc="lower center", frameon=False, fontsize=SMALL + 1,
        ncols=max(1, int(width / (0.065 * longest + 0.7))),
    )  # fmt: skip
    titles: dict[int, float] = {}
    for axes in figure.axes:
        row = axes.get_subplotspec().rowspan.start  # pyrefly: ignore
        titles[row] = max(titles.get(row, 0.0), inches(axes.title))
    below = inches(keys) + inches(note) + 3 * GAP
    height = below + sum(titles.values()) + len(titles) * panel + inches(heading) + GAP
    keys.set_bbox_to_anchor((0.5, (inches(note) + 2 * GAP) / height), figure.transFigure)
    note.set_position((GAP / width, GAP / height))
    figure.set_figheight(height)
    figure.get_layout_engine().set(rect=(0, below / height, 1, 1 - below / height))  # pyrefly: ignore
    return figure


def _panel_title(axes: Axes, name: str, below: str) -> None:
    axes.set_title(f"{_text(name)}\n{below}", fontsize=MEDIUM)


def _percents(axes: Axes, label: str) -> None:
    """A vertical axis of shares."""
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel(label, fontsize=MEDIUM)
    axes.tick_params(labelsize=SMALL + 1)


def _whole(axes: Axes, label: str) -> None:
    """A horizontal axis of whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(label, fontsize=MEDIUM)


def _lengths(axes: Axes, lengths: Iterable[int]) -> None:
    """A horizontal axis of draft lengths, a doubling as wide everywhere."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
    axes.set_xlim(min(lengths) / 1.3, max(lengths) * 1.3)
    axes.set_xlabel("draft length k [tokens, log scale]", fontsize=MEDIUM)
    axes.tick_params(labelsize=SMALL + 1)
    axes.grid(alpha=0.3)


def _shade(axes: Axes, lengths: Sequence[int], tau: np.ndarray, cost: np.ndarray) -> None:
    """The area between the two lines: gain where τ is above, loss where it is below. A lone k has a strip."""
    at = np.log2(lengths)  # the lines are straight there
    fine = np.linspace(at[0], at[-1], 200) if len(at) > 1 else at[0] + np.array([-0.1, 0.1])
    x, tau, cost = 2**fine, np.interp(fine, at, tau), np.interp(fine, at, cost)
    axes.fill_between(x, tau, cost, where=(tau >= cost).tolist(), interpolate=True, **GAIN)
    axes.fill_between(x, tau, cost, where=(tau < cost).tolist(), interpolate=True, **LOSS)


def _interval(method: MethodReport) -> str:
    interval = "" if method.ci95 is None else f" [{method.ci95[0]:.2f}, {method.ci95[1]:.2f}]"
    return f"{method.acceptance_length:.2f}{interval}"


def _text(text: str, width: float = LONGEST) -> str:
    """Broken into lines, and dollar signs as they are: not as formulas."""
    lines = (textwrap.fill(line, int(width)) for line in text.splitlines())
    return "\n".join(lines).replace("$", r"\$")
