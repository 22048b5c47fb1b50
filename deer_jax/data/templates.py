"""Chat templates, rendered within bounds of time and memory in a process beside this one."""

import contextlib
import datetime
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deer_jax.config import nearest
from deer_jax.data.chats import excerpt
from deer_jax.errors import InputError, RunError

SECONDS = 10  # that a template has for one chat
MEMORY = 2**31  # bytes, above what the process starts with
START_SECONDS = 120  # until the program is up: it imports transformers
WORKER = Path(__file__).with_name("template_worker.py")
# What is said about every chat or is no argument of templates.
RESERVED = frozenset(
    {"messages", "conversation", "conversations", "chat_template", "add_generation_prompt", "continue_final_message",
     "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
     "return_assistant_tokens_mask", "tokenizer_kwargs", "now"}
)  # fmt: skip


class ArgumentError(InputError):
    """An argument that the template does not take.

    Attributes:
      name: of the argument.
    """

    def __init__(self, name: str, line: str):
        super().__init__(line)
        self.name = name


class Renderer:
    """Renders the templates of one tokenizer. Its process starts with the first chat and ends with this object."""

    def __init__(self, where: str):
        """where: names the tokenizer in errors."""
        self._where = where
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._stop: Any = None
        self._variables: dict[str, frozenset[str]] = {}

    def render(
        self, template: str, messages: Sequence[Mapping[str, Any]], *, now: datetime.datetime | None,
        tools: Sequence[Any] | None, documents: Sequence[Any] | None, special: Mapping[str, Any],
        arguments: Mapping[str, Any],
    ) -> str:  # fmt: skip
        """The text of a chat, up to where the assistant's answer starts.

        Args:
          now: the moment that strftime_now() writes; None is the present.
          special: the tokenizer's special tokens by name. arguments: what else the template gets.

        Raises InputError for an argument the template does not know and for a template that fails, RunError if the
        process cannot be started.
        """
        with self._lock:
            self._check(template, arguments, tools, documents, special)
            found = self._ask(
                {
                    "template": template,
                    "messages": list(messages),
                    "now": (now or datetime.datetime.now()).isoformat(),
                    "tools": tools,
                    "documents": documents,
                    "arguments": {**special, **arguments},
                }
            )
        return found["text"]

    def _check(self, template, arguments, tools, documents, special) -> None:
        if not arguments and tools is None and documents is None:
            return
        if template not in self._variables:
            self._variables[template] = frozenset(self._ask({"template": template})["variables"])
        known = self._variables[template] - RESERVED
        for name in arguments:
            check_name(name)
            if name not in known:
                valid = sorted(known - set(special) - {"tools", "documents"})
                hint = nearest(name[:50], valid) if valid else "it takes none"
                raise ArgumentError(
                    name,
                    f"{self._where}: the chat template has no argument {excerpt(name)}, "
                    f"{excerpt(hint, 300, quoted=False)}",
                )
        for name, value in (("tools", tools), ("documents", documents)):
            if value is not None and name not in known:
                raise ArgumentError(
                    name, f"{self._where}: the chat template has no place for {name}; leave them out of the chat"
                )

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer; InputError where it is none."""
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError):
            raise InputError(f"{self._where}: a chat template reads texts, numbers, lists and mappings only") from None
        process = self._running()
        answer, expired = _exchange(process, line, SECONDS)
        if expired or not answer:
            status = process.poll()
            self._end()
        if not answer:
            if expired:
                raise InputError(f"{self._where}: the chat template takes more than {SECONDS} seconds for one chat")
            raise InputError(
                f"{self._where}: the chat template brought down the program that renders it (status {status})"
            )
        found = json.loads(answer)
        if "memory" in found:
            raise InputError(f"{self._where}: the chat template needs far more memory than a chat can")
        if "error" in found:
            raise InputError(f"{self._where}: the chat template refuses these messages: {found['error']}")
        return found

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, started if there is none, or if this one is a copy of that which had it."""
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._end()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER), str(math.ceil(SECONDS) + 5), str(MEMORY)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise RunError(f"chat templates cannot be rendered: {sys.executable} does not start: {error}") from None
        self._process, self._owner = process, os.getpid()
        self._stop = weakref.finalize(self, _end, process, self._owner)
        answer, _ = _exchange(process, json.dumps(path).encode() + b"\n", START_SECONDS)
        if not answer:
            status = process.poll()
            self._end()
            raise RunError(f"chat templates cannot be rendered: {sys.executable} {WORKER} ended with status {status}")
        return process

    def _end(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None


def check_name(name: str, where: str = "template argument") -> None:
    """ArgumentError for the name of something that is no template's to decide."""
    if name in RESERVED:
        raise ArgumentError(name, f"{where} {excerpt(name)}: is not for the template; it is set by this library")


def _exchange(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> tuple[bytes, bool]:
    """A line to a process and the line that comes back, empty if none does; and whether its time was up."""
    assert process.stdin is not None
    assert process.stdout is not None
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(line)
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:  # it is gone
        answer = b""
    except BaseException:  # Ctrl-C: whatever comes back now belongs to nobody
        process.kill()
        raise
    finally:
        timer.cancel()
    if not answer.endswith(b"\n"):
        process.kill()
        process.wait()
        return b"", expired.is_set()
    return answer, expired.is_set()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill the process, if it is a child of this one, and close its pipes."""
    if owner == os.getpid():
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
