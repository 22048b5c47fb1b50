"""Whose a run's folder is: one job writes it, its lead, for one recipe and the same inputs from first call to last.

    with claimed(folder, recipe, kind=DRAFTER, essential=essential) as claim:   # locked; another recipe is refused here
        target = load_target(..., digests=claim.digests)                        # knows what earlier calls have read
        claim.settle({"target": ..., "dtype": "float32"}, describe)             # other inputs are refused here

A folder becomes a run's in three steps, each whole or not there: identity.json, recipe.yaml, the description of what is
trained. What is there after the first or second is known by identity.json, and may still become another recipe's.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deer_jax import processes, spools, stores
from deer_jax.checkpoints.records import DRAFTER, TARGET
from deer_jax.checkpoints.runs import IDENTITY, RECIPE, check_path, is_run
from deer_jax.digests import Digests
from deer_jax.errors import InputError
from deer_jax.files import new_folder, sweep, write_file
from deer_jax.formats import differences, json_bytes, read_json, read_yaml, unreadable
from deer_jax.spools import Guard, Spool
from deer_jax.stores import is_store

FORMAT = 1  # of a run's folder
MODELS = ("target", "start drafter")  # inputs that are files of a model
WHOLE = "as this version reads it"  # beside them: one digest of all that was made of them
NAMED = 4  # changes that a message lists


@contextlib.contextmanager
def claimed(
    folder: Path,
    recipe: Mapping[str, Any],
    *,
    kind: str,
    essential: Callable[[Mapping[str, Any], str], Mapping[str, Any]],
    verify: bool = False,
) -> Iterator["Claim"]:
    """The folder of a run, locked for the time of the block. A folder that was made for it and stays empty is removed.

    Args:
      recipe: plain values.
      kind: DRAFTER or TARGET.
      essential: what of a recipe, which its second argument names, must not change while a run goes on.
      verify: read every input again, also those whose size and time of change are what they were.

    Raises InputError if another process writes the folder, or it holds a run of another recipe (the differences are
    listed), or anything that no run wrote.
    """
    check_path(folder)
    processes.same({"recipe": recipe})
    lock, made = spools.lock(folder, inside=True), []
    if processes.lead() and not is_store(folder):
        made = [path for path in (folder.absolute(), *folder.absolute().parents) if not os.path.lexists(path)]
    try:
        with contextlib.ExitStack() as held:
            processes.led(lambda: str(held.enter_context(lock).path))
            yield Claim(folder, recipe, kind, essential, lock, verify)
    finally:
        for path in made:
            with contextlib.suppress(OSError, ValueError):
                path.rmdir()  # what holds anything stays


class Claim:
    """A run's folder in the hands of this job.

    Attributes:
      lock: of the folder, held by the lead, who checks it before anything is written.
      digests: of inputs; knows those of earlier calls.
      begun: local time at which the run began: what its chat templates take for now.
      spool: the folder's files, but for checkpoints and metrics: where each process reads them, and the lead writes.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Mapping[str, Any],
        kind: str,
        essential: Callable[[Mapping[str, Any], str], Mapping[str, Any]],
        lock: Guard,
        verify: bool,
    ):
        """The arguments of `claimed`."""
        self.lock = lock
        self._folder, self._recipe, self._kind = folder, recipe, kind
        self.spool = Spool(folder, lock)
        processes.every(self._pull)
        self.begun = datetime.datetime.fromisoformat(processes.led(lambda: self._check(essential)))
        self._before = self._read_identity()
        self._goes_on = is_run(self.spool.path, kind)
        self.digests = Digests(self._before.get("files"), verify=verify)

    def _pull(self) -> None:
        """Of a run that is on a store, bring what is read when it goes on."""
        self.spool.pull(IDENTITY, RECIPE)
        if self._read_identity() and (self.spool.path / RECIPE).exists():
            self.spool.pull(DRAFTER, TARGET)

    def _check(self, essential: Callable[[Mapping[str, Any], str], Mapping[str, Any]]) -> str:
        """Whether the folder may become that of this run, or is; when the run began."""
        self._before = self._read_identity()
        if is_run(self.spool.path, self._kind):
            self._check_recipe(essential)
            return self._before["begun"]
        self._check_free()
        return datetime.datetime.now().replace(microsecond=0).isoformat()

    def _check_recipe(self, essential: Callable[[Mapping[str, Any], str], Mapping[str, Any]]) -> None:
        where = self._folder / RECIPE
        if not self._before:
            raise InputError(f"{self._folder}: has no {IDENTITY}, so it is no run of this version; name another output")
        if self._before["format"] != FORMAT:
            raise InputError(
                f"{self._folder}: is a run of format {self._before['format']!r:.20}, this version writes {FORMAT}; "
                "name another output, or go on with the version that began it"
            )
        before = essential(read_yaml(self.spool.path / RECIPE), str(where))
        changes = differences(before, essential(self._recipe, "recipe"))
        if changes:
            raise InputError(
                f"{self._folder}: holds another run: {_listed(changes)}. Name another output, or go on with its own "
                f"recipe, {where}"
            )

    def _check_free(self) -> None:
        """InputError if the folder holds anything but the beginnings of a run that was stopped right there."""
        ours = (IDENTITY, RECIPE, self._kind)
        for name in ours:
            sweep(self._folder / name)
        allowed = {self.lock.path.name, *((IDENTITY, RECIPE) if self._before else ())}
        try:
            there = stores.names(self._folder)
        except OSError as error:
            raise unreadable(self._folder, error) from None
        if is_store(self._folder) and self._before.get("kind") == self._kind and RECIPE not in there:
            stores.remove_tree(self._folder / self._kind)  # on a store it is not there at once
            allowed.add(self._kind)
        others = [name for name in there if name not in allowed]
        if others and self._before.get("kind") in {DRAFTER, TARGET} - {self._kind}:
            raise InputError(f"{self._folder}: is the run of a {self._before['kind']}; name another output")
        if others:
            named = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise InputError(f"{self._folder}: is no run but holds {named:.300}; name another output")

    def settle(self, inputs: Mapping[str, Any], describe: Callable[[Path], None]) -> None:
        """Make the folder that of this run, or find that it already is.

        Args:
          inputs: what decides the result beside the recipe, by what it is: a value, or digests by file.
          describe: writes config.json and tokenizer of what is trained into a folder.

        Raises InputError, which names what changed, if the run was begun with other inputs.
        """
        processes.same({"inputs": inputs})
        processes.led(lambda: self._settle(inputs, describe))
        processes.every(lambda: None if processes.lead() else self._pull())

    def _settle(self, inputs: Mapping[str, Any], describe: Callable[[Path], None]) -> None:
        self.lock.check()
        if self._goes_on and (changes := input_changes(self._before["inputs"], inputs)):
            raise InputError(
                f"{self._folder}: cannot go on: {_listed(changes)} since it was begun; bring back what it was begun "
                "with, or name another output"
            )
        identity = {
            "format": FORMAT, "kind": self._kind, "begun": self.begun.isoformat(), "inputs": dict(inputs),
            "files": self.digests.records(),
        }  # fmt: skip
        if identity != self._before:  # also where a file has another time of change than before
            write_file(self.spool.path / IDENTITY, json_bytes(identity, indent=1))
        if not self._goes_on:
            write_file(self.spool.path / RECIPE, yaml.safe_dump(dict(self._recipe), sort_keys=False).encode())
            with new_folder(self.spool.path / self._kind) as partial:
                describe(partial)
        self.spool.put(IDENTITY, self._kind, RECIPE)  # last what makes it a run

    def _read_identity(self) -> dict[str, Any]:
        """The values of identity.json; empty if there is none. InputError if a run did not write it."""
        path = self.spool.path / IDENTITY
        if not os.path.lexists(path):
            return {}
        found = read_json(path)
        try:
            datetime.datetime.fromisoformat(found["begun"])
            sound = found["kind"] in (DRAFTER, TARGET) and type(found["format"]) is int
            sound = sound and isinstance(found["inputs"], dict)
        except (KeyError, ValueError, TypeError):
            sound = False
        if not sound:
            raise InputError(f"{self._folder / IDENTITY}: is not as a run writes it; name another output")
        return found


