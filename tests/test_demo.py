"""The demonstration pair: the same on every call, decoding exactly, and honest about its weights."""

import jax
import numpy as np

from deer_jax.cli import main as cli
from deer_jax.demo import PROMPTS, ByteTokenizer, demo_pair


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é!") == [195, 169, 33]
    assert tokenizer.decode([195, 169, 33]) == "é!"
    assert tokenizer.decode([195, 33]) == "\ufffd!"


def test_the_pair_is_always_the_same():
    jax.tree.map(np.testing.assert_array_equal, demo_pair()[0].params, demo_pair()[0].params)
    jax.tree.map(np.testing.assert_array_equal, demo_pair()[1].params, demo_pair()[1].params)


def test_command(capsys, monkeypatch):
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "weights of this pair are random" in out
    assert out.count("token for token the same") == len(PROMPTS)
    assert "untrained k=4" in out
