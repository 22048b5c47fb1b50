"""Folders of drafters that read their target: loaded whatever their layout, written in the one that is asked for.

Our own layout has the tensors' names of the others, and in config.json a configuration of the backbone like a model's
and a section `deer_jax` with the rest (see `section` of their methods, and `ids`, those of a reduced vocabulary). It
says every drafter; the others are refused where they cannot.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from deer_jax.checkpoints import eagle3, speculators, zlab
from deer_jax.checkpoints.backbones import ItsTarget, drafter_slots, prefix_of, shape_from
from deer_jax.checkpoints.families import Slot, write_config
from deer_jax.checkpoints.huggingface import (
    CONFIG,
    EMBEDDING,
    LM_HEAD,
    Progress,
    load_slots,
    read_config,
    read_values,
    save_slots,
)
from deer_jax.checkpoints.tensors import Header, check_count, check_headers, opened, read_headers
from deer_jax.config import ConditionedConfig, Eagle3Config, ModelConfig, from_mapping
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.drafters.conditioned import ConditionedMethod, ConditionedReading
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.eagle3 import Eagle3Method
from deer_jax.drafters.heads import head_from
from deer_jax.drafters.tapped import Ids, TappedMethod, TappedReading, check_target, draft_ids, shared_of
from deer_jax.errors import InputError, shown
from deer_jax.formats import mapping
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params

SECTION, CONDITIONED, EAGLE3 = "deer_jax", "conditioned", "eagle3"  # the section, and what kinds it says
ARCHITECTURE = "DeerJaxDrafter"  # no other library takes such a folder for a model of its own
Layout = Literal["deer_jax", "dflash", "eagle3", "speculators"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
SHARED = "shared"  # the group of a head that a folder has, which is not a parameter


def is_tapped(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a drafter that reads its target, of any layout."""
    if SECTION in values:
        section = values[SECTION]
        return isinstance(section, dict) and section.get("kind") in (CONDITIONED, EAGLE3)
    return speculators.KIND in values or zlab.is_zlab(values) or eagle3.is_eagle3(values)


def read_method(folder: Path, layers: int | None = None) -> tuple[TappedMethod, np.ndarray | None]:
    """What config.json says, and the ids of a reduced vocabulary if it has them too. layers: the target's."""
    values, where = read_values(folder), str(folder / CONFIG)
    try:
        if SECTION in values:
            return _own_method(values, where)
        if eagle3.is_eagle3(values):
            return eagle3.method_from(values, layers, where), None
        read = speculators.method_from if speculators.KIND in values else zlab.method_from
        return read(values, where), None
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _own_method(values: Mapping[str, Any], where: str) -> tuple[TappedMethod, np.ndarray | None]:
    where, section = f"{where}: {SECTION}", values[SECTION]
    conditioned = section["kind"] == CONDITIONED
    for key in section:
        if key not in ("kind", "reading", "shape", "ids", *(["head"] if conditioned else [])):
            raise InputError(f"{where}: unknown key {shown(key)}")
    reading, shape = (
        {name: tuple(value) if isinstance(value, list) else value for name, value in part.items()}
        for part in (mapping(section.get(key), f"{where}: {key}") for key in ("reading", "shape"))
    )
    sizes = shape_from(values, where) | shape
    if conditioned:
        method: TappedMethod = ConditionedMethod(
            from_mapping(ConditionedConfig, sizes, f"{where}: shape"),
            from_mapping(ConditionedReading, reading, f"{where}: reading"),
            head_from(section.get("head"), f"{where}: head"),
        )
    else:
        method = Eagle3Method(
            from_mapping(Eagle3Config, sizes, f"{where}: shape"),
            from_mapping(TappedReading, reading, f"{where}: reading"),
        )
    return method, draft_ids(method, section.get("ids"), f"{where}: ids")


def read_drafter(
    folder: Path,
    target: Target,
    *,
    name: str,
    tokenizer: Tokenizer | None,
    dtype=None,
    progress: Progress | None = None,
) -> Drafter:
    """The drafter in a folder; with dtype None without parameters, as what describes a run."""
    method, ids = read_method(folder, target.config.layers)
    values = read_values(folder)
    own, package = SECTION in values, SECTION not in values and speculators.KIND in values
    try:
        check_target(method, target.config, target.name)
        if package:
            speculators.check_taps(method, target.config.layers)
        if not own:  # there training has looked for it in the texts
            _check_masks(method, target)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    made: dict[str, Any] = {"method": method, "name": name, "tokenizer": tokenizer or target.tokenizer}
    if dtype is None:
        return Drafter(params={}, shared=shared_of(method, target, ids), **made)
    headers = read_headers(folder)
    prefix, reduced = prefix_of(headers), method.reading.draft_vocab is not None
    slots, ignored, has_head = drafter_slots(method, headers), [], method.carries_head
    check_count(headers, len(slots), method.shape.layers, 0, str(folder))
    head = Slot(SHARED, "head", (), (method.draft_vocab, method.shape.width), ("vocab", "width"))
    if has_head and (not own or LM_HEAD in headers):
        slots[prefix + LM_HEAD] = head
    if package or (has_head and not own):
        others = (*speculators.OF_TARGET, *([speculators.TO_TARGET, speculators.TO_DRAFT] if reduced else []))
        ignored = [prefix + key for key in (*others, *([] if has_head else [LM_HEAD]))]
    check_headers(headers, slots, str(folder), ignored=ignored)
    if reduced and not own:
        ids = _public_ids(headers, prefix, method, folder)
    params = load_slots(
        headers, slots, (method.shape.layers, 0), dtype, scan=target.build.scan, mesh=target.mesh, progress=progress
    )
    stored = params.pop(SHARED, None)
    rows = stored["head"].astype(target.dtype) if stored else None
    shared = shared_of(method, target, ids, rows=rows)
    return Drafter(params=params, shared=shared, **made)


