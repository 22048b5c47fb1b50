"""Prompt files: the published ones, and everything that can be wrong with one."""

import gzip
import json

import pytest

from deer_jax.data.sources import Prompt, as_chat, read_prompts
from deer_jax.errors import InputError


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "count", "first_id", "start", "end"),
    [
        ("humaneval/humaneval_000_099.jsonl", 100, "HumanEval/0", "from typing import List", '    """\n'),
        ("gsm8k/test_0000_0999.jsonl", 1000, "1", "Janet’s ducks lay 16 eggs", "farmers' market?"),
        ("gsm8k/train.jsonl.gz", 7473, "1", "Natalia sold clips", "April and May?"),
        ("math500/math500_000_399.jsonl", 400, None, "Convert the point $(0,3)$", "\\pi.$"),
        ("mt_bench/question.jsonl", 80, "81", "Compose an engaging travel blog", "must-see attractions."),
        ("spec_bench/question_shared.jsonl", 301, "81", "Compose an engaging travel blog", "must-see attractions."),
        ("livecodebench/lcb_v6_prompts.jsonl", 131, "abc391_d", "You will be given a question", None),
        ("mbpp/mbpp_nontest.jsonl", 469, None, "You are an expert Python programmer", "[BEGIN]\n"),
        ("mbpp/sanitized_mbpp_nontest.jsonl", 168, "2", "You are an expert Python programmer", "[BEGIN]\n"),
    ],
)
def test_published_files(data_dir, name, count, first_id, start, end):
    path = data_dir / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    prompts = read_prompts(path)
    assert len(prompts) == count
    assert all(isinstance(prompt.content, str) and isinstance(prompt.id, str) for prompt in prompts)
    assert first_id in (None, prompts[0].id)
    assert prompts[0].content.startswith(start)
    assert end is None or prompts[0].content.endswith(end)


def test_mbpp_carries_its_tests(tmp_path):
    task, tests = "Add two numbers.", ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    expected = (
        "You are an expert Python programmer, and here is your task: Add two numbers. "
        "Your code should pass these tests:\n\nassert add(1, 2) == 3\nassert add(0, 0) == 0\n[BEGIN]\n"
    )
    for field in ("text", "prompt"):
        path = write(tmp_path / "a.jsonl", {field: task, "task_id": 7, "test_list": tests})
        assert read_prompts(path) == [Prompt("7", expected)]


@pytest.mark.representative
def test_plain_forms(tmp_path):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]
    path = write(tmp_path / "a.jsonl", {"prompt": "é"}, "\n", {"messages": messages}, {"id": "x", "tokens": [1, 0]})
    assert read_prompts(path) == [Prompt("1", "é"), Prompt("3", messages), Prompt("x", [1, 0])]
    assert read_prompts(path, limit=2) == [Prompt("1", "é"), Prompt("3", messages)]
    assert read_prompts(path, chat=True) == [Prompt("1", as_chat("é")), Prompt("3", messages), Prompt("x", [1, 0])]


def test_named_field(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "instruction": "b"})
    assert read_prompts(path, field="instruction")[0].content == "b"
    with pytest.raises(InputError, match=r"a\.jsonl:1: no field 'task'; its fields: prompt, instruction\Z"):
        read_prompts(path, field="task")


def test_answer_files_are_read_whole_or_their_prompts_alone(tmp_path):
    rows = {"id": "a", "prompt": [1, 2], "answer": [3]}, {"prompt": "what?", "answer": "that"}, {"text": "x"}
    path = write(tmp_path / "a.jsonl", *rows[:2])
    assert read_prompts(path) == [Prompt("a", [1, 2]), Prompt("2", "what?")]
    assert read_prompts(path, whole=True) == [Prompt("a", [1, 2, 3]), Prompt("2", "what?")]
    assert read_prompts(write(path, rows[2]), field="text", whole=True) == [Prompt("1", "x")]


def test_empty_prompts_where_they_are_allowed(tmp_path):
    rows = {"prompt": ""}, {"tokens": []}, {"turns": [""]}, {"messages": []}, {"text": "", "test_list": ["t"]}
    path = write(tmp_path / "a.jsonl", *rows, {"prompt": [], "answer": []}, {"prompt": "b"})
    for chat in (False, True):
        found = read_prompts(path, allow_empty=True, whole=True, chat=chat)
        assert [prompt.content for prompt in found] == [*[""] * 6, as_chat("b") if chat else "b"]
    with pytest.raises(InputError, match=r"a\.jsonl:1: prompt is empty\Z"):
        read_prompts(path)


def test_compressed(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    assert read_prompts(path) == [Prompt("1", "a")]


def test_limit_stops_before_a_damaged_line(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, "{\n")
    assert len(read_prompts(path, limit=1)) == 1
    with pytest.raises(InputError, match="limit must be at least 1, got 0"):
        read_prompts(path, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r":2: not valid JSON: .* at column 15"),
        ('{"prompt": "\udcff"}', r":2: not UTF-8"),
        ("[1]", r":2: expected a JSON object, found list"),
        ('{"task": "a", "n": 1}', r":2: no field that holds a prompt; its fields: task, n; name one"),
        ("{}", r":2: no field that holds a prompt; its fields: none; name one"),
        ('{"prompt": ""}', r":2: prompt is empty"),
        ('{"prompt": 3}', r":2: prompt must be a text.*"),
        ('{"tokens": [1, true]}', r":2: tokens must be .*"),
        ('{"messages": [{"content": "a"}]}', r":2: messages must be .*"),
        ('{"turns": []}', r":2: turns must be a list of texts"),
        ('{"turns": [{"speaker": "a"}]}', r":2: turns must be .*"),
        ('{"text": "a", "test_list": "assert f()"}', r":2: text must be a text and test_list a list of texts"),
        ('{"prompt": [1], "test_list": []}', r":2: prompt must be a text and test_list a list of texts"),
    ],
)
def test_refused_lines(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(InputError, match=rf"\A{path}{message}\Z"):
        read_prompts(path)


def test_refused_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        read_prompts(tmp_path)
    with pytest.raises(InputError, match="the file is empty"):
        read_prompts(write(tmp_path / "a.jsonl", "\n \n"))
    for content in (b"plain text", gzip.compress(b'{"prompt": "a"}\n')[:-9]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.jsonl\.gz: cannot be read"):
            read_prompts(tmp_path / "a.jsonl.gz")
