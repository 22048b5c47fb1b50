"""What goes wrong, as one line each: by whom it can be mended, and the command line's exit status."""

import math
from typing import Any


class InputError(ValueError):
    """Wrong input from the user: one line that names the value and the remedy. The command line exits with 2."""


class Terminated(KeyboardInterrupt):
    """Asked to stop by SIGTERM; exit status 143."""


class PromptError(InputError):
    """One of several prompts is wrong.

    Attributes:
      index: its place in the list, from 0; reason: what is wrong with it. Who knows where the prompt came from says so
        instead of the index.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(f"prompts[{index}]: {reason}")
        self.index, self.reason = index, reason


class RunError(RuntimeError):
    """A run that cannot go on although its input was right: a full disk, a damaged checkpoint, a loss that is not
    finite. One line; the command line exits with 1."""


class NotFiniteError(RunError):
    """The logits for a prompt are not finite.

    Attributes:
      index: the prompt's place in the list, from 0; reason: which model's, and the tensor that is the cause where one
        is found.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(f"prompts[{index}]: {reason}")
        self.index, self.reason = index, reason


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error says, on one line of at most `most` characters; its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: Any, most: int = 80) -> str:
    """A value from elsewhere as an error names it: its repr, on one line of at most `most` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list that is nested as deeply
        text = f"a {type(value).__name__} that is too large to print"
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def named(name: Any, most: int = 80) -> str:
    """A name from elsewhere, such as a path or a key: as it is, or as `shown` where that is no short line."""
    text = str(name)
    return text if text.isprintable() and len(text) <= most else shown(text, most)


def duration(seconds: float) -> str:
    """In one unit, rounded up: 40 s, 3 min, 2 h."""
    for unit, name, most in ((1, "s", 60), (60, "min", 3600)):
        if seconds <= most:
            return f"{math.ceil(seconds / unit)} {name}"
    return f"{math.ceil(seconds / 3600)} h"
