"""An answer file while it is made: it grows line by line, and the run that makes it can be stopped and go on."""

import contextlib
import datetime
import hashlib
import json
import os
import re
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deer_jax.data.answers import MOST_LINE
from deer_jax.errors import InputError, RunError
from deer_jax.files import disk_error, replaceable, write_file
from deer_jax.formats import json_bytes, parse_json, read_json
from deer_jax.spools import Spool, lock
from deer_jax.stores import is_store, names, place

PUT_EVERY = 60.0  # seconds between two copies of the file to a store, which takes it as a whole each time
STATE = ".state.json"  # behind the name of a file: what is kept beside it of the run that makes it
# What a run is known by that nobody can read: how a line says that it differs.
UNREADABLE = {
    "target": "the target's weights, configuration, tokenizer or dtype changed",
    "drafter": "the drafter's weights or configuration changed",
    "prompts": "the prompts or their names changed",
}


class State(NamedTuple):
    """What FILE.state.json keeps of the run that makes FILE."""

    settings: dict[str, Any]
    running: dict[int, list[int]]
    size: int  # bytes of FILE when it was last saved
    sha256: str  # of these bytes
    begun: datetime.datetime
    files: Any  # what `Digests.records` returned


def state_path(output: Path) -> Path:
    return output.with_name(output.name + STATE)


def read_state(output: str | Path) -> State | None:
    """The state of the run that makes an output, None before it has begun. InputError for what cannot go on."""
    output = place(output)
    path, special = state_path(output), False
    try:
        if is_store(output):
            there = names(output.parent)
            exists, begun = output.name in there, path.name in there
        else:
            special = replaceable(output) == "special"
            exists, begun = os.path.lexists(output), os.path.lexists(path)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, InputError) else disk_error(output, error) from None
    if special:
        raise InputError(f"{output}: is no regular file, and what is appended there could not go on; name a file")
    if begun:
        return _state_of(read_json(path), path, _remedy(output))
    if exists:
        raise InputError(
            f"{output}: exists without {path.name}, so it is no run that can go on; write to another output, or remove "
            "it"
        )
    return None


def _remedy(output: Path) -> str:
    return f"write to another output, or remove {output} and {state_path(output).name}"


def _state_of(values: dict[str, Any], path: Path, remedy: str) -> State:
    wrong = InputError(f"{path}: is not the state of a run; {remedy}")
    settings, running, size, sha256 = (values.get(name) for name in ("settings", "running", "size", "sha256"))
    try:
        whole = values.get("checksum") == _checksum(values)
    except RecursionError:
        raise wrong from None
    if not whole:
        raise InputError(f"{path}: was damaged or changed by something else; {remedy}") if settings else wrong
    if not isinstance(settings, dict) or not isinstance(running, dict) or type(size) is not int or size < 0:
        raise wrong
    if not isinstance(sha256, str) or not all(re.fullmatch("[0-9]{1,12}", item) for item in running):
        raise wrong
    for tokens in running.values():
        if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
            raise wrong
    try:
        begun = datetime.datetime.fromisoformat(values["begun"])
    except (KeyError, TypeError, ValueError):
        raise wrong from None
    items = {int(item): tokens for item, tokens in running.items()}
    return State(settings, items, size, sha256, begun, values.get("files"))


