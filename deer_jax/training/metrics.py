"""What a run reports: metrics.jsonl, one JSON object per line, and the same for TensorBoard."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore
from tensorboardX.summary import scalar

from deer_jax.errors import InputError

FILE, FOLDER = "metrics.jsonl", "tensorboard"


class MetricsLog:
    """Appends to a run's metrics; a context manager. A resumed run drops what was written behind its step."""

    def __init__(self, folder: Path, *, resumed_at: int):
        """resumed_at: step of the checkpoint that the run goes on from; -1 if there is none."""
        self.path = folder / FILE
        try:
            if self.path.exists():
                kept = [line for line in read_metrics(folder) if line["step"] <= resumed_at]
                partial = self.path.with_name(f".{FILE}.partial")
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
                partial.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
            (folder / FOLDER).mkdir(exist_ok=True)
            # Written in this thread: the usual writer of tensorboardX has one of its own, which hangs on a full disk.
            self._board = EventsWriter(str(folder / FOLDER / "events"))
            restart = SessionLog(status=SessionLog.START)
            self._board.write_event(Event(wall_time=time.time(), step=resumed_at + 1, session_log=restart))
        except OSError as error:
            raise self._refused(error) from None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._file.close()
            self._board.close()
        except OSError as failure:
            if error is None:  # otherwise it has been said already
                raise self._refused(failure) from None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line; its numbers also go to TensorBoard, those of inner mappings as `outer/inner`."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                inner = value.items() if isinstance(value, Mapping) else [(None, value)]
                for key, number in inner:
                    if isinstance(number, int | float):
                        summary = scalar(name if key is None else f"{name}/{key}", number)
                        self._board.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._board.flush()
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> InputError:
        return InputError(
            f"{self.path.parent}: metrics cannot be written: {error.strerror}; make room, then the same command goes "
            "on from the newest checkpoint"
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a torn last one, of a run that was killed, does not count."""
    lines = (folder / FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
