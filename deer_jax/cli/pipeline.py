"""deer-jax pipeline: several verbs one after the other, from one file."""

import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from rich import box
from rich.table import Table

from deer_jax.cli.common import show, write_json, write_text
from deer_jax.cli.options import parse
from deer_jax.config import nearest
from deer_jax.errors import InputError
from deer_jax.formats import read_yaml

EXAMPLE = "deer-jax pipeline --steps configs/quickstart.yaml --output runs/quickstart"
VERBS = {"pretrain": "--recipe", "answers": "--config", "align": "--recipe", "bench": "--config", "export": "--config"}
FOLDER = "{output}"
STATE = "pipeline.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Run several verbs one after the other: from text to a target, its answers, a drafter, its numbers, its export.

    The file has a list, `steps`, of a verb with its options each: the keys of a recipe for pretrain and align, those of
    the command line for the others. `{output}` stands for the output folder. Each step's options are written there too,
    as N-VERB.yaml, to be used alone. Steps that are done are not done again: after Ctrl-C the same command goes on.
    """

    steps: Annotated[Path, "the YAML file with the steps"]
    output: Annotated[Path, "the folder for everything that is made", "FOLDER"]


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "pipeline", argv, EXAMPLE)
    steps = read_steps(options.steps, options.output)
    done = begin(options.output, steps)
    for number, (verb, values) in enumerate(steps):
        where = f"step {number + 1} of {len(steps)}: {verb}"
        if number < len(done):
            print(f"deer-jax: {where}: done before", file=sys.stderr)
            continue
        print(f"deer-jax: {where}", file=sys.stderr, flush=True)
        file = options.output / f"{number + 1}-{verb}.yaml"
        write_text(file, yaml.safe_dump(values, sort_keys=False, width=110))
        start = time.perf_counter()
        importlib.import_module(f"deer_jax.cli.{verb}").run([VERBS[verb], str(file)])
        done.append({"verb": verb, "options": values, "seconds": round(time.perf_counter() - start, 1)})
        write_json(options.output / STATE, done)
    show(table(done))


def read_steps(path: Path, output: Path) -> list[tuple[str, dict[str, Any]]]:
    """The verbs with their options, `{output}` replaced."""
    values = read_yaml(path)
    for key in values:
        if key != "steps":
            raise InputError(f"{path}: unknown key '{key}', {nearest(str(key), ['steps'])}")
    found = []
    for number, step in enumerate(values.get("steps") or []):
        where = f"{path}: steps[{number}]"
        if not isinstance(step, Mapping) or len(step) != 1:
            raise InputError(f"{where} must be one verb with its options, got {step!r}")
        (verb, given), *_ = step.items()
        if verb not in VERBS:
            raise InputError(f"{where}: unknown verb '{verb}', {nearest(str(verb), VERBS)}")
        if not isinstance(given, Mapping):
            raise InputError(f"{where}: {verb} must have keys and values, got {given!r}")
        found.append((str(verb), filled(dict(given), str(output))))
    if not found:
        raise InputError(f"{path}: steps is empty: give at least one")
    return found


def filled(value: Any, output: str) -> Any:
    """The value with `{output}` replaced in every text of it."""
    if isinstance(value, str):
        return value.replace(FOLDER, output)
    if isinstance(value, Mapping):
        return {key: filled(each, output) for key, each in value.items()}
    return [filled(each, output) for each in value] if isinstance(value, list) else value


def begin(output: Path, steps: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The folder, made if need be, and the steps that are done in it."""
    state = output / STATE
    try:
        output.mkdir(parents=True, exist_ok=True)
        done = json.loads(state.read_text(encoding="utf-8")) if state.exists() else []
    except (OSError, ValueError) as error:
        raise InputError(f"{state}: cannot be used: {error}; name another output") from None
    for number, (before, (verb, values)) in enumerate(zip(done, steps, strict=False)):
        if (before["verb"], before["options"]) != (verb, json.loads(json.dumps(values))):
            raise InputError(
                f"{output}: its step {number + 1}, {before['verb']}, was done with other options; name another output, "
                f"or remove it and those behind it from {state}"
            )
    return done[: len(steps)]


def table(done: Sequence[Mapping[str, Any]]) -> Table:
    """What took how long."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("step")
    result.add_column("seconds", justify="right")
    for each in done:
        result.add_row(each["verb"], f"{each['seconds']:,.0f}")
    result.add_row("together", f"{sum(each['seconds'] for each in done):,.0f}")
    return result
