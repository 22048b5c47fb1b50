"""What a model is named by: a folder or a GGUF file, here or on an object store, or an id of the Hugging Face hub."""

import errno
import os
import re
import stat
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from deer_jax.checkpoints.gguf import is_gguf
from deer_jax.checkpoints.runs import RECIPE, needed
from deer_jax.errors import InputError, RunError, named, one_line, shown
from deer_jax.formats import open_file, unreadable
from deer_jax.stores import Entry, is_store, local_file, local_folder, place

HUB = "hub:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
SNAPSHOTS = re.compile(r"models--(?:.+?--)?(.+)")  # folders of the hub's cache
DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
# What people call folders of their own: `runs/mine` from the wrong place is no question for the hub.
FOLDERS = frozenset(
    {
        "answers", "artifacts", "bin", "build", "cache", "checkpoint", "checkpoints", "ckpt", "ckpts", "config",
        "configs", "data", "dataset", "datasets", "deer_jax", "demo", "dev", "dist", "docs", "drafter", "drafters",
        "examples", "experiment", "experiments", "export", "exported", "exports", "home", "log", "logs", "mnt",
        "model", "models", "notebooks", "opt", "out", "output", "outputs", "pretrained", "private", "project",
        "projects", "release", "results", "root", "run", "runs", "saved", "scratch", "scripts", "shared", "src",
        "srv", "target", "targets", "temp", "test", "tests", "tmp", "tokenizer", "tokenizers", "train", "trained",
        "training", "usr", "var", "weights", "work", "workspace",
    }
)  # fmt: skip


def resolve_folder(path_or_id: str | os.PathLike[str]) -> Path:
    """The local folder of this name, or the downloaded one of a hub id or of a folder on a store.

    `hub:OWNER/NAME` is one of the hub in any case. OWNER/NAME alone is where no such folder is here and it does not
    look like a path. Raises InputError, one line; what looks like a path asks nothing of the network.
    """
    text = os.fspath(path_or_id) if isinstance(path_or_id, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise InputError(f"a model is named by a folder or a hub id, got {shown(path_or_id)}")
    if text.startswith(HUB):
        hub_id = text.removeprefix(HUB)
        if not HUB_ID.fullmatch(hub_id):
            raise InputError(f"{named(text)}: a model of the Hugging Face hub is written {HUB}OWNER/NAME")
        return _download(hub_id, text)
    path = existing_folder(text)
    if path is not None:
        return path
    if _looks_like_a_path(text):
        example = text if HUB_ID.fullmatch(text) else "OWNER/NAME"
        where = "" if os.path.isabs(text) else f" here (in {_here()})"
        raise InputError(
            f"{named(text, 200)}: no such folder{where}; check the path; "
            f"a model of the Hugging Face hub is written {HUB}{example}"
        )
    return _download(text, text)


def resolve_target(path_or_id: str | os.PathLike[str]) -> Path:
    """The local GGUF file of this name, or a copy of one on a store; any other name as in `resolve_folder`."""
    if isinstance(path_or_id, str | os.PathLike) and is_gguf(path := os.fspath(path_or_id)):
        file = Path(local_file(path)) if is_store(path) else expanded(path)
        if is_gguf(file):
            os.close(open_file(file))  # refuses what is no file
            return file
    return resolve_folder(path_or_id)


def model_name(path_or_id: str | os.PathLike[str]) -> str:
    """What a model is called: the last part of its path or id; the id's where the path is the hub's own copy.

    ~/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/b968826d -> Qwen3-8B
    """
    path = Path(path_or_id)
    if path.parent.name == "snapshots" and (found := SNAPSHOTS.fullmatch(path.parent.parent.name)):
        return found[1]
    return path.name or path.absolute().name or str(path_or_id)


def expanded(text: str | os.PathLike[str]) -> Path:
    """The path, a leading ~ replaced by the home folder."""
    try:
        return place(text).expanduser()
    except RuntimeError:  # ~nobody, or no home at all
        raise InputError(f"{named(text, 200)}: no such home folder; check the path") from None


def existing_folder(text: str | os.PathLike[str]) -> Path | None:
    """The folder at a path, or the copy here of one on a store; None if nothing is there. Of a run on a store, no more
    is copied than its best checkpoint needs."""
    path = expanded(text)
    if is_store(path):
        return local_folder(path, lambda entries: needed(path, entries) if RECIPE in entries else _model(path, entries))
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise unreadable(named(text, 200), error) from None
    if not stat.S_ISDIR(mode):
        raise InputError(f"{named(text, 200)}: is a file; name the folder of the model")
    return path


def _model(folder: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The files of a model among those of a folder; further chat templates may lie in one inside."""
    names = [name for name in entries if name.endswith(".jinja") or "/" not in name]
    found = {name: entries[name] for name in names if any(fnmatch(name, pattern) for pattern in DOWNLOADED)}
    if not found:
        raise InputError(f"{folder}: holds no model, and no run")
    return found


def _looks_like_a_path(text: str) -> bool:
    first = text.partition("/")[0]
    return not HUB_ID.fullmatch(text) or first.lower() in FOLDERS or os.path.lexists(first)


def _here() -> str:
    try:
        return named(os.getcwd(), 200)
    except OSError:
        return "a folder that is gone"


def _download(hub_id: str, text: str) -> Path:
    import huggingface_hub  # slow to import, and only needed here
    from huggingface_hub.errors import HTTPError

    wrong: Any = (OSError, HTTPError, ValueError, RuntimeError)
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(DOWNLOADED)))
    except wrong as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{named(text, 200)}: cannot be downloaded: {error.strerror}; make room") from None
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"{named(text, 200)}: no such folder, and it could not be downloaded from the Hugging Face hub "
            f"({one_line(RuntimeError(first))}); check the spelling and the network, or give a local folder"
        ) from None
