"""The fast tier: `pytest -m representative` runs one of each kind of test; and what only `make soak` runs."""

import os
from collections.abc import Iterable
from typing import Any

import pytest

KILLS = int(os.environ.get("DEER_JAX_KILLS", "0"))  # of each verb
soak = pytest.mark.skipif(not KILLS, reason="many starts of the program: make soak")


def representing(cases: Iterable[Any], chosen: Any) -> list:
    """The cases of a parametrized test, tuples where it has several arguments; the chosen one is in the fast tier."""
    marks = {True: [pytest.mark.representative], False: []}
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks[case == chosen]) for case in cases
    ]
