"""The target of the phases that need a real one; of their tiny form, random weights."""

import dataclasses
from pathlib import Path
from typing import Any

from shapes import shape_of

from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.demo import FOLDER
from deer_jax.models.transformer import init_params


def real_target(args: Any) -> str:
    """Its name, as `load_target` takes it."""
    if args.target:
        return args.target
    folder: Path = args.work / "target"
    if not folder.exists():  # with the tokenizer of the bundled target
        config = dataclasses.replace(shape_of("0.5b", tiny=True), vocab_size=2048, layers=2)
        save_folder(folder, config, init_params(config, 0), tokenizer_source=FOLDER / "target")
    return str(folder)