def _listed(changes: Sequence[str]) -> str:
    more = f"; and {len(changes) - NAMED} more" if len(changes) > NAMED else ""
    return "; ".join(changes[:NAMED]) + more


def input_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the inputs of two calls: ``the target's weights changed (model.safetensors)``."""
    changes = []
    for label in dict.fromkeys((*before, *now)):
        old, new = before.get(label), now.get(label)
        if old == new:
            continue
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            short = all(isinstance(value, str | int | None) and len(str(value)) < 20 for value in (old, new))
            changes.append(f"{label:.40} was {old}, is {new}" if short else f"the {label:.40} changed")
            continue
        differing = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
        parts: dict[str, list[str]] = {}
        for name in differing:
            if name != WHOLE or differing == [WHOLE]:
                parts.setdefault(_part(label, name), []).append(name)
        for part, names in parts.items():
            named = ", ".join(name[-60:] for name in names[:3]) + (", ..." if len(names) > 3 else "")
            changes.append(f"the {label:.40}{part} changed ({named})")
    return changes


def _part(label: str, name: str) -> str:
    """Which part of a model a file is, for a message."""
    if label not in MODELS or name == WHOLE:
        return ""
    if name.endswith((".safetensors", "checkpoint.json")):
        return "'s weights"
    return "'s configuration" if name.endswith("config.json") and "tokenizer" not in name else "'s tokenizer"
