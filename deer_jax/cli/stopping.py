"""Ctrl-C and SIGTERM as requests: what runs comes to a good end first, and several processes end together."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deer_jax import processes
from deer_jax.cli.progress import say
from deer_jax.errors import Terminated


class Stopping:
    """Whether the program was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def is_set(self) -> bool:
        return self.signal is not None

    def agree(self) -> None:
        """All processes end alike, whichever was told: by SIGTERM, if one was."""
        if processes.agree(self.signal == signal.SIGTERM):
            self.signal = signal.SIGTERM

    def interruption(self, line: str) -> KeyboardInterrupt:
        """What to raise: it decides the exit status."""
        return Terminated(line) if self.signal == signal.SIGTERM else KeyboardInterrupt(line)


@contextmanager
def asked_to_stop(
    after: str = "this step or evaluation", kept: str = "the same command goes on from the newest checkpoint"
) -> Iterator[Stopping]:
    """What Ctrl-C or SIGTERM sets; a second one interrupts at once, with `kept` as its line."""
    stopping = Stopping()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.getsignal(each) for each in signals}

    def ask(number, frame):
        again, stopping.signal = stopping.is_set(), number
        if again:
            raise stopping.interruption(kept)
        say(f"stopping when {after} is done; once more stops at once")

    if threading.current_thread() is not threading.main_thread():  # which alone hears of signals
        yield stopping
        return
    for each in signals:
        signal.signal(each, ask)
    try:
        yield stopping
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def interrupted(kept: str) -> Iterator[None]:
    """An interruption in the block says what is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise type(error)(kept) from None


@contextmanager
def ending_together(after: str, kept: str = "") -> Iterator[Callable[[], None]]:
    """A function that all processes call at the same places: it ends all of them where one was asked to stop.

    A single process is interrupted at once, as ever, and the function does nothing.

    Args:
      after: what is to be done first, as in "this part".
      kept: what the last line says.
    """
    if processes.count() == 1:
        yield lambda: None
        return
    with asked_to_stop(after, kept) as stopping:
        asked = processes.agreed(stopping.is_set)

        def check() -> None:
            if asked():
                stopping.agree()
                processes.leave()
                raise stopping.interruption(kept)

        yield check
