"""Prompt files with anything wrong in them: they are read, or refused in one line."""

import gzip
import json
import random
import warnings

from deer_jax.data.chats import is_chat, normalised
from deer_jax.data.sources import read_prompts
from deer_jax.errors import InputError

NESTED = b"[" * 800 + b"]" * 800
ROWS = (
    {"prompt": "a"}, {"id": 3, "prompt": [1, 2], "answer": [3]}, {"tokens": [1, 2]}, {"turns": ["a", "b"]},
    {"text": "a", "test_list": ["b"]}, {"question": "a", "answer": "b"}, {"problem": "a"},
    {"instruction": "a", "input": "b", "output": "c"}, {"task_id": "x", "prompt": "a", "input": ""},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "tools": [{"type": "function"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c", "tools": "[]"},
)  # fmt: skip
VALUES = (
    None, True, -1, 0, 2**70, 1e400, "", "x", "\ud83d", "two\nlines", "\x1b[31m", "a" * 3000, [], {}, ["x"], [1],
    [None], [[]], [{}], {"role": "user"}, {"role": "user", "content": "a"}, {"from": "x", "value": "y"}, {"type": "x"},
)  # fmt: skip
FIELDS = (*[None] * 12, "prompt", "messages", "id", "{prompt}{id}", "{instruction}\\n{input}", "{", "{a!r}")
DAMAGE = (
    b"",
    b"\xff",
    b"\0",
    b"\n",
    b"\r",
    b'"',
    b"[" * 9999,
    NESTED,
    b"[" * 800 + b"]" * 800,
    b"9" * 5000,
    b"\xef\xbb\xbf",
    b"\\ud83d",
    b"}{",
)


def mutate(rng: random.Random, value):
    """The value with one thing in it replaced, added or left out."""
    if rng.random() < 0.3 or not value or not isinstance(value, dict | list):
        return rng.choice(VALUES)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], mutate(rng, value[at]), *value[at + 1 :]]
    kind, key = rng.random(), rng.choice(sorted(value))
    if kind < 0.2:
        return {name: entry for name, entry in value.items() if name != key}
    if kind < 0.4:
        other = rng.choice(sorted({name for row in ROWS for name in row} | {"functions", "choices", "\ud83d", "a\nb"}))
        return value | {other: rng.choice(VALUES)}
    return value | {key: mutate(rng, value[key])}


def content_of(rng: random.Random) -> bytes:
    rows = [rng.choice(ROWS) for _ in range(rng.randint(1, 3))]
    rows = [mutate(rng, row) if rng.random() < 0.4 else row for row in rows]
    if rng.random() < 0.2:
        content = json.dumps(rows, indent=rng.choice((None, 1))).encode()
    else:
        content = b"\n".join(json.dumps(row).encode() for row in rows)
    if rng.random() < 0.3:
        at = rng.randrange(len(content))
        content = content[:at] + rng.choice(DAMAGE) + content[at + rng.randrange(5) :]
    if rng.random() < 0.1:
        content = content.decode("utf-8", "replace").encode("utf-16")
    return content


def test_fuzz_prompt_files(tmp_path):
    read = 0
    for seed in range(700):
        rng = random.Random(seed)
        content, field, zipped = content_of(rng), rng.choice(FIELDS), rng.random() < 0.2
        data = gzip.compress(content) if zipped else content
        if zipped and rng.random() < 0.5:
            at = rng.randrange(len(data))
            data = data[:at] + rng.choice((b"", b"\xff", b"\0\0")) + data[at + rng.randrange(9) :]
        path = tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl")
        path.write_bytes(data)
        case = f"seed {seed}, field {field!r}: {content!r:.2000}"
        options = {"chat": rng.random() < 0.3, "whole": rng.random() < 0.2, "allow_empty": rng.random() < 0.3}
        refusal = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read_prompts(path, field=field, **options)
        except InputError as error:
            refusal = str(error)
        except BaseException as error:
            raise AssertionError(f"{case} raises {error!r}") from error
        else:
            read += 1
            for prompt in found:  # what is read can be encoded, sent to a template, and written down
                json.dumps([prompt.content, prompt.id], ensure_ascii=False, allow_nan=True).encode()
                if is_chat(prompt.content):
                    assert normalised(prompt.content)["messages"][-1]["role"] != "assistant", case
        assert "\n" not in refusal, case
        assert len(refusal) < 1000, case
        assert not refusal or str(path) in refusal or "field" in refusal, case
    assert 100 < read < 500