def _public_ids(headers: Mapping[str, Header], prefix: str, method: TappedMethod, folder: Path) -> np.ndarray:
    found = {}
    for name in (speculators.TO_TARGET, speculators.TO_DRAFT):
        if prefix + name not in headers:
            raise InputError(f"{folder}: {prefix + name} is missing: the ids of the reduced vocabulary")
        with opened(headers[prefix + name].file) as tensors:
            found[name] = tensors.get_tensor(prefix + name)
    ids = speculators.ids_from(found[speculators.TO_TARGET], method, str(folder))
    marked = found[speculators.TO_DRAFT]
    if marked.shape != (method.target_vocab,) or not np.array_equal(np.flatnonzero(marked), ids):
        raise InputError(f"{folder}: {speculators.TO_DRAFT} and {speculators.TO_TARGET} are of different ids")
    return ids


def _check_masks(method: TappedMethod, target: Target) -> None:
    """InputError for a mask that texts may contain; special tokens and ids without one are none of them."""
    for mask in method.reserved:
        if isinstance(target.tokenizer, Tokenizer) and (text := target.tokenizer.ordinary(mask)) is not None:
            raise InputError(
                f"the mask is id {mask}, an ordinary token of {target.name} ({shown(text)}), which texts contain: "
                "another target, or a damaged folder"
            )


def describe(method: TappedMethod, ids: Ids | None, dtype, stop_ids: Sequence[int]) -> dict[str, Any]:
    """A config.json of our own layout."""
    section = method.section() | ({} if ids is None else {"ids": np.asarray(ids).tolist()})
    own: dict[str, Any] = {"architectures": [ARCHITECTURE], SECTION: section}
    if isinstance(method.shape, ConditionedConfig):
        own["attention_bias"] = method.shape.o_bias
    return write_config(method.shape, dtype, stop_ids=stop_ids) | own


def write_drafter(
    folder: Path,
    method: TappedMethod,
    params: Params,
    *,
    layout: Layout = "deer_jax",
    target: ItsTarget | None = None,
    ids: Ids | None = None,
    head: Any = None,
    stop_ids: Sequence[int] = (),
    tokenizer_source: Path | None = None,
    **options,
) -> None:
    """Write a drafter as a folder that `read_drafter` reads; further options as for `save_slots`.

    Args:
      target: what the public layouts say of it.
      ids, head: of a reduced vocabulary, and the rows [V', D] of the head for them; our own layout does without the
        rows, which are then taken from the target. The public ones have EAGLE-3's head in any case.
      stop_ids, tokenizer_source: for our own layout; the others have them with the target.

    Raises InputError where the layout cannot say the drafter.
    """
    dtype, extra = params["norm"].dtype, {}
    if layout == "deer_jax":
        values = describe(method, ids, dtype, stop_ids)
    else:
        values = public_values(method, layout, dtype, target)
        tokenizer_source = None
    if head is not None:
        extra[LM_HEAD] = np.asarray(jax.device_get(head)).astype(dtype)
    if ids is not None and layout in ("eagle3", "speculators"):
        extra |= speculators.id_tensors(np.asarray(ids), method.target_vocab)
    slots = drafter_slots(method, midlayer=layout == "eagle3")
    save_slots(folder, slots, params, values, tokenizer_source=tokenizer_source, extra=extra, **options)


def public_values(method: TappedMethod, layout: Layout, dtype, target: ItsTarget | None) -> dict[str, Any]:
    """The config.json of a public layout."""
    if target is None:
        raise InputError(f"layout {layout}: its folders say what target they are for; give it as `target`")
    check_target(method, target.config, target.name)
    try:
        if isinstance(method, Eagle3Method):
            return eagle3.write_values(method, layout, dtype, target)
        assert isinstance(method, ConditionedMethod)
        if layout == "eagle3":
            raise InputError("a drafter of another kind than EAGLE-3 cannot be said in this layout")
        write = speculators.write_values if layout == "speculators" else zlab.write_values
        return write(method, dtype, target)
    except InputError as error:
        raise InputError(f"layout {layout}: {error}; our own, deer_jax, says every drafter") from None


def target_in(folder: Path) -> ItsTarget:
    """A target's folder as the public layouts name it: its hub id if that is where it came from, else its path."""
    parts = folder.parent.parent.name.split("--")
    hub = folder.parent.name == "snapshots" and parts[0] == "models"
    return ItsTarget("/".join(parts[1:]) if hub else str(folder), read_config(folder))


def head_rows(folder: Path, config: ModelConfig, ids: Ids | None) -> np.ndarray:
    """Some rows [V', D] of the output head of a target's folder; None: all."""
    headers, key = read_headers(folder), EMBEDDING if config.tied else LM_HEAD
    if key not in headers or headers[key].shape != (config.vocab_size, config.width):
        raise InputError(f"{folder}: {key} is missing, or not of the shape that config.json says")
    with opened(headers[key].file) as tensors:
        return tensors.get_tensor(key)[... if ids is None else np.asarray(ids)]
