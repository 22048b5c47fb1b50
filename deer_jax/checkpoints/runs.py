"""The folder of a training run: what it is, its checkpoints, and the model in it.

    recipe.yaml        what the run does, as it was begun
    identity.json      what else decides its result, such as the digests of its target and answers; see `claims`
    drafter/, target/  config.json and tokenizer of what is trained, without weights: the one or the other
    checkpoints/STEP/  parameters, their average, optimiser state and position in the data, as Orbax writes them, and
                       checkpoint.json: step, score, size and SHA-256 of every file of the checkpoint and of the
                       description above, and the SHA-256 of all this
    metrics.jsonl, tensorboard/

A checkpoint appears under its final name only when it is complete and on the disk, so a run that is killed has the ones
before. One whose files are not those that were written is never read.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from deer_jax.digests import sha256_of
from deer_jax.errors import InputError, RunError, one_line
from deer_jax.files import Lock, disk_error, remove, sync_folder, sync_tree, write_file
from deer_jax.formats import json_bytes, parse_json, unreadable
from deer_jax.models.transformer import Params

RECIPE, IDENTITY, CHECKPOINTS, RECORD = "recipe.yaml", "identity.json", "checkpoints", "checkpoint.json"
DRAFTER, TARGET = "drafter", "target"  # what a run trains, and the folder that describes it
FORMAT = 1  # of checkpoint.json; its own digest is made in the same way in every format
STEP = re.compile(r"0|[1-9][0-9]{0,17}")
PARTIAL = re.compile(r"\.[0-9]+\.partial-[0-9a-f]{8}(\.orbax-checkpoint-tmp.*)?")  # Orbax writes beside, as we do
PATTERN = re.compile(r"[*?\[\]\\]")  # tensorstore takes such names for patterns, and finds nothing
OS_ERROR = re.compile(r"os_error_code='(\d+)'|\[Errno (\d+)\]")
THREADS = 4  # that read files for their digests
GOES_ON = "earlier checkpoints are whole, and the same command goes on from the newest"


class DamagedError(RunError):
    """The files of a checkpoint are not those that were written. One line that names the first of them."""


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
    """The checkpoints of a run that this process has locked. The newest `keep` stay, and the best."""

    def __init__(self, folder: Path, *, keep: int, lock: Lock):
        """What processes that are gone have left of their writing is removed."""
        check_path(folder)
        self.folder, self._keep, self._lock = (folder / CHECKPOINTS).absolute(), keep, lock
        lock.check()
        try:
            self.folder.mkdir(exist_ok=True)
            for entry in os.scandir(self.folder):
                if PARTIAL.fullmatch(entry.name):
                    remove(Path(entry.path))
        except OSError as error:
            raise disk_error(self.folder, error) from None

    def newest_first(self) -> list[Checkpoint]:
        """Those whose checkpoint.json is sound."""
        return [Checkpoint(step, record["score"]) for step, record in self._records() if record is not None]

    def steps(self) -> list[int]:
        """Of all, newest first, the damaged ones too."""
        return _steps(self.folder)

    def _records(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        for step in self.steps():
            try:
                yield step, read_record(self.folder / str(step))
            except DamagedError:
                yield step, None

    def save(self, step: int, parts: Mapping[str, Any], score: float | None) -> None:
        """Write a checkpoint and wait for it, then remove those that are to stay no longer.

        Raises RunError, one line, where the disk does not take it, or the run's folder is no longer there.
        """
        self._lock.check()
        final = self.folder / str(step)
        partial = self._partial(step)
        try:
            if os.path.lexists(final):
                raise RunError(f"{final}: is already there; move it away, then the same command goes on")
            with _quiet():
                ocp.save_checkpointables(str(partial), dict(parts))
            record = {
                "format": FORMAT, "step": step, "score": score, "files": _describe(partial),
                "description": _description(self.folder.parent),
            }  # fmt: skip
            write_file(partial / RECORD, _record_bytes(record))
            sync_tree(partial)
            self._lock.check()
            partial.rename(final)
            sync_folder(self.folder)
        except BaseException as error:
            self._give_up(partial)
            if isinstance(error, OSError | ValueError) and not isinstance(error, InputError):
                failure = _system_error(error)
                if failure is not None:
                    raise disk_error(final, failure, GOES_ON) from None
            raise
        self._remove_old()

    def _partial(self, step: int) -> Path:
        return self.folder / f".{step}.partial-{secrets.token_hex(4)}"

    def _give_up(self, partial: Path) -> None:
        """Remove what was begun; RunError if the run's folder was taken away meanwhile, which Orbax makes again."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"{partial.name}*"):
                remove(path)
        try:
            self._lock.check()
        except RunError:
            with contextlib.suppress(OSError):  # what holds anything stays
                self.folder.rmdir()
                self.folder.parent.rmdir()
            raise

    def _remove_old(self) -> None:
        found = self.newest_first()
        best = best_of(found)
        for each in found[self._keep :]:
            if each != best:
                partial = self._partial(each.step)
                try:
                    (self.folder / str(each.step)).rename(partial)  # half of one is no checkpoint, nor a damaged one
                except OSError as error:
                    raise disk_error(self.folder / str(each.step), error) from None
                remove(partial)

    def restore(self, step: int, parts: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of a checkpoint: arrays like the abstract ones given, iterators moved to where they were.

        Raises DamagedError where its files are not those that were written, and RunError where they are, but cannot be
        read as these parts.
        """
        folder = self.folder / str(step)
        verify(folder, read_record(folder))
        return {name: _load(folder, name, like) for name, like in parts.items()}

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that its step can be written again; where it is now."""
        source, number = self.folder / str(step), 1
        while os.path.lexists(aside := self.folder.parent / f"damaged-{step}-{number}"):
            number += 1
        try:
            source.rename(aside)
        except OSError as error:
            raise disk_error(aside, error) from None
        return aside


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
    for step in _steps(where):
        try:
            found[step] = read_record(where / str(step))
        except DamagedError:
            if (where / str(step)).exists():  # training may have removed it just now
                raise
    if not found:
        raise InputError(f"{folder}: the run has no checkpoint yet; training writes the first one later")
    best = best_of([Checkpoint(step, record["score"]) for step, record in found.items()])
    step = best.step if best else max(found)
    return where / str(step), found[step]


def read_best(folder: Path, shapes: Params) -> Params:
    """The parameters to decode with, of the run's best checkpoint, or its newest if none was measured.

    shapes: the parameters as shapes, float32, stacked. Where an average of the parameters was kept, it is read.

    Raises RunError, one line, if what is to be read is damaged: another checkpoint would not be the best.
    """
    where = None
    try:
        where, record = best_checkpoint(folder)
        part = "average" if any(name.startswith("average/") for name in record["files"]) else "params"
        verify(where, record, only=part)
        _verify_description(folder, record)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), shapes)
        return _load(where.absolute(), part, wanted)
    except RunError as error:
        if where is not None and not where.exists():
            return read_best(folder, shapes)  # training has removed it meanwhile, as it has better ones
        if isinstance(error, DamagedError):
            raise RunError(f"{error}; remove that checkpoint to use the next best") from None
        raise


