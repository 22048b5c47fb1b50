"""Answer files and the stream of corrupted examples: errors, coverage, determinism, resumption."""

import itertools
import json
import os
import re

import numpy as np
import pytest

from deer_jax import InputError
from deer_jax.data import answers as module
from deer_jax.data.answers import AnswerFiles
from deer_jax.data.examples import example_batches
from deer_jax.diffusion.corruption import Corruption

CONTINUATION, REFINEMENT = Corruption(stage="continuation", width=4, blocks=2), Corruption(stage="refinement")
LENGTH = 24


def write(path, records):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in records))
    return path


@pytest.fixture
def answers(tmp_path) -> AnswerFiles:
    """Eleven records; the first token of each is its number."""
    rng = np.random.default_rng(0)
    records = [
        {"prompt": [i, *rng.integers(50, 90, 3).tolist()], "answer": rng.integers(50, 90, 6 + i).tolist(), "n": i}
        for i in range(11)
    ]
    return AnswerFiles([write(tmp_path / "answers.jsonl", records)], vocab_size=100)


def stream(records, corruption=CONTINUATION, *, bidirectional=False, length=LENGTH, batch=4, seed=0, **part):
    return example_batches(
        records, corruption, bidirectional=bidirectional, length=length, batch=batch, seed=seed, **part
    )


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("tail", ["\n", ""])
def test_records_in_any_order(tmp_path, tail):
    lines = [json.dumps({"prompt": [i] * (i + 1), "answer": [9 - i], "text": "é\u2028" * i}) for i in range(5)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(("\n".join(lines) + tail).encode())
    records = AnswerFiles([str(path)], vocab_size=100)
    assert len(records) == 5
    for i in (4, 0, np.int64(3), 1, 2, 4):
        assert records[i]["prompt"] == [i] * (i + 1)
        assert records[i]["answer"] == [9 - i]


def test_an_item_that_stands_twice_is_refused_with_both_lines(tmp_path):
    rows = [{"prompt": [1], "answer": [2], "item": item} for item in (4, 5, 4)]
    one, other = (write(tmp_path / name, rows[i:]) for i, name in ((0, "a"), (1, "b")))
    records = AnswerFiles([other], vocab_size=10)
    assert [records[i]["item"] for i in (0, 1, 1, 0)] == [5, 4, 4, 5]
    records = AnswerFiles([other, one], vocab_size=10)  # files of several runs have the same numbers
    assert [records[i]["item"] for i in (0, 1, 2, 3)] == [5, 4, 4, 5]
    with pytest.raises(InputError, match=rf"{one}:3: item 4 stands in line 1 already"):
        records[4]
    plain = AnswerFiles([write(tmp_path / "c", [{"prompt": [1], "answer": [2]}] * 2)], vocab_size=10)
    assert plain[0]["answer"] == plain[1]["answer"]


def test_what_is_no_file_of_answers_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "is no regular file"), (tmp_path, "is a folder"), ("/dev/zero", "is no")):
        with pytest.raises(InputError, match=message):
            AnswerFiles([path], vocab_size=10)
    path = write(tmp_path / "a", ['{"prompt": [1], "answer": [1], "prompt": [2]}\n'])
    with pytest.raises(InputError, match=r"a:1: not readable as JSON: the key 'prompt' stands twice"):
        AnswerFiles([path], vocab_size=10)
    monkeypatch.setattr(module, "MOST_LINE", 100)
    path = write(tmp_path / "a", [{"prompt": [1], "answer": [1]}, {"prompt": [1], "answer": [1] * 99}])
    records = AnswerFiles([path], vocab_size=10)
    with pytest.raises(InputError, match=r"a:2: a line of 32\d bytes is no answer"):
        records[1]
    path.unlink()
    with pytest.raises(InputError, match="a: no such file"):
        records[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path}: no such file"),
        ("", "{path}: is empty; let a target answer prompts first"),
        ("[1, 2\n", "{path}:1: not valid JSON: "),
        ("[1, 2]\n", "{path}:1: expected an object with 'prompt' and 'answer', found list"),
        ('{"prompts": [1], "text": "a"}\n', "{path}:1: missing prompt, answer; found: prompts, text"),
        ('{"prompt": [1]}\n', "{path}:1: missing answer; found: prompt"),
        ('{"prompt": [1], "answer": []}\n', "{path}:1: 'answer' must be a list of one or more token ids"),
        ('{"prompt": "hi", "answer": [1]}\n', "{path}:1: 'prompt' must be a list of one or more token ids"),
        ('{"prompt": [1, -1], "answer": [1]}\n', "{path}:1: 'prompt' must be a list of one or more token ids"),
        ('{"prompt": [1], "answer": [1.5]}\n', "{path}:1: 'answer' must be a list of one or more token ids"),
    ],
)
def test_a_wrong_file_is_noticed_when_it_is_opened(tmp_path, content, message):
    path = tmp_path / "answers.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="^" + re.escape(message.format(path=path))) as error:
        AnswerFiles([path], vocab_size=100)
    assert "\n" not in str(error.value)


def test_a_wrong_line_is_named_when_it_is_met(tmp_path):
    good = {"prompt": [1], "answer": [2, 3]}
    path = write(tmp_path / "answers.jsonl", [good, good, '{"prompt": [1],\n', good])
    records = AnswerFiles([path], vocab_size=100)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:3: not valid JSON: "):
        records[2]
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:3: not valid JSON: "):
        take(stream(records), 1)


def test_fewer_records_than_a_batch(answers):
    line = f"{answers}: 11 records are fewer than a batch of 12; lower batch"
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        stream(answers, batch=12)


