"""Drafters from and to Hugging Face folders, and from the folders of alignment runs.

The folder of a drafter that reads text alone is that of its backbone, plus a `deer_jax` section in config.json (see
`DrafterConfig`; its head under `draft_head`) and further tensors: mask and separator, and those of its head. The public
open-dCoder layout has none of these: its mask is a row of the embedding. Folders of drafters that read their target are
in `conditioned`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deer_jax.build import parse_dtype
from deer_jax.checkpoints.backbones import ItsTarget
from deer_jax.checkpoints.eagle3 import is_eagle3
from deer_jax.checkpoints.families import DRAFTERS, write_config
from deer_jax.checkpoints.gguf import is_gguf
from deer_jax.checkpoints.hub import model_name, resolve_folder
from deer_jax.checkpoints.huggingface import (
    Progress,
    deciding_files,
    load_params,
    read_config,
    read_values,
    save_folder,
    write_description,
)
from deer_jax.checkpoints.records import DRAFTER
from deer_jax.checkpoints.runs import is_run, read_best
from deer_jax.checkpoints.tapped import (
    LAYOUTS,
    SECTION,
    Layout,
    describe,
    is_tapped,
    read_drafter,
    target_in,
    write_drafter,
)
from deer_jax.config import DrafterConfig, check_choice, from_mapping
from deer_jax.data.tokenizer import Tokenizer, differing_ids
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.heads import HEAD, INDEPENDENT, head_from
from deer_jax.drafters.prompt_lookup import lookup_first, prompt_lookup
from deer_jax.drafters.protocol import Trainable
from deer_jax.drafters.standalone import MASK, StandaloneMethod, backbone, drafter_from_target, new_entries
from deer_jax.drafters.start import FROM_TARGET, listed_layers
from deer_jax.drafters.tapped import TappedMethod, shared_of
from deer_jax.errors import InputError, named, shown
from deer_jax.models.target import Target, check_target
from deer_jax.models.transformer import Params, is_stacked, stack_layers, unstack_layers
from deer_jax.models.weights import Weight
from deer_jax.sharding import on_mesh, placements

SPECIAL = "deer_jax.mask_and_separator"
OF_HEAD = f"{SECTION}.{HEAD}."  # before the names of a head's weights
PROMPT_LOOKUP, LOOKUP_FIRST = "prompt-lookup", "prompt-lookup+"
OPEN_DCODER_MASK = "<M>"
OPEN_DCODER_DIFFERING = (151665, 151666, 151667, 151668)  # <M> and unused rows there, tool and think tags in Qwen3
PAPER_DRAFT_LENGTH = 32  # k of the DEER paper, for folders that do not say theirs


def load_drafter(
    source: str | Path,
    *,
    target: Target,
    dtype=None,
    config: DrafterConfig | None = None,
    progress: Progress | None = None,
) -> Drafter:
    """The drafter in a folder, local or on the hub, for a target.

    Args:
      source: a folder or hub id (see `load_target`): one this library saved, that of an alignment run (its best
        checkpoint), one in the layout of open-dCoder, of z-lab's dflash (DFlash, DFlash 2), of EAGLE-3's authors or of
        speculators (dflash, dflash2, dspark, eagle3); or `from-target` (`from-target:0,2,4`): an untrained drafter with
        the target's own weights, of all layers or of those listed; or `prompt-lookup`, which proposes what followed the
        last time the text ended as it does now; or `prompt-lookup+SOURCE`, which does so where at least three tokens
        are repeated, and drafts as that source elsewhere.
      dtype: "bfloat16" or "float32"; None is the target's.
      config: how the drafter reads, instead of what its folder says; a folder of a plain model needs it.
      progress: called with the bytes read so far and their total.

    Raises InputError, one line, for a folder that is no drafter or whose tokenizer differs from the target's.
    """
    check_target(target)
    if not isinstance(config, DrafterConfig | None):
        raise InputError(f"config must be a DrafterConfig, got {shown(config)}")
    name = str(source)
    if name == PROMPT_LOOKUP:
        return prompt_lookup(target)
    if name.startswith(LOOKUP_FIRST):
        inner = name.removeprefix(LOOKUP_FIRST)
        if not inner or inner.startswith(PROMPT_LOOKUP):
            raise InputError(f"{shown(name)}: name the drafter behind it, as in {LOOKUP_FIRST}runs/mine")
        return lookup_first(load_drafter(inner, target=target, dtype=dtype, config=config, progress=progress))
    if name.partition(":")[0] == FROM_TARGET:
        drafter = drafter_from_target(target, config, layers=listed_layers(name), name=name)
        if dtype is None:
            return drafter
        dtype = parse_dtype(dtype)
        return dataclasses.replace(drafter, params=jax.tree.map(lambda x: x.astype(dtype), drafter.params))
    folder = resolve_folder(source)
    dtype = parse_dtype(target.dtype if dtype is None else dtype)
    run, folder = (folder, folder / DRAFTER) if is_run(folder, DRAFTER) else (None, folder)
    if run is None:
        deciding_files(folder)  # refuses what is no file before anything reads it
    values = read_values(folder)
    _check_eagle(values, folder)  # the kinds before EAGLE-3
    if is_tapped(values):
        if config is not None:
            raise InputError(f"{folder}: the drafter reads its target; config is for drafters that read text alone")
        tokenizer = _own_tokenizer(folder, target)
        told: Any = {"name": model_name(source), "tokenizer": tokenizer}
        if run is None:
            return read_drafter(folder, target, dtype=dtype, progress=progress, **told)
        drafter = read_drafter(folder, target, **told)
        shapes = drafter_shapes(trainable(drafter), target.mesh)
        return usable_drafter(drafter, read_best(run, shapes), target, dtype)
    _check_kind(values, folder)
    model, tokenizer = read_config(folder), Tokenizer.load(folder)
    found, mask = _reading(folder, tokenizer, config)
    if mask is not None and mask >= model.vocab_size:
        raise InputError(f"{folder}: {OPEN_DCODER_MASK} is id {mask}, the vocabulary ends at {model.vocab_size - 1}")
    if tokenizer and isinstance(target.tokenizer, Tokenizer):
        differing_ids(target.tokenizer, tokenizer, found.differing_ids)
    method = standalone_method(folder, found, target.config.vocab_size)
    drafter = Drafter(method=method, params={}, name=model_name(source), tokenizer=tokenizer)
    if run is not None:
        return usable_drafter(drafter, read_best(run, drafter_shapes(method, target.mesh)), target, dtype)
    options: dict[str, Any] = {"scan": target.build.scan, "mesh": target.mesh, "progress": progress}
    if values.get(SECTION) is not None:
        own = {SPECIAL: Weight((2, model.width), (None, None))}
        own |= {OF_HEAD + name: weight for name, weight in method.head_weights().items()}
        params, extra = load_params(folder, model, dtype, extra=own, **options)
        special = extra.pop(SPECIAL)
        if extra:
            params[HEAD] = {key.removeprefix(OF_HEAD): value for key, value in extra.items()}
    else:
        params, _ = load_params(folder, model, dtype, **options)
        special = new_entries(params["embed"])
        if mask is not None:
            special = special.at[MASK].set(params["embed"][mask])
    return dataclasses.replace(drafter, params=params | {"special": special})


def standalone_method(
    folder: Path, reading: DrafterConfig | None = None, target_vocab: int | None = None
) -> StandaloneMethod:
    """The method of the drafter in a folder that reads text alone; None: the reading that the folder says, and a target
    of as many ids as it has."""
    section, model = read_values(folder).get(SECTION), read_config(folder)
    if reading is None:
        reading = _own_reading(section, folder)
    head = INDEPENDENT
    if section is not None and HEAD in section:
        head = head_from(section[HEAD], f"{folder}: {SECTION}: {HEAD}")
    try:
        return StandaloneMethod(model, reading, model.vocab_size if target_vocab is None else target_vocab, head)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def own_tensors(params: Params) -> dict[str, Any]:
    """What a folder of a drafter that reads text alone has beside its backbone, by key."""
    head = {OF_HEAD + name: value for name, value in params.get(HEAD, {}).items()}
    return {SPECIAL: params["special"]} | head


def _own_tokenizer(folder: Path, target: Target) -> Tokenizer | None:
    """The tokenizer of a drafter's folder, whose ids mean what the target's do; None if it has none."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer and isinstance(target.tokenizer, Tokenizer):
        differing_ids(target.tokenizer, tokenizer, ())
    return tokenizer


