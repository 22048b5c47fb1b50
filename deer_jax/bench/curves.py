"""How drafters learned: the evaluations in the folders of align runs, for a picture."""

import dataclasses
import datetime
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deer_jax.checkpoints.runs import RECIPE
from deer_jax.errors import InputError
from deer_jax.formats import read_yaml
from deer_jax.stores import local_file, place
from deer_jax.training.metrics import FILE, read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A drafter's real acceptance while it learned: one run, draft length and temperature, n evaluations.

    Attributes:
      run: its folder's name, or the whole path if another run has the same name.
      target: name of the target it learned from.
      prompts: held-out prompts of each evaluation.
      steps: [n] of the optimiser.
      tokens: [n] text tokens read until then; None for a run whose metrics do not count them.
      acceptance_length: [n]
      ci95: [n] 95 % bootstrap intervals of it over prompts; None for a single prompt.
      date: of the run's last metrics.
    """

    run: str
    target: str
    draft_length: int
    temperature: float
    prompts: int
    steps: list[int]
    tokens: list[int] | None
    acceptance_length: list[float]
    ci95: list[tuple[float, float] | None]
    date: str

    @property
    def name(self) -> str:
        return f"{self.run}: k={self.draft_length}, T={self.temperature:g}"


def learning_curve(*runs: str | Path) -> Any:
    """A matplotlib Figure of how the drafters of align runs learned: τ against the text that training has read.

    Args:
      runs: their folders.

    Raises InputError for a folder that is no such run, or has no evaluation.
    """
    from deer_jax.bench import plots  # only here: matplotlib looks for fonts and a folder of its own

    return plots.curve(read_curves(runs))


def read_curves(folders: Iterable[str | Path]) -> list[Curve]:
    """The evaluations of align runs, one curve for each draft length and temperature of each.

    Raises:
      InputError: a folder is no align run, or its metrics hold no evaluation.
    """
    paths = list(dict.fromkeys(place(folder) for folder in folders))
    names = [path.absolute().name for path in paths]
    taken = Counter(names)
    found = (_read(path, name if taken[name] == 1 else str(path)) for path, name in zip(paths, names, strict=True))
    return list(itertools.chain.from_iterable(found))


def _read(folder: Path, run: str) -> list[Curve]:
    try:
        lines = read_metrics(folder)
        date = datetime.date.fromtimestamp(Path(local_file(folder / FILE)).stat().st_mtime).isoformat()
        evaluated = [(line["step"], line.get("tokens"), each) for line in lines for each in line.get("evaluation", ())]
        if not evaluated:
            raise InputError(f"{folder}: no evaluation in its {FILE}; align writes them if its recipe has `evaluation`")
        target = Path(str(read_yaml(folder / RECIPE).get("target", "unknown"))).name
        counted = all("tokens" in line for line in lines)  # a run begun before they were counted has too few
        curves = []
        for kind in dict.fromkeys((each["draft_length"], each["temperature"]) for *_, each in evaluated):
            rows = [row for row in evaluated if (row[2]["draft_length"], row[2]["temperature"]) == kind]
            steps, tokens, found = (list(column) for column in zip(*rows, strict=True))
            curves.append(
                Curve(
                    run=run, target=target, draft_length=kind[0], temperature=kind[1], prompts=found[0]["prompts"],
                    steps=steps, tokens=tokens if counted else None,
                    acceptance_length=[each["acceptance_length"] for each in found],
                    ci95=[each["ci95"] and tuple(each["ci95"]) for each in found], date=date,
                )
            )  # fmt: skip
        return curves
    except OSError as error:
        raise InputError(f"{folder}: {FILE} cannot be read: {error.strerror}; name an align run's folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder}: {FILE} is damaged, or not that of an align run") from None
