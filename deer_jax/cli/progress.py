"""What people are told on stderr: lines, and progress as a bar on a terminal, as a line every few seconds elsewhere."""

import contextlib
import math
import os
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_PER_LINE = 5.0
LONGEST = 900  # letters of a line; a name of thousands is not shown in full


_who = ""  # of several processes all but the lead say their number before what they say


def speak_as(who: str) -> None:
    """Put a name before every line, and report no progress."""
    global _who
    _who = f"{who}: "


def silent() -> bool:
    """Whether another process reports progress and results."""
    return bool(_who)


def say(text: str) -> None:
    """One line on stderr. A run does not end because nobody can read it any more.

    "error: a\nb \x1b[1m" -> deer-jax: error: a b \\x1b[1m
    """
    text = _who + " ".join(text.split())
    if len(text) > LONGEST:  # what is wrong stands at the beginning, what to do at the end
        text = f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    try:
        print(f"deer-jax: {text}", file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """What is written to a stream goes nowhere from now on, what it still holds included."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Reporter:
    """Shows how far a piece of work is; a context manager. Nothing stays on a terminal when it ends."""

    def __init__(self, what: str):
        """what: the work, as in "decoding"."""
        self.what = what
        self.bar: Progress | None = None
        self.last = time.monotonic()
        self.first: tuple[float, int, int] | None = None  # when the work began to be shown, pieces done then, and all
        if sys.stderr.isatty() and not silent():
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self.task = self.bar.add_task(what, total=None, note="")

    def __enter__(self) -> "Reporter":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, done: int, total: int, note: str = "") -> None:
        """done of total pieces; note: what else is known."""
        if silent():
            return
        if self.bar:
            self.bar.update(self.task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if self.first is None or total != self.first[2] or done < self.first[1]:  # other work under the same name
            self.first = now, done, total
        if now - self.last >= SECONDS_PER_LINE:
            self.last = now
            begin, before, _ = self.first
            parts = [f"{done:,} of {total:,}", note]
            if before < done < total:
                parts.append(f"about {duration((now - begin) * (total - done) / (done - before))} left")
            say(f"{self.what}: {', '.join(filter(None, parts))}")


def duration(seconds: float) -> str:
    """In one unit, rounded up: 40 s, 3 min, 2 h."""
    for unit, name, most in ((1, "s", 60), (60, "min", 3600)):
        if seconds <= most:
            return f"{math.ceil(seconds / unit)} {name}"
    return f"{math.ceil(seconds / 3600)} h"
