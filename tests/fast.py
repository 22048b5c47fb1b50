"""The fast tier: `pytest -m representative` runs one of each kind of test."""

from collections.abc import Iterable
from typing import Any

import pytest


def representing(cases: Iterable[Any], chosen: Any) -> list:
    """The cases of a parametrized test, tuples where it has several arguments; the chosen one is in the fast tier."""
    marks = {True: [pytest.mark.representative], False: []}
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks[case == chosen]) for case in cases
    ]
