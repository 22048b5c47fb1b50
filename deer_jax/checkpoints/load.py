"""A target from a folder, a GGUF file or a hub id, in one call."""

from pathlib import Path

from jax.sharding import Mesh

from deer_jax import processes
from deer_jax.build import Build
from deer_jax.checkpoints.gguf import is_gguf, read_gguf
from deer_jax.checkpoints.gguf_tokenizer import load_tokenizer
from deer_jax.checkpoints.hub import model_name, resolve_target
from deer_jax.checkpoints.huggingface import (
    Progress,
    deciding_files,
    load_params,
    read_config,
    read_stop_ids,
)
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.digests import Digests, check_unchanged
from deer_jax.models.target import Target, references
from deer_jax.sharding import check_mesh


def load_target(
    path_or_id: str | Path,
    dtype=None,
    mesh: Mesh | None = None,
    *,
    progress: Progress | None = None,
    digests: Digests | None = None,
) -> Target:
    """The target in a Hugging Face folder, here, on gs:// or on the hub, or in a GGUF file here or on gs://.

    Args:
      path_or_id: a folder, a file MODEL.gguf, or a hub id: OWNER/NAME, or hub:OWNER/NAME where that could be a path. A
        file's values are dequantised and rounded to bfloat16, then cast to `dtype`.
      dtype: "bfloat16" or "float32"; None is float32 on CPU and bfloat16 elsewhere.
      mesh: devices to shard the parameters over; None is the default device.
      progress: called with the bytes read so far and their total.
      digests: computes what `Target.digest` needs while the weights are loaded; None leaves it for when it is asked.

    Raises InputError, one line, for whatever is wrong with the folder or file; RunError if it changes meanwhile.
    """
    check_mesh(mesh)
    if mesh is not None:
        processes.check_devices(mesh.devices.flat)
    build = Build.here(mesh, dtype)
    folder = resolve_target(path_or_id)
    files = deciding_files(folder)
    config, stop_ids = read_config(folder), read_stop_ids(folder)
    tokenizer = load_tokenizer(read_gguf(folder)) if is_gguf(folder) else Tokenizer.load(folder)
    if digests is not None:
        for stamp in files:
            digests.begin(stamp)
    params, _ = load_params(folder, config, build.dtype, scan=build.scan, mesh=mesh, progress=progress)
    for stamp in files:
        check_unchanged(stamp)
    return Target(
        config=config,
        params=params,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        name=model_name(path_or_id),
        mesh=mesh,
        build=build,
        files=files,
        digests=Digests() if digests is None else digests,
        loaded=references(params, tokenizer),
    )
