"""What the tests of the command line share: a model to name, and verbs run in this process with its JAX settings."""

from collections.abc import Callable

import pytest

from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.cli import main as cli
from tests.tiny import random_params, tiny


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """JAX's settings are the process's own: the other tests shall not find theirs changed."""
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """A tiny random target without a tokenizer."""
    config = tiny("llama", layers=1, context=512)
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(path, config, random_params(config))
    return str(path)


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs a verb with its options: the exit status, and what went to stdout and stderr."""

    def call(*argv: str) -> tuple[int, str, str]:
        status = cli.main(argv)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
