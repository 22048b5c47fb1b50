"""Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_PER_LINE = 5.0


class Reporter:
    """Shows how far a piece of work is; a context manager. Nothing stays on a terminal when it ends."""

    def __init__(self, what: str):
        """what: the work, as in "decoding"."""
        self.what = what
        self.bar: Progress | None = None
        self.last = time.monotonic()
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(
                *columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True
            )
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
        elif time.monotonic() - self.last >= SECONDS_PER_LINE:
            self.last = time.monotonic()
            print(
                f"deer-jax: {self.what}: {done:,} of {total:,}{', ' if note else ''}{note}", file=sys.stderr, flush=True
            )
