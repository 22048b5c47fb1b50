"""An answer file that grows: what is in it after every way to stop, and what is refused."""

import errno
import json
import os
import random
import re
import subprocess
import sys

import pytest

from deer_jax.data import answer_writer as module
from deer_jax.data.answer_writer import AnswerWriter, read_state
from deer_jax.data.answers import AnswerFiles
from deer_jax.errors import InputError, RunError

SETTINGS = {"seed": 0, "temperatures": [0.0, 0.7], "prefix": None}
ITEMS = range(10)


def record(item: int) -> dict:
    return {"item": item, "prompt": [1], "answer": [item]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


@pytest.fixture
def state(tmp_path):
    return tmp_path / "answers.jsonl.state.json"


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save(path, records=(), running=None, settings=SETTINGS) -> tuple[set[int], dict[int, list[int]]]:
    """One run: what it found, and then saves."""
    with AnswerWriter(path) as writer:
        writer.begin(settings, ITEMS)
        found = set(writer.items), dict(writer.running)
        writer.save(list(records), running or {})
    return found


def refused(path, match, kind=InputError, settings=SETTINGS):
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    with pytest.raises(kind, match=match) as caught:
        save(path, settings=settings)
    assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()} == before


@pytest.mark.representative
def test_grows_and_goes_on(path):
    with AnswerWriter(path) as writer:
        writer.begin(SETTINGS, ITEMS)
        assert (writer.items, writer.running) == (set(), {})
        begun = writer.begun
        writer.files = {"/m/a": [1, 2, "d"]}
        writer.save([], {0: [5], 1: [6], 7: [8]})
        writer.save([record(1), record(2)], {0: [5, 5], 3: [9]})
        assert writer.items == {1, 2}
        assert writer.running == {0: [5, 5], 3: [9], 7: [8]}  # 7 was not mentioned: it waits
    with AnswerWriter(path) as again:
        assert (again.begun, again.files) == (begun, {"/m/a": [1, 2, "d"]})
        seen = []
        again.begin({**SETTINGS, "temperatures": (0, 0.7)}, ITEMS, lambda row, where: seen.append((row, where)))
        assert (again.items, again.running) == ({1, 2}, {0: [5, 5], 3: [9], 7: [8]})
        assert seen == [(record(1), f"{path}:1"), (record(2), f"{path}:2")]
        again.save([record(0)], {})
    assert lines(path) == [record(1), record(2), record(0)]
    assert sorted(found.name for found in path.parent.iterdir()) == ["answers.jsonl", "answers.jsonl.state.json"]


@pytest.mark.representative
@pytest.mark.parametrize("torn", ['{"item": 2, "pro', '{"item": 2}', "\0"])
def test_a_torn_line_is_dropped(path, torn):
    save(path, [record(1)], {2: [4]})
    with path.open("a") as stream:
        stream.write(torn)
    assert save(path, [record(2)]) == ({1}, {2: [4]})
    assert lines(path) == [record(1), record(2)]


def test_lines_that_were_appended_but_not_saved_are_kept(path):
    """Stopped after the append and before the state was replaced."""
    save(path, [record(0)], {1: [4], 2: [4]})
    with path.open("a") as stream:
        stream.write(json.dumps(record(2)) + "\n")
    assert save(path) == ({0, 2}, {1: [4]})
    assert lines(path) == [record(0), record(2)]


