"""The real model that the demonstration shows, where it is at hand."""

import os
from pathlib import Path

import pytest

from deer_jax.demo import FILE


@pytest.fixture(scope="session")
def smollm2() -> tuple[Path, Path]:
    """The published GGUF file of SmolLM2, and the Hugging Face folder that was made from it."""
    folder = Path(os.environ.get("DEER_JAX_SMOLLM2") or "none")
    file = Path(os.environ.get("DEER_JAX_SMOLLM2_GGUF") or Path.home() / ".cache" / "deer_jax" / FILE)
    if not (folder / "complete").exists() or not file.is_file():
        pytest.skip("no SmolLM2: set DEER_JAX_SMOLLM2 to its folder, DEER_JAX_SMOLLM2_GGUF to the published file")
    return file, folder
