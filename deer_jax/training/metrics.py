"""What a run reports: metrics.jsonl, one JSON object per line, and the same for TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from deer_jax.config import InputError

FILE, FOLDER = "metrics.jsonl", "tensorboard"


class MetricsLog:
    """Appends to a run's metrics; a context manager. A resumed run drops what was written behind its step."""

    def __init__(self, folder: Path, *, resumed_at: int):
        self.path = folder / FILE
        try:
            if self.path.exists():
                kept = [line for line in read_metrics(folder) if line["step"] <= resumed_at]
                partial = self.path.with_name(f".{FILE}.partial")
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
                partial.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._board = SummaryWriter(str(folder / FOLDER), purge_step=resumed_at + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line; its numbers also go to TensorBoard, those of inner mappings as `outer/inner`."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written: {error.strerror}; make room, then the same command goes on from the "
                "newest checkpoint"
            ) from None
        for name, value in values.items():
            inner = value.items() if isinstance(value, Mapping) else [(None, value)]
            for key, number in inner:
                if isinstance(number, int | float):
                    self._board.add_scalar(name if key is None else f"{name}/{key}", number, step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a torn last one, of a run that was killed, does not count."""
    lines = (folder / FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
