"""deer-jax VERB: finds the verb, sets up JAX, and turns what goes wrong into one line and an exit status."""

import difflib
import errno
import importlib
import importlib.metadata
import io
import logging
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from deer_jax import processes
from deer_jax.cli.progress import discard, say
from deer_jax.errors import InputError, RunError, Terminated, one_line

INTERRUPTED, TERMINATED = 130, 143  # exit statuses: 128 and the number of the signal
REPORTED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")
PACKAGE = Path(__file__).resolve().parent.parent

VERBS = {
    "demo": "decode with a small pair, beside plain decoding",
    "decode": "decode prompts with any target and drafter",
    "pretrain": "train a small target from text, for demonstrations and research",
    "answers": "let a target answer prompts: the training set of its drafter",
    "align": "train a drafter for a target from its answers",
    "bench": "measure acceptance length and speed of drafters against plain decoding",
    "pipeline": "run several of these one after the other, from one file",
    "export": "write a run's best checkpoint as a Hugging Face folder",
}
HELP = """\
usage: deer-jax VERB [options]

Diffusion-drafted speculative decoding: the target's own answers, several tokens per pass.

{verbs}

`deer-jax VERB --help` lists the options of a verb; `deer-jax --version` prints the version.

example, in the repository:
  deer-jax decode --target deer_jax/pair/target --drafter deer_jax/pair/drafter --prompt "def main():"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status.

    0; 2 for wrong input; 1 for a run that failed; 130 after Ctrl-C and 143 after SIGTERM. Whatever is not 0 is one line
    on stderr.
    """
    open_streams()
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        with one_line_warnings(), interruptible():
            status = _run(words)
            sys.stdout.flush()  # what is still buffered may find no room, and at exit nobody catches that
    except SystemExit:
        raise
    except BaseException as error:  # the last boundary; panics of Rust libraries are no Exceptions
        status = ended(error, words)
    if processes.started():
        if status not in (INTERRUPTED, TERMINATED):  # a stop that all agreed on has waited, a second signal does not
            processes.leave()
        os._exit(status)  # what JAX does at the end would wait for those that are gone
    if argv is None and status in (INTERRUPTED, TERMINATED):
        # XLA may still be at work on what was interrupted, and taking the interpreter down under it can crash.
        os._exit(status)
    return status


def _run(argv: Sequence[str]) -> int:
    verb = argv[0] if argv else ""
    if verb in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {name:<8} {what}" for name, what in VERBS.items())), end="")
    elif verb == "--version":
        print(importlib.metadata.version("deer_jax"))
    elif not verb or verb.startswith("-"):
        raise InputError(f"name a verb first: {', '.join(VERBS)}; see deer-jax --help")
    elif verb not in VERBS:
        raise InputError(f"unknown verb '{verb:.40}', {meant(verb)}")
    else:
        try:
            os.getcwd()
        except OSError:
            raise InputError("the current folder does not exist any more; change into another one") from None
        keep_compiled_programs()
        # Nobody needs to be told that transformers found no PyTorch: only its tokenizers are used.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # nor that it keeps its list of fonts nowhere
        try:
            importlib.import_module(f"deer_jax.cli.{verb}").run(argv[1:])
        except SystemExit:  # --help
            sys.stdout.flush()
            raise
    return 0


def meant(word: str) -> str:
    """A hint for a word that is no verb: those spelled like it or described with it, or all of them."""
    word = word.lower()
    close = difflib.get_close_matches(word, VERBS, cutoff=0.75)
    described = {verb: re.findall(r"\w+", what) for verb, what in VERBS.items()}
    found = [word] if word in VERBS else [verb for verb in VERBS if verb in close or word in described[verb]]
    return f"did you mean {' or '.join(map(repr, found))}?" if found else f"valid: {', '.join(VERBS)}"