def _check_eagle(values: Mapping[str, Any], folder: Path) -> None:
    """InputError for EAGLE's drafters other than EAGLE-3, by architecture or kind."""
    given = values.get("architectures")
    said = [*(given if isinstance(given, list) else ()), values.get("speculators_model_type")]
    if any(isinstance(each, str) and "eagle" in each.lower() for each in said) and not is_eagle3(values):
        raise InputError(
            f"{folder}: is an EAGLE drafter of another kind than EAGLE-3, with one layer and a `draft_vocab_size` in "
            "config.json, which is what loads (docs/drafters.md)"
        )


def _check_kind(values: Mapping[str, Any], folder: Path) -> None:
    """InputError for drafters of other kinds, by their architecture; those without one are plain models."""
    given = values.get("architectures")
    for name in given if isinstance(given, list) else ():
        if isinstance(name, str) and DRAFTERS.search(name):
            raise InputError(
                f"{folder}: drafters of architecture {named(name)} are not supported; supported: folders of this "
                "library, open-dCoder, DFlash and DFlash 2 of z-lab, EAGLE-3, and dflash, dflash2, dspark, eagle3 of "
                "speculators"
            )


def _reading(
    folder: Path, tokenizer: Tokenizer | None, given: DrafterConfig | None
) -> tuple[DrafterConfig, int | None]:
    """How the drafter in a folder reads, and the row of the embedding that is its mask, if one is."""
    section = read_values(folder).get(SECTION)
    if section is not None:
        found = _own_reading(section, folder)
        return given or found, None
    mask = tokenizer.vocabulary().get(OPEN_DCODER_MASK) if tokenizer else None
    if mask is None:
        if given is None:
            raise InputError(
                f"{folder}: no drafter: config.json has no '{SECTION}' section and the tokenizer no "
                f"{OPEN_DCODER_MASK}; to train one from it, say how it is to read (`reading` in a recipe)"
            )
        return given, None
    differing = OPEN_DCODER_DIFFERING if mask in OPEN_DCODER_DIFFERING else (mask,)
    if given is not None:
        return dataclasses.replace(given, differing_ids=tuple(sorted({*given.differing_ids, *differing}))), mask
    # The layout has no separator; a mean embedding holds its place until a drafter is trained with one.
    return DrafterConfig(
        attention="bidirectional", separator=False, draft_length=PAPER_DRAFT_LENGTH, differing_ids=differing
    ), mask