@pytest.mark.parametrize(("bidirectional", "least"), [(False, 6), (True, 7)])
def test_a_prompt_that_fills_the_length_is_an_error_with_its_line(tmp_path, bidirectional, least):
    long = {"prompt": [1, 2, 3, 4, 5], "answer": [6, 7]}
    path = write(tmp_path / "answers.jsonl", [{"prompt": [1], "answer": [2]}, long])
    records = AnswerFiles([path], vocab_size=100)
    message = f"{path}:2: a prompt of 5 tokens leaves no room for its answer in length {least - 1}; raise length to "
    with pytest.raises(InputError, match="^" + re.escape(f"{message}at least {least} ")):
        take(stream(records, bidirectional=bidirectional, length=least - 1, batch=2), 1)
    (batch,) = take(stream(records, bidirectional=bidirectional, length=least, batch=2), 1)
    row = batch["tokens"][batch["tokens"][:, 2].argmax()]
    assert row[:6].tolist() == [1, 2, 3, 4, 5, 6]
    assert not row[6:].any()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_examples_are_their_records(answers, bidirectional):
    shapes = {"tokens": ("int32", (4, 16)), "total": ("float32", (4,)), "length": ("int32", (4,))}
    row = (4, 16)
    if bidirectional:
        shapes |= {"masked": ("bool", row), "weight": ("float32", row)}
    else:
        shapes |= dict.fromkeys(("anchor", "size"), ("int32", (4, 2)))
        shapes |= {"masked": ("bool", (4, 2, 4)), "weight": ("float32", (4, 2, 4)), "text_weight": ("float32", row)}
    for batch in take(stream(answers, bidirectional=bidirectional, length=16), 10):
        assert {name: (str(value.dtype), value.shape) for name, value in batch.items()} == shapes
        for i in range(4):
            record = answers[batch["tokens"][i, 0]]
            text = (record["prompt"] + record["answer"])[: 15 if bidirectional else 16]
            assert batch["tokens"][i].tolist() == text + [0] * (16 - len(text))
            if bidirectional:  # the separator's place is inside the arrays, and it is no answer's
                assert 4 < batch["length"][i] <= len(text) <= 15
                assert not batch["masked"][i, batch["length"][i] :].any()
            else:
                assert batch["length"][i] == len(text)
                assert not batch["text_weight"][i, len(text) - 1 :].any()
                assert all(3 <= a <= len(text) - 2 for a in batch["anchor"][i])
                assert all(a + n < len(text) for a, n in zip(batch["anchor"][i], batch["size"][i], strict=True))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_seed_decides_everything(answers, bidirectional):
    one, same, other = (take(stream(answers, seed=s, bidirectional=bidirectional), 6) for s in (3, 3, 4))
    assert_same(one, same)
    assert any(not np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(one, other, strict=True))


def test_every_epoch_has_every_record_once_in_its_own_order(answers):
    numbers = np.concatenate([batch["tokens"][:, 0] for batch in take(stream(answers), 11)])  # four epochs
    orders = numbers.reshape(4, 11).tolist()
    assert [sorted(order) for order in orders] == [list(range(11))] * 4
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_epoch_corrupts_anew(answers, bidirectional):
    examples = [
        {name: value[i] for name, value in batch.items()}
        for batch in take(stream(answers, bidirectional=bidirectional), 11)
        for i in range(4)
    ]
    epochs = [examples[11 * e : 11 * (e + 1)] for e in range(4)]
    for number in range(11):
        of_record = [next(x for x in epoch if x["tokens"][0] == number) for epoch in epochs]
        assert len({x["weight"].tobytes() for x in of_record}) > 1


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_resumed_stream_goes_on(answers, bidirectional, done):
    whole = take(stream(answers, bidirectional=bidirectional), 9)
    again = AnswerFiles(answers.paths, vocab_size=100)
    assert_same(take(stream(again, bidirectional=bidirectional, first=done), 9 - done), whole[done:])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[3, 1], [0, 2]], [[0], [1], [2], [3]], [[0, 1, 2, 3]] * 2])
def test_processes_read_their_rows_of_the_same_batches(answers, bidirectional, shares):
    for batch, *parts in zip(
        take(stream(answers, bidirectional=bidirectional), 7)[2:],
        *(take(stream(answers, bidirectional=bidirectional, first=2, rows=np.array(rows)), 5) for rows in shares),
        strict=True,
    ):
        for rows, part in zip(shares, parts, strict=True):
            assert_same([part], [{name: value[rows] for name, value in batch.items()}])


def test_the_rates_of_a_batch_are_spread_evenly(tmp_path):
    # One masked token of a long answer shows t as 1 / weight.
    records = [{"prompt": [i], "answer": [1] * 2000} for i in range(16)]
    answers = AnswerFiles([write(tmp_path / "answers.jsonl", records)], vocab_size=100)
    settings = Corruption(stage="continuation", least_rate=1e-3)
    seen = []
    for seed in (0, 1):
        for batch in take(stream(answers, settings, bidirectional=True, length=2002, batch=8, seed=seed), 12):
            rates = 1 / np.maximum(batch["weight"].max(axis=1), 1)
            counts = np.histogram(rates, bins=4, range=(0, 1))[0]
            assert counts.min() >= 1
            assert counts.max() <= 3
            seen.append(rates)
    assert np.mean(seen) == pytest.approx(0.5, abs=0.03)
    assert len(np.unique(seen)) > 180  # the seed moves them


def test_refinement_masks_the_last_tokens_before_the_cut(answers):
    for batch in take(stream(answers, REFINEMENT, bidirectional=True), 6):
        for i in range(4):
            places = np.flatnonzero(batch["masked"][i])
            assert places.tolist() == list(range(batch["length"][i] - len(places), batch["length"][i]))
            assert batch["total"][i] == pytest.approx(batch["weight"][i].sum())
