"""An answer file that grows: what is in it after every way to stop, and what is refused."""

import errno
import json
import os

import pytest

from deer_jax.data.answers import AnswerWriter
from deer_jax.errors import InputError

SETTINGS = {"seed": 0, "temperatures": [0.0, 0.7], "prefix": None}


def record(item: int) -> dict:
    return {"item": item, "prompt": [1], "answer": [item]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.representative
def test_grows_and_goes_on(path):
    writer = AnswerWriter(path, SETTINGS)
    assert (writer.items, writer.running) == (set(), {})
    writer.save([], {0: [5], 1: [6], 7: [8]})
    writer.save([record(1), record(2)], {0: [5, 5], 3: [9]})
    for again in (writer, AnswerWriter(path, {**SETTINGS, "temperatures": (0, 0.7)})):
        assert again.items == {1, 2}
        assert again.running == {0: [5, 5], 3: [9], 7: [8]}  # 7 was not mentioned: it waits
    again.save([record(0)], {})
    assert lines(path) == [record(1), record(2), record(0)]
    assert sorted(found.name for found in path.parent.iterdir()) == ["answers.jsonl", "answers.jsonl.state.json"]


@pytest.mark.representative
@pytest.mark.parametrize("torn", ['{"item": 2, "pro', '{"item": 2}', "\0"])
def test_a_torn_line_is_dropped(path, torn):
    AnswerWriter(path, SETTINGS).save([record(1)], {2: [4]})
    with path.open("a") as stream:
        stream.write(torn)
    writer = AnswerWriter(path, SETTINGS)
    assert (writer.items, writer.running) == ({1}, {2: [4]})
    writer.save([record(2)], {})
    assert lines(path) == [record(1), record(2)]


def test_what_is_in_the_file_does_not_run(path):
    """Stopped after the append and before the state was replaced."""
    AnswerWriter(path, SETTINGS).save([], {1: [4], 2: [4]})
    path.write_text(json.dumps(record(2)) + "\n", encoding="utf-8")
    assert AnswerWriter(path, SETTINGS).running == {1: [4]}


def test_refused(path):
    path.write_text("mine\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"answers.jsonl: exists without answers.jsonl.state.json, .* another output"):
        AnswerWriter(path, SETTINGS)
    assert path.read_text(encoding="utf-8") == "mine\n"
    path.unlink()
    AnswerWriter(path, SETTINGS).save([record(1)], {})
    with path.open("a") as stream:
        stream.write("{}")  # would be cut, but nothing is changed before the settings are known to be the same
    before = path.read_bytes()
    differ = (
        r"other settings: seed 0 \(now 1\), prefix None \(now \[1, 2\]\); write to another output, or remove .* and"
    )
    with pytest.raises(InputError, match=differ) as caught:
        AnswerWriter(path, SETTINGS | {"seed": 1, "prefix": (1, 2)})
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    path.write_text('{"id": 3}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"answers.jsonl:1: is no answer of this run; write to another output"):
        AnswerWriter(path, SETTINGS)
    for text in ("", "[]", "{}", '{"settings": [], "running": {"a": 1}}'):
        (path.parent / "answers.jsonl.state.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"answers.jsonl.state.json: is not the state of a run"):
            AnswerWriter(path, SETTINGS)


def test_errors_of_the_disk_are_one_line_and_lose_nothing(path, monkeypatch):
    writer = AnswerWriter(path, SETTINGS)
    writer.save([record(1)], {2: [4]})
    before = [(file, file.read_bytes()) for file in (path, writer.state)]
    sync = os.fsync

    def full(stream):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InputError, match=r"answers.jsonl: cannot be written: No space left on device; what was"
    ) as caught:
        writer.save([record(2)], {})
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"answers.jsonl.state.json: cannot be written: No space left"):
        writer.save([], {3: [1]})
    monkeypatch.setattr(os, "fsync", sync)
    assert path.read_bytes().startswith(before[0][1])
    assert writer.state.read_bytes() == before[1][1]
    assert AnswerWriter(path, SETTINGS).items >= {1}
    with pytest.raises(InputError, match=r"none/a.jsonl.state.json: cannot be written: No such file or directory"):
        AnswerWriter(path.parent / "none" / "a.jsonl", SETTINGS)
