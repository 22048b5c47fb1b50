"""A training run's best checkpoint as a Hugging Face folder.

Beside the model lies `export.json`, which says what it is the export of, and what files it is made of: the same export
once more finds that it is done. Their MD5 is what an object store knows of what it holds.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deer_jax.build import parse_dtype
from deer_jax.checkpoints.drafters import check_own_layout, own_tensors, standalone_method
from deer_jax.checkpoints.hub import existing_folder, expanded, resolve_target
from deer_jax.checkpoints.huggingface import read_bos_id, read_config, read_stop_ids, read_values, save_folder
from deer_jax.checkpoints.records import DRAFTER, TARGET
from deer_jax.checkpoints.runs import best_checkpoint, is_run, read_best
from deer_jax.checkpoints.tapped import (
    LAYOUTS,
    SECTION,
    Layout,
    head_rows,
    is_tapped,
    public_values,
    read_method,
    target_in,
    write_drafter,
)
from deer_jax.config import check_choice
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.digests import sha256_of
from deer_jax.errors import InputError, RunError, named
from deer_jax.files import disk_error
from deer_jax.formats import json_bytes, read_json
from deer_jax.models.transformer import abstract_params
from deer_jax.spools import lock, new_tree
from deer_jax.stores import is_store, listing, md5_of

EXPORT, FORMAT = "export.json", 1


def export(
    source: str | Path,
    output: str | Path,
    *,
    dtype="bfloat16",
    layout: Layout = "deer_jax",
    target: str | Path | None = None,
) -> Path:
    """Write the best checkpoint of a run as a folder that this library reads, and others too.

    A pretrained target becomes a plain model. A drafter of text alone becomes its backbone, which is a plain model too,
    with a `deer_jax` section in config.json that says how it reads, and one more tensor, `deer_jax.mask_and_separator`
    [2, D], beside those of its head if it has one, `deer_jax.draft_head.*`. A drafter that reads its target has no
    layout that transformers knows.

    Args:
      source: the folder of a `pretrain` or `align` run.
      output: the folder to make; if it is the whole export of the same checkpoint at the same dtype, it stays as it is.
      dtype: "bfloat16" or "float32"; values are rounded to it.
      layout: of drafters that read their target: ours, or that of the packages `dflash` (z-lab) or `speculators`, or
        `eagle3`, of EAGLE's authors.
      target: the folder or hub id of the target, which these three say.

    Returns the output's path. Raises InputError if the source is no run or has no checkpoint, if the layout cannot say
    the drafter, if the output holds anything else or is being written; RunError for parameters that are not finite, or
    if the disk is full.
    """
    dtype = parse_dtype(dtype)
    if not os.fspath(output):
        raise InputError("output is empty: name the folder to make")
    about = _about(source, dtype, layout, target)
    source, output = expanded(source), expanded(output)
    if _is_whole(output, about):
        return output
    try:
        if not is_store(output):
            output.absolute().parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise disk_error(output, error) from None
    with lock(output) as held:
        if not _is_whole(output, about):  # another process may just have done it
            with new_tree(output, held, last=EXPORT) as folder:
                _write(source, folder, dtype, about)
    return output


def is_exported(
    source: str | Path,
    output: str | Path,
    *,
    dtype="bfloat16",
    layout: Layout = "deer_jax",
    target: str | Path | None = None,
) -> bool:
    """Whether `export` with the same arguments would find its work done."""
    return _is_whole(expanded(output), _about(source, parse_dtype(dtype), layout, target))


def _about(source: str | Path, dtype: jnp.dtype, layout: Layout, target: str | Path | None) -> dict[str, Any]:
    """What an export is one of, as `export.json` says it."""
    check_choice("layout", layout, LAYOUTS)
    public = {} if layout == "deer_jax" else {"layout": layout, "target": None if target is None else str(target)}
    folder = existing_folder(source)
    kind = next((kind for kind in (DRAFTER, TARGET) if folder and is_run(folder, kind)), None)
    if folder is None or kind is None:
        raise InputError(
            f"{named(source, 200)}: is no folder of a pretrain or align run; give the `output` of its recipe"
        )
    step, digest = _best(folder)
    return {
        "format": FORMAT,
        "kind": kind,
        "step": step,
        "checkpoint_sha256": digest,
        "dtype": dtype.name,
    } | public


def _best(run: Path) -> tuple[int, str]:
    """The step of the checkpoint that `read_best` reads, and the digest of its record, which has those of its files."""
    _, record = best_checkpoint(run)
    return record["step"], record["sha256"]


def _is_whole(output: Path, about: Mapping[str, Any]) -> bool:
    """Whether a folder is the export described, with all its files as they were written."""
    try:
        found = read_json(output / EXPORT, most=2**22)
        files = found["files"]
        same = bool(files) and about.items() <= found.items()
        if is_store(output):
            there = listing(output)
            return same and all(there[name].md5 == each["md5"] for name, each in files.items())
        return same and all(sha256_of(output / name) == each["sha256"] for name, each in files.items())
    except (InputError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _write(source: Path, output: Path, dtype: jnp.dtype, about: Mapping[str, Any]) -> None:
    run, layout, target = existing_folder(source), about.get("layout", "deer_jax"), about.get("target")
    assert run is not None
    described = run / about["kind"]
    values, stop_ids = read_values(described), read_stop_ids(described)
    conditioned = about["kind"] == DRAFTER and is_tapped(values)
    standalone = about["kind"] == DRAFTER and not conditioned
    method, ids = read_method(described) if conditioned else (None, None)
    folder = None if target is None else resolve_target(target)
    its = None if folder is None else target_in(folder)
    if method is None:
        check_own_layout(layout)
        shapes = standalone_method(described).shapes() if standalone else abstract_params(read_config(described))
    else:
        shapes = method.shapes()
        if layout != "deer_jax":
            public_values(method, layout, dtype, its)  # refuses before the checkpoint is read
    params = jax.tree.map(lambda x: x.astype(dtype), read_best(run, shapes))
    if _about(source, dtype, layout, target) != about:
        raise RunError(f"{source}: was trained further while it was exported; start again")

    def finish(folder: Path) -> None:
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path), "md5": md5_of(path)}
            for path in sorted(folder.iterdir())
        }
        (folder / EXPORT).write_bytes(json_bytes({"source": source.absolute().name, **about, "files": files}, indent=2))

    options: dict[str, Any] = {
        "tokenizer_source": described if Tokenizer.load(described) else None, "stop_ids": stop_ids, "finish": finish,
    }  # fmt: skip
    if method is not None:
        head = head_rows(folder, its.config, ids) if method.carries_head and folder and its else None
        write_drafter(output, method, params, layout=layout, target=its, ids=ids, head=head, **options)
        return
    extra, extra_config = (own_tensors(params), {SECTION: values[SECTION]}) if standalone else (None, None)
    save_folder(
        output, read_config(described), params, bos_id=read_bos_id(described), extra=extra, extra_config=extra_config,
        **options,
    )  # fmt: skip
