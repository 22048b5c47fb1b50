"""Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import math
import sys
import time

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


class Reporter:
    """Shows how far a piece of work is; a context manager. Nothing stays on a terminal when it ends."""

    def __init__(self, what: str):
        """what: the work, as in "decoding"."""
        self.what = what
        self.bar: Progress | None = None
        self.last = time.monotonic()
        self.first: tuple[float, int, int] | None = None  # when the work began to be shown, pieces done then, and all
        if sys.stderr.isatty():
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
            print(f"deer-jax: {self.what}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """In one unit, rounded up: 40 s, 3 min, 2 h."""
    for unit, name, most in ((1, "s", 60), (60, "min", 3600)):
        if seconds <= most:
            return f"{math.ceil(seconds / unit)} {name}"
    return f"{math.ceil(seconds / 3600)} h"