def test_refused(path, state):
    path.write_text("mine\n", encoding="utf-8")
    refused(path, r"answers.jsonl: exists without answers.jsonl.state.json, .* another output")
    path.unlink()
    save(path, [record(1)])
    with path.open("a") as stream:
        stream.write("{}")  # would be cut, but nothing is changed before the settings are known to be the same
    differ = r"settings: seed 0 \(now 1\), prefix None \(now \[1, 2\]\); write to another output, or remove .* and"
    refused(path, differ, settings=SETTINGS | {"seed": 1, "prefix": (1, 2)})
    refused(path, r"drafter's weights or configuration changed; write", settings=SETTINGS | {"drafter": "abc"})
    for text, message in (
        ('{"id": 3}\n', r"answers.jsonl:1: is no answer of this run; write to another output"),
        ('{"item": 10}\n', r"answers.jsonl:1: is no answer of this run"),
        ('{"item": true}\n', r"answers.jsonl:1: is no answer of this run"),
        ("\n", r"answers.jsonl:1: not valid JSON: .*; write to another output"),
        (json.dumps(record(2)) + "\n", r"answers.jsonl: its first 42 bytes are not those that were saved; write"),
        ("", r"answers.jsonl: its first 42 bytes are not those that were saved"),
        (json.dumps(record(1)), r"answers.jsonl: its first 42 bytes are not those that were saved"),
    ):
        path.write_text(text, encoding="utf-8")
        refused(path, message)
    path.unlink()
    refused(path, r"answers.jsonl: is gone, of which answers.jsonl.state.json says that it can go on")


def test_an_item_that_stands_twice_is_refused_with_both_lines(path):
    save(path, [record(3), record(1)])
    with path.open("a") as stream:
        stream.write(json.dumps(record(3)) + "\n")
    refused(path, r"answers.jsonl:3: item 3 stands in line 1 already")


def test_a_flipped_bit_is_noticed(path, state):
    """Every bit of both files, one at a time."""
    save(path, [record(1), record(2)], {3: [4, 5]})
    for file in (path, state):
        whole = file.read_bytes()
        for place in range(0, len(whole), 1 if file == path else 7):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 7
            file.write_bytes(changed)
            with pytest.raises(InputError) as caught:
                save(path)
            assert "\n" not in str(caught.value), (file, place)
            assert file.read_bytes() == changed
        file.write_bytes(whole)
    assert save(path) == ({1, 2}, {3: [4, 5]})


def test_one_writer_at_a_time(path):
    with AnswerWriter(path) as writer:
        writer.begin(SETTINGS, ITEMS)
        second = (
            "import sys; from deer_jax.data.answer_writer import AnswerWriter\n"
            "try: AnswerWriter(sys.argv[1]).__enter__()\n"
            "except ValueError as error: print(error)"
        )
        found = subprocess.run([sys.executable, "-c", second, path], capture_output=True, text=True, check=True)
        assert re.fullmatch(rf"{path}: is being written by process {os.getpid()} on .*\n", found.stdout)
        writer.save([record(1)], {})
    assert save(path) == ({1}, {})


@pytest.mark.parametrize("change", ["removed", "replaced", "appended", "cut"])
def test_a_file_that_is_changed_meanwhile_is_noticed(path, change):
    with AnswerWriter(path) as writer:
        writer.begin(SETTINGS, ITEMS)
        writer.save([record(1)], {})
        if change in ("removed", "replaced"):
            content = path.read_bytes()
            path.unlink()
            if change == "replaced":
                path.write_bytes(content)
        elif change == "appended":
            with path.open("a") as stream:
                stream.write("x")
        else:
            os.truncate(path, 3)
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(RunError, match=r"answers.jsonl: was removed or changed while it was being written"):
            writer.save([record(2)], {})
        assert (path.read_bytes() if path.exists() else None) == before


def test_what_cannot_be_appended_to_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "real").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = sorted(tmp_path.iterdir())
    for name, message in (
        ("pipe", "pipe: is no regular file, and what is appended there could not go on; name a file"),
        ("folder", "folder: is a folder; name a file"),
        ("link", "link: is a link to .*real; name the file itself"),
        ("/dev/stdout", "/dev/stdout: is no regular file"),
        ("/dev/null", "/dev/null: is no regular file"),
        ("none/a", "none/a: cannot be written: No such file or directory"),
        ("nul\0", "cannot be written: .*null"),
        ("n" * 300, "cannot be written: File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            save(tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_one_line_and_loses_nothing(path, state, monkeypatch):
    save(path, [record(1)], {2: [4]})
    before = [(file, file.read_bytes()) for file in (path, state)]

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "write"):
        with AnswerWriter(path) as writer:
            writer.begin(SETTINGS, ITEMS)
            with monkeypatch.context() as patch:
                patch.setattr(os, name, full)
                message = r"answers.jsonl: cannot be written: No space left on device; what was .* is kept"
                with pytest.raises(RunError, match=message) as caught:
                    writer.save([record(2)], {})
            assert "\n" not in str(caught.value)
        assert [(file, file.read_bytes()) for file in (path, state)] == before
    with AnswerWriter(path) as writer:
        writer.begin(SETTINGS, ITEMS)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"answers.jsonl.state.json: cannot be written: No space left"):
            writer.save([], {3: [1]})
    assert state.read_bytes() == before[1][1]


