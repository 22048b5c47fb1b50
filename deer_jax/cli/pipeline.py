"""deer-jax pipeline: several verbs one after the other, from one file."""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from rich import box
from rich.table import Table

from deer_jax import processes
from deer_jax.cli.common import show, write_json, write_text
from deer_jax.cli.options import parse, shown
from deer_jax.cli.processes import ProcessOptions
from deer_jax.cli.progress import silent, tell
from deer_jax.config import nearest
from deer_jax.errors import InputError, RunError
from deer_jax.files import disk_error
from deer_jax.formats import json_bytes, parse_json, read_bytes, read_yaml
from deer_jax.spools import Guard
from deer_jax.spools import lock as lock_of
from deer_jax.stores import exists, is_store, names, place

EXAMPLE = "deer-jax pipeline --steps configs/quickstart.yaml --output runs/quickstart"
VERBS = {"pretrain": "--recipe", "answers": "--config", "align": "--recipe", "bench": "--config", "export": "--config"}
FOLDER = "{output}"
STATE = "pipeline.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions):
    """Run several verbs one after the other: from text to a target, its answers, a drafter, its numbers, its export.

    The file has a list, `steps`, of a verb with its options each: the keys of a recipe for pretrain and align, those of
    the command line for the others. `{output}` stands for the output folder. Each step's options are written there too,
    as N-VERB.yaml, to be used alone. Steps that are done are not done again: after Ctrl-C or a crash the same command
    goes on.
    """

    steps: Annotated[Path, "the YAML file with the steps"]
    output: Annotated[Path, "the folder for everything that is made", "FOLDER"]


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "pipeline", argv, EXAMPLE)
    options.join()
    steps = read_steps(options.steps, options.output)
    processes.same({"steps": steps})
    lock = lock_of(options.output, inside=True)
    with contextlib.ExitStack() as held:

        def claim() -> str:
            check_folder(options.output)
            held.enter_context(lock)
            return json.dumps(begin(options.output, steps))

        done = json.loads(processes.led(claim))
        for number, (verb, values) in enumerate(steps):
            where = f"step {number + 1} of {len(steps)}: {verb}"
            if number < len(done):
                tell(f"{where}: done before")
                continue
            tell(where)
            file = options.output / f"{number + 1}-{verb}.yaml"
            text = yaml.safe_dump(values, sort_keys=False, width=110)
            processes.led(lambda file=file, text=text: write(lock, file, text))
            start = time.perf_counter()
            try:
                run_verb(verb, file)
            except KeyboardInterrupt as error:
                raise type(error)(f"{where}: {str(error) or 'the same command does this step again'}") from None
            done.append({"verb": verb, "options": values, "seconds": round(time.perf_counter() - start, 1)})
            text = json_bytes(done, indent=2).decode()
            processes.led(lambda text=text: write(lock, options.output / STATE, text))
    if not silent():
        show(table(done))


def write(lock: Guard, path: Path, text: str) -> None:
    """A file in the folder that is locked."""
    lock.check()
    write_text(path, text)


def run_verb(verb: str, file: Path) -> None:
    """One step, by all processes together; an export by the lead alone."""
    arguments = [f"{VERBS[verb]}={file}"]
    if verb == "export" and processes.count() > 1:
        processes.led(lambda: run_apart([verb, *arguments]))
    else:
        importlib.import_module(f"deer_jax.cli.{verb}").run(arguments)


def run_apart(arguments: list[str]) -> None:
    """A verb in a program of its own, which knows no other processes and leaves the accelerator alone: reading a
    checkpoint here, Orbax would wait for the others. Its last line is the error, if there is one."""
    command = [sys.executable, "-m", "deer_jax.cli.main", *arguments]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"{arguments[0]} ended with status {done.returncode}"])[-1]
        raise (InputError if done.returncode == 2 else RunError)(last.removeprefix("deer-jax: error: "))