def keep_compiled_programs() -> None:
    """Compiled programs outlive the process, in ~/.cache or where JAX's own variable says (empty: nowhere).

    Where nothing can be written they do not, which costs time and nothing else.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named is not None and (not named or "://" in named):
        return
    folder = None
    try:
        folder = Path.home() / ".cache" / "deer_jax" / "xla" if named is None else Path(named).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: there is no home
        warnings.warn(f"compiled programs are not kept, the next start compiles again: {reason(error)}", stacklevel=1)
        folder = None
    jax.config.update("jax_compilation_cache_dir", folder and str(folder))
    if named is None:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def open_streams() -> None:
    """Standard streams that can be written to in any case.

    One that was closed at the start is opened to nowhere, so that no file gets its number; stdout replaces what its
    encoding does not have, as stderr does by itself.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM raises Terminated, as Ctrl-C raises KeyboardInterrupt."""

    def ask(number: int, frame: Any) -> None:
        raise Terminated

    def lost(found: Any) -> None:
        """Once more what was raised where Python raises nothing, such as in the garbage collector's calls."""
        if not isinstance(found.exc_value, KeyboardInterrupt):
            return report(found)
        number = signal.SIGTERM if isinstance(found.exc_value, Terminated) else signal.SIGINT
        again = threading.Timer(0.05, os.kill, (os.getpid(), number))
        again.daemon = True
        return again.start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, report = signal.signal(signal.SIGTERM, ask), sys.unraisablehook
    sys.unraisablehook = lost
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = report


def ended(error: BaseException, argv: Sequence[str]) -> int:
    """Say on one line what has ended a verb; the exit status."""
    full = unwritten()
    if isinstance(error, InputError):
        say(f"error: {error}")
        return 2
    if isinstance(error, RunError):
        say(f"error: {error}")
        return 1
    if isinstance(error, KeyboardInterrupt):  # with a message from verbs that keep what they did
        terminated = isinstance(error, Terminated)
        say(
            f"{'terminated' if terminated else 'interrupted'}: "
            f"{str(error) or 'files are written at the end, whole or not at all'}"
        )
        return TERMINATED if terminated else INTERRUPTED
    if isinstance(error, BrokenPipeError) and error.filename is None:  # `... | head` has seen enough
        return 0
    if isinstance(error, OSError):
        # What is longer than a buffer fails where it is printed, and leaves nothing to flush; files are named.
        full = full or error.errno == errno.ENOSPC
        where = "stdout" if full and error.filename is None else error.filename
        say(f"error: {'' if where is None else f'{where}: '}{reason(error)}")
        return 1
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        say(
            f"error: the device has too little memory: {one_line(error)}; a smaller batch (batch_size, in a recipe "
            "batch with accumulate), a smaller length or max_new_tokens, or dtype bfloat16 needs less"
        )
        return 1
    if processes.started() and isinstance(error, jax.errors.JaxRuntimeError | ValueError) and processes.lost(error):
        say(f"error: another process has ended, so this one cannot go on; start all again ({one_line(error)})")
        return 1
    if isinstance(error, RuntimeError) and "nable to initialize backend" in str(error):
        say(f"error: {one_line(error)}; JAX_PLATFORMS names the platforms to use, as in JAX_PLATFORMS=cpu")
        return 2
    say(f"error: unexpected {type(error).__name__}: {one_line(error)}; {kept(error, argv)}, please report them")
    return 1


def unwritten() -> bool:
    """Whether stdout does not take what was printed; it goes nowhere then, as it would be tried again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        discard(sys.stdout)
        return True
    return False


def reason(error: Exception) -> str:
    """What the system said, without numbers."""
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


def kept(error: BaseException, argv: Sequence[str]) -> str:
    """Write what is known of an error of ours into a new file; where it is."""
    try:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("deer_jax", *REPORTED)]
        lines = [
            f"deer-jax {shlex.join(argv)}", ", ".join([*versions, f"Python {platform.python_version()}"]),
            platform.platform(), "", *traceback.format_exception(error),
        ]  # fmt: skip
        descriptor, path = tempfile.mkstemp(prefix="deer-jax-", suffix=".txt")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write("\n".join(lines).encode(errors="backslashreplace"))
        return f"the details are in {path}"
    except Exception as second:  # nothing is left to turn to
        return f"the details could not be kept ({reason(second)})"


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings as one line on stderr, without the source line that Python adds; those of other libraries once a place,
    whatever they name."""
    shown = set()

    def show(message: Warning | str, category: type, filename: str, lineno: int, *args: Any, **kwargs: Any) -> None:
        place = (filename, lineno)
        if place in shown and PACKAGE not in Path(filename).parents:
            return
        shown.add(place)
        say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    sys.exit(main())
