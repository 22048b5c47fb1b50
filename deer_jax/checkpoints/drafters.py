"""Drafters from and to Hugging Face folders.

A drafter's folder is that of its backbone, plus a `deer_jax` section in config.json (see `DrafterConfig`) and one more
tensor, mask and separator. The public open-dCoder layout has neither: its mask is a row of the embedding.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deer_jax.checkpoints.huggingface import Progress, load_params, read_config, read_json, resolve_folder, save_folder
from deer_jax.checkpoints.load import check_vocabulary, compute_dtype, scan_layers
from deer_jax.config import DrafterConfig, InputError, from_mapping
from deer_jax.data.tokenizer import Tokenizer, differing_ids
from deer_jax.drafters.standalone import StandaloneDrafter, StandaloneMethod, drafter_from_target
from deer_jax.models.target import Target

SECTION, SPECIAL = "deer_jax", "deer_jax.mask_and_separator"
FROM_TARGET = "from-target"
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
) -> StandaloneDrafter:
    """The drafter in a folder, local or on the hub, for a target.

    Args:
      source: a folder this library saved, one in the open-dCoder layout, or `from-target` (`from-target:0,2,4`): an
        untrained drafter with the target's own weights, of all layers or of those listed.
      dtype: "bfloat16" or "float32"; None is the target's.
      config: reading conventions of a `from-target` drafter; a folder brings its own.
      progress: called with the bytes read so far and their total.

    Raises InputError, one line, for a folder that is no drafter or whose tokenizer differs from the target's.
    """
    name = str(source)
    if name.partition(":")[0] == FROM_TARGET:
        drafter = drafter_from_target(target, config, layers=_listed_layers(name), name=name)
        if dtype is None:
            return drafter
        dtype = compute_dtype(dtype)
        return dataclasses.replace(drafter, params=jax.tree.map(lambda x: x.astype(dtype), drafter.params))
    folder = resolve_folder(source)
    dtype = compute_dtype(target.params["embed"].dtype if dtype is None else dtype)
    model, tokenizer = read_config(folder), Tokenizer.load(folder)
    check_vocabulary(tokenizer, model.vocab_size, folder)
    section = read_json(folder / "config.json").get(SECTION)
    options = {"scan": scan_layers(), "mesh": target.mesh, "progress": progress}
    if section is not None:
        found = from_mapping(DrafterConfig, _with_tuple(section, folder), f"{folder}: {SECTION}")
        params, extra = load_params(folder, model, dtype, extra={SPECIAL: (2, model.width)}, **options)
        params["special"] = extra[SPECIAL]
    else:
        mask = tokenizer.vocabulary().get(OPEN_DCODER_MASK) if tokenizer else None
        if mask is None:
            raise InputError(
                f"{folder}: no drafter: config.json has no '{SECTION}' section and the tokenizer no "
                f"{OPEN_DCODER_MASK}; start an untrained one with '{FROM_TARGET}'"
            )
        differing = OPEN_DCODER_DIFFERING if mask in OPEN_DCODER_DIFFERING else (mask,)
        found = DrafterConfig(
            attention="bidirectional", separator=False, draft_length=PAPER_DRAFT_LENGTH, differing_ids=differing
        )
        params, _ = load_params(folder, model, dtype, **options)
        # The layout has no separator: a mean embedding holds its place until a drafter is trained with one.
        mean = jnp.mean(params["embed"].astype(jnp.float32), axis=0)
        params["special"] = jnp.stack([params["embed"][mask], mean.astype(dtype)])
    if tokenizer and isinstance(target.tokenizer, Tokenizer):
        differing_ids(target.tokenizer, tokenizer, found.differing_ids)
    method = StandaloneMethod(model, found, target.config.vocab_size)
    return StandaloneDrafter(method=method, params=params, name=Path(name).name, tokenizer=tokenizer)


def save_drafter(folder: str | Path, drafter: StandaloneDrafter, **options) -> None:
    """Write a drafter as a Hugging Face folder that `load_drafter` reads; options as for `save_folder`."""
    tokenizer = drafter.tokenizer
    save_folder(
        Path(folder),
        drafter.method.model,
        {name: value for name, value in drafter.params.items() if name != "special"},
        tokenizer_source=tokenizer.folder if isinstance(tokenizer, Tokenizer) else None,
        extra={SPECIAL: np.asarray(drafter.params["special"])},
        extra_config={SECTION: dataclasses.asdict(drafter.method.config)},
        **options,
    )


def _listed_layers(name: str) -> tuple[int, ...] | None:
    listed = name.partition(":")[2]
    if not listed:
        return None
    try:
        return tuple(int(layer) for layer in listed.split(","))
    except ValueError:
        raise InputError(f"{name}: expected layer numbers, as in {FROM_TARGET}:0,2,4") from None


def _with_tuple(section, folder: Path) -> dict:
    if not isinstance(section, dict):
        raise InputError(f"{folder}: {SECTION} in config.json must be keys and values, got {section!r}")
    ids = section.get("differing_ids", [])
    return section | {"differing_ids": tuple(ids) if isinstance(ids, list) else ids}
