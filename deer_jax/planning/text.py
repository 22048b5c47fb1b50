"""The text of a compiled program as a value: computations of instructions, who uses what, and the source lines."""

import dataclasses
import math
import re
from collections import defaultdict
from typing import NamedTuple

BYTES = {"s4": 0.5, "u4": 0.5, "pred": 1.0}  # of an element whose type's name does not say its bits, or too few

ARRAY = re.compile(r"\b(pred|[suf]\d+\w*|bf16|c\d+)\[([\d,]*)\](\{[^}]*\})?")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.\-]+) = (.*)")


class Array(NamedTuple):
    """One array of an instruction's type."""

    dims: tuple[int, ...]
    bytes: float
    in_hbm: bool  # not in on-chip memory


def arrays(type_text: str) -> list[Array]:
    """The arrays of a type, of tuples their leaves in order."""
    found = []
    for kind, dims_text, layout in ARRAY.findall(type_text):
        dims = tuple(int(size) for size in dims_text.split(",") if size)
        bits = re.search(r"\d+", kind)
        itemsize = BYTES[kind] if kind in BYTES or bits is None else int(bits[0]) / 8
        found.append(Array(dims, math.prod(dims) * itemsize, not re.search(r"S\([1-9]\d*\)", layout)))
    return found


def bytes_of(type_text: str) -> float:
    """Bytes of a type wherever it lies."""
    return sum(array.bytes for array in arrays(type_text))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    op: str
    args: tuple[str, ...]  # names; of a parameter or constant what stands in the brackets
    attrs: str
    root: bool

    def called(self, key: str = "calls") -> str:
        """The name of the computation that an attribute names; empty without one."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attrs)
        return found[1] if found else ""


class Text:
    """A compiled program's text, taken apart. ValueError if it is none.

    Attributes:
      computations: their instructions in order, by name, by the computation's name.
      entry: the name of the computation where the program starts.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                lines = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif found := INSTRUCTION.match(line):
                kind, op, inside, attrs = _split(found[3])
                names = (inside.strip(),) if op in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", inside)
                lines[found[2]] = Instruction(found[2], kind, op, tuple(names), attrs, bool(found[1]))
        if not self.entry:
            raise ValueError("no entry computation: not the text of a compiled program")
        self._users: dict[str, dict[str, list[tuple[Instruction, int]]]] = {}
        for computation, instructions in self.computations.items():
            users = self._users[computation] = defaultdict(list)
            for line in instructions.values():
                for place, name in enumerate(line.args):
                    users[name].append((line, place))
        self._tables = _tables(text)
        self._known: dict[int, str] = {}

    def users(self, computation: str, name: str) -> list[tuple[Instruction, int]]:
        """The instructions that have it as an argument, and at which place."""
        return self._users[computation][name]

    def root(self, computation: str) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(line for line in self.computations[computation].values() if line.root)

    def origin(self, line: Instruction) -> str:
        """What made it: the name in JAX's terms, and the source lines, innermost first."""
        name = re.search(r'op_name="([^"]*)"', line.attrs)
        frame = re.search(r"stack_frame_id=(\d+)", line.attrs)
        parts = [name[1] if name else "", self._sources(int(frame[1])) if frame else ""]
        return " | ".join(part for part in parts if part)

    def _sources(self, frame: int) -> str:
        if frame not in self._known:
            parts, at = [], frame
            while entry := self._tables["StackFrames"].get(at):
                place = _numbers(self._tables["FileLocations"][_numbers(entry)["file_location_id"]])
                file = self._tables["FileNames"][place["file_name_id"]].strip('"').split("/")[-1]
                function = self._tables["FunctionNames"][place["function_name_id"]].strip('"')
                parts.append(f"{file}:{place['line']} {function}")
                at = _numbers(entry)["parent_frame_id"] - 1  # written one higher; 1 is none
            self._known[frame] = " < ".join(parts)
        return self._known[frame]


def _numbers(entry: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", entry)}


def _tables(text: str) -> dict[str, dict[int, str]]:
    """The tables of source lines that stand in front of the computations; empty ones where there are none."""
    tables: dict[str, dict[int, str]] = {
        name: {} for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
    }
    table: dict[int, str] | None = None
    for line in text.splitlines():
        if line in tables:
            table = tables[line]
        elif table is not None and (found := re.match(r"(\d+) (.*)", line)):
            table[int(found[1])] = found[2]
        elif COMPUTATION.match(line):
            break
        else:
            table = None
    return tables


def _split(text: str) -> tuple[str, str, str, str]:
    """The parts of `TYPE op(args), attrs`."""
    end = _end(text, " ")
    kind, (op, rest) = text[:end], text[end + 1 :].split("(", 1)
    end = _end(rest, ")")
    return kind, op, rest[:end], rest[end + 1 :]


def _end(text: str, stop: str) -> int:
    """Where a character stands outside of brackets that open in the text; its length if nowhere."""
    depth = 0
    for place, char in enumerate(text):
        if char == stop and depth == 0:
            return place
        depth += (char in "([{") - (char in ")]}")
    return len(text)