def _checksum(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class AnswerWriter:
    """An answer file that grows, so that the run that makes it can be stopped at any moment and go on.

    What is finished is appended. What runs is kept in a second file beside it, FILE.state.json, with the settings of
    the run; a run with other settings is refused, and so is a file that has no such companion or is not as it was
    saved. A line that was being written when the run was stopped is dropped. One process writes a file at a time, for
    the length of a `with` block; `begin` comes first in it.

        with AnswerWriter("answers.jsonl") as writer:
            writer.begin(settings, items=range(100))
            writer.save([{"item": 3, ...}], running={})

    Attributes:
      begun: when the run was begun, to the second; local time.
      files: digests that the run knows, see `Digests`.
      items: numbers of the items that the file answers.
      running: tokens so far of the others that were begun, by item.
    """

    def __init__(self, path: str | Path):
        self.path = place(path)
        self.state = state_path(self.path)
        self.items: set[int] = set()
        self.running: dict[int, list[int]] = {}
        self._size, self._hash, self._descriptor = 0, hashlib.sha256(), -1

    def __enter__(self) -> "AnswerWriter":
        """InputError for an output that another process writes, or that cannot go on; nothing was written then."""
        read_state(self.path)
        with contextlib.ExitStack() as stack:
            self._spool = Spool(self.path.parent, stack.enter_context(lock(self.path)))
            self._spool.pull(self.path.name, self.state.name)
            stack.push(self._put_all)
            self._file = self._spool.path / self.path.name
            self._before = read_state(self.path)
            self._open = stack.pop_all()
        now = datetime.datetime.now().replace(microsecond=0)
        self.begun = self._before.begun if self._before else now
        self.files: Any = self._before.files if self._before else {}
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    def _put_all(self, kind: type[BaseException] | None, *error) -> None:
        """What a store does not have yet; where something went wrong before, that is what is said."""
        with contextlib.suppress(*(() if kind is None else (InputError, RunError))):
            self._spool.put(self.path.name, self.state.name)

    def begin(
        self,
        settings: Mapping[str, Any],
        items: Container[int],
        found: Callable[[dict[str, Any], str], None] | None = None,
    ) -> None:
        """Go on with the run, or begin it.

        Args:
          settings: what the answers depend on, as JSON values.
          items: numbers of all items that the run has.
          found: called with every record that the file has, and its place.
        """
        self._settings = json.loads(json.dumps(settings))  # as they are read back
        if self._before is not None:
            self._check(self._before.settings)
        else:
            self._save_state()  # before the file, which would be refused without it
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        if self._before is None or self._before.size == 0:
            flags |= os.O_CREAT
        try:
            self._descriptor = os.open(self._file, flags, 0o666)
        except FileNotFoundError:
            raise InputError(f"{self.path}: is gone, of which {self.state.name} says that it can go on; "
                             f"bring it back, or remove {self.state.name} to begin again") from None  # fmt: skip
        except OSError as error:
            raise disk_error(self.path, error) from None
        self._open.callback(os.close, self._descriptor)
        if self._before is not None:
            self._read(self._before, items, found)
            self.running = {i: tokens for i, tokens in self._before.running.items() if i not in self.items}
            if any(item not in items for item in self.running):
                raise InputError(f"{self.state}: is not the state of this run; {_remedy(self.path)}")
        self.save([], {})
        self._spool.put(self.state.name, self.path.name)  # a file without its state would be refused

    def save(self, records: Sequence[Mapping[str, Any]], running: Mapping[int, list[int]]) -> None:
        """Append finished records, each with its "item", and replace what is known of those that run.

        Both are on the disk when this returns; a store has them within PUT_EVERY seconds. RunError for a full disk, or
        where something else has changed the file; what was saved before is kept.
        """
        self._append(b"".join(json_bytes(record) for record in records))
        finished = {record["item"] for record in records}
        self.items |= finished
        self.running = {item: tokens for item, tokens in {**self.running, **running}.items() if item not in finished}
        self._save_state()
        self._spool.put(self.path.name, self.state.name, every=PUT_EVERY)

    def _append(self, content: bytes) -> None:
        ours = os.fstat(self._descriptor)
        try:
            there = os.lstat(self._file)
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino, there.st_size) != (ours.st_dev, ours.st_ino, self._size):
            raise RunError(f"{self.path}: was removed or changed while it was being written; what was to be appended "
                           "is lost")  # fmt: skip
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            if content:
                os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            kept = "what was written before is kept, and the same run goes on from there"
            raise disk_error(self.path, error, kept) from None
        self._size += len(content)
        self._hash.update(content)

    def _save_state(self) -> None:
        values = {
            "settings": self._settings, "running": {str(item): tokens for item, tokens in self.running.items()},
            "size": self._size, "sha256": self._hash.hexdigest(), "begun": self.begun.isoformat(), "files": self.files,
        }  # fmt: skip
        write_file(self._spool.path / self.state.name, json_bytes(values | {"checksum": _checksum(values)}))

    def _check(self, theirs: Mapping[str, Any]) -> None:
        differ = [
            UNREADABLE.get(name) or f"{name} {theirs.get(name)!r:.60} (now {self._settings.get(name)!r:.60})"
            for name in {**self._settings, **theirs}
            if theirs.get(name) != self._settings.get(name)
        ]
        if differ:
            raise InputError(
                f"{self.path}: was begun with other settings: {', '.join(differ):.500}; {_remedy(self.path)}"
            )

    def _read(self, saved: State, items: Container[int], found: Callable[[dict[str, Any], str], None] | None) -> None:
        """Collect what whole lines hold, and cut a torn one behind what was saved.

        Lines that were appended but not yet saved are kept.
        """
        lines: dict[int, int] = {}
        whole = not saved.size and saved.sha256 == self._hash.hexdigest()
        with os.fdopen(os.dup(self._descriptor), "rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MOST_LINE), b""), 1):
                where = f"{self.path}:{number}"
                if not line.endswith(b"\n"):
                    if len(line) == MOST_LINE:
                        raise InputError(f"{where}: a line of more than {MOST_LINE:,} bytes is no answer")
                    break
                record = self._record(line, where, items)
                if (first := lines.setdefault(record["item"], number)) != number:
                    raise InputError(
                        f"{where}: item {record['item']} stands in line {first} already; {_remedy(self.path)}"
                    )
                if found is not None:
                    found(record, where)
                self._size += len(line)
                self._hash.update(line)
                whole = whole or (self._size == saved.size and self._hash.hexdigest() == saved.sha256)
        if not whole:
            raise InputError(
                f"{self.path}: its first {saved.size:,} bytes are not those that were saved; {_remedy(self.path)}"
            )
        self.items = set(lines)
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError as error:
            raise disk_error(self.path, error) from None

    def _record(self, line: bytes, where: str, items: Container[int]) -> dict[str, Any]:
        try:
            record = parse_json(line, where)
        except InputError as error:
            raise InputError(f"{error}; {_remedy(self.path)}") from None
        if not isinstance(record, dict) or type(record.get("item")) is not int or record["item"] not in items:
            raise InputError(f"{where}: is no answer of this run; {_remedy(self.path)}")
        return record
