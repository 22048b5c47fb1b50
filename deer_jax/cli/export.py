"""deer-jax export: a run's best checkpoint as a Hugging Face folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from deer_jax.checkpoints.export import export, is_exported
from deer_jax.checkpoints.tapped import Layout
from deer_jax.cli.common import ConfigOptions
from deer_jax.cli.options import Source, parse
from deer_jax.cli.progress import say
from deer_jax.stores import folder_bytes

EXAMPLE = "deer-jax export --source runs/first --output first-drafter  # the example of align makes the run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ConfigOptions):
    """Write the best checkpoint of a pretrain or align run as a Hugging Face folder.

    A target becomes a plain model that transformers loads. A drafter of text alone becomes its backbone with a
    'deer_jax' section in config.json and one more tensor, mask and separator. A drafter that reads its target is
    written in our layout, or in that of a public package. load_drafter reads them all, and so does --drafter of every
    verb.
    """

    source: Annotated[Path, "the folder of the run: the output of its recipe", "FOLDER"]
    output: Annotated[Path, "the folder to make", "FOLDER"]
    dtype: Annotated[Literal["bfloat16", "float32"], "of the weights; values are rounded to it"] = "bfloat16"
    layout: Annotated[Layout, "of a drafter that reads its target: ours, or a package's"] = "deer_jax"
    target: Annotated[Source | None, "its target, a folder or hub id: the packages' layouts name it", "SOURCE"] = None


def run(argv: Sequence[str]) -> None:
    options = parse(Options, "export", argv, EXAMPLE)
    how: Any = {"dtype": options.dtype, "layout": options.layout, "target": options.target}
    if is_exported(options.source, options.output, **how):
        say(f"{options.output}: is complete, nothing to do")
        return
    folder = export(options.source, options.output, **how)
    say(f"{folder}: {folder_bytes(folder) / 1e6:,.1f} MB")
