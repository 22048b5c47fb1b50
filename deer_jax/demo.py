"""The pair that comes with the package: a small target for Python source, and the drafter aligned to it.

How both were made, and how they fare, stands in pair/README.md.
"""

import dataclasses
from pathlib import Path

from deer_jax.checkpoints.drafters import load_drafter
from deer_jax.checkpoints.load import load_target
from deer_jax.drafters.drafter import Drafter
from deer_jax.models.target import Target

FOLDER = Path(__file__).parent / "pair"  # target/ and drafter/, and prompts that neither was trained on
PROMPTS = FOLDER / "held_out.jsonl"


def demo_pair() -> tuple[Target, Drafter]:
    """The bundled target and its drafter; nothing is downloaded."""
    target = dataclasses.replace(load_target(FOLDER / "target"), name="bundled target")
    return target, dataclasses.replace(load_drafter(FOLDER / "drafter", target=target), name="bundled drafter")
