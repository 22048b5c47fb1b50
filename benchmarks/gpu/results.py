"""Figures, written the moment they are known, beside what should come out."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LINES, TEXT = "results.jsonl", "report.txt"
PIECE = 15 << 20  # bytes

Figures = Mapping[str, Any]


class Results:
    """What one phase writes to the folder of results."""

    def __init__(self, out: Path, phase: str):
        self.out, self.phase = out, phase

    def add(self, what: str, measured: Figures, expected: Figures | None = None, because: str = "") -> None:
        """A measurement. expected: what should have come out, by the same names, and because of what."""
        expected = expected or {}
        strange = expected.keys() - measured.keys()
        if strange:
            raise ValueError(f"{what}: expected {sorted(strange)}, which is not among what was measured")
        self._line({"what": what, "measured": dict(measured), "expected": dict(expected), "because": because})
        parts = [
            f"{name} {shown(value)}" + (f" (expected {shown(expected[name])})" if name in expected else "")
            for name, value in measured.items()
        ]
        self.say(f"{what}: {', '.join(parts)}" + (f"\n    expected: {because}" if because else ""))

    def leave_out(self, what: str, why: str) -> None:
        """Something that was not measured."""
        self._line({"what": what, "left_out": why})
        self.say(f"{what}: left out: {why}")

    def ended(self, outcome: str, seconds: float, *, ok: bool) -> None:
        """How the phase ended."""
        self._line({"what": "phase", "ok": ok, "outcome": outcome, "seconds": seconds})
        self.say(f"-- {self.phase}: {outcome} ({seconds:.0f} s)")

    def say(self, text: str) -> None:
        """A line of the report, also printed."""
        print(text, flush=True)
        self._append(TEXT, text)

    def _line(self, values: Figures) -> None:
        self._append(LINES, json.dumps({"phase": self.phase, **values}))

    def _append(self, name: str, text: str) -> None:
        with (self.out / name).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())


def in_pieces(results: Results, name: str, data: bytes) -> None:
    """A file of the results, in pieces NAME.0, NAME.1, ...: `cat NAME.*` has it whole."""
    pieces = [data[at : at + PIECE] for at in range(0, len(data), PIECE)]
    for number, piece in enumerate(pieces):
        (results.out / f"{name}.{number}").write_bytes(piece)
    results.add(name, {"MB": len(data) / 1e6, "pieces": len(pieces)})


def shown(value: Any) -> str:
    """A number with four digits, anything else as it is."""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
