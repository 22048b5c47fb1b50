"""The folder of a training run: what it is, its checkpoints, and the model in it.

    recipe.yaml        what the run does, as it was begun
    identity.json      what else decides its result, such as the digests of its target and answers; see `claims`
    drafter/, target/  config.json and tokenizer of what is trained, without weights: the one or the other
    checkpoints/STEP/  parameters, their average and optimiser state, as Orbax writes them, and checkpoint.json, their
                       record; see `records`
    metrics.jsonl, tensorboard/

A checkpoint appears only when it is complete and on the disk, see `shelves`, so a run that is killed has the ones
before. One whose files are not those that were written is never read.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from deer_jax import processes
from deer_jax.checkpoints.records import (
    DRAFTER,
    RECORD,
    TARGET,
    DamagedError,
    damage,
    read_record,
    verify,
    verify_description,
)
from deer_jax.checkpoints.shelves import CHECKPOINTS, STEP, shelf_of, steps_in
from deer_jax.errors import InputError, RunError, one_line
from deer_jax.files import disk_error
from deer_jax.models.transformer import Params
from deer_jax.spools import Guard
from deer_jax.stores import Entry, is_store, look_anew, place

RECIPE, IDENTITY = "recipe.yaml", "identity.json"
PATTERN = re.compile(r"[*?\[\]\\]")  # tensorstore takes such names for patterns, and finds nothing
OS_ERROR = re.compile(r"os_error_code='(\d+)'|\[Errno (\d+)\]")
GOES_ON = "earlier checkpoints are whole, and the same command goes on from the newest"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: its step, and how good it was found there, if it was measured; larger is better."""

    step: int
    score: float | None


