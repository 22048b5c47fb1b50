"""Where the checkpoints of a run lie: in its folder, here or on an object store.

One in a folder here gets its name, its step, when it is complete and on the disk. A store cannot rename a folder: there
one is written under its name, and is a checkpoint from the moment on that its record lies beside its files.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

from deer_jax.checkpoints.records import RECORD, write_record
from deer_jax.errors import InputError, RunError
from deer_jax.files import disk_error, remove, sync_folder, sync_tree
from deer_jax.formats import unreadable
from deer_jax.stores import copy, is_store, names, remove_tree

CHECKPOINTS = "checkpoints"
STEP = re.compile(r"0|[1-9][0-9]{0,17}")
PARTIAL = re.compile(r"\.[0-9]+\.partial-[0-9a-f]{8}(\.orbax-checkpoint-tmp.*)?")  # Orbax writes beside, as we do


def shelf_of(run: Path) -> "Shelf":
    """That of a run's folder."""
    return StoreShelf(run) if is_store(run) else Shelf(run)


def steps_in(folder: Path) -> list[int]:
    """Of the checkpoints in a folder, newest first."""
    try:
        return sorted((int(name) for name in names(folder) if STEP.fullmatch(name)), reverse=True)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise error if isinstance(error, InputError) else unreadable(folder, error) from None


class Shelf:
    """The checkpoints in a run's folder here.

    Attributes:
      run: the run's folder. folder: where they lie in it.
    """

    def __init__(self, run: Path):
        self.run, self.folder = run.absolute(), run.absolute() / CHECKPOINTS

    def open(self) -> None:
        """Make it, and remove what processes that are gone have left of their writing."""
        try:
            self.folder.mkdir(exist_ok=True)
            for entry in os.scandir(self.folder):
                if PARTIAL.fullmatch(entry.name):
                    remove(Path(entry.path))
        except OSError as error:
            raise disk_error(self.folder, error) from None

    def has(self, step: int) -> bool:
        """Whether anything is there under that name."""
        return os.path.lexists(self.folder / str(step))

    def new_name(self, step: int) -> str:
        """Of the folder to write a checkpoint in."""
        return f".{step}.partial-{secrets.token_hex(4)}"

    def finish(self, name: str, step: int, score: float | None, check: Callable[[], None]) -> None:
        """Make a checkpoint of what has been written; check: raises if that may no longer be."""
        partial = self.folder / name
        write_record(partial, self.run, step=step, score=score)
        sync_tree(partial)
        check()
        partial.rename(self.folder / str(step))
        sync_folder(self.folder)

    def give_up(self, name: str, check: Callable[[], None]) -> None:
        """Remove what was begun; what `check` raises if the run's folder was taken away meanwhile, which Orbax makes
        again."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"{name}*"):
                remove(path)
        try:
            check()
        except RunError:
            with contextlib.suppress(OSError):  # what holds anything stays
                self.folder.rmdir()
                self.run.rmdir()
            raise

    def remove(self, step: int) -> None:
        """Remove a checkpoint."""
        partial = self.folder / self.new_name(step)
        try:
            (self.folder / str(step)).rename(partial)  # half of one is no checkpoint, nor a damaged one
        except OSError as error:
            raise disk_error(self.folder / str(step), error) from None
        remove(partial)

    def set_aside(self, step: int) -> Path:
        """Move a checkpoint into the run's folder, under a name of its own; where it is now."""
        number = 1
        while os.path.lexists(aside := self.run / f"damaged-{step}-{number}"):
            number += 1
        try:
            (self.folder / str(step)).rename(aside)
        except OSError as error:
            raise disk_error(aside, error) from None
        return aside


class StoreShelf(Shelf):
    """The checkpoints in a run's folder on a store."""

    def open(self) -> None:
        for step in steps_in(self.folder):
            if RECORD not in names(self.folder / str(step)):
                self.remove(step)

    def has(self, step: int) -> bool:
        return bool(names(self.folder / str(step)))

    def new_name(self, step: int) -> str:
        return str(step)

    def finish(self, name: str, step: int, score: float | None, check: Callable[[], None]) -> None:
        check()
        write_record(self.folder / name, self.run, step=step, score=score)

    def give_up(self, name: str, check: Callable[[], None]) -> None:
        check()  # otherwise it may be another's by now
        with contextlib.suppress(InputError, RunError):
            remove_tree(self.folder / name)

    def remove(self, step: int) -> None:
        remove_tree(self.folder / str(step), first=RECORD)  # without it the rest is no checkpoint

    def set_aside(self, step: int) -> Path:
        number = 1
        while f"damaged-{step}-{number}" in names(self.run):
            number += 1
        aside = self.run / f"damaged-{step}-{number}"
        copy(self.folder / str(step), aside)
        self.remove(step)
        return aside
