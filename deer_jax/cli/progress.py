"""What people are told on stderr: lines, and progress as a bar on a terminal, as a line every few seconds elsewhere."""

import contextlib
import os
import sys
import threading
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

from deer_jax.build import watching
from deer_jax.errors import duration

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


def tell(text: str) -> None:
    """A line that one of several processes says, the lead."""
    if not silent():
        say(text)


def discard(stream: TextIO) -> None:
    """What is written to a stream goes nowhere from now on, what it still holds included."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Reporter:
    """Shows how far a piece of work is, and that it is compiling; a context manager. Nothing stays on a terminal when
    it ends."""

    def __init__(self, what: str, *, guess: bool = True):
        """what: the work, as in "decoding". guess: how long the rest takes, as if all pieces were alike; otherwise the
        notes say it."""
        self.what, self.guess = what, guess
        self.bar: Progress | None = None
        self.note = ""
        self.waiting: threading.Timer | None = None  # says that a program is being compiled, if that takes long
        self.watch = watching(self.compiling)
        self.last = time.monotonic()
        self.first: tuple[float, int, int] | None = None  # when the work began to be shown, pieces done then, and all
        if sys.stderr.isatty() and not silent():
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                *([TimeRemainingColumn()] if guess else []), TextColumn("{task.fields[note]}"),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self.task = self.bar.add_task(what, total=None, note="")

    def __enter__(self) -> "Reporter":
        if self.bar:
            self.bar.start()
        self.watch.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.watch.__exit__(*error)
        if self.bar:
            self.bar.stop()

    def show(self, done: int, total: int, note: str = "") -> None:
        """done of total pieces; note: what else is known."""
        self.note = note
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
            if self.guess and before < done < total:
                parts.append(f"about {duration((now - begin) * (total - done) / (done - before))} left")
            say(f"{self.what}: {', '.join(filter(None, parts))}")

    def compiling(self, begun: bool) -> None:
        """A program begins to be compiled, or that is over: a line where nothing was said for a while."""
        if self.waiting:
            self.waiting.cancel()
            self.waiting = None
        if silent():
            return
        if self.bar:
            self.bar.update(self.task, note="compiling" if begun else self.note)
        elif begun:
            silence = time.monotonic() - self.last
            self.waiting = threading.Timer(max(0.0, SECONDS_PER_LINE - silence), self._say_compiling)
            self.waiting.daemon = True
            self.waiting.start()

    def _say_compiling(self) -> None:
        self.last = time.monotonic()
        say(f"{self.what}: compiling, which may take minutes the first time")
