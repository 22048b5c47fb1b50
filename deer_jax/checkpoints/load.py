"""A target from a folder or a hub id, in one call."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deer_jax.checkpoints.hub import model_name, resolve_folder
from deer_jax.checkpoints.huggingface import (
    Progress,
    deciding_files,
    load_params,
    read_config,
    read_stop_ids,
)
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.digests import Digests, check_unchanged
from deer_jax.errors import InputError, shown
from deer_jax.models.target import Target, references

DTYPES = ("bfloat16", "float32")


def compute_dtype(dtype=None) -> jnp.dtype:
    """The dtype by name or value; None is float32 on CPU and bfloat16 elsewhere."""
    if dtype is None:
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or found.name not in DTYPES:
        raise InputError(f"dtype must be {' or '.join(DTYPES)}, got {shown(dtype)}")
    return found


def scan_layers() -> bool:
    """Whether layers are stacked and scanned here: everywhere but on CPU, where unrolled ones are faster."""
    return jax.default_backend() != "cpu"


def check_mesh(mesh: Mesh | None) -> None:
    """InputError for what is no mesh."""
    if not isinstance(mesh, Mesh | None):
        raise InputError(f"mesh must be what make_mesh returns, as in make_mesh(fsdp=8), got {shown(mesh)}")


def load_target(
    path_or_id: str | Path,
    dtype=None,
    mesh: Mesh | None = None,
    *,
    progress: Progress | None = None,
    digests: Digests | None = None,
) -> Target:
    """The target in a Hugging Face folder, local or on the hub.

    Args:
      path_or_id: a folder, or a hub id: OWNER/NAME, or hub:OWNER/NAME where that could be a path.
      dtype: "bfloat16" or "float32"; None is float32 on CPU and bfloat16 elsewhere.
      mesh: devices to shard the parameters over; None is the default device.
      progress: called with the bytes read so far and their total.
      digests: computes what `Target.digest` needs while the weights are loaded; None leaves it for when it is asked.

    Raises InputError, one line, for whatever is wrong with the folder; RunError if it changes meanwhile.
    """
    dtype = compute_dtype(dtype)
    check_mesh(mesh)
    folder = resolve_folder(path_or_id)
    files = deciding_files(folder)
    config, stop_ids = read_config(folder), read_stop_ids(folder)
    tokenizer = Tokenizer.load(folder)
    if digests is not None:
        for stamp in files:
            digests.begin(stamp)
    params, _ = load_params(folder, config, dtype, scan=scan_layers(), mesh=mesh, progress=progress)
    for stamp in files:
        check_unchanged(stamp)
    return Target(
        config=config,
        params=params,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        name=model_name(path_or_id),
        mesh=mesh,
        files=files,
        digests=Digests() if digests is None else digests,
        loaded=references(params, tokenizer),
    )
