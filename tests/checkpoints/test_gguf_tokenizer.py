"""Tokenizers in GGUF metadata: the ids of the folder's tokenizer.json, its templates, and refusals in one line."""

import gc
import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from deer_jax import drafter_from_target, load_drafter, save_drafter
from deer_jax.checkpoints.gguf import GgufFile, read_gguf
from deer_jax.checkpoints.gguf_tokenizer import PRE_TOKENIZERS, load_tokenizer
from deer_jax.checkpoints.load import load_target
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.demo import FOLDER
from deer_jax.errors import InputError, RunError
from tests.gguf_files import model_pair, tiny_gguf, tokenizer_metadata

PAIR = FOLDER / "target"
TURNS = [
    {"role": "system", "content": "Answer like a pirate."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "It be 42."},
    {"role": "user", "content": "Und auf Deutsch?\n\n"},
    {"role": "assistant", "content": "Zweiundvierzig."},
    {"role": "user", "content": "def f(x):\n    return x  # 日本語 🦌"},
]


def texts(count: int = 300) -> list[str]:
    """Code, words of several scripts, numbers, spaces and signs, put together by chance."""
    rng = random.Random(0)
    source = Path(json.__file__).read_text(encoding="utf-8")
    parts = [
        "the quick", " brown", "FOX's", "don't", "I'LL", " naïve", "Straße", "日本語", "한국어", "مرحبا", "ไทย", "🦌🎄",
        "e\u0301", "\u00e9", "3", "42", "1234567", "3.14159", "٣٤", "½", "²", " ", "  ", "    ", "\n", "\n\n", "\r\n",
        "\t", "\u00a0", "\u2003", "!", "?!...", "(x)", "[0]", "{a: 1}", "+=", "->", "#", "_name_", "$", "€", "\\",
        "\x00", "\u200b", "ﬁ",
    ]  # fmt: skip
    found = ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(count)]
    return found + [source[i : i + 200] for i in rng.sample(range(len(source) - 200), 100)]


def in_memory(metadata: dict[str, Any]) -> GgufFile:
    return GgufFile(Path("model.gguf"), {key: value for key, value in metadata.items() if value is not None}, {})


def assert_like(found: Tokenizer, folder: Path, bos: list[int] | None = None) -> None:
    """Every text's ids are those of the folder's tokenizer.json, and decode alike."""
    truth = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in texts():
        ids = truth.encode(text, add_special_tokens=False).ids
        assert found.encode(text) == (bos or []) + ids, text
        assert found.decode(ids) == truth.decode(ids)
    assert found.vocabulary() == truth.get_vocab()


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return tokenizer_metadata(PAIR, "gpt-2") | {"tokenizer.ggml.add_bos_token": True}


@pytest.mark.representative
def test_gpt_2(metadata):
    found = load_tokenizer(in_memory(metadata))
    assert_like(found, PAIR, bos=[0])
    folder = Tokenizer.load(PAIR)
    assert found.encode("def f(): ") == folder.encode("def f(): ")
    assert found.fingerprint == folder.fingerprint
    assert found.settled([5, 6, 7]) == folder.settled([5, 6, 7])


def test_qwen2(data_dir, tmp_path):
    source = data_dir / "tokenizers" / "qwen3"
    if not source.is_dir():
        pytest.skip(f"no {source}")
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    shutil.copyfile(source / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    ours = PRE_TOKENIZERS["qwen2"]
    assert values["normalizer"] == ours["normalizer"]
    assert values["pre_tokenizer"]["pretokenizers"][0] == ours["pre_tokenizers"][0]
    found = load_tokenizer(in_memory(tokenizer_metadata(tmp_path, "qwen2")))
    assert_like(found, tmp_path)
    folder = Tokenizer.load(tmp_path)
    for chat in (TURNS, TURNS[1:2]):
        assert found.encode_chat(chat) == folder.encode_chat(chat)
        assert found.encode_chat(chat, enable_thinking=False) == folder.encode_chat(chat, enable_thinking=False)


def test_smollm(smollm2):
    file, folder = smollm2
    found, other = load_tokenizer(read_gguf(file)), Tokenizer.load(folder)
    assert_like(found, folder)
    for chat in (TURNS, TURNS[1:], TURNS[1:2], TURNS[3:4]):
        assert found.encode_chat(chat) == other.encode_chat(chat)


def test_pieces_of_each_pre_tokenizer(metadata):
    """What the merges of each see, for the kinds of which no published tokenizer is at hand too."""
    expected = {
        "gpt-2": ["It", "'s", "Ġ12345", "ĠĠ", "Ġx", "!\"", "ĊĊ", "Ġa"],
        "smollm": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠĠ", "Ġx", "!\"", "ĊĊ", "Ġa"],
        "qwen2": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠĠ", "Ġx", "!\"ĊĊ", "Ġa"],
        "llama-bpe": ["It", "'s", "Ġ", "123", "45", "ĠĠ", "Ġx", "!\"ĊĊ", "Ġa"],
    }  # fmt: skip
    assert expected.keys() == PRE_TOKENIZERS.keys()
    for pre, pieces in expected.items():
        found = load_tokenizer(in_memory(metadata | {"tokenizer.ggml.pre": pre}))
        split: Any = tokenizers.Tokenizer.from_file(str(found.folder / "tokenizer.json")).pre_tokenizer
        assert isinstance(split, pre_tokenizers.Sequence)
        assert [piece for piece, _ in split.pre_tokenize_str("It's 12345   x!\"\n\n a")] == pieces, pre


