"""Hugging Face folders in and out: configuration, weights, stop ids.

Weights go tensor by tensor from safetensors files into (sharded) device arrays and back, so host memory is bounded by
the largest tensor when loading and by one shard when saving.
"""

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deer_jax.checkpoints.families import Slot, config_from, stop_field, tensor_slots, write_config
from deer_jax.config import ModelConfig
from deer_jax.data.tokenizer import COMPANIONS, VOCABULARIES, copy_tokenizer
from deer_jax.digests import Stamp
from deer_jax.errors import InputError
from deer_jax.formats import read_json
from deer_jax.models.transformer import Params, turned
from deer_jax.sharding import placement

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
FLOATS = ("F32", "F16", "BF16")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BUFFERS = re.compile(r".*\brotary_emb\.\w+")  # constants that old versions saved with the weights
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
COMPARED_ROWS = 4096  # a slice of a vocabulary that host memory never notices
NAMED = 8  # a report of wrong tensors names this many of each kind

Progress = Callable[[int, int], None]


def resolve_folder(path_or_id: str | Path) -> Path:
    """The local folder, or the downloaded one of a hub id."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path_or_id}: is a file; name the folder of the model")
    if not HUB_ID.fullmatch(str(path_or_id)):
        raise InputError(f"{path_or_id}: no such folder, and not a hub id (owner/name); check the path")
    import huggingface_hub  # slow to import, and only needed here
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(huggingface_hub.snapshot_download(str(path_or_id), allow_patterns=list(DOWNLOADED)))
    except (OSError, HTTPError, HFValidationError) as error:
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"{path_or_id}: no such folder, and it could not be downloaded from the Hugging Face hub ({first}); "
            "check the spelling and the network, or give a local folder"
        ) from None


def read_config(folder: Path) -> ModelConfig:
    """The model's configuration, from `config.json`."""
    path = Path(folder) / "config.json"
    return config_from(read_json(path), str(path))


def read_stop_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end an answer: `eos_token_id` of generation_config.json, else of config.json; () if neither has one."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        found = read_json(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
                raise InputError(f"{path}: eos_token_id must be an id or a list of ids, got {found!r}")
            return tuple(ids)
    return ()


class Header(NamedTuple):
    """What a safetensors file says about one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, ...


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        tensors = safe_open(file, framework="numpy")  # checks that the header covers the whole file
    except FileNotFoundError:
        raise InputError(f"{file}: no such file, though the index names it; download it again") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: damaged or truncated safetensors file ({error}); download it again") from None
    with tensors:
        yield tensors


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor of a folder, by key; nothing but the files' headers is read."""
    folder = Path(folder)
    if (folder / SINGLE).exists():
        files = [folder / SINGLE]
    elif (folder / INDEX).exists():
        where = read_json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise InputError(f"{folder / INDEX}: no weight_map from keys to files")
        files = [folder / name for name in sorted(set(where.values()))]
    elif any(folder.glob("*.bin")):
        raise InputError(f"{folder}: holds only PyTorch .bin weights; convert them with save_pretrained to safetensors")
    else:
        raise InputError(f"{folder}: no {SINGLE} and no {INDEX}")
    headers = {}
    for file in files:
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                piece = tensors.get_slice(key)
                headers[key] = Header(file, tuple(piece.get_shape()), str(piece.get_dtype()))
    return headers


def deciding_files(folder: Path) -> tuple[Stamp, ...]:
    """What of a model's folder decides its answers: weights, configuration, stop ids and tokenizer, as they are now."""
    weights = sorted({header.file for header in read_headers(folder).values()})
    others = ("config.json", "generation_config.json", *VOCABULARIES, *COMPANIONS)
    return tuple(
        Stamp.of(path) for path in (*weights, *(folder / name for name in others if (folder / name).is_file()))
    )


def check_headers(
    headers: Mapping[str, Header], expected: Mapping[str, tuple[int, ...]], where: str, ignored: Sequence[str] = ()
) -> None:
    """One InputError with all missing, unknown and wrong tensors; nothing if they are exactly those expected."""
    found = {key for key in headers if key not in ignored and not BUFFERS.fullmatch(key)}
    wrong = []
    for key in expected.keys() & found:
        header = headers[key]
        if header.shape != tuple(expected[key]):
            wrong.append(f"{key} is {list(header.shape)}, expected {list(expected[key])}")
        elif header.dtype not in FLOATS:
            wrong.append(f"{key} is {header.dtype}, expected one of {', '.join(FLOATS)}")
    kinds = {"missing": expected.keys() - found, "unknown": found - expected.keys(), "wrong": wrong}
    if not any(kinds.values()):
        return
    parts = []
    for kind, names in kinds.items():
        if names:
            more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
            parts.append(f"{kind}: {', '.join(sorted(names)[:NAMED])}{more}")
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items() if names)
    raise InputError(f"{where}: the tensors do not fit config.json ({counts}); {'; '.join(parts)}")


def _same_values(headers: Mapping[str, Header], left: str, right: str) -> bool:
    one, other = headers[left], headers[right]
    if one.shape != other.shape or one.dtype not in FLOATS:
        return False
    rows = one.shape[0]
    with _opened(one.file) as first, _opened(other.file) as second:
        a, b = first.get_slice(left), second.get_slice(right)
        spans = (slice(i, min(i + COMPARED_ROWS, rows)) for i in range(0, rows, COMPARED_ROWS))
        return all(np.array_equal(a[span], b[span]) for span in spans)


