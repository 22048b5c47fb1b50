"""Configurations refuse values of a wrong type or range in one line."""

import numpy as np
import pytest

from deer_jax.config import DrafterConfig, Sampling
from deer_jax.errors import InputError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("draft_length", 2.0),
        ("draft_length", True),
        ("draft_length", "4"),
        ("separator", 1),
        ("separator", "false"),
        ("differing_ids", [4]),
        ("differing_ids", None),
        ("differing_ids", (4, -1)),
        ("differing_ids", (True,)),
    ],
)
def test_drafter_fields_are_checked(field, value):
    with pytest.raises(InputError, match=rf"\A{field} must be [^\n]*\Z"):
        DrafterConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-7),
        ("draft_temperature", "hot"),
        ("draft_temperature", 1e-7),
        ("top_p", "all"),
        ("top_p", None),
        ("top_k", 1.0),
        ("top_k", True),
        ("top_k", 2**31),
    ],
)
def test_sampling_fields_are_checked(field, value):
    with pytest.raises(InputError, match=rf"\A{field} [^\n]*\Z"):
        Sampling(**{field: value})


def test_sampling_takes_the_limits_and_numpy_numbers():
    assert Sampling(temperature=1e-6, draft_temperature=0, top_k=2**31 - 1).top_k == 2**31 - 1
    assert Sampling(temperature=np.float32(0.5), top_k=np.int64(3)).top_k == 3
