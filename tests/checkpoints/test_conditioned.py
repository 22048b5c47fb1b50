"""Folders of conditioned drafters, in every layout: written, read again, refused; tests/drafters/golden has some."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import deer_jax
from deer_jax.models.target import Target
from tests.fast import representing
from tests.tiny import random_params, tiny

GOLDEN = Path(__file__).parent.parent / "drafters" / "golden"
EMBEDDING_TAPPED = "speculators-dflash-next-token"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
KNOWN = [case for case in CASES if case != EMBEDDING_TAPPED]
TARGET = tiny("qwen3", vocab_size=64, layers=8, mlp_width=16)


@pytest.fixture(scope="module")
def target():
    return Target(config=TARGET, params=random_params(TARGET, scan=False))


def layout_of(case: str) -> str:
    return "dflash" if case.startswith("zlab") else "speculators"


def same_drafter(one, other):
    assert one.method == other.method
    for mine, theirs in ((one.params, other.params), (one.shared, other.shared)):
        assert jax.tree.structure(mine) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", representing(KNOWN, "speculators-dspark-gated"))
def test_a_public_folder_is_written_as_it_was(case, target, tmp_path):
    drafter = deer_jax.load_drafter(GOLDEN / case, target=target, dtype="bfloat16")
    deer_jax.save_drafter(tmp_path / "again", drafter, layout=layout_of(case), target=target)
    before, after = load_file(GOLDEN / case / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert (value.dtype, value.shape) == (after[key].dtype, after[key].shape)
        np.testing.assert_array_equal(value, after[key])
    same_drafter(deer_jax.load_drafter(tmp_path / "again", target=target, dtype="bfloat16"), drafter)
    deer_jax.save_drafter(tmp_path / "ours", drafter)
    same_drafter(deer_jax.load_drafter(tmp_path / "ours", target=target, dtype="bfloat16"), drafter)
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"config.json", "model.safetensors"}
