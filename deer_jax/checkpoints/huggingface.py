"""Hugging Face folders in and out, and GGUF files in: configuration, weights, stop ids.

Weights go tensor by tensor from safetensors files into (sharded) device arrays and back, so host memory is bounded by
the largest tensor when loading and by one shard when saving.
"""

import functools
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from deer_jax.checkpoints.families import (
    Slot,
    bos_id_from,
    config_from,
    stop_ids_from,
    tensor_count,
    tensor_slots,
    write_config,
)
from deer_jax.checkpoints.gguf import is_gguf, read_gguf
from deer_jax.checkpoints.gguf_models import config_values
from deer_jax.checkpoints.tensors import (
    FLOATS,
    INDEX,
    SINGLE,
    Header,
    check_count,
    check_headers,
    opened,
    read_headers,
    weight_files,
)
from deer_jax.config import ModelConfig
from deer_jax.data.tokenizer import COMPANIONS, VOCABULARIES, copy_tokenizer
from deer_jax.digests import Stamp
from deer_jax.errors import InputError, RunError, one_line
from deer_jax.files import new_folder
from deer_jax.formats import json_bytes, open_file, read_json
from deer_jax.models.transformer import Params
from deer_jax.models.weights import Weight
from deer_jax.sharding import Axis, placement

CONFIG, GENERATION = "config.json", "generation_config.json"
MOST_CONFIG_BYTES = 2**22
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
EXTRA = "extra"  # the group of tensors beside the parameters
COMPARED_ROWS = 4096  # a slice of a vocabulary that host memory never notices
OS_CODE = re.compile(r"\(os error (\d+)\)|\bcode: (\d+)")

Progress = Callable[[int, int], None]