# Whatever stands in the two files: a run that goes on, or one line.

VALUES = [None, True, -1, 0, 3, 2**70, 1.5, "", "x", "é", [], [[]], {}, {"a": 1}, [1, "2"], "2026-01-01", float("nan")]


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Bytes removed, doubled, changed; or text that nests or repeats."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0:
            del data[place : place + rng.choice([1, 1, 10, 1000])]
        elif kind == 1:
            data[place:place] = data[place : place + rng.choice([1, 20, 200])]
        elif kind == 2:
            data[place:place] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 4])))
        elif kind == 3 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 4:
            data[place:place] = rng.choice([b"\n", b"\r", b"[" * 5000, b"9" * 5000, b"\xff\xfe", b'"item": 1, ', b"\0"])
        elif kind == 5:
            del data[place:]
        else:
            data[place:place] = json.dumps(rng.choice(VALUES)).encode()
    return bytes(data)


def changed(rng: random.Random, value):
    """A JSON value with one value inside replaced, removed or added; its type may be wrong then."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        kind = rng.randrange(6)
        if kind == 0:
            return {name: each for name, each in value.items() if name != key}
        if kind == 1:
            return value | {rng.choice(["", "0", "-1", "1e9", "99999999999999999999", "x"]): rng.choice(VALUES)}
        return value | {key: changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.6:
        place = rng.randrange(len(value))
        return [*value[:place], changed(rng, value[place]), *value[place + 1 :]]
    return rng.choice(VALUES)


def outcome(function, case) -> bool:
    """Whether it went well; otherwise it must have been one line."""
    try:
        function()
        return True
    except (InputError, RunError) as error:
        text = str(error)
        assert "\n" not in text, case
        assert len(text) < 1000, (case, text)
        return False
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}; case {case!r:.3000}") from error


def test_any_state_file(path, state, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    save(path, [record(1), record(2)], {3: [4, 5], 4: [7]})
    content, values = path.read_bytes(), json.loads(state.read_bytes())
    text, went = state.read_bytes(), 0
    for seed in range(600):
        rng = random.Random(seed)
        if seed % 3 == 0:
            new = mutated(rng, text)
        else:
            body = changed(rng, values)
            if isinstance(body, dict) and seed % 3 == 1:  # as if it were ours
                body["checksum"] = module._checksum(body)
            new = json.dumps(body).encode()
        state.write_bytes(new)
        path.write_bytes(content)
        went += outcome(lambda: save(path), (seed, new))
        outcome(lambda: read_state(path), (seed, new))
        assert path.read_bytes() == content, (seed, new)
    assert 0 < went < 300


def test_any_answer_file(path, state, monkeypatch):
    """A writer goes on from whole lines only, and never with an item twice; a reader reads or says which line."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    save(path, [record(1), record(2), record(5)], {3: [4, 5]})
    content, kept = path.read_bytes(), state.read_bytes()

    def read():
        files = AnswerFiles([path], vocab_size=20)
        for number in range(len(files)):
            files[number]

    wrote = 0
    for seed in range(500):
        rng = random.Random(seed)
        row = json.dumps(changed(rng, record(6))).encode() + b"\n"
        new = mutated(rng, content) if seed % 2 else content + rng.choice([row, mutated(rng, row), row[:-1]])
        path.write_bytes(new)
        state.write_bytes(kept)
        outcome(read, (seed, new))
        if outcome(lambda: save(path), (seed, new)):
            wrote += 1
            assert path.read_bytes().startswith(content), (seed, new)
            items = [each["item"] for each in lines(path)]
            assert len(set(items)) == len(items), (seed, new)
        else:
            assert path.read_bytes() == new, (seed, new)
    assert 20 < wrote < 400
