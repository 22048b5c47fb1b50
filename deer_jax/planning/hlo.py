"""What a compiled program moves and computes on each device, read from its text: no device is needed, nothing is run.

    program = Program(compiled.as_text(), trips={"attend_cache": 32})
    program.per_round().hbm_bytes      # of one pass of the loop whose end depends on data: a round of the decode loop
    program.once().hbm_bytes           # of everything around that loop
    program.whole().by_kind()          # {"all-reduce": Total(count=75, bytes=614400)}

`compiled.cost_analysis()` cannot serve: it counts the body of a loop once, and on-chip memory as if it were HBM. Here

- arrays in on-chip memory (`S(1)` in the layout of a TPU program) cost nothing; on CPU every array counts;
- a fusion reads what it uses of an operand: a slice or gather its result, an update in place nothing; and writes what
  is new: an update in place the update alone;
- the body of a loop counts as often as it runs: as the compiler says (CPU), as `i < N` and `i + 1` say (TPU), or as
  the caller says (`trips`); other loops count once and are listed in `unresolved`;
- of the branches of a conditional the dearest counts;
- flops are those of products (dot and convolution), 2 per multiplication and addition. A convolution counts the pairs
  of which neither is padding: a batched product is one on TPU.

Limits: kernels (custom calls) read all of their operands and have no flops; padding of tiles is not seen.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from deer_jax.planning.text import Instruction, Text, arrays, bytes_of

COPY_BYTES = 1e6  # a copy from here on is a large one

# Operations that move nothing: other names of what is there, or constants.
FREE = {
    "after-all", "bitcast", "bitcast-convert", "constant", "get-tuple-element", "iota", "opt-barrier", "parameter",
    "partition-id", "replica-id", "reshape", "tuple",
}  # fmt: skip
FREE_CALLS = (
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "GatherScatterIndicesBitpacked", "Sharding",
)  # fmt: skip
PASSING = ("bitcast", "convert", "copy", "reshape", "transpose")  # inside a fusion they are not stored
ALONE = re.compile(r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\]<=)")  # groups of one device each
COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation. bytes: of its operand or its result, whichever is larger."""

    kind: str
    bytes: float


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction as it is run: figures of one run, how often, and inside which loops, outermost first."""

    instruction: Instruction
    hbm_bytes: float
    flops: float
    collectives: tuple[Collective, ...]
    copied: float  # bytes that a copy writes to HBM
    largest: float  # bytes of the largest array that it makes in HBM
    times: float
    loops: tuple[str, ...]
    origin: str  # the operation's name in JAX and the source lines that made it


class Total(NamedTuple):
    """How often, and bytes in all."""

    count: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a part of a program costs, per device."""

    steps: tuple[Step, ...]

    @property
    def hbm_bytes(self) -> float:
        """Bytes read from and written to HBM."""
        return sum(step.hbm_bytes * step.times for step in self.steps)

    @property
    def flops(self) -> float:
        """Of products of matrices."""
        return sum(step.flops * step.times for step in self.steps)

    def by_kind(self) -> dict[str, Total]:
        """Collectives: how many are run of each kind and the bytes of all of them."""
        totals: dict[str, Total] = {}
        for step in self.steps:
            for kind, size in ((one.kind, one.bytes) for one in step.collectives):
                before = totals.get(kind, Total(0, 0))
                totals[kind] = Total(before.count + step.times, before.bytes + size * step.times)
        return totals

    @property
    def collectives(self) -> Total:
        """All kinds of collectives together."""
        totals = self.by_kind().values()
        return Total(sum(total.count for total in totals), sum(total.bytes for total in totals))

    @property
    def large_copies(self) -> Total:
        """Copies that write COPY_BYTES and more to HBM, and what they write."""
        found = [step for step in self.steps if step.copied >= COPY_BYTES]
        return Total(sum(step.times for step in found), sum(step.times * step.copied for step in found))

    def dearest(self, count: int, key: str = "hbm_bytes") -> list[Step]:
        """The steps that cost most in all their runs: of `hbm_bytes`, of `flops`, or of bytes of `collectives`."""

        def total(step: Step) -> float:
            one = sum(part.bytes for part in step.collectives) if key == "collectives" else getattr(step, key)
            return one * step.times

        return [step for step in sorted(self.steps, key=total, reverse=True)[:count] if total(step) > 0]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device as the compiler planned them."""

    arguments: int
    results: int
    aliased: int  # results that lie where arguments lay
    temporaries: int
    peak: int

    @classmethod
    def of(cls, compiled: Any) -> "Memory":
        """Of a compiled program."""
        found = compiled.memory_analysis()
        return cls(
            found.argument_size_in_bytes, found.output_size_in_bytes, found.alias_size_in_bytes,
            found.temp_size_in_bytes, found.peak_memory_in_bytes,
        )  # fmt: skip


class Program:
    """The text of a compiled program, read.

    Args:
      text: `compiled.as_text()`.
      trips: how often loops run whose end depends on data; the key is a part of the loop's `origin` (scope, file or
        function), the first that fits counts.
    Attributes:
      unresolved: the origins, by name, of the loops whose number of runs nobody knows, from the outside inwards.
    """

    def __init__(self, text: str, trips: Mapping[str, float] | None = None):
        self.text = Text(text)
        self._trips_of = dict(trips or {})
        self._used: dict[tuple[str, int], float] = {}
        loops = [line for lines in self.text.computations.values() for line in lines.values() if line.op == "while"]
        self.unresolved = {loop.name: self.text.origin(loop) for loop in reversed(loops) if self._trips(loop) is None}

    def whole(self) -> Cost:
        """One call of the program; a loop whose runs nobody knows counts once."""
        return Cost(tuple(self._walk(self.text.entry)))

    def per_round(self) -> Cost:
        """One pass of the round loop: the last loop of the entry whose runs nobody knows. ValueError without one."""
        loop = self._round_loop()
        if loop is None:
            raise ValueError("the entry has no loop whose end depends on data")
        return Cost(tuple(self._walk(loop.called("body"), loops=(loop.name,))))

    def once(self) -> Cost:
        """What a call costs beside the rounds."""
        return Cost(tuple(self._walk(self.text.entry, without=self._round_loop())))

    def _round_loop(self) -> Instruction | None:
        entry = self.text.computations[self.text.entry].values()
        loops = [line for line in entry if line.op == "while" and self._trips(line) is None]
        return loops[-1] if loops else None

    def _trips(self, loop: Instruction) -> float | None:
        if known := re.search(r'known_trip_count":?\{"n":"(\d+)"', loop.attrs):
            return int(known[1])
        condition = self.text.computations[loop.called("condition")]
        root = self.text.root(loop.called("condition"))
        if root.op == "compare" and "direction=LT" in root.attrs:
            limit, counter = condition.get(root.args[1]), condition.get(root.args[0])
            if limit and counter and limit.op == "constant" and counter.op == "get-tuple-element":
                return math.ceil(int(limit.args[0]) / self._stride(loop, counter))
        origin = self.text.origin(loop)
        return next((count for key, count in self._trips_of.items() if key in origin), None)

    def _stride(self, loop: Instruction, counter: Instruction) -> int:
        """What a pass of a loop adds to its counter; more than 1 where the compiler has unrolled it."""
        place = re.search(r"index=(\d+)", counter.attrs)
        lines, root = self.text.computations[loop.called("body")], self.text.root(loop.called("body"))
        grown = lines[root.args[int(place[1])]] if place and root.op == "tuple" else root
        added = [lines[name] for name in grown.args if lines[name].op == "constant"] if grown.op == "add" else []
        return int(added[0].args[0]) if added else 1

    def _walk(
        self, computation: str, times: float = 1, loops: tuple[str, ...] = (), without: Instruction | None = None
    ) -> Iterator[Step]:
        for line in self.text.computations[computation].values():
            if line is without:
                continue
            if line.op == "while":
                count = self._trips(line)
                yield from self._walk(
                    line.called("body"), times * (1 if count is None else count), (*loops, line.name), without
                )
            elif line.op == "call":
                yield from self._walk(line.called("to_apply"), times, loops, without)
            elif line.op == "conditional":
                branches = [list(self._walk(branch, times, loops)) for branch in _branches(line)]
                yield from max(branches, key=lambda steps: (Cost(tuple(steps)).hbm_bytes, Cost(tuple(steps)).flops))
            elif line.op not in FREE and not line.op.endswith("-done"):
                bytes_, flops = self._bytes(computation, line), self._flops(computation, line)
                collectives = tuple(self._collectives(computation, line))
                made = self._made(computation, line)
                copied = sum(made) if line.op in ("copy", "copy-start") else 0.0
                origin = self.text.origin(line)
                yield Step(line, bytes_, flops, collectives, copied, max(made, default=0.0), times, loops, origin)

    # Bytes

    def _bytes(self, computation: str, line: Instruction) -> float:
        if _is_free(line):
            return 0.0
        lines = self.text.computations[computation]
        total = 0.0
        for place, name in enumerate(line.args):
            if name not in lines or not any(array.in_hbm for array in arrays(lines[name].type)):
                continue
            if inner := line.called():
                total += self._read_by(inner, place)
            elif place == 0 and line.op in ("dynamic-slice", "slice", "gather", "slice-start"):
                total += bytes_of(self._result(computation, line))
            elif place > 0 or line.op not in ("dynamic-update-slice", "scatter"):
                total += sum(array.bytes for array in arrays(lines[name].type) if array.in_hbm)
        return total + sum(self._made(computation, line))

    def _made(self, computation: str, line: Instruction) -> list[float]:
        """Bytes that it writes to HBM, by array."""
        leaves = arrays(self._result(computation, line))
        return [new for new, leaf in zip(self._written(computation, line), leaves, strict=True) if leaf.in_hbm]

    def _result(self, computation: str, line: Instruction) -> str:
        """The type of what it makes; of the first half of an asynchronous operation that of the second."""
        if line.op.endswith("-start"):
            for user, _ in self.text.users(computation, line.name):
                if user.op.endswith("-done"):
                    return user.type
        return line.type

    def _read_by(self, computation: str, place: int) -> float:
        """Bytes that a fused computation uses of its parameter."""
        key = (computation, place)
        if key not in self._used:
            lines = self.text.computations[computation].values()
            name = next((x.name for x in lines if x.op == "parameter" and x.args == (str(place),)), "")
            self._used[key] = self._use(computation, name) if name else 0.0
        return self._used[key]

    def _use(self, computation: str, name: str) -> float:
        full, total = bytes_of(self.text.computations[computation][name].type), 0.0
        for user, place in self.text.users(computation, name):
            if user.op in PASSING and not user.root:
                total += self._use(computation, user.name)
            elif place == 0 and user.op in ("dynamic-slice", "slice", "gather"):
                total += bytes_of(user.type)
            elif user.op == "fusion":
                total += self._read_by(user.called(), place)
            elif user.op == "tuple" or _is_free(user):
                pass  # handed on
            elif place == 0 and user.op in ("dynamic-update-slice", "scatter"):
                pass  # updated in place
            elif not self._goes_on(computation, user):
                total += full
        return min(total, full)

    def _written(self, computation: str, line: Instruction) -> list[float]:
        """Bytes written of each leaf of the result."""
        lines = self.text.computations[computation]
        if line.op == "tuple":
            return [new for name in line.args for new in self._written(computation, lines[name])]
        if line.op in ("bitcast", "reshape") and lines[line.args[0]].op != "parameter":
            return self._written(computation, lines[line.args[0]])
        if line.op == "dynamic-update-slice":
            return [bytes_of(lines[line.args[1]].type)]
        if line.op == "scatter" and len(line.args) == 3:
            return [bytes_of(lines[line.args[2]].type)]
        leaves = [array.bytes for array in arrays(self._result(computation, line))]
        if line.op == "fusion":
            inner = line.called()
            new = self._written(inner, self.text.root(inner))
            aliased = re.search(r"output_to_operand_aliasing=\{\{([\d, ]*)\}: \(", line.attrs)
            if "async-collective" in line.name and aliased:  # the operand of the first half, the result of the second
                return [0.0] * len(leaves) if not aliased[1] else [0.0, *leaves[1:]]
            return new if len(new) == len(leaves) else leaves
        if (line.op == "parameter" and computation != self.text.entry) or self._goes_on(computation, line):
            return [0.0] * len(leaves)  # handed on as it is
        return leaves

    # Products

    def _flops(self, computation: str, line: Instruction) -> float:
        if line.op == "dot":
            return self._dot(self.text.computations[computation], line)
        if line.op == "convolution":
            return self._convolution(self.text.computations[computation], line)
        if inner := line.called():
            return sum(self._flops(inner, part) for part in self.text.computations[inner].values())
        return 0.0

    @staticmethod
    def _dot(lines: dict[str, Instruction], line: Instruction) -> float:
        left = arrays(lines[line.args[0]].type)[0].dims
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attrs)
        over = [left[int(axis)] for axis in summed[1].split(",") if axis] if summed else []
        return 2.0 * math.prod(arrays(line.type)[0].dims) * math.prod(over)

    @staticmethod
    def _convolution(lines: dict[str, Instruction], line: Instruction) -> float:
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attrs)
        assert labels is not None
        left, kernel = (arrays(lines[name].type)[0].dims for name in line.args[:2])
        result = arrays(line.type)[0].dims
        pairs = 1.0
        for place, window in enumerate(_windows(line.attrs, len(left) - 2)):
            spatial = str(place)
            pairs *= _pairs(left[labels[1].index(spatial)], result[labels[3].index(spatial)], window)
        rows, columns = result[labels[3].index("b")], result[labels[3].index("f")]
        return 2.0 * rows * columns * kernel[labels[2].index("i")] * pairs

    # Collectives

    def _collectives(self, computation: str, line: Instruction) -> Iterator[Collective]:
        if ALONE.search(line.attrs):
            return
        if found := COLLECTIVE.match(line.op):
            lines = self.text.computations[computation]
            operands = sum(bytes_of(lines[name].type) for name in line.args if name in lines)
            if not self._goes_on(computation, line):
                yield Collective(found[1], max(operands, bytes_of(self._result(computation, line))))
        elif inner := line.called():
            for part in self.text.computations[inner].values():
                yield from self._collectives(inner, part)

    def _goes_on(self, computation: str, line: Instruction) -> bool:
        """Whether it is a later piece of a collective that began in an earlier fusion, beside whose work it runs."""
        if "chain_id=" not in line.attrs or not COLLECTIVE.match(line.op):
            return False
        lines = self.text.computations[computation].values()
        return not any('"AsyncCollectiveStart"' in other.attrs for other in lines)


def _is_free(line: Instruction) -> bool:
    return line.op == "custom-call" and any(f'"{name}"' in line.attrs for name in FREE_CALLS)


class _Window(NamedTuple):
    size: int = 1
    stride: int = 1
    low: int = 0  # padding in front
    lhs_dilate: int = 1
    rhs_dilate: int = 1


def _windows(attrs: str, spatial: int) -> list[_Window]:
    found = re.search(r"window=\{([^}]*)\}", attrs)
    values = dict(part.split("=") for part in found[1].split()) if found else {}
    columns = {name: values[name].split("x") for name in values}
    numbers = {name: columns[name] for name in ("size", "stride", "lhs_dilate", "rhs_dilate") if name in columns}
    numbers |= {"low": [pad.split("_")[0] for pad in columns["pad"]]} if "pad" in columns else {}
    return [_Window(**{name: int(column[i]) for name, column in numbers.items()}) for i in range(spatial)]


def _pairs(inputs: int, outputs: int, window: _Window) -> int:
    """Pairs of an output place and a window place that meet an input, not padding and not a gap of a dilation."""
    reach = (inputs - 1) * window.lhs_dilate
    places = (
        out * window.stride + at * window.rhs_dilate - window.low
        for out, at in itertools.product(range(outputs), range(window.size))
    )
    return sum(0 <= place <= reach and place % window.lhs_dilate == 0 for place in places)


def _branches(line: Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", line.attrs):
        return re.findall(r"%([\w.\-]+)", found[1])
    return [line.called("true_computation"), line.called("false_computation")]
