"""A training run's best checkpoint as a Hugging Face folder."""

from pathlib import Path

import jax
import jax.numpy as jnp

from deer_jax.checkpoints.drafters import SECTION, SPECIAL
from deer_jax.checkpoints.huggingface import read_config, read_stop_ids, save_folder
from deer_jax.checkpoints.load import compute_dtype
from deer_jax.checkpoints.runs import DRAFTER, TARGET, is_run, read_best
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.errors import InputError
from deer_jax.formats import read_json
from deer_jax.models.transformer import abstract_params


def export(source: str | Path, output: str | Path, *, dtype="bfloat16") -> Path:
    """Write the best checkpoint of a run as a folder that transformers and this library read.

    A pretrained target becomes a plain model. A drafter becomes its backbone, which is a plain model too, with a
    `deer_jax` section in config.json that says how it reads, and one more tensor, `deer_jax.mask_and_separator` [2, D].

    Args:
      source: the folder of a `pretrain` or `align` run.
      output: the folder to make.
      dtype: "bfloat16" or "float32"; values are rounded to it.

    Returns the output's path. Raises InputError if the source is no run or has no checkpoint, or the output exists.
    """
    source, output, dtype = Path(source).expanduser(), Path(output).expanduser(), compute_dtype(dtype)
    kind = next((kind for kind in (DRAFTER, TARGET) if is_run(source, kind)), None)
    if kind is None:
        raise InputError(f"{source}: is no folder of a pretrain or align run; give the `output` of its recipe")
    described = source / kind
    config = read_config(described)
    shapes = abstract_params(config)
    if kind == DRAFTER:
        shapes |= {"special": jax.ShapeDtypeStruct((2, config.width), jnp.float32)}
    params = jax.tree.map(lambda x: x.astype(dtype), read_best(source, shapes))
    values = read_json(described / "config.json")
    save_folder(
        output, config, {name: value for name, value in params.items() if name != "special"},
        tokenizer_source=described if Tokenizer.load(described) else None,
        stop_ids=read_stop_ids(described), bos_id=values.get("bos_token_id"),
        extra={SPECIAL: params["special"]} if kind == DRAFTER else None,
        extra_config={SECTION: values[SECTION]} if kind == DRAFTER else None,
    )  # fmt: skip
    return output
