"""deer-jax VERB: finds the verb, sets up JAX, and turns what goes wrong into one line and an exit status."""

import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

from deer_jax.config import nearest
from deer_jax.errors import InputError, RunError, Terminated

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

example:
  deer-jax decode --target models/stories260k --drafter from-target --prompt "Once upon a time"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status: 0, 2 for bad arguments or input, 130 when interrupted. Failures propagate."""
    try:
        with one_line_warnings():
            status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # what is still buffered may not reach a closed pipe either, and at exit nobody catches it
        return status
    except InputError as error:
        _say("error", str(error))
        return 2
    except RunError as error:
        _say("error", str(error))
        return 1
    except BrokenPipeError:  # `... | head` has seen enough; nothing more can be flushed to it at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:  # with a message from verbs that keep what they did
        _say("interrupted", str(error) or "files are written at the end, so none was")
        if argv is None:
            # XLA may still be at work on what was interrupted, and taking the interpreter down under it can crash.
            sys.stdout.flush()
            os._exit(143 if isinstance(error, Terminated) else 130)
        return 143 if isinstance(error, Terminated) else 130


def _run(argv: Sequence[str]) -> int:
    verb = argv[0] if argv else ""
    if verb in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {name:<8} {what}" for name, what in VERBS.items())), end="")
    elif verb == "--version":
        print(importlib.metadata.version("deer_jax"))
    elif not verb or verb.startswith("-"):
        raise InputError(f"name a verb first: {', '.join(VERBS)}; see deer-jax --help")
    elif verb not in VERBS:
        raise InputError(f"unknown verb '{verb}', {nearest(verb, VERBS)}")
    else:
        keep_compiled_programs()
        # Nobody needs to be told that transformers found no PyTorch: only its tokenizers are used.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        importlib.import_module(f"deer_jax.cli.{verb}").run(argv[1:])
    return 0


def keep_compiled_programs() -> None:
    """Compiled programs outlive the process, in ~/.cache or where JAX's own variable says (empty: nowhere)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "deer_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings as one line on stderr, without the source line that Python adds."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *args, **kwargs: _say("warning", str(message))
        yield


def _say(kind: str, text: str) -> None:
    print(f"deer-jax: {kind}: {' '.join(text.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