def _to_device(value: np.ndarray, mesh: Mesh | None, axes: Sequence[str | None]) -> jax.Array:
    sharding = placement(mesh, value.shape, axes)
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
    extra: Mapping[str, tuple[int, ...]] | None = None,
    progress: Progress | None = None,
) -> tuple[Params, dict[str, jax.Array]]:
    """The parameters of a folder in `dtype`, and the extra tensors, both on the device or sharded over the mesh.

    Args:
      scan: stack the layers; otherwise params["layers"] is index -> name -> weight. Experts are always stacked.
      extra: further keys that the folder must have, with their shapes; returned replicated, by key.
      progress: called with the bytes read so far and their total.

    Raises InputError once, with every missing, unknown and wrongly shaped tensor.
    """
    folder, dtype, extra = Path(folder), jnp.dtype(dtype), dict(extra or {})
    slots, headers = tensor_slots(config), read_headers(folder)
    expected = {key: slot.shape for key, slot in slots.items()} | extra
    check_headers(headers, expected, str(folder), ignored=(HEAD,) if config.tied else ())
    if config.tied and HEAD in headers and not _same_values(headers, HEAD, EMBEDDING):
        # transformers 5 leaves such a model untied, older versions drop the head: better not to guess.
        raise InputError(
            f"{folder}: config.json ties {HEAD} to the embedding, but their values differ; "
            "set tie_word_embeddings to false, or remove the tensor"
        )

    params: Params = {}
    extras: dict[str, jax.Array] = {}

    def place(slot: Slot, piece: jax.Array) -> None:
        if slot.group != "experts" and not (slot.group == "layers" and scan):
            home = params if not slot.group else params.setdefault("layers", {}).setdefault(slot.index[0], {})
            piece = piece.astype(dtype)
            home[slot.name] = turned(slot.name, piece) if slot.group == "layers" else piece
            return
        home = params.setdefault(slot.group, {})
        stack = (config.layers, config.experts)[: len(slot.index)]
        shape, axes = stack + slot.shape, (None, "experts")[: len(stack)] + slot.axes
        sharding = placement(mesh, shape, axes)
        if slot.name not in home:
            home[slot.name] = _zeros(shape, dtype, sharding)()
        home[slot.name] = _write(sharding)(home[slot.name], piece, _traced(slot.index))

    files: dict[Path, list[str]] = {}
    for key in expected:
        files.setdefault(headers[key].file, []).append(key)
    done, total = 0, sum(_bytes(headers[key]) for key in expected)
    for file, keys in files.items():
        with _opened(file) as tensors:
            for key in keys:
                value = tensors.get_tensor(key)
                if key in slots:
                    place(slots[key], _to_device(value, mesh, slots[key].axes))
                else:
                    extras[key] = _to_device(value, mesh, (None,) * value.ndim).astype(dtype)
                done += _bytes(headers[key])
                if progress:
                    progress(done, total)
    return params, extras


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
        value, index = turned(slot.name, home[index[0]][slot.name]), ()
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
) -> None:
    """Write a folder that transformers and `load_params` read: all of it, or nothing.

    Args:
      params: stacked or unrolled; their values are written bit for bit.
      tokenizer_source: the folder whose tokenizer files are copied.
      extra: further tensors by key; extra_config: further entries of config.json.
      max_shard_bytes: weights beyond this are split over several files with an index.

    Raises InputError if `folder` exists and is not an empty folder.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder; remove it or choose another")
    slots, extra = tensor_slots(config), dict(extra or {})
    dtype = params["embed"].dtype
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

    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")  # a sibling, so that renaming is atomic
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created: {error.strerror}") from None
    try:
        where = {}
        for number, keys in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {key: _tensor(params, slots[key]) for key in keys if key in slots}
            tensors |= {key: np.ascontiguousarray(jax.device_get(extra[key])) for key in keys if key in extra}
            save_file(tensors, partial / name, metadata={"format": "pt"})
            where |= dict.fromkeys(keys, name)
        if len(shards) > 1:
            _write_json(partial / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
        write_description(
            partial, config, dtype, tokenizer_source=tokenizer_source, stop_ids=stop_ids, bos_id=bos_id,
            extra_config=extra_config,
        )  # fmt: skip
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_description(
    folder: Path,
    config: ModelConfig,
    dtype,
    *,
    tokenizer_source: Path | None = None,
    stop_ids: Sequence[int] = (),
    bos_id: int | None = None,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Everything of a model's folder but its weights; the arguments are those of `save_folder`."""
    values = write_config(config, dtype, bos_id=bos_id, stop_ids=stop_ids) | dict(extra_config or {})
    generation = {"bos_token_id": bos_id, "eos_token_id": stop_field(stop_ids)}
    _write_json(folder / "config.json", values)
    _write_json(folder / "generation_config.json", {key: v for key, v in generation.items() if v is not None})
    if tokenizer_source is not None:
        copy_tokenizer(tokenizer_source, folder)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
