"""Prompt files: the published ones, and everything that can be wrong with one."""

import gzip
import json
import os

import pytest

from deer_jax.data import rows
from deer_jax.data.chats import as_chat
from deer_jax.data.sources import Prompt, read_prompts, template_arguments
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
    lines = {"id": "a", "prompt": [1, 2], "answer": [3]}, {"prompt": "what?", "answer": "that"}, {"text": "x"}
    path = write(tmp_path / "a.jsonl", *lines[:2])
    assert read_prompts(path) == [Prompt("a", [1, 2]), Prompt("2", "what?")]
    assert read_prompts(path, whole=True) == [Prompt("a", [1, 2, 3]), Prompt("2", "what?")]
    assert read_prompts(write(path, lines[2]), field="text", whole=True) == [Prompt("1", "x")]


def test_empty_prompts_where_they_are_allowed(tmp_path):
    given = {"prompt": ""}, {"tokens": []}, {"turns": [""]}, {"messages": []}, {"text": "", "test_list": ["t"]}
    path = write(tmp_path / "a.jsonl", *given, {"prompt": [], "answer": []}, {"prompt": "b"})
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
        ('{"prompt": "\udcff"}', r":2: not UTF-8 at byte 12"),
        ("[1]", r":2: expected a JSON object, found list"),
        ('{"task": "a", "n": 1}', r":2: no field that holds a prompt; its fields: task, n; name one"),
        ("{}", r":2: no field that holds a prompt; its fields: none; name one"),
        ('{"prompt": ""}', r":2: prompt is empty"),
        ('{"prompt": 3}', r":2: prompt must be a text.*"),
        ('{"tokens": [1, true]}', r":2: tokens must be .*"),
        ('{"messages": [{"content": "a"}]}', r":2: messages: message 1 has no role; a role is a text"),
        ('{"messages": "hi"}', r":2: messages must be a list, found str"),
        ('{"messages": [{"role": 5, "content": "a"}]}', r":2: messages: message 1 has the role '5'; a role is a text"),
        (
            '{"messages": [{"role": "user"}]}',
            r":2: messages: message 1 \(user\) has no content; only .*",
        ),
        (
            '{"messages": [{"role": "user", "content": 5}]}',
            r":2: messages: message 1: content must be .*, got int",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
            r":2: messages: message 1: content has a part of type 'image_url'; only text can be read",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            r":2: the chat has no user message .*: assistant",
        ),
        (
            '{"messages": [{"role": "system", "content": "a"}]}',
            r":2: the chat has no user message .*: system",
        ),
        (
            '{"conversations": [{"from": "narrator", "value": "a"}]}',
            r":2: conversations: message 1 is from 'narrator', which is none of human, user, gpt, .*",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}], "functions": [{}]}',
            r":2: 'functions' beside messages .* tools.*",
        ),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "no"}', r":2: tools: not valid JSON: .*"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "tools": {"a": 1}}',
            r":2: messages: tools must be a list, got dict",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}], "tools": [1]}',
            r":2: messages: tools\[0\] must be a mapping, got int",
        ),
        ('{"prompt": "a \\ud83d"}', r":2: prompt: character 3 is half of a surrogate pair \('\\ud83d'\), which .*"),
        ('{"prompt": "a", "id": "\\ud83d"}', r":2: id: character 1 is half of a surrogate pair .*"),
        ('{"prompt": "a", "prompt": "b"}', r":2: not readable as JSON: the key 'prompt' stands twice in one object"),
        ('{"prompt": ' + "[" * 100000 + "}", r":2: not readable as JSON: nested too deeply"),
        ('{"id": ' + "1" * 5000 + "}", r":2: not readable as JSON: Exceeds the limit .*"),
        ('{"question": "a", "choices": ["b"]}', r":2: 'choices' beside 'question' would be left out; write both .*"),
        ('{"question": "a", "context": "b"}', r":2: 'context' beside 'question' would be left out; give --field .*"),
        (
            '{"instruction": "a", "input": "b", "system": "c"}',
            r":2: 'system' beside 'instruction' would .*",
        ),
        (
            '{"messages": [{"role": "user", "content": "a", "images": ["x"]}]}',
            r":2: messages: message 1 has 'images' beside its text; only text can be read",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "b"}]}]}',
            r":2: messages: message 1: a text part has 'image' too; only text can be read",
        ),
        ('{"messages": [{"role": "user", "content": " "}]}', r":2: the messages of the user are empty"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "context": "b"}',
            r":2: 'context' beside messages would be left out; write it into the messages, or remove the field",
        ),
        ('{"question": "a", "A": "b", "B": "c"}', r":2: 'A' beside 'question' would be left out; .*"),
        ('{"question": "a", "option_1": "b"}', r":2: 'option_1' beside 'question' would be left out; .*"),
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


USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}


def test_answers_of_the_data_set_are_cut_from_chats_and_counted(tmp_path):
    given = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, USER]}, {"messages": [USER, ANSWER, ANSWER]}]
    given.append({"messages": [USER | {"role": "User"}, {"role": "model", "content": "hi"}]})  # by other names
    path = write(tmp_path / "a.jsonl", *given)
    with pytest.warns(UserWarning, match=r"a\.jsonl: 3 of 4 prompts ended with the assistant's answer, .*") as caught:
        found = read_prompts(path)
    assert len(caught) == 1
    assert [prompt.content for prompt in found] == [[USER], [USER, ANSWER, USER], [USER], [USER]]


def test_fields_of_a_mixed_table_that_are_null_are_absent(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": None, "prompt": "x"}, {"messages": [USER], "prompt": None})
    assert [prompt.content for prompt in read_prompts(path)] == ["x", [USER]]


def test_content_parts_are_one_text(tmp_path):
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "the dog"}]
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "name": "ann", "content": parts}]})
    assert read_prompts(path)[0].content == [{"role": "user", "content": "hello the dog", "name": "ann"}]


def test_calls_of_tools_have_no_content_and_stay(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    result = {"role": "tool", "content": "7", "tool_call_id": "1"}
    path = write(tmp_path / "a.jsonl", {"messages": [USER, call, result]})
    kept = {"role": "assistant", "tool_calls": call["tool_calls"]}
    assert read_prompts(path)[0].content == [USER, kept, result]


def test_tools_and_their_like_stay_with_the_chat(tmp_path):
    tools, documents = (
        [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        [{"title": "a", "text": "b"}],
    )
    given = [
        {"messages": [USER], "tools": tools},
        {"messages": [USER], "tools": json.dumps(tools), "documents": documents},
        {"messages": [USER], "tools": [], "documents": None, "chat_template_kwargs": {"enable_thinking": False}},
        {"conversations": [{"from": "human", "value": "hello"}], "tools": "[]", "system": "Be short."},
    ]
    assert [prompt.content for prompt in read_prompts(write(tmp_path / "a.jsonl", *given))] == [
        {"messages": [USER], "tools": tools},
        {"messages": [USER], "tools": tools, "documents": documents},
        {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
        [{"role": "system", "content": "Be short."}, USER],
    ]


@pytest.mark.filterwarnings("ignore:.*the assistant's answer")
def test_sharegpt_as_lines_and_as_an_array(tmp_path):
    row = {"id": "a1", "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]}
    lines = read_prompts(write(tmp_path / "a.jsonl", row, row | {"id": "a2"}))
    array = tmp_path / "a.json"
    array.write_text("\n " + json.dumps([row, row | {"id": "a2"}], indent=2), encoding="utf-8")
    assert lines == read_prompts(array) == [Prompt("a1", [USER]), Prompt("a2", [USER])]
    assert [prompt.place for prompt in lines] == [f"{tmp_path}/a.jsonl:1 (id a1)", f"{tmp_path}/a.jsonl:2 (id a2)"]
    assert [prompt.where for prompt in read_prompts(array)] == [f"{array}: entry 1", f"{array}: entry 2"]
    array.write_text('[{"prompt": "a"}, 3]', encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.json: entry 2: expected a JSON object, found int\Z"):
        read_prompts(array)


def test_alpaca_rows_and_patterns(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "add", "input": "1 and {2}", "output": "3"},
        {"instruction": "sing", "input": "", "output": "la"},
    )
    assert [prompt.content for prompt in read_prompts(path)] == ["add\n\n1 and {2}", "sing"]
    for pattern in ("{instruction}\n{input}", r"{instruction}\n{input}"):
        assert [prompt.content for prompt in read_prompts(path, field=pattern)] == ["add\n1 and {2}", "sing"]
    assert read_prompts(path, field="{{{input}}}: {output}", limit=1)[0].content == "{1 and {2}}: 3"
    assert read_prompts(path, field="{instruction}")[0].content == "add"
    with pytest.raises(
        InputError, match=r"a\.jsonl:1: 'input' beside 'instruction' would be left out; give --field \""
    ) as e:
        read_prompts(path, field="instruction")
    assert str(e.value).endswith('give --field "{instruction}\\n{input}", or --field "{instruction}" without it')
    for pattern, message in (
        ("{instructio}", r"a\.jsonl:1: no field 'instructio', did you mean 'instruction'\?\Z"),
        ("{instruction.x}", r"a\.jsonl:1: no field 'instruction.x'"),
        ("{input:>1000000000}", r"field: the pattern .* cannot be read: a field stands in braces by its name alone"),
        ("{input!r}", "cannot be read"),
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        ("{{a}}", "names no field"),
    ):
        with pytest.raises(InputError, match=message):
            read_prompts(path, field=pattern)
    with pytest.raises(InputError, match=r"a\.jsonl:1: the pattern is empty"):
        read_prompts(write(path, {"instruction": "", "input": None}), field="{instruction}: {input}")


def test_a_pipe_is_read(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b'\xef\xbb\xbf{"prompt": "a"}\r\n')
    os.close(writing)
    assert read_prompts(f"/dev/fd/{reading}") == [Prompt("1", "a")]
    os.close(reading)


def test_bounds(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n{"prompt": "' + b"a" * (rows.MOST_OF_LINE + 10) + b'"}\n'))
    with pytest.raises(InputError, match=r"a\.jsonl\.gz:2: the line has more than 67,108,864 bytes"):
        read_prompts(path)
    assert len(read_prompts(path, limit=1)) == 1
    for name, value in (("MOST_BYTES", 30), ("MOST_LINES", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(rows, name, value)
            with pytest.raises(InputError, match="split it"):
                read_prompts(write(tmp_path / "b.jsonl", *[{"prompt": "a"}] * 3))
    monkeypatch.setattr(rows, "MOST_OF_ARRAY", 30)
    with pytest.raises(InputError, match=r"b\.jsonl: an array of more than 30 bytes.* write JSON lines"):
        read_prompts(write(tmp_path / "b.jsonl", json.dumps([{"prompt": "a"}] * 3)))


def test_template_arguments():
    assert template_arguments(["a=1", "b=[x, y]", "c="], "--template") == {"a": 1, "b": ["x", "y"], "c": None}
    for entries, message in (
        (["a=1", "a=2"], "--template: 'a' is given twice"),
        (["a"], "--template: expected NAME=VALUE, got 'a'"),
        (["a={b: 1, b: 2}"], "--template 'a': not valid YAML: line 1: the key 'b' stands here and in line 1"),
        (["day=2024-01-02"], "--template 'day': a date is no text, number, list or mapping; write it as a text"),
        (["tokenize=true"], "--template 'tokenize': is not for the template; it is set by this library"),
    ):
        with pytest.raises(InputError) as caught:
            template_arguments(entries, "--template")
        assert str(caught.value) == message


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
