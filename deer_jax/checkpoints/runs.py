"""The folder of a training run: what it is, its checkpoints, and the model in it.

    recipe.yaml        what the run does, as it was begun
    facts.json         what a resumed run must find unchanged beside the recipe, such as the digest of its answers
    drafter/, target/  config.json and tokenizer of what is trained, without weights: the one or the other
    checkpoints/STEP/  parameters, their average, optimiser state and position in the data (Orbax)
    metrics.jsonl, tensorboard/

A checkpoint appears under its final name only when it is complete, so a run that is killed has the ones before.
"""

import contextlib
import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from orbax.checkpoint import v1 as ocp

from deer_jax.errors import InputError
from deer_jax.formats import read_yaml
from deer_jax.models.transformer import Params

RECIPE, FACTS, CHECKPOINTS = "recipe.yaml", "facts.json", "checkpoints"
DRAFTER, TARGET = "drafter", "target"  # what a run trains, and the folder that describes it
METRIC = "score"
OS_ERROR = re.compile(r"os_error_code='(\d+)'|\[Errno \d+\]")
# What reading a damaged checkpoint raises, in Orbax, tensorstore and grain.
DAMAGED = (ValueError, KeyError, OSError, TypeError, AttributeError)


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
    """The checkpoints of a run; a context manager. The newest `keep` stay, and the best."""

    def __init__(self, folder: Path, *, keep: int):
        self.folder = (folder / CHECKPOINTS).absolute()  # tensorstore wants no other
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            n=1, get_metric_fn=lambda metrics: metrics[METRIC], keep_checkpoints_without_metrics=False
        )
        with _quiet():
            self._orbax = ocp.training.Checkpointer(
                str(self.folder),
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),  # pyrefly: ignore
                cleanup_tmp_directories=True,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            with _quiet():
                self._orbax.close()
        except (OSError, ValueError):
            if error is None:  # closing says again what a save has said before
                raise

    def newest_first(self) -> list[Checkpoint]:
        return [_checkpoint(found) for found in reversed(self._orbax.checkpoints)]

    def save(self, step: int, parts: Mapping[str, Any], score: float | None) -> None:
        """Write a checkpoint and wait for it. InputError, one line, where the disk does not take it."""
        metrics: Any = None if score is None else {METRIC: score}
        try:
            with _quiet():
                self._orbax.save_checkpointables(step, dict(parts), force=True, overwrite=True, metrics=metrics)
        except (OSError, ValueError) as error:
            reason = _system_reason(error)
            if reason is None:
                raise
            raise InputError(
                f"{self.folder}: the checkpoint of step {step} cannot be written: {reason}; earlier ones are whole: "
                "make room, then the same command goes on from the newest"
            ) from None

    def restore(self, step: int, parts: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of a checkpoint: arrays like the abstract ones given, iterators moved to where they were.

        Raises one of DAMAGED where the checkpoint cannot be read.
        """
        # One at a time: of several, Orbax leaves those behind a damaged one waiting, which Python complains about.
        with _quiet():
            return {name: self._orbax.load_checkpointables(step, {name: like})[name] for name, like in parts.items()}

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that its step can be written again; where it is now."""
        source, number = self.folder / str(step), 1
        while (aside := self.folder.parent / f"damaged-{step}-{number}").exists():
            number += 1
        source.replace(aside)
        self._orbax.reload()
        return aside


def is_run(folder: Path, kind: str) -> bool:
    """Whether a folder is that of a run that trains a DRAFTER, or a TARGET."""
    return (folder / RECIPE).is_file() and (folder / kind).is_dir()


def best_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint that `read_best` reads."""
    with _quiet():
        orbax = ocp.training.Checkpointer(str((folder / CHECKPOINTS).absolute()))
    with contextlib.closing(orbax):
        return _best(folder, orbax)


def _best(folder: Path, orbax: ocp.training.Checkpointer) -> Checkpoint:
    found = [_checkpoint(each) for each in orbax.checkpoints]
    if not found:
        raise InputError(f"{folder}: the run has no checkpoint yet; training writes the first one later")
    return best_of(found) or found[-1]


def read_best(folder: Path, shapes: Params) -> Params:
    """The parameters to decode with, of the run's best checkpoint, or its newest if none was measured.

    shapes: the parameters as shapes, float32, stacked. Where an average of the parameters was kept, it is read.
    """
    with _quiet():
        orbax = ocp.training.Checkpointer(str((folder / CHECKPOINTS).absolute()))
    with contextlib.closing(orbax):
        best = _best(folder, orbax)
        part = "average" if (folder / CHECKPOINTS / str(best.step) / "average").is_dir() else "params"
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here), shapes)
        try:
            with _quiet():
                return orbax.load_checkpointables(best.step, {part: wanted})[part]
        except DAMAGED as error:
            raise InputError(
                f"{folder / CHECKPOINTS / str(best.step)}: damaged ({_line(error)}); remove it to use the next best"
            ) from None


def _checkpoint(found) -> Checkpoint:
    return Checkpoint(found.step, (found.metrics or {}).get(METRIC))


def _system_reason(error: Exception) -> str | None:
    """What the operating system said, if it is behind the error."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) or OS_ERROR.search(text):
        return re.sub(r"\s*\[os_error_code='\d+'\]", "", text.rsplit(": ", 1)[-1])
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs what it raises, with tracebacks; what it raises is enough."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def claim(
    folder: Path,
    recipe: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    kind: str,
    essential: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    describe: Callable[[Path], None],
) -> None:
    """Make the folder that of this run, or find that it already is.

    Args:
      recipe, facts: plain values; see the top of this file.
      essential: what of a recipe must not change while a run goes on.
      kind: DRAFTER or TARGET.
      describe: writes config.json and tokenizer of what is trained into a folder.

    Raises InputError if the folder holds a run of another recipe (the differences are listed), or something else.
    """
    partial = folder / f".{RECIPE}.partial"
    try:
        if (folder / RECIPE).is_file():
            before = {**essential(read_yaml(folder / RECIPE)), "facts": _read_facts(folder)}
            changes = differences(before, {**essential(recipe), "facts": dict(facts)})
            if changes:
                raise InputError(
                    f"{folder}: holds another run: {'; '.join(changes)}. Name another output, or go on with its own "
                    f"recipe, {folder / RECIPE}"
                )
            return
        known = (kind, FACTS, partial.name)  # of a run that was stopped right here
        others = [found.name for found in folder.iterdir() if found.name not in known] if folder.is_dir() else []
        if others:
            raise InputError(f"{folder}: is no run but holds {', '.join(sorted(others)[:3])}; name another output")
        shutil.rmtree(folder / kind, ignore_errors=True)
        (folder / kind).mkdir(parents=True)
        describe(folder / kind)
        (folder / FACTS).write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")
        # What makes the folder a run comes last, and whole.
        partial.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
        partial.replace(folder / RECIPE)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None


def _read_facts(folder: Path) -> Any:
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{folder / FACTS}: cannot be read; name another output") from None


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two plain values, one entry each: ``stages.0.steps was 10, is 20``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{where}{key}.")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line for i, pair in enumerate(zip(before, now, strict=True)) for line in differences(*pair, f"{where}{i}.")
        ]
    return [] if before == now else [f"{where.rstrip('.')} was {before!r}, is {now!r}"]
