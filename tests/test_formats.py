"""JSON and YAML from elsewhere: what is wrong with it is one line, at once, and without much memory."""

import json
import os
import random
import time

import pytest

from deer_jax import formats
from deer_jax.errors import InputError, named, one_line, shown
from deer_jax.formats import (
    json_bytes,
    mapping,
    open_file,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
)


def refused(words: str):
    return pytest.raises(InputError, match=rf"\A(?=[^\n]{{1,999}}\Z)[^\n]*{words}")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (
        ("pipe", "pipe: is no regular file; name a file"),
        ("/dev/zero", "/dev/zero: is no regular file"),
        (".", "is a folder; name a file"),
        ("none", "none: no such file"),
        ("loop", "loop: cannot be read: Too many levels"),
        ("a\0b", "cannot be read: embedded null byte"),
        ("x" * 300, "cannot be read: File name too long"),
    ):
        for read in (open_file, read_bytes, read_text, read_json, read_yaml):
            with refused(words):
                read(tmp_path / name)
    with refused("is a folder"):
        open_file(tmp_path, regular=False)


def test_files_are_read_up_to_a_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"{}" + b" " * 98)
    assert read_bytes(path, most=100) == path.read_bytes()
    assert read_json(path, most=100) == {}
    for read in (read_bytes, read_text, read_json):
        with refused("file: has more than 99 bytes"):
            read(path, most=99)
    path.write_bytes(b"ab\xffc")
    with refused("file: not UTF-8 at byte 2"):
        read_text(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "x: not valid JSON: Expecting value at column 1"),
        ('{"a": 1,\n "b" 2}', "x: not valid JSON: .* at line 2, column 6"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"b": [{"' + "k" * 5000 + '": 1, "' + "k" * 5000 + '": 2}]}', "the key 'kkkk"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("1" * 5000, "not readable as JSON: Exceeds the limit"),
        (b"\xff", "not UTF-8 at byte 0"),
    ],
)
def test_json_that_is_refused(text, words):
    with refused(words):
        parse_json(text, "x")


def test_json_files_hold_an_object(tmp_path):
    (tmp_path / "file").write_text("[1]")
    with refused("expected a JSON object, found list"):
        read_json(tmp_path / "file")
    with refused("x must be keys and values, got 5"):
        mapping(5, "x")


def test_json_that_was_read_can_be_written():
    for text in ('{"a": "\\ud800 é \\u2028"}', '["\\udfff\\ud800"]', '{"\\ud83d": {"b": [1.5, null, true]}}'):
        value = parse_json(text, "x")
        assert json.loads(json_bytes(value)) == value
        assert json.loads(json_bytes(value, indent=2)) == value
    assert json_bytes({"a": "é"}) == '{"a": "é"}\n'.encode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "x: not valid YAML: line 3: the key 'a' stands here and in line 1"),
        ("a:\n  - {b: 1, b: 2}", "line 2: the key 'b' stands here and in line 2"),
        ("1: a\n+1: b", "the key 1 stands"),
        ("a: 1:30", "line 1: the number 1:30 may be read in several ways"),
        ("a: 010", "the number 010 may be read in several ways"),
        ("a: [1", "not valid YAML: line 1: while parsing"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: !!" + "x" * 5000 + " 1", "could not determine a constructor"),
        ("\0", "special characters are not allowed"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: *b", "undefined alias"),
        ("&a [*a]", "has more than 100,000 entries"),
        ("a: &a [x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}]\n" for p, c in
                                 zip("abcdefgh", "bcdefghi", strict=True)), "has more than 100,000 entries"),
        ("[" * 2_000, "nested too deeply"),
        ("- a\n- b", None),
        ("a: " + "9" * 5000, "not readable as YAML"),
        ("a: 2001-99-99", "not readable as YAML"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(text, words, tmp_path):
    if words is not None:
        with refused(words):
            parse_yaml(text, "x")
    (tmp_path / "file").write_text(text)
    with refused("file: "):
        read_yaml(tmp_path / "file")


def test_long_yaml_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(formats, "MOST_NODES", 5_000)
    start = time.process_time()
    with refused("x: has more than 5,000 entries"):
        parse_yaml("- a\n" * 1_000_000, "x")
    assert time.process_time() - start < 10  # the whole of it takes two hundred times as long as this part


def test_yaml_as_people_write_it(tmp_path):
    (tmp_path / "file").write_text("base: &base {a: 1}\nother: {<<: *base, b: 2}\nlist: [1, two, 3.0, null]\n")
    assert read_yaml(tmp_path / "file") == {
        "base": {"a": 1}, "other": {"a": 1, "b": 2}, "list": [1, "two", 3.0, None],
    }  # fmt: skip
    (tmp_path / "empty").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty") == {}
    assert parse_yaml("", "x") is None


GOOD_JSON = json.dumps({"model": {"a": [1, 2.5, "text\n", None, True]}, "ids": [[1], {"b": "\ud83d"}], "x": -1e3})
GOOD_YAML = """\
target: models/one  # a comment
stages:
  - {steps: 10, stage: continuation, learning_rate: 1.0e-4}
  - &second {steps: 5, when: 2001-01-01, text: "quoted \\u00e9"}
more: *second
merged: {<<: *second, a: ~}
block: |
  several
  lines
"""
PIECES = ["[", "{", "}", "]", ":", ",", '"', "'", "&a", "*a", "<<: ", "- ", "\n", "\t", "!!int ", "!!set ", "? ", "| ",
          "%", "\ud800", "\x00", "\x85", "9" * 30, "0x", "1_0:5", "..", "\\", "é", "~", "=", "@", "`", "---\n", "...\n",
          "[" * 300, "{a: " * 300, "9" * 6000, ".nan", "!!binary x", "!!timestamp x", "!!float x"]  # fmt: skip


@pytest.mark.parametrize(("parse", "good"), [(parse_json, GOOD_JSON), (parse_yaml, GOOD_YAML)])
def test_mutated_texts(parse, good):
    read = 0
    for seed in range(250):
        rng = random.Random(seed)
        text = good
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice([*PIECES, ""]) + text[at + rng.choice([0, 0, 1, 5]) :]
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text) + 1)]
        try:
            parse(text, "x")
            read += 1
        except InputError as error:
            line = str(error)
            if not line.isprintable() or len(line) >= 1000:
                raise AssertionError(f"seed {seed}: {line!r}: {text!r}"[:3000]) from error
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}: {text!r}"[:3000]) from error
    assert 0 < read < 250


def test_values_and_names_in_errors_are_short_lines():
    class Odd:
        def __repr__(self):
            raise ValueError("too long")

    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5000, "x" * 10_000, "a\nb\ud800", deep, Odd(), {"a": ["b"] * 1000}):
        for text in (shown(value), shown(value, 30), one_line(ValueError(shown(value)))):
            assert len(text) <= 200
            assert text.isprintable(), text
    assert shown(10**5000) == "a int that is too large to print"
    assert named("path/é") == "path/é"
    assert named("a\nb") == "'a\\nb'"
    assert len(named("x" * 5000)) == 80