def test_bos_is_added_where_the_metadata_or_the_kind_says_so(metadata):
    for changes, added in (
        ({"tokenizer.ggml.add_bos_token": False}, False),
        ({"tokenizer.ggml.add_bos_token": None}, False),
        ({"tokenizer.ggml.add_bos_token": None, "tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.pre": "llama-bpe"}, False),
    ):
        found = load_tokenizer(in_memory(metadata | changes))
        assert found.encode("a") == ([0] if added else []) + found.plain("a")


def test_kinds_of_tokens(metadata):
    tokens, kinds = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    tokens += ["<think>", "[PAD9]", "<|turn|>"]
    kinds += [4, 5, 3]
    found = load_tokenizer(in_memory(metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}))
    size = len(tokens)
    assert found.plain("<think><|turn|>") == [size - 3, size - 1]
    assert found.decode([size - 3, size - 2, size - 1]) == "<think>"
    assert found.token(size - 2) is None


def test_a_template_and_stop_ids_of_a_file_on_the_disk(metadata, tmp_path):
    template = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}A:"
    values = metadata | {"tokenizer.chat_template": template, "tokenizer.ggml.eot_token_id": 9}
    size = len(metadata["tokenizer.ggml.tokens"])
    file, _ = model_pair(tmp_path, tiny_gguf("llama", vocab_size=size), metadata=values)
    target = load_target(file)
    assert target.stop_ids == (0, 9)
    tokenizer = target.tokenizer
    edge = "<|endoftext|>"
    expected = "".join(f"{edge}{turn['role']}: {turn['content']}{edge}" for turn in TURNS) + "A:"
    assert tokenizer.encode_chat(TURNS) == tokenizer.plain(expected)
    with pytest.raises(InputError, match=rf"\A{file}: the chat template has no argument"):
        tokenizer.encode_chat(TURNS, thinking=True)
    folder = tokenizer.folder
    assert tokenizer.digest() == load_target(file).tokenizer.digest()
    assert (folder / "tokenizer.json").exists()
    del target, tokenizer
    gc.collect()
    assert not folder.exists()


def test_a_drafter_takes_its_tokenizer_along(metadata, tmp_path):
    size = len(metadata["tokenizer.ggml.tokens"])
    file, _ = model_pair(tmp_path, tiny_gguf("llama", vocab_size=size), metadata=metadata)
    target = load_target(file)
    save_drafter(tmp_path / "drafter", drafter_from_target(target))
    drafter = load_drafter(tmp_path / "drafter", target=target)
    assert_like(drafter.tokenizer, target.tokenizer.folder, bos=[0])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": "llama"}, "tokenizer 'llama' is not supported; supported: gpt2"),
        ({"model": "bert"}, "tokenizer 'bert' is not supported"),
        ({"model": None}, "tokenizer None is not supported"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported; supported: gpt-2, smollm, qwen2, llama-bpe"),
        ({"pre": "default"}, "pre-tokenizer 'default' is not supported"),
        ({"pre": None}, "pre-tokenizer None is not supported"),
        ({"merges": None}, "tokenizer.ggml.merges is missing, or no list of texts"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is missing, or no list of texts"),
        ({"merges": ["a b c"]}, "'a b c' is no merge of two tokens into one"),
        ({"merges": ["a 日"]}, "'a 日' is no merge of two tokens into one"),
        ({"token_type": [1]}, "token_type must have an entry for each"),
        ({"bos_token_id": 10**6}, "bos_token_id must be one of the"),
        ({"bos_token_id": None}, "add_bos_token is true, but there is no tokenizer.ggml.bos_token_id"),
        ({"token_type": 6}, "kind 6 is not supported for gpt2"),
        ({"tokens": 0}, "stands twice"),
    ],
)
def test_what_is_not_known_or_damaged_is_one_line(metadata, changes, line):
    ((key, value),) = changes.items()
    if key == "token_type" and value == 6:
        value = [6] * len(metadata["tokenizer.ggml.tokens"])
    if key == "tokens" and value == 0:
        value = [*metadata["tokenizer.ggml.tokens"][:-1], "a"]
    with pytest.raises(InputError) as error:
        load_tokenizer(in_memory(metadata | {f"tokenizer.ggml.{key}": value}))
    assert str(error.value).startswith("model.gguf: ")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_no_room_for_its_files(metadata, monkeypatch):
    def full(**options):
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(RunError, match="cannot be written: No space left on device"):
        load_tokenizer(in_memory(metadata))
