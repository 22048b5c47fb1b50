"""What a run reports: metrics.jsonl, one JSON object per line, and the same for TensorBoard."""

import json
import os
import secrets
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deer_jax.errors import InputError, RunError
from deer_jax.files import disk_error, write_file
from deer_jax.formats import json_bytes, parse_json, read_bytes
from deer_jax.spools import Guard, Spool
from deer_jax.stores import local_file

FILE, FOLDER = "metrics.jsonl", "tensorboard"
MOST_BYTES = 2**32  # of metrics.jsonl: some ten million lines
PUT_EVERY = 30.0  # seconds: as late a store shows the last line


class MetricsLog:
    """Appends to a run's metrics; a context manager. A resumed run drops what was written behind its step.

    Attributes:
      tokens: text tokens read until the step that the run goes on from.
    """

    def __init__(self, folder: Path, *, resumed_at: int, lock: Guard):
        """resumed_at: step of the checkpoint that the run goes on from; -1 if there is none. lock: of the folder.

        Lines that are no metrics are dropped with a warning, but for a torn last one, of a run that was killed.
        """
        # Only here: where PyTorch is installed tensorboardX brings it along, which is slow.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore

        self.path, self._lock = folder / FILE, lock
        lock.check()
        self._spool = Spool(folder, lock)
        self._spool.pull(FILE)
        local, board = self._spool.path / FILE, self._spool.path / FOLDER
        kept: list[dict[str, Any]] = []
        if os.path.lexists(local):
            content = read_bytes(local, most=MOST_BYTES)
            kept, foreign = _sound_lines(content)
            if foreign:
                warnings.warn(f"{self.path}: {foreign} lines are no metrics and are dropped", stacklevel=6)
            kept = [line for line in kept if line["step"] <= resumed_at]
            sound = b"".join(json_bytes(line) for line in kept)
            if sound != content:
                write_file(local, sound)
        self.tokens = max((line["tokens"] for line in kept if type(line.get("tokens")) is int), default=0)
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            board.mkdir(exist_ok=True)
            # Written in this thread: the usual writer of tensorboardX has one of its own, which hangs on a full disk.
            # A name of its own: two calls within one second would write the same file.
            self._board = EventsWriter(str(board / "events"), f".{secrets.token_hex(4)}")
            restart = SessionLog(status=SessionLog.START)
            self._board.write_event(Event(wall_time=time.time(), step=resumed_at + 1, session_log=restart))
            self._file = os.fdopen(os.open(local, flags, 0o666), "ab")
        except OSError as error:
            raise self._refused(error) from None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._file.close()
            self._board.close()
            if kind is None or not issubclass(kind, KeyboardInterrupt):  # a second one ends at once
                self.put()
        except (OSError, InputError, RunError) as failure:
            if error is None:  # otherwise it has been said already
                raise self._refused(failure) if isinstance(failure, OSError) else failure from None

    def put(self) -> None:
        """See to it that all that was written is there, also on a store: before a checkpoint, so that who goes on from
        it finds the lines before it."""
        self._spool.put(FILE, FOLDER)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line; its numbers also go to TensorBoard, those of inner mappings as `outer/inner`."""
        from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore
        from tensorboardX.summary import scalar

        self._lock.check()
        try:
            self._file.write(json_bytes({"step": step, **values}))
            self._file.flush()
            for name, value in values.items():
                inner = value.items() if isinstance(value, Mapping) else [(None, value)]
                for key, number in inner:
                    if isinstance(number, int | float):
                        summary = scalar(name if key is None else f"{name}/{key}", number)
                        self._board.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._board.flush()
            self._spool.put(FILE, every=PUT_EVERY)
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> InputError | RunError:
        return disk_error(self.path, error, "the same command goes on from the newest checkpoint")


def _sound_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl that are objects with a step, and how many others there are."""
    lines, found = content.splitlines(keepends=True), []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    for line in lines:
        try:
            values = parse_json(line, FILE)
        except InputError:
            continue
        if isinstance(values, dict) and type(values.get("step")) is int:
            found.append(values)
    return found, len(lines) - len(found)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a torn last one, of a run that was killed, does not count."""
    lines = Path(local_file(folder / FILE)).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