def save_drafter(
    folder: str | Path, drafter: Drafter, *, layout: Layout = "deer_jax", target: Target | None = None, **options
) -> None:
    """Write a drafter as a folder that `load_drafter` reads; further options as for `save_folder`.

    Args:
      layout: of drafters that read their target: ours, or `dflash` (z-lab), `eagle3` (EAGLE's authors) or
        `speculators`, which say what `target` they are for. InputError where that layout cannot say the drafter.
    """
    check_choice("layout", layout, LAYOUTS)
    if not isinstance(drafter, Drafter):
        raise InputError(f"drafter must be a Drafter, as load_drafter returns, got {shown(drafter)}")
    tokenizer, method = drafter.tokenizer, trainable(drafter)
    options["tokenizer_source"] = tokenizer.folder if isinstance(tokenizer, Tokenizer) else None
    if isinstance(method, TappedMethod):
        shared = drafter.shared
        its = None if target is None else named_target(target)
        write_drafter(
            Path(folder), method, drafter.params, layout=layout, target=its, ids=shared.get("ids"),
            head=shared["head"] if method.carries_head else None, **options,
        )  # fmt: skip
        return
    check_own_layout(layout)
    save_folder(
        Path(folder),
        method.shape,
        backbone(drafter.params),
        extra=own_tensors(drafter.params),
        extra_config={SECTION: method.section()},
        **options,
    )


