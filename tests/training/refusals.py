"""What may come of damaged input: it is taken, or refused in one line."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from deer_jax.errors import InputError, RunError


@contextlib.contextmanager
def taken_or_refused(case: Any) -> Iterator[None]:
    """Fails for any other outcome of the block, and shows the case, which makes it happen again."""
    try:
        yield
    except (InputError, RunError) as error:
        if "\n" in str(error) or len(str(error)) >= 1000:
            pytest.fail(f"not one line: {str(error)[:2000]!r}\n{case!r:.4000}")
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error!s:.300}\n{case!r:.4000}")