def best_of(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The one of the largest score, of several the last; None if none was measured."""
    measured = [(found.score, found.step, found) for found in checkpoints if found.score is not None]
    return max(measured)[2] if measured else None


class Checkpoints:
    """The checkpoints of a run that this process, or the lead of several, has locked; a context manager.

    The newest `keep` stay, and the best. All processes call the methods together: each writes and reads its parts of
    the arrays, the lead everything else.
    """

    def __init__(self, folder: Path, *, keep: int, lock: Guard):
        """What processes that are gone have left of their writing is removed."""
        check_path(folder)
        self._shelf, self._keep, self._lock = shelf_of(folder), keep, lock
        self.folder = self._shelf.folder
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None
        processes.led(self._open)

    def _open(self) -> None:
        self._lock.check()
        self._shelf.open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error, trace) -> None:
        """What was begun is there at the end of the block, also if that fails, but for an interruption."""
        if kind is None:
            self.wait()
        elif not issubclass(kind, KeyboardInterrupt) and processes.count() == 1:  # another may be gone
            with contextlib.suppress(InputError, RunError):
                self.wait()
        self._writer.shutdown(wait=False)

    def newest_first(self) -> list[Checkpoint]:
        """Those whose checkpoint.json is sound."""
        found = processes.led(lambda: json.dumps([dataclasses.astuple(each) for each in self._sound()]))
        return [Checkpoint(step, score) for step, score in json.loads(found)]

    def steps(self) -> list[int]:
        """Of all, newest first, the damaged ones too."""
        return json.loads(processes.led(lambda: json.dumps(steps_in(self.folder))))

    def _sound(self) -> list[Checkpoint]:
        found = []
        for step in steps_in(self.folder):
            with contextlib.suppress(DamagedError):
                found.append(Checkpoint(step, read_record(self.folder / str(step))["score"]))
        return found

    def save(self, step: int, parts: Mapping[str, Any], score: float | None) -> None:
        """`begin`, and `wait` for it."""
        self.begin(step, parts, score)
        self.wait()

    def begin(self, step: int, parts: Mapping[str, Any], score: float | None) -> None:
        """Begin to write a checkpoint. When this returns the arrays have been read and may change.

        Raises RunError, one line, where the disk does not take it, or the run's folder is no longer there: for this
        checkpoint, or for the one that was begun before, which is waited for.
        """
        self.wait()
        partial = self.folder / processes.led(lambda: self._new_name(step))
        _quiet()
        look_anew(partial)
        try:
            written = ocp.save_checkpointables_async(str(partial), dict(parts))
        except BaseException as error:
            raise self._failed(step, partial, error) from None
        self._pending = self._writer.submit(self._finish, written, step, partial, score)

    def wait(self) -> None:
        """Until the checkpoint that was begun is there, and those that are to stay no longer are gone.

        Raises RunError, one line, where the disk does not take it, or the run's folder is no longer there.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            processes.led(pending.result)
            pending.result()

    def _new_name(self, step: int) -> str:
        """Of the folder to write in; the lead looks whether it may."""
        self._lock.check()
        if self._shelf.has(step):
            raise RunError(f"{self.folder / str(step)}: is already there; move it away, then the same command goes on")
        return self._shelf.new_name(step)

    def _finish(self, written: Any, step: int, partial: Path, score: float | None) -> None:
        """Give a checkpoint its record and its name when all processes have written their parts of it."""
        try:
            written.result()
            if not processes.lead():
                return
            self._shelf.finish(partial.name, step, score, self._lock.check)
        except BaseException as error:
            raise self._failed(step, partial, error) from None
        self._remove_old()

    def _failed(self, step: int, partial: Path, error: BaseException) -> BaseException:
        """Remove what was begun; the error to raise."""
        if processes.lead():
            try:
                self._shelf.give_up(partial.name, self._lock.check)
            except RunError as gone:
                return gone
            except InputError:
                pass  # a store that refuses everything: nothing is removed, and what failed first is said
        if is_store(self.folder) and isinstance(error, Exception) and not isinstance(error, InputError | RunError):
            return RunError(f"{self.folder / str(step)}: cannot be written: {one_line(error)}; {GOES_ON}")
        if isinstance(error, OSError | ValueError) and not isinstance(error, InputError):
            failure = _system_error(error)
            if failure is not None:
                return disk_error(self.folder / str(step), failure, GOES_ON)
        return error

    def _remove_old(self) -> None:
        found = self._sound()
        best = best_of(found)
        for each in found[self._keep :]:
            if each != best:
                self._shelf.remove(each.step)

    def restore(self, step: int, parts: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of a checkpoint: arrays like the abstract ones given, on whatever mesh they were written.

        Raises DamagedError where its files are not those that were written, and RunError where they are, but cannot be
        read as these parts.
        """
        folder = self.folder / str(step)
        if found := processes.led(lambda: damage(folder)):
            raise DamagedError(found)
        return {name: _load(folder, name, like) for name, like in parts.items()}

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that its step can be written again; where it is now."""
        return place(processes.led(lambda: str(self._shelf.set_aside(step))))


def is_run(folder: Path, kind: str) -> bool:
    """Whether a folder is that of a run that trains a DRAFTER, or a TARGET."""
    return (folder / RECIPE).is_file() and (folder / kind).is_dir()


def check_path(folder: Path) -> None:
    """InputError if checkpoints written to a folder could not be read back."""
    where = str(folder.absolute())
    if found := PATTERN.search(where):
        raise InputError(f"{folder}: a path of checkpoints must not have {found[0]!r} in it ({where}); choose another")
    try:
        where.encode()
    except UnicodeEncodeError:
        raise InputError(f"{folder}: a path of checkpoints must be UTF-8; choose another") from None


def best_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where the best checkpoint of a run is, or its newest if none was measured, and its checkpoint.json.

    Raises InputError if there is none yet, and DamagedError if the record of any cannot be read: it may be the best.
    """
    check_path(folder)
    where = folder / CHECKPOINTS
    found = {}
    for step in steps_in(where):
        try:
            found[step] = read_record(where / str(step))
        except DamagedError:
            if (where / str(step)).exists():  # training may have removed it just now
                raise
    if not found:
        raise InputError(f"{folder}: the run has no checkpoint yet; training writes the first one later")
    step = _chosen(found)
    return where / str(step), found[step]


def _chosen(records: Mapping[int, Mapping[str, Any]]) -> int:
    """The step of the checkpoint to use: the best, or the newest if none was measured."""
    best = best_of([Checkpoint(step, record["score"]) for step, record in records.items()])
    return best.step if best else max(records)


def _used(record: Mapping[str, Any]) -> str:
    """The part of a checkpoint to decode with."""
    return "average" if any(name.startswith("average/") for name in record["files"]) else "params"


def needed(run: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """What of a run's folder on a store `read_best` reads: the other checkpoints stay there, but for their records."""
    names = [name for name in entries if name in (RECIPE, IDENTITY) or name.startswith((f"{DRAFTER}/", f"{TARGET}/"))]
    records = {}
    for name in entries:
        where, _, rest = name.removeprefix(f"{CHECKPOINTS}/").partition("/")
        if name.startswith(CHECKPOINTS) and STEP.fullmatch(where) and rest == RECORD:
            names.append(name)
            with contextlib.suppress(RunError):  # who reads it here will say so
                records[int(where)] = read_record(run / CHECKPOINTS / where)
    if records:
        step = _chosen(records)
        used = [
            name for name in records[step]["files"] if "/" not in name or name.startswith(f"{_used(records[step])}/")
        ]
        names += [f"{CHECKPOINTS}/{step}/{name}" for name in used]
    return {name: entries[name] for name in names if name in entries}


def read_best(folder: Path, shapes: Params) -> Params:
    """The parameters to decode with, of the run's best checkpoint, or its newest if none was measured.

    shapes: the parameters as shapes, float32, stacked. Where an average of the parameters was kept, it is read.

    Raises RunError, one line, if what is to be read is damaged: another checkpoint would not be the best.
    """
    where = None
    try:
        where, record = best_checkpoint(folder)
        part = _used(record)
        verify(where, record, only=part)
        verify_description(folder, record)
        here = SingleDeviceSharding(jax.local_devices()[0])  # and not where the run had them
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding or here), shapes)
        return _load(where.absolute(), part, wanted)
    except RunError as error:
        if where is not None and not where.exists():
            return read_best(folder, shapes)  # training has removed it meanwhile, as it has better ones
        if isinstance(error, DamagedError):
            raise RunError(f"{error}; remove that checkpoint to use the next best") from None
        raise


def _load(folder: Path, name: str, like: Any) -> Any:
    """One part of a checkpoint whose files are those that were written."""
    # One at a time: of several, Orbax leaves those behind a failing one waiting, which Python complains about.
    _quiet()
    look_anew(folder)
    try:
        return ocp.load_checkpointables(str(folder), {name: like})[name]
    except Exception as error:  # of any kind: Orbax, tensorstore and grain have no common one
        while error.__cause__ is not None:
            error = error.__cause__
        line = one_line(error)
        raise RunError(f"{folder}: its files are as they were written, but its {name} cannot be read: {line}") from None


def _system_error(error: Exception) -> OSError | None:
    """What the operating system said, if it is behind the error: tensorstore only writes it into its message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    found = OS_ERROR.search(str(error))
    number = int(found[1] or found[2]) if found else None
    return None if number is None else OSError(number, os.strerror(number))


def _quiet() -> None:
    """Orbax logs what it raises, with tracebacks and from threads of its own; what it raises is enough."""
    logging.getLogger("absl").addFilter(_not_of_orbax)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