def read_values(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """What one of a folder's two configuration files says, as it stands there; of a GGUF file what the first would."""
    if name == CONFIG and is_gguf(folder):
        return config_values(read_gguf(Path(folder)))
    return read_json(Path(folder) / name, most=MOST_CONFIG_BYTES)


def read_config(folder: Path) -> ModelConfig:
    """The model's configuration, from `config.json` or the metadata of a GGUF file."""
    return config_from(read_values(folder), _config_of(folder))


def _config_of(folder: Path) -> str:
    return str(folder if is_gguf(folder) else Path(folder) / CONFIG)


def read_stop_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end an answer: `eos_token_id` of generation_config.json, else of config.json; () if neither has one."""
    if is_gguf(folder):
        return stop_ids_from(read_values(folder), str(folder)) or ()
    for name in (GENERATION, CONFIG):
        path = Path(folder) / name
        found = stop_ids_from(read_values(folder, name), str(path)) if os.path.lexists(path) else None
        if found is not None:
            return found
    return ()


def read_bos_id(folder: Path) -> int | None:
    """`bos_token_id` of config.json; None if it has none."""
    return bos_id_from(read_values(folder), _config_of(folder))


def deciding_files(folder: Path) -> tuple[Stamp, ...]:
    """What of a model's folder decides its answers: weights, configuration, stop ids and tokenizer, as they are now.

    Raises InputError if one of them is no regular file: a pipe would be waited for.
    """
    if is_gguf(folder):
        os.close(open_file(folder))
        return (Stamp.of(folder),)
    others = (GENERATION, *VOCABULARIES, *COMPANIONS)
    files = [folder / CONFIG, *(folder / name for name in others if os.path.lexists(folder / name))]
    for file in files:
        os.close(open_file(file))
    return tuple(Stamp.of(file) for file in (*weight_files(folder), *files))


def _same_values(headers: Mapping[str, Header], left: str, right: str) -> bool:
    one, other = headers[left], headers[right]
    if one.shape != other.shape or one.dtype not in FLOATS:
        return False
    rows = one.shape[0]
    with opened(one.file) as first, opened(other.file) as second:
        a, b = first.get_slice(left), second.get_slice(right)
        spans = (slice(i, min(i + COMPARED_ROWS, rows)) for i in range(0, rows, COMPARED_ROWS))
        return all(np.array_equal(a[span], b[span]) for span in spans)


def _to_device(value: np.ndarray, mesh: Mesh | None, axes: Sequence[Axis], what: str) -> jax.Array:
    sharding = placement(mesh, value.shape, axes, what)
    if sharding is None:
        piece = jax.device_put(value)
    else:  # every process hands over the slices of its own devices only
        piece = jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
    return piece.block_until_ready()  # before the next tensor is read: host memory holds one


@functools.lru_cache
def _zeros(shape, dtype, sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache
def _write(sharding):
    def write(stack, piece, index):
        where = (*index, *(jnp.zeros((), jnp.int32) for _ in piece.shape))
        piece = lax.expand_dims(piece.astype(stack.dtype), range(len(index)))
        return lax.dynamic_update_slice(stack, piece, where)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _traced(index: tuple[int, ...]) -> tuple[np.int32, ...]:
    return tuple(np.int32(i) for i in index)  # traced: one program for all layers and experts


def load_params(
    folder: Path,
    config: ModelConfig,
    dtype,
    *,
    scan: bool,
    mesh: Mesh | None = None,
    extra: Mapping[str, Weight] | None = None,
    progress: Progress | None = None,
) -> tuple[Params, dict[str, jax.Array]]:
    """The parameters of a folder in `dtype`, and the extra tensors, both on the device or sharded over the mesh.

    Args:
      scan: stack the layers; otherwise params["layers"] is index -> name -> weight. Experts are always stacked.
      extra: further keys that the folder must have, and what they are; returned by key.
      progress: called with the bytes read so far and their total.

    Raises InputError once, with every missing, unknown and wrongly shaped tensor.
    """
    folder, extra = Path(folder), dict(extra or {})
    headers = read_headers(folder)
    check_count(headers, tensor_count(config) + len(extra), config.layers, config.experts, str(folder))
    slots = tensor_slots(config) | {
        key: Slot(EXTRA, key, (), weight.shape, weight.axes) for key, weight in extra.items()
    }
    check_headers(headers, slots, str(folder), ignored=(LM_HEAD,) if config.tied else ())
    if config.tied and LM_HEAD in headers and not _same_values(headers, LM_HEAD, EMBEDDING):
        # transformers 5 leaves such a model untied, older versions drop the head: better not to guess.
        raise InputError(
            f"{folder}: config.json ties {LM_HEAD} to the embedding, but their values differ; "
            "set tie_word_embeddings to false, or remove the tensor"
        )
    params = load_slots(headers, slots, (config.layers, config.experts), dtype, scan=scan, mesh=mesh, progress=progress)
    return params, params.pop(EXTRA, {})


def load_slots(
    headers: Mapping[str, Header],
    slots: Mapping[str, Slot],
    stack: tuple[int, int],
    dtype,
    *,
    scan: bool,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Params:
    """The tensors of these slots, which are among the headers, where they belong; see `load_params`.

    stack: the number of layers and of experts.
    """
    params: Params = {}
    dtype = jnp.dtype(dtype)

    def place(slot: Slot, piece: jax.Array) -> None:
        home: dict[Any, Any] = params.setdefault(slot.group, {}) if slot.group else params
        if slot.group == "layers" and not scan:
            home.setdefault(slot.index[0], {})[slot.name] = piece.astype(dtype)
            return
        if not slot.index:
            home[slot.name] = piece.astype(dtype)
            return
        sizes = stack[: len(slot.index)]
        shape, axes = sizes + slot.shape, (None, "experts")[: len(sizes)] + slot.axes
        sharding = placement(mesh, shape, axes, f"{slot.group}.{slot.name}")
        if slot.name not in home:
            home[slot.name] = _zeros(shape, dtype, sharding)()
        home[slot.name] = _write(sharding)(home[slot.name], piece, _traced(slot.index))

    files: dict[Path, list[str]] = {}
    for key in slots:
        files.setdefault(headers[key].file, []).append(key)
    done, total = 0, sum(_bytes(headers[key]) for key in slots)
    for file, keys in files.items():
        with opened(file) as tensors:
            for key in keys:
                place(slots[key], _to_device(tensors.get_tensor(key), mesh, slots[key].axes, key))
                done += _bytes(headers[key])
                if progress:
                    progress(done, total)
    return params


def _bytes(header: Header) -> int:
    return int(np.prod(header.shape, dtype=np.int64)) * (4 if header.dtype == "F32" else 2)


@jax.jit
def _pick(stack, index):
    where = (*index, *(jnp.zeros((), jnp.int32) for _ in range(stack.ndim - len(index))))
    shape = stack.shape[len(index) :]
    return lax.dynamic_slice(stack, where, (1,) * len(index) + shape).reshape(shape)


def _tensor(params: Params, slot: Slot) -> np.ndarray:
    """One tensor of a folder, on the host, from stacked or unrolled parameters."""
    home: dict[Any, Any] = params[slot.group] if slot.group else params
    index = slot.index
    if slot.group == "layers" and slot.name not in home:
        value, index = home[index[0]][slot.name], ()
    else:
        value = home[slot.name]
    if index:
        value = value[index] if isinstance(value, np.ndarray) else _pick(value, _traced(index))
    value = np.ascontiguousarray(jax.device_get(value))
    if value.shape != slot.shape:
        raise InputError(f"parameter {slot.name} is {list(value.shape)}, the configuration says {list(slot.shape)}")
    return value


def save_folder(
    folder: Path,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer_source: Path | None = None,
    stop_ids: Sequence[int] = (),
    bos_id: int | None = None,
    extra: Mapping[str, Any] | None = None,
    extra_config: Mapping[str, Any] | None = None,
    max_shard_bytes: float = 5e9,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder that transformers and `load_params` read: all of it, or nothing.

    Args:
      params: stacked or unrolled; their values are written bit for bit.
      tokenizer_source: the folder whose tokenizer files are copied.
      extra: further tensors by key; extra_config: further entries of config.json.
      max_shard_bytes: weights beyond this are split over several files with an index.
      finish: called with the folder when all of this is in it, before it takes its place.

    Raises InputError if `folder` exists and is not an empty folder, RunError for values that are not finite.
    """
    values = write_config(config, params["embed"].dtype, bos_id=bos_id, stop_ids=stop_ids) | dict(extra_config or {})
    save_slots(
        folder, tensor_slots(config), params, values, tokenizer_source=tokenizer_source, extra=extra,
        max_shard_bytes=max_shard_bytes, finish=finish,
    )  # fmt: skip


def save_slots(
    folder: Path,
    slots: Mapping[str, Slot],
    params: Params,
    values: Mapping[str, Any],
    *,
    tokenizer_source: Path | None = None,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: float = 5e9,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder with the tensors of these slots; values: its config.json. See `save_folder`."""
    folder = Path(folder)
    with new_folder(folder) as partial:
        _write_weights(partial, slots, params, extra, max_shard_bytes)
        write_description(partial, values, tokenizer_source=tokenizer_source)
        if finish is not None:
            finish(partial)


def _write_weights(
    folder: Path, slots: Mapping[str, Slot], params: Params, extra: Mapping[str, Any] | None, max_shard_bytes: float
) -> None:
    extra = dict(extra or {})
    dtype = params["norm"].dtype
    sizes = {key: int(np.prod(slot.shape)) * dtype.itemsize for key, slot in slots.items()}
    sizes |= {key: int(value.size) * value.dtype.itemsize for key, value in extra.items()}
    shards: list[list[str]] = [[]]
    held = 0
    for key, size in sizes.items():
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(key)
        held += size

    where = {}
    for number, keys in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: _tensor(params, slots[key]) for key in keys if key in slots}
        tensors |= {key: np.ascontiguousarray(jax.device_get(extra[key])) for key in keys if key in extra}
        for key, value in tensors.items():
            if not np.isfinite(value).all():
                raise RunError(f"{key} has values that are not finite: such a model is of no use, and is not written")
        _save(folder / name, tensors)
        where |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def _save(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    try:
        file.touch()
        mode = stat.S_IMODE(file.stat().st_mode)
        save_file(dict(tensors), file, metadata={"format": "pt"})
        file.chmod(mode)  # safetensors lets nobody else read it
    except SafetensorError as error:  # what the system said is in its text: No space left on device (os error 28)
        code = OS_CODE.search(str(error))
        if code is None:
            raise RunError(f"{file.name}: cannot be written: {one_line(error)}") from None
        number = int(code[1] or code[2])
        raise OSError(number, os.strerror(number)) from None


def write_description(folder: Path, values: Mapping[str, Any], *, tokenizer_source: Path | None = None) -> None:
    """Everything of a model's folder but its weights. values: its config.json, whose ids of BOS and EOS, if it has any,
    are in generation_config.json too; tokenizer_source: the folder whose tokenizer files are copied."""
    _write_json(folder / CONFIG, values)
    ids = {key: values[key] for key in ("bos_token_id", "eos_token_id") if values.get(key) is not None}
    if ids:
        _write_json(folder / GENERATION, ids)
    if tokenizer_source is not None:
        copy_tokenizer(tokenizer_source, folder)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_bytes(json_bytes(dict(sorted(values.items())), indent=2))