def _steps(folder: Path) -> list[int]:
    """Of the checkpoints in a folder, newest first."""
    try:
        return sorted((int(entry.name) for entry in os.scandir(folder) if STEP.fullmatch(entry.name)), reverse=True)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from None


def _load(folder: Path, name: str, like: Any) -> Any:
    """One part of a checkpoint whose files are those that were written."""
    # One at a time: of several, Orbax leaves those behind a failing one waiting, which Python complains about.
    try:
        with _quiet():
            return ocp.load_checkpointables(str(folder), {name: like})[name]
    except Exception as error:  # of any kind: Orbax, tensorstore and grain have no common one
        while error.__cause__ is not None:
            error = error.__cause__
        line = one_line(error)
        raise RunError(f"{folder}: its files are as they were written, but its {name} cannot be read: {line}") from None


def _describe(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file, by its path in the folder."""
    names = _names(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: sha256_of(folder / name), names)
        return {name: [(folder / name).stat().st_size, digest] for name, digest in zip(names, digests, strict=True)}


def _description(run: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of the files that describe what a run trains, by their path in its folder."""
    kinds = [kind for kind in (DRAFTER, TARGET) if (run / kind).is_dir()]
    return {f"{kind}/{name}": found for kind in kinds for name, found in _describe(run / kind).items()}


def _verify_description(run: Path, record: Mapping[str, Any]) -> None:
    """RunError if the configuration or tokenizer is not the one that its checkpoint was written with."""
    before, now = record["description"], _description(run)
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            raise RunError(
                f"{run / name}: is not what the run wrote; bring it back, or change what an export makes instead"
            )


def _names(folder: Path) -> list[str]:
    """Every file but the record, and whatever else is no folder."""
    found = []
    for where, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        found += [os.path.relpath(os.path.join(where, name), folder) for name in (*names, *links)]
    return sorted(name for name in found if name != RECORD)


def _record_bytes(record: Mapping[str, Any]) -> bytes:
    """The content of checkpoint.json, whose last entry is the digest of the others."""
    digest = hashlib.sha256(json_bytes(record, indent=1)).hexdigest()
    return json_bytes({**record, "sha256": digest}, indent=1)


def read_record(folder: Path) -> dict[str, Any]:
    """The checkpoint.json of a checkpoint, `sha256` included.

    Raises DamagedError if it is not as it was written, and RunError if another version of this library wrote it.
    """
    path = folder / RECORD
    try:
        if not path.is_file():
            raise DamagedError(f"{folder}: damaged: has no {RECORD}")
        content = path.read_bytes()
    except OSError as error:
        raise _not_now(path, error) from None
    try:
        record: Any = parse_json(content, str(path))
        sound = content == _record_bytes({name: value for name, value in record.items() if name != "sha256"})
    except (ValueError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise DamagedError(f"{path}: damaged: is not as it was written")
    if record.get("format") != FORMAT:
        raise RunError(f"{path}: has format {record.get('format')!r:.20}, this version reads {FORMAT}; update deer_jax")
    if str(record["step"]) != folder.name:
        raise DamagedError(f"{folder}: damaged: is the checkpoint of step {record['step']}")
    return record


def verify(folder: Path, record: Mapping[str, Any], *, only: str | None = None) -> None:
    """DamagedError if a file is not the one that was written; InputError if there is one that was not.

    only: of the parts, look at this one; the files that lie beside the parts always count.
    """
    expected: Mapping[str, Sequence[Any]] = record["files"]
    if foreign := sorted(set(_names(folder)) - expected.keys()):
        raise InputError(f"{folder / foreign[0]}: was not written by the run; move it out of the checkpoint")
    names = [name for name in expected if only is None or "/" not in name or name.startswith(f"{only}/")]
    for name in names:
        try:
            found = (folder / name).stat()
        except OSError as error:
            raise _not_now(folder / name, error) from None
        if not stat.S_ISREG(found.st_mode) or found.st_size != expected[name][0]:
            raise DamagedError(f"{folder / name}: damaged: has {found.st_size:,} bytes, not {expected[name][0]:,}")
    with ThreadPoolExecutor(THREADS) as pool:
        for name, digest in zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True):
            if digest != expected[name][1]:
                raise DamagedError(f"{folder / name}: damaged: its content is not what was written")


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise _not_now(path, error) from None


def _not_now(path: Path, error: OSError) -> RunError:
    """What a checkpoint's file that cannot be read means: damage if it is not there, else perhaps a passing failure."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return DamagedError(f"{path}: damaged: is missing")
    return RunError(
        f"{path}: cannot be read: {error.strerror}; the same command goes on when it can, or, if the file is lost, "
        "when its checkpoint has been moved away"
    )


def _system_error(error: Exception) -> OSError | None:
    """What the operating system said, if it is behind the error: tensorstore only writes it into its message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    found = OS_ERROR.search(str(error))
    number = int(found[1] or found[2]) if found else None
    return None if number is None else OSError(number, os.strerror(number))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs what it raises, with tracebacks; what it raises is enough.

    Where it raises its threads may log after it has, so its records are left out from then on.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except BaseException:
        logger.addFilter(_not_of_orbax)
        raise
    finally:
        logger.setLevel(level)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