def check_own_layout(layout: str) -> None:
    """InputError for another layout of a drafter that reads text alone."""
    if layout != "deer_jax":
        raise InputError(f"layout {layout}: is for drafters that read their target; this one reads text alone")


def named_target(target: Target) -> ItsTarget:
    """A target as the public layouts name it."""
    if target.files:
        first = target.files[0].path
        return target_in(first if is_gguf(first) else first.parent)._replace(config=target.config)
    return ItsTarget(target.name, target.config)


def describe_drafter(folder: Path, drafter: Drafter, stop_ids: Sequence[int] = ()) -> None:
    """Write everything of `save_drafter` but the weights; stop_ids: of the target."""
    tokenizer, method = drafter.tokenizer, trainable(drafter)
    if isinstance(method, TappedMethod):
        values = describe(method, drafter.shared.get("ids"), "float32", stop_ids)
    else:
        values = write_config(method.shape, "float32", stop_ids=stop_ids) | {SECTION: method.section()}
    write_description(folder, values, tokenizer_source=tokenizer.folder if isinstance(tokenizer, Tokenizer) else None)


def kept_by_runs(drafter: Drafter, target: Target) -> Drafter:
    """The drafter as the folder of a run gives it back, which keeps no head: a reduced one has the target's own rows.

    InputError where it came with others. Those that are the target's but for rounding to bfloat16 are none.
    """
    method, shared = drafter.method, drafter.shared
    if not isinstance(method, TappedMethod):
        return drafter
    own = shared_of(method, target, np.asarray(shared["ids"]) if "ids" in shared else None)
    if shared["head"] is own["head"]:
        return drafter
    with on_mesh(target.mesh):
        same = jax.jit(lambda *rows: jnp.array_equal(*(each.astype(jnp.bfloat16) for each in rows)))
        if not same(shared["head"], own["head"]):
            raise InputError(
                f"{drafter.name}: its output head has other rows than {target.name}'s, and a run keeps no head: give "
                "the target that it was trained for, or begin another drafter (`conditioned` or `eagle3` in a recipe)"
            )
    return dataclasses.replace(drafter, shared=own)


def trainable(drafter: Drafter) -> Trainable:
    """Its method; InputError for a drafter that has nothing to train or to keep."""
    if not isinstance(drafter.method, Trainable):
        raise InputError(f"{drafter.name}: has nothing that could be trained or written")
    return drafter.method


def drafter_shapes(method: Trainable, mesh: Mesh | None) -> Params:
    """A drafter's parameters as training holds them, float32 and stacked: shapes with their places on the mesh."""
    shapes = method.shapes()
    if mesh is None:
        return shapes
    where = placements(mesh, shapes, method.axes())
    return jax.tree.map(lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), shapes, where)


def place_drafter(drafter: Drafter, mesh: Mesh, dtype=jnp.float32) -> Params:
    """The parameters stacked and sharded over the mesh; training holds them in float32."""
    params = drafter.params if is_stacked(drafter.params) else stack_layers(drafter.params)
    shapes = drafter_shapes(trainable(drafter), mesh)
    return jax.tree.map(lambda x, like: jax.device_put(x.astype(dtype), like.sharding), params, shapes)


def usable_drafter(drafter: Drafter, params: Params, target: Target, dtype=None) -> Drafter:
    """The drafter with parameters that training holds, as decoding beside the target wants them."""
    dtype = target.dtype if dtype is None else dtype
    if target.mesh is not None:
        params = place_drafter(dataclasses.replace(drafter, params=params), target.mesh, dtype)
    else:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    if not target.build.scan:
        params = unstack_layers(params, params["layers"]["input_norm"].shape[0])
    return dataclasses.replace(drafter, params=params)


def _own_reading(section: Any, folder: Path) -> DrafterConfig:
    """How the drafter reads, by its section of config.json, which has its head as well."""
    if not isinstance(section, dict):
        raise InputError(f"{folder}: {SECTION} in config.json must be keys and values, got {shown(section)}")
    values = {key: value for key, value in section.items() if key != HEAD}
    ids = values.get("differing_ids", [])
    values["differing_ids"] = tuple(ids) if isinstance(ids, list) else ids
    return from_mapping(DrafterConfig, values, f"{folder}: {SECTION}")
