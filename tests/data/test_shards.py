"""Answers that several processes have made: their shards are one output, in the order of its items."""

import json
import re

import pytest

from deer_jax.data.answers import AnswerFiles, shard_numbers, shard_path
from deer_jax.errors import InputError

IDS = ["a", 'q"uo\\te', '", "item": 7, "', "é\n", ""]


def row(item: int, **more) -> dict:
    return {"id": IDS[item % 5], "item": item, "prompt": [1 + item], "answer": [2], "ended": False, **more}


def write(path, rows, end="\n"):
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + end for each in rows), encoding="utf-8")
    return path


def read(*paths) -> list[dict]:
    files = AnswerFiles(paths, vocab_size=20)
    return [{name: value for name, value in files[i].items() if name != "where"} for i in range(len(files))]


def test_rows_do_not_depend_on_the_shards(tmp_path):
    rows = [row(item) for item in range(9)]
    one, four = tmp_path / "one.jsonl", tmp_path / "four.jsonl"
    write(one, [rows[i] for i in (4, 0, 8, 1, 3, 2, 7, 5, 6)])
    for number in range(4):
        write(shard_path(four, number), rows[number::4][::-1])
    assert read(one) == read(four) == rows
    write(shard_path(four, 2), [])
    write(shard_path(four, 11), rows[2::4])
    assert shard_numbers(four) == [1, 2, 3, 11]
    assert read(four, one) == rows + rows
    files = AnswerFiles([four], vocab_size=20)
    assert [path.name for path in files.paths] == [
        "four.jsonl", "four.shard-1.jsonl", "four.shard-2.jsonl", "four.shard-3.jsonl", "four.shard-11.jsonl"
    ]  # fmt: skip
    assert [files[i]["where"].rpartition("/")[2] for i in (0, 1, 8)] == [
        "four.jsonl:3", "four.shard-1.jsonl:2", "four.jsonl:1"
    ]  # fmt: skip
    files.leave_out([0, 8])
    assert [files[i]["item"] for i in range(len(files))] == list(range(1, 8))


@pytest.mark.parametrize(
    "other",
    [{"prompt": [3], "answer": [4]}, {"prompt": [3], "answer": [4], "item": 0}, {"x": {"id": "a"}, **row(0)}],
)
def test_lines_of_elsewhere_keep_their_order(tmp_path, other):
    rows = [row(5), row(2), other]
    assert read(write(tmp_path / "a.jsonl", rows)) == rows
    assert read(write(tmp_path / "a.jsonl", [row(5), row(2)], end=" \n")) == [row(2), row(5)]


def test_a_last_line_without_an_end(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(1), row(0)])
    path.write_bytes(path.read_bytes()[:-1])
    assert read(path) == [row(1), row(0)]


def test_names_of_shards_are_only_those(tmp_path):
    for name in ("b.shard-0.jsonl", "b.shard-01.jsonl", "b.shard-1.json", "bb.shard-1.jsonl", "b.shard-1.jsonl.gz"):
        write(tmp_path / name, [row(9)])
    assert read(write(tmp_path / "b.jsonl", [row(1)])) == [row(1)]
    assert shard_path(tmp_path / "b", 3).name == "b.shard-3"


def test_what_is_no_output_with_shards_is_refused(tmp_path):
    path, shard = tmp_path / "a.jsonl", tmp_path / "a.shard-1.jsonl"
    write(path, [])
    write(shard, [])
    with pytest.raises(InputError, match=r"a\.jsonl: is empty; let a target answer prompts first"):
        read(path)
    write(shard, [row(3)])
    with pytest.raises(InputError, match=r"a\.shard-1\.jsonl: is the same file as .*a\.shard-1\.jsonl; name it once"):
        read(path, shard)
    write(path, [row(2), row(3)])
    message = rf"{re.escape(str(shard))}:1: item 3 stands in {re.escape(str(path))}:2 already; remove one of the lines"
    with pytest.raises(InputError, match=message):
        read(path)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.jsonl"):
        read(path)
