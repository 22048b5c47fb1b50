"""The learnt tokenizer: every text comes back, the ids stand in their order, the same texts give the same files."""

import json

import numpy as np
import pytest

from deer_jax import InputError
from deer_jax.data.bpe import EDGE, LEAST, train_bpe
from deer_jax.data.tokenizer import Tokenizer

TEXTS = [
    "def add(first, second):\n    return first + second\n\n\ndef sub(first, second):\n    return first - second\n" * 3,
    "class Stack:\n    def push(self, value):\n        self.values.append(value)\n" * 3,
]
V = 300


def learn(folder, texts=TEXTS, size=V) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    train_bpe(texts, size, folder)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("bpe"))


def random_text(seed) -> str:
    """Characters of every width, blanks and controls among them; no surrogates, which are no text."""
    rng = np.random.default_rng(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000), (9, 14), (32, 33)]
    picked = rng.integers(0, len(ranges), rng.integers(0, 60))
    return "".join(chr(rng.integers(*ranges[i])) for i in picked)


CASES = [
    "", " ", "  two  blanks  ", "\t\ttabs\t", "trailing  \n\n", "\r\nwindows\r\n", "no newline", "\x00\x7f",
    "a , b . isn't 'tis", "e\u0301 is not \u00e9", "\ufb01 \u2028 \ufeff", "naïve 東京 🦊", f"a{EDGE}b", TEXTS[0],
    *map(random_text, range(40)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
def test_any_text_comes_back(tokenizer, number):
    text = CASES[number]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == [0, *tokenizer.plain(text)]  # BOS once
    assert 0 not in ids[1:]
    assert all(0 <= token < V for token in ids)


def test_ids_are_the_edge_the_bytes_and_the_merges(tokenizer):
    vocabulary = tokenizer.vocabulary()
    assert sorted(vocabulary.values()) == list(range(V))
    words = {token: text for text, token in vocabulary.items()}
    assert words[0] == EDGE
    assert all(len(words[token]) == 1 for token in range(1, LEAST))
    assert all(len(words[token]) > 1 for token in range(LEAST, V))
    assert {tokenizer.plain(chr(byte))[0] for byte in range(128)} <= set(range(1, LEAST))
    saved = json.loads((tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert ["".join(pair) for pair in saved["model"]["merges"]] == [words[token] for token in range(LEAST, V)]


def test_merges_shorten_what_they_were_learnt_from(tokenizer):
    assert len(tokenizer.plain(TEXTS[0])) < 0.6 * len(TEXTS[0].encode())
    assert len(tokenizer.plain("東京")) == len("東京".encode())


def test_all_but_an_open_character_is_settled(tokenizer):
    ids = tokenizer.encode("return 東")
    assert tokenizer.settled(ids) == len(ids)


def test_a_text_of_few_words_learns_fewer_merges(tmp_path):
    assert len(learn(tmp_path / "few", ["a b\n"]).vocabulary()) <= LEAST + 2
    least = learn(tmp_path / "least", TEXTS, LEAST)
    assert len(least.vocabulary()) == LEAST
    assert least.decode(least.encode("def f")) == "def f"
    assert len(least.plain("def f")) == 5


@pytest.mark.parametrize("size", [LEAST - 1, 0])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path, size):
    with pytest.raises(InputError, match=rf"\Avocab_size must be at least 257, [^\n]*, got {size}\Z"):
        train_bpe(TEXTS, size, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_same_texts_give_the_same_files(tokenizer, tmp_path):
    again = learn(tmp_path / "again", iter(TEXTS))
    for path in tokenizer.folder.iterdir():
        assert path.read_bytes() == (again.folder / path.name).read_bytes()
    assert again.fingerprint == tokenizer.fingerprint
    assert learn(tmp_path / "other", TEXTS[:1]).fingerprint != tokenizer.fingerprint