def read_steps(path: Path, output: Path) -> list[tuple[str, dict[str, Any]]]:
    """The verbs with their options, `{output}` replaced."""
    values = read_yaml(path)
    for key in values:
        if key != "steps":
            raise InputError(f"{path}: unknown key {shown(key)}; its one key is steps")
    steps = values.get("steps")
    if not isinstance(steps, list | None):
        raise InputError(f"{path}: steps must be a list of verbs with their options, got {shown(steps)}")
    found = []
    for number, step in enumerate(steps or []):
        where = f"{path}: steps[{number}]"
        if not isinstance(step, Mapping) or len(step) != 1:
            raise InputError(f"{where} must be one verb with its options, got {shown(step)}")
        (verb, given), *_ = step.items()
        if verb not in VERBS:
            raise InputError(f"{where}: unknown verb {shown(verb)}, {nearest(shown(verb), VERBS)}")
        if not isinstance(given, Mapping):
            raise InputError(f"{where}: {verb} must have keys and values, got {shown(given)}")
        options = filled(given, str(output), f"{where}: {verb}")
        own = (output.absolute(), (output / STATE).absolute())
        if any(place(text).absolute() in own for text in outputs(options)):
            raise InputError(f"{where}: {verb} would write over the pipeline's own; name one in it: {FOLDER}/run")
        found.append((str(verb), options))
    if not found:
        raise InputError(f"{path}: steps is empty: give at least one")
    return found


def filled(value: Any, output: str, where: str) -> Any:
    """The value with `{output}` replaced in every text of it; InputError if JSON, which keeps it, has no such value."""
    if isinstance(value, str):
        return value.replace(FOLDER, output)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{where}: the key {shown(key)} is no text; quotes make it one")
        return {key: filled(each, output, f"{where}.{key:.60}") for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, output, where) for each in value]
    small = isinstance(value, int) and abs(value) < 2**63
    if value is None or small or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise InputError(
        f"{where}: expected text or a number, got {shown(value)}, a YAML {type(value).__name__}; quotes make it text"
    )


def outputs(values: Mapping[str, Any]) -> list[str]:
    """The paths that a step writes."""
    return [values[key] for key in ("output", "json", "plot") if isinstance(values.get(key), str) and values[key]]


def check_folder(output: Path) -> None:
    """Refuse a folder that holds something and is no pipeline's: its files would be written over."""
    try:
        found = names(output) if is_store(output) or output.exists() else []
    except OSError as error:
        raise disk_error(output, error) from None
    others = [name for name in found if not name.startswith(".")]
    if others and STATE not in others:
        raise InputError(f"{output}: is no pipeline's folder but holds {', '.join(others[:3])}; name another output")


def begin(output: Path, steps: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Make the folder that of a pipeline; the steps that are done in it, up to the first of which an output is gone."""
    state = output / STATE
    begun = STATE in names(output)
    done = read_state(state) if begun else []
    for number, (before, (verb, values)) in enumerate(zip(done, steps, strict=False)):
        if (before["verb"], before["options"]) != (verb, values):
            raise InputError(
                f"{output}: its step {number + 1}, {before['verb']}, was done with other options; name another output, "
                f"or remove it and those behind it from {state}"
            )
        if not all(exists(place(text).expanduser()) for text in outputs(values)):
            done = done[:number]
            break
    if not begun:
        write_json(state, done)
    return done[: len(steps)]


def read_state(path: Path) -> list[dict[str, Any]]:
    """The steps that were done, as they were noted."""
    done = parse_json(read_bytes(path), str(path))
    right = isinstance(done, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("verb"), str)
        and isinstance(each.get("options"), dict)
        and type(each.get("seconds")) in (int, float)
        and abs(each["seconds"]) < 1e9
        for each in done
    )
    if not right:
        raise InputError(f"{path}: is not what a pipeline has written; name another output")
    return done


def table(done: Sequence[Mapping[str, Any]]) -> Table:
    """What took how long."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("step")
    result.add_column("seconds", justify="right")
    for each in done:
        result.add_row(f"{each['verb']:.60}", f"{each['seconds']:,.0f}")
    result.add_row("together", f"{sum(each['seconds'] for each in done):,.0f}")
    return result
