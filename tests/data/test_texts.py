"""Folders of text: what is read, kept apart or left out; their tokens in windows, and passages for prompts."""

import itertools
import re

import numpy as np
import pytest

from deer_jax import InputError
from deer_jax.data import texts
from deer_jax.data.sources import read_prompts
from deer_jax.data.texts import (
    SHORT_LINE,
    Document,
    Windows,
    passages,
    read_corpus,
    tokens_of,
    window_batches,
    write_prompts,
)


def put(root, files) -> str:
    """A folder of these files, by name below it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def lines(label, count=6) -> str:
    """A text of its own: no line of it stands in that of another label."""
    return "".join(f"{label} is here in line number {i}\n" for i in range(count))


def names(documents) -> list[str]:
    return [each.name for each in documents]


def test_texts_come_in_the_order_of_their_names_source_by_source(tmp_path):
    first = put(tmp_path / "first", {name: lines(name) for name in ("z.py", "a/c.py", "a.py", "a/b/d.py")})
    second = put(tmp_path / "second", {"m.py": lines("m"), "blank.py": " \n\n", "empty.py": ""})
    alone = put(tmp_path / "third", {"b.txt": lines("alone")}) + "/b.txt"
    corpus = read_corpus([second, first, alone])
    assert names(corpus.training) == ["m.py", "a.py", "a/b/d.py", "a/c.py", "z.py", "b.txt"]
    assert corpus.training[1].text == lines("a.py")
    assert (corpus.held_out, corpus.duplicates) == ([], [])
    assert read_corpus([second, first, alone]) == corpus


def test_patterns_choose_what_is_read_and_what_is_kept_apart(tmp_path):
    kept = ("a.py", "deep/er/b.py", "pkg/c.py", "pkg/sub/d.py")
    left_out = ("readme.md", "deep/data.bin", "old/e.py", "pkg/old/f.py", "deep/test_g.py")
    files: dict[str, str | bytes] = {name: lines(name) for name in (*kept, *left_out)}
    files["deep/data.bin"] = b"\xff\x00"
    folder = put(tmp_path, files)
    patterns = {"files": ["*.py"], "exclude": ["old/*", "*/old/*", "*/test_*"]}
    corpus = read_corpus([folder], **patterns, held_out=["pkg/*", "a.p?"])
    assert names(corpus.training) == ["deep/er/b.py"]
    assert names(corpus.held_out) == ["a.py", "pkg/c.py", "pkg/sub/d.py"]
    assert names(read_corpus([folder], **patterns).training) == list(kept)
    # Patterns of held_out are of whole paths: c.py is pkg/c.py nowhere.
    with pytest.raises(InputError, match=r"\Aheld_out: c\.py matches no text of [^\n]*\Z"):
        read_corpus([folder], **patterns, held_out=["c.py", "a.py"])
    with pytest.raises(InputError, match=r"\Aheld_out: old/e\.py matches no text of"):  # it is excluded
        read_corpus([folder], **patterns, held_out=["old/e.py"])


def test_texts_that_mostly_repeat_others_are_left_out(tmp_path):
    long, short = lines("long", 10), "x = 1\ny = 2\n"
    kept = long.splitlines(keepends=True)
    folder = put(tmp_path, {
        "a.py": long,
        "b_copy.py": long,
        "c_near.py": "".join(kept[:6]) + lines("c", 5),
        "d_indented.py": "".join(f"    {line}" for line in kept),
        "e_half.py": "".join(kept[:5]) + lines("e", 5),  # not more than half
        "f_short.py": short,
        "g_short.py": short,  # of short lines only, which recur by chance
        "h_self.py": lines("h", 1) * 10,  # repeats itself alone
    })  # fmt: skip
    corpus = read_corpus([folder])
    assert names(corpus.training) == ["a.py", "e_half.py", "f_short.py", "g_short.py", "h_self.py"]
    assert corpus.duplicates == ["b_copy.py", "c_near.py", "d_indented.py"]
    assert len("x = 1") < SHORT_LINE <= min(map(len, kept))


def test_of_two_texts_the_one_kept_apart_stays(tmp_path):
    shared, other = lines("shared"), lines("other")
    folder = put(tmp_path, {
        "a.py": shared, "b.py": other, "c.py": lines("c"), "held/x.py": shared, "held/y.py": other, "held/z.py": other,
    })  # fmt: skip
    corpus = read_corpus([folder], held_out=["held/*"])
    assert names(corpus.training) == ["c.py"]
    assert names(corpus.held_out) == ["held/x.py", "held/y.py"]
    assert sorted(corpus.duplicates) == ["a.py", "b.py", "held/z.py"]
    (tmp_path / "c.py").unlink()
    with pytest.raises(InputError, match=r"\A[^\n]*: every text to train on repeats one of held_out[^\n]*\Z"):
        read_corpus([folder], held_out=["held/*"])


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({"a.py": b"caf\xe9"}, {}, "{folder}/a.py: not UTF-8; name it in exclude, or what is to be read in files"),
        ({}, {"sources": ["{folder}/none"]}, "{folder}/none: no such folder or file, and not 'stdlib'"),
        ({"a.py": " \n"}, {}, "{folder}: no text to train on; check files, exclude and held_out"),
        ({"a.py": "x = 1\n"}, {"files": ["*.txt"]}, "{folder}: no text to train on; check files, "),
        ({"a.py": "x = 1\n"}, {"held_out": ["*"]}, "{folder}: no text to train on; check files, "),
        ({"a.py": "x = 1\n"}, {"held_out": ["z.py", "a*", "b.py"]}, "held_out: b.py, z.py matches no text of {folder}"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, files, settings, message):
    folder = put(tmp_path / "texts", files)
    sources = [source.format(folder=folder) for source in settings.pop("sources", ["{folder}"])]
    with pytest.raises(InputError, match="^" + re.escape(message.format(folder=folder))) as error:
        read_corpus(sources, **settings)
    assert "\n" not in str(error.value)


def test_the_standard_library_is_a_source():
    corpus = read_corpus(["stdlib"], files=["bisect.py", "heapq.py"], held_out=["heapq.py"])
    assert names(corpus.held_out) == ["heapq.py"]
    assert "bisect.py" in names(corpus.training)
    assert "def bisect_right(" in corpus.training[names(corpus.training).index("bisect.py")].text
    assert not any("site-packages" in name for name in names(read_corpus(["stdlib"], files=["__init__.py"]).training))


def test_installed_packages_are_no_part_of_the_standard_library(tmp_path, monkeypatch):
    installed = ("site-packages/p/a.py", "lib/site-packages/b.py")
    folder = put(tmp_path, {name: lines(name) for name in ("os.py", "json/decoder.py", *installed)})
    monkeypatch.setattr(texts.sysconfig, "get_path", {"stdlib": folder}.__getitem__)
    assert names(read_corpus(["stdlib"]).training) == ["json/decoder.py", "os.py"]
    assert len(read_corpus([folder]).training) == 4  # named as a folder it is read whole


class Letters:
    """A tokenizer of bytes."""

    def plain(self, text):
        return list(text.encode())


def test_documents_stand_behind_each_other_each_with_its_end():
    tokens = tokens_of([Document("a", "ab"), Document("b", "c")], Letters(), 7)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [97, 98, 7, 99, 7]


@pytest.mark.parametrize(("count", "length"), [(1, 2), (7, 8), (8, 8), (14, 8), (15, 8), (50, 5), (3, 100)])
def test_windows_hold_every_token_once(count, length):
    tokens = np.arange(100, 100 + count, dtype=np.int32)
    windows = Windows(tokens, length, 1)
    rows = [windows[i] for i in range(len(windows))]
    assert all(row["tokens"].shape == (length,) and row["tokens"].dtype == np.int32 for row in rows)
    assert all(row["tokens"][0] == 1 for row in rows)  # BOS
    assert np.concatenate([row["tokens"][1 : row["length"]] for row in rows]).tolist() == tokens.tolist()
    assert [row["length"] for row in rows[:-1]] == [length] * (len(rows) - 1)
    last = rows[-1]
    assert 2 <= last["length"] <= length
    assert (last["tokens"][last["length"] :] == 1).all()
    assert [row["total"] for row in rows] == [row["length"] - 1 for row in rows]
    assert sum(row["total"] for row in rows) == count
    assert {(type(row["length"]), type(row["total"])) for row in rows} == {(np.int32, np.float32)}


def stream(seed=0, count=44, batch=4, **part):
    return window_batches(Windows(np.arange(100, 100 + count, dtype=np.int32), 5, 1), batch=batch, seed=seed, **part)


def firsts(batches, count) -> list[list[int]]:
    """The first token of each window, of so many batches."""
    return [batch["tokens"][:, 1].tolist() for batch in itertools.islice(batches, count)]


def test_every_epoch_has_every_window_once_in_an_order_of_its_own():
    batch = next(stream())
    assert {name: (value.dtype.name, value.shape) for name, value in batch.items()} == {
        "tokens": ("int32", (4, 5)), "length": ("int32", (4,)), "total": ("float32", (4,)),
    }  # fmt: skip
    orders = np.array(firsts(stream(), 11)).reshape(4, 11).tolist()  # four epochs of eleven windows
    assert [sorted(order) for order in orders] == [list(range(100, 144, 4))] * 4
    assert len({tuple(order) for order in orders}) == 4
    assert firsts(stream(), 11) == firsts(stream(), 11) != firsts(stream(seed=1), 11)


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_resumed_stream_goes_on(done):
    whole = firsts(stream(), 9)[done:]
    assert firsts(stream(first=done), 9 - done) == whole
    assert firsts(stream(first=done, rows=np.array([2, 0])), 9 - done) == [[row[2], row[0]] for row in whole]


def test_a_text_that_fills_no_batch_is_refused():
    message = "the text fills 11 windows, fewer than a batch of 12; lower batch or length"
    with pytest.raises(InputError, match=f"^{message}$"):
        stream(batch=12)
    assert len(next(stream(batch=11))["tokens"]) == 11


def paragraphs(label, count, size=3) -> Document:
    return Document(label, "\n".join(lines(f"{label} {i}", size) for i in range(count)))


def test_passages_begin_paragraphs():
    documents = [
        paragraphs("a", 8),
        paragraphs("b", 4),
        Document("c", "\n\n\nshort\n\n  \n    an indented beginning\n"),
    ]
    found = passages(documents, count=100, most=5, seed=0)
    assert found == passages(documents, count=100, most=5, seed=0)
    assert found != passages(documents, count=100, most=5, seed=1)
    assert len(found) == len(set(found)) == 13  # every paragraph but the one of a short line
    heights = set()
    for text in found:
        assert text == text.rstrip()
        assert len(text) >= SHORT_LINE
        height = text.count("\n") + 1
        assert 1 <= height <= 5
        heights.add(height)
        (place,) = [each.text for each in documents if text in each.text]
        before = place[: place.index(text)].splitlines()
        assert not before or not before[-1].strip()
    assert len(heights) >= 3
    assert passages(documents, count=5, most=5, seed=0) == found[:5]
    assert {text.count("\n") for text in passages(documents, count=100, most=1, seed=0)} == {0}


def test_equal_beginnings_count_once():
    documents = [Document(name, lines("the same") + "\n" + lines(name)) for name in "abc"]
    assert len(passages(documents, count=10, most=1, seed=0)) == 4


def test_prompt_files_are_read_back_and_written_whole(tmp_path):
    wanted = ["def f(x):\n", "line \u2028 and tab\t\n", "naïve 東京\n"]
    write_prompts(tmp_path / "prompts.jsonl", wanted)
    found = read_prompts(tmp_path / "prompts.jsonl")
    assert [prompt.content for prompt in found] == wanted
    assert [prompt.id for prompt in found] == ["0", "1", "2"]
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]
    with pytest.raises(InputError, match=r"\A[^\n]*none/prompts\.jsonl: cannot be written: No such file[^\n]*\Z"):
        write_prompts(tmp_path / "none" / "prompts.jsonl", wanted)
