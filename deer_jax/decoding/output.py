"""The file of a run's answers, made by one process or by several together, each its own part of it."""

import contextlib
import datetime
import json
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from deer_jax import processes
from deer_jax.data.answer_writer import STATE, AnswerWriter, state_path
from deer_jax.data.answers import shard_numbers, shard_path
from deer_jax.errors import InputError
from deer_jax.stores import place

Found = dict[int, tuple[set[int], dict[int, list[int]]]]  # of each shard, the items it answers and those that run


class Output:
    """An answer file and its shards; a context manager, whose methods all processes call together.

    Process i of n writes the items with item % n == i, to the shard of its number; that of process 0 is the output
    itself. What shards of more processes hold, from an earlier call, counts; their files stay as they are. All of them
    are locked for the time of the block: by their process, or by the lead.

    Attributes:
      begun, files: see `AnswerWriter`, of the lead.
      items: numbers of the items that are answered.
      running: tokens so far of the others that were begun, by item.
    """

    def __init__(self, path: str | Path, *, sharded: bool):
        """sharded: every process writes; otherwise the lead alone."""
        self.path = place(path)
        self.state = state_path(self.path)
        self.items: set[int] = set()
        self.running: dict[int, list[int]] = {}
        self._writers = processes.count() if sharded else 1
        self._shards: dict[int, AnswerWriter] = {}  # those that this process has locked

    def __enter__(self) -> "Output":
        """InputError for an output of which another process writes a part, or that cannot go on; nothing was written
        then."""
        with contextlib.ExitStack() as stack:

            def lock(numbers: Sequence[int]) -> None:
                for number in numbers:
                    self._shards[number] = stack.enter_context(AnswerWriter(shard_path(self.path, number)))

            def first() -> str:
                there = {*shard_numbers(self.path), *shard_numbers(self.path, STATE)}
                lock([0, *sorted(number for number in there if number >= self._writers)])
                return json.dumps([self._shards[0].begun.isoformat(), self._shards[0].files])

            begun, self.files = json.loads(processes.led(first))
            processes.every(lambda: lock([processes.number()] if 0 < processes.number() < self._writers else []))
            self.begun = datetime.datetime.fromisoformat(begun)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error) -> None:
        with self._open:
            if kind is None:
                processes.every(lambda: "")  # what the others have to write is written

    def begin(
        self,
        settings: Mapping[str, Any],
        items: Container[int],
        found: Callable[[dict[str, Any], str], None] | None = None,
    ) -> None:
        """Go on with the run, or begin it; the arguments are those of `AnswerWriter.begin`.

        found: called with the records of the shards that this process has.
        """
        processes.same({"output": {"path": str(self.path)} | dict(settings)})

        def start(first: bool) -> None:
            for number, writer in self._shards.items():
                if (number == 0) == first:
                    writer.begun, writer.files = self.begun, self.files
                    writer.begin(settings, items, found)

        processes.led(lambda: start(True))  # nothing is a part of a run that has not begun
        processes.every(lambda: start(False))
        shards = self._gathered()
        for number, (answered, _) in sorted(shards.items()):
            if twice := self.items & answered:
                item = min(twice)
                first = next(each for each, (theirs, _) in sorted(shards.items()) if item in theirs)
                one, other = shard_path(self.path, first), shard_path(self.path, number)
                raise InputError(f"{other}: item {item} stands in {one} already; write to another output")
            self.items = answered if len(shards) == 1 else self.items | answered
        for _, running in shards.values():  # one that was dealt to another process since may stand in several
            for item, tokens in running.items():
                if item not in self.items and len(tokens) > len(self.running.get(item, ())):
                    self.running[item] = tokens
        if len(shards) > 1:
            self._deal()

    def _gathered(self) -> Found:
        """What the shards of all processes hold."""
        own: Found = {number: (writer.items, writer.running) for number, writer in self._shards.items()}
        if processes.count() == 1:
            return own
        texts = processes.gather(
            json.dumps({number: [sorted(items), running] for number, (items, running) in own.items()})
        )
        return {
            int(number): (set(items), {int(item): tokens for item, tokens in running.items()})
            for text in texts
            for number, (items, running) in json.loads(text).items()
        }

    def _deal(self) -> None:
        """Each process keeps what runs of its own items; nothing is dropped before it is on the disk elsewhere."""
        for number, writer in self._own():
            writer.save([], {item: tokens for item, tokens in self.running.items() if self._has(number, item)})
        processes.every(lambda: "")
        for number, writer in self._own():
            writer.running = {item: tokens for item, tokens in writer.running.items() if self._has(number, item)}

    def _own(self) -> list[tuple[int, AnswerWriter]]:
        """The shards that this process writes: one or none, by number."""
        return [(number, writer) for number, writer in self._shards.items() if number < self._writers]

    def _has(self, number: int, item: int) -> bool:
        return item % self._writers == number

    def save(self, records: Sequence[Mapping[str, Any]], running: Mapping[int, list[int]]) -> None:
        """Append finished records, each with its "item", and replace what is known of those that run; every process
        hands over all of them, and has its own on the disk when this returns. Raises as `AnswerWriter.save`."""
        for number, writer in self._own():
            writer.save(
                [record for record in records if self._has(number, record["item"])],
                {item: tokens for item, tokens in running.items() if self._has(number, item)},
            )
        finished = {record["item"] for record in records}
        self.items |= finished
        self.running = {item: tokens for item, tokens in {**self.running, **running}.items() if item not in finished}
