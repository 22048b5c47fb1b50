"""Tokenizer files with anything wrong in them: they are read, or refused in one line."""

import copy
import json
import random

import pytest

from deer_jax.data.bpe import train_bpe
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.errors import InputError, RunError

VALUES = (
    None, True, -1, 0, 2**31, 2**40, 2**70, 1.5, "", "x", "\ud83d", "a" * 3000, [], {}, ["x"], [1], [["a", "b"]],
    {"type": "BPE"}, {"type": "x"}, {"": {}}, {"content": "x"},
)  # fmt: skip
KEYS = (
    "add_prefix_space", "chat_template", "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens",
    "model_max_length", "padding_side", "tokenizer_class", "auto_map", "truncation", "padding", "backend", "pad_token",
    "unk_token", "normalizer", "decoder", "clean_up_tokenization_spaces", "split_special_tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["the dog said hello to you"] * 3, 265, folder)
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir()}


def places(value, place=()):
    """Every place in a JSON value, by the keys that lead there."""
    if place:
        yield place
    entries = list(value.items())[:40] if isinstance(value, dict) else list(enumerate(value))[:5]
    for key, entry in entries if isinstance(value, dict | list) else ():
        yield from places(entry, (*place, key)) if isinstance(entry, dict | list) else [(*place, key)]


def mutate(rng: random.Random, value) -> None:
    *path, last = rng.choice(list(places(value)))
    inside = value
    for key in path:
        inside = inside[key]
    kind = rng.random()
    if kind < 0.25:
        del inside[last]
    elif kind < 0.5 and isinstance(inside, dict):
        inside[rng.choice(KEYS)] = rng.choice(VALUES)
    else:
        inside[last] = rng.choice(VALUES)


def use(folder) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    ids = tokenizer.encode("the dog said ñ")
    tokenizer.decode(ids)
    tokenizer.settled(ids)
    assert len(tokenizer.fingerprint) == 12


def test_fuzz_tokenizer_files(files, tmp_path, capfd):
    for seed in range(150):
        rng = random.Random(seed)
        name = rng.choice(sorted(files))
        values = copy.deepcopy(files[name])
        for _ in range(rng.choice((1, 1, 2))):
            mutate(rng, values)
        content = {each: json.dumps(values if each == name else files[each]).encode() for each in files}
        if rng.random() < 0.1:
            at = rng.randrange(len(content[name]))
            content[name] = (
                content[name][:at] + rng.choice((b"", b"\xff", b"\0", b"{" * 9999)) + content[name][at + 1 :]
            )
        for each, data in content.items():
            (tmp_path / each).write_bytes(data)
        case = f"seed {seed}: {name} {values!r:.2000}"
        refusal = ""
        try:
            use(tmp_path)
        except (InputError, RunError) as error:
            refusal = str(error)
        except BaseException as error:
            raise AssertionError(f"{case} raises {error!r}") from error
        assert "\n" not in refusal, case
        assert len(refusal) < 1000, case
        assert "panicked" not in capfd.readouterr().err, case


def test_ids_without_a_text_do_not_end_a_run(files, tmp_path):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.plain("the dog")
    assert tokenizer.decode([*ids, 10**6, 2**40, -1]) == "the dog"
