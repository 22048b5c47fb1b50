"""Answer files: what is in them by their definition, whatever the batch and however often the run was stopped."""

import dataclasses
import datetime
import json
import os
import shutil

import jax
import numpy as np
import pytest

from deer_jax import InputError, Target, answers, decode, load_target
from deer_jax.data import answer_writer as writer_module
from deer_jax.decoding import answers as module
from deer_jax.decoding.answers import beginning
from tests.stamps import keep_stamp
from tests.tiny import random_params, tiny

V, NEW = 48, 11
MIXED = {"temperatures": (0.0, 1.0, 0.0), "samples": 2, "seed": 3, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, V, n).tolist() for n in (9, 1, 14, 3, 5, 1)]


@pytest.fixture(scope="module")
def target(prompts) -> Target:
    """Some of its answers end with a stop token, some are cut."""
    config = tiny("qwen3", vocab_size=V, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24, context=64)
    target = Target(config=config, params=random_params(config, 5, scan=False))
    return dataclasses.replace(target, stop_ids=(decode(target, prompts[:1], max_new_tokens=5).tokens[0][4],))


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(module, "ROUNDS_PER_SEGMENT", 3)


def read(path) -> dict[int, dict]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({record["item"] for record in found}) == len(found)
    return {record["item"]: record for record in found}


@pytest.fixture(scope="module")
def whole(target, prompts, tmp_path_factory) -> dict[int, dict]:
    """The lines of an uninterrupted run, by item."""
    path = tmp_path_factory.mktemp("whole") / "a.jsonl"
    answers(target, prompts, path, batch_size=4, **MIXED)
    return read(path)


def test_items_are_what_decode_says(target, prompts, whole):
    items = [prompts[item // 2] for item in range(12)]
    expected = {t: decode(target, items, temperature=t, seed=3, max_new_tokens=NEW).tokens for t in (0.0, 1.0)}
    assert sorted(whole) == list(range(12))
    for item, found in whole.items():
        temperature = 1.0 if item % 3 == 1 else 0.0
        answer = expected[temperature][item]
        assert found == {
            "id": str(item // 2 + 1), "item": item, "prompt": items[item], "answer": answer,
            "ended": answer[-1] in target.stop_ids, "temperature": temperature,
        }  # fmt: skip
    assert {found["ended"] for found in whole.values()} == {True, False}
    assert all(found["ended"] or len(found["answer"]) == NEW for found in whole.values())


@pytest.mark.parametrize("batch_size", [2, 5])
def test_the_batch_does_not_matter(target, prompts, whole, tmp_path, batch_size):
    calls = []
    report = answers(
        target,
        prompts,
        tmp_path / "a.jsonl",
        batch_size=batch_size,
        progress=lambda *state: calls.append(state),
        **MIXED,
    )
    assert read(tmp_path / "a.jsonl") == whole
    assert (report.written, report.resumed, report.skipped_empty, report.skipped_overlong) == (12, 0, 0, 0)
    assert report.ended == sum(found["ended"] for found in whole.values())
    assert report.new_tokens == sum(len(found["answer"]) for found in whole.values())
    assert report.tokens_per_second == pytest.approx(report.new_tokens / report.seconds)
    assert calls[0] == (0, 12, 0.0)
    assert calls[-1][:2] == (12, 12)
    assert [done for done, *_ in calls] == sorted(done for done, *_ in calls)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_an_interrupted_run_ends_with_the_same_answers(target, prompts, whole, tmp_path, batch_size):
    path, state, stops, resumed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.state.json", 0, set()

    def interrupt(done, total, speed):
        nonlocal segments
        segments += 1
        if segments > 2:  # the first call comes before any work
            raise KeyboardInterrupt

    while True:
        segments = 0
        try:
            report = answers(target, prompts, path, batch_size=batch_size, progress=interrupt, **MIXED)
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops < 30, "an interrupted run begins anew instead of going on"
            running = json.loads(state.read_text(encoding="utf-8"))["running"]
            resumed |= {whole[int(item)]["temperature"] for item in running}
            for item, tokens in running.items():
                assert tokens == whole[int(item)]["answer"][: len(tokens)]
                assert len(tokens) % 3 == 0 or batch_size == 3  # refilled slots stop in the middle of others' segments
            with path.open("a") as stream:
                stream.write('{"item": 1, "answ')  # a kill in the middle of a line
    assert stops > 2
    assert resumed == {0.0, 1.0}
    assert read(path) == whole
    assert report.written + report.resumed == 12

    before = path.read_bytes()
    again = answers(target, prompts, path, **MIXED)
    assert (again.written, again.new_tokens, again.resumed) == (0, 0, 12)
    assert path.read_bytes() == before


def test_rows_that_wait_are_kept_when_fewer_run(target, prompts, whole, tmp_path):
    """Two slots take over from eight, and are stopped before they have come to all rows that were under way."""

    def stop_at(count):
        calls = []

        def progress(*state):
            calls.append(state)
            if len(calls) > count:
                raise KeyboardInterrupt

        return progress

    for batch_size in (8, 2):
        with pytest.raises(KeyboardInterrupt):
            answers(target, prompts, tmp_path / "a", batch_size=batch_size, progress=stop_at(1), **MIXED)
    running = json.loads((tmp_path / "a.state.json").read_text(encoding="utf-8"))["running"]
    assert len(running) + len(read(tmp_path / "a")) == 8
    answers(target, prompts, tmp_path / "a", batch_size=2, **MIXED)
    assert read(tmp_path / "a") == whole


def test_long_answers_are_read_again_in_whole(target, tmp_path):
    """Prompt and tokens so far may need more padding than the capacity has left."""
    prompt, options = list(range(10)), {"max_new_tokens": 50, "temperatures": (1.0,), "samples": 3}
    target = dataclasses.replace(target, stop_ids=())

    def interrupt(done, total, speed):
        calls.append(done)
        if len(calls) == 16:
            raise KeyboardInterrupt

    for name in ("a", "b"):
        calls = [] if name == "a" else [0] * 16
        try:
            answers(target, [prompt], tmp_path / name, progress=interrupt, **options)
        except KeyboardInterrupt:
            answers(target, [prompt], tmp_path / name, **options)
    assert read(tmp_path / "a") == read(tmp_path / "b")


def test_prefixes(target, prompts, tmp_path):
    stop = target.stop_ids[0]
    texts = [[*prompts[2], *prompts[0]], [1, 2, 3, 4, 5], [7, 8, stop], [stop], prompts[2]]
    options = {"prefix": (2, 6), "samples": 4, "max_new_tokens": 3, "seed": 9}
    report = answers(target, texts, tmp_path / "a.jsonl", batch_size=3, **options)
    found = read(tmp_path / "a.jsonl")
    drawn = set()
    for item in range(20):
        text, length = texts[item // 4], int(np.random.default_rng((9, item)).integers(2, 7))
        expected = text[:length] if len(text) > length else [token for token in text if token != stop]
        drawn.add(length)
        assert beginning(text, (2, 6), 9, item, target.stop_ids) == expected
        assert found.pop(item, {"prompt": []})["prompt"] == expected
    assert drawn == {2, 3, 4, 5, 6}
    assert not found
    assert report.skipped_empty == 4  # nothing but a stop token


def test_empty_and_overlong_prompts_are_skipped_and_counted(target, prompts, tmp_path):
    texts = [prompts[0], [], [1] * 54, [1] * 53, np.array([], int)]
    report = answers(target, texts, tmp_path / "a", ids=list("abcde"), max_new_tokens=11, samples=2)
    assert (report.written, report.skipped_empty, report.skipped_overlong) == (4, 4, 2)
    assert [(item, found["id"]) for item, found in sorted(read(tmp_path / "a").items())] == [
        (0, "a"), (1, "a"), (6, "d"), (7, "d")
    ]  # fmt: skip
    nothing = answers(target, [[], []], tmp_path / "b")
    assert (nothing.written, nothing.skipped_empty, nothing.tokens_per_second) == (0, 2, 0.0)
    assert (tmp_path / "b").read_bytes() == b""


class Opening:
    """A tokenizer that is asked for nothing but what it puts before a text."""

    def __init__(self, ids):
        self.ids = ids

    def encode(self, text: str) -> list[int]:
        assert text == ""
        return list(self.ids)


def test_from_bos(target, tmp_path):
    spoken = dataclasses.replace(target, tokenizer=Opening([1]))
    answers(spoken, None, tmp_path / "a", samples=5, temperatures=(0, 0.9), max_new_tokens=6)
    found = read(tmp_path / "a")
    assert [found[item]["prompt"] for item in range(5)] == [[1]] * 5
    assert found[0]["answer"] == found[2]["answer"] == found[4]["answer"]
    assert found[1]["answer"] != found[3]["answer"]
    with pytest.raises(InputError, match="the tokenizer of target puts no BOS before a text: give prompts"):
        answers(dataclasses.replace(target, tokenizer=Opening([])), None, tmp_path / "b")
    with pytest.raises(InputError, match="target has no tokenizer, so its BOS is not known: give prompts of token ids"):
        answers(target, None, tmp_path / "b")
    with pytest.raises(InputError, match="prefix cuts prompts, and there are none"):
        answers(spoken, None, tmp_path / "b", prefix=(1, 2))


def test_text_and_fingerprint_of_a_real_target(stories_dir, tmp_path):
    import deer_jax

    real = deer_jax.load_target(stories_dir)
    answers(real, ["Once upon a time", "", "Lily"], tmp_path / "a", max_new_tokens=8)
    found = read(tmp_path / "a")
    assert sorted(found) == [0, 2]
    expected = decode(real, ["Once upon a time", "Lily"], max_new_tokens=8).tokens
    assert [found[0]["answer"], found[2]["answer"]] == expected
    assert found[2]["prompt"] == real.tokenizer.encode("Lily")
    assert found[0]["tokenizer"] == real.tokenizer.fingerprint


def test_another_run_is_refused(target, prompts, tmp_path):
    options = {"max_new_tokens": 2, "temperatures": (0,)}
    answers(target, prompts, tmp_path / "a", **options)
    before = (tmp_path / "a").read_bytes()
    other = Target(config=target.config, params=random_params(target.config, 6, scan=False), stop_ids=target.stop_ids)
    params = jax.tree.map(lambda x: x, target.params)
    params["layers"][1]["down"] = params["layers"][1]["down"].at[5, 3].add(1e-3)  # as a merged adapter: norm and
    nudged = dataclasses.replace(target, params=params)  # embedding are the same
    for model, texts, changes, message in (
        (other, prompts, {}, "the target's weights, configuration, tokenizer or dtype changed; write"),
        (nudged, prompts, {}, "the target's weights, configuration, tokenizer or dtype changed; write"),
        (target, prompts[:-1], {}, "the prompts or their names changed;"),
        (target, prompts, {"ids": list("abcdef")}, "the prompts or their names changed;"),
        (target, prompts, {"seed": 1, "samples": 2}, r"samples 1 \(now 2\), seed 0 \(now 1\);"),
        (target, prompts, {"temperatures": (0, 0.5)}, r"temperatures \[0.0\] \(now \[0.0, 0.5\]\);"),
        (target, prompts, {"prefix": (1, 2), "top_k": 3}, r"top_k 0 \(now 3\), prefix None \(now \[1, 2\]\);"),
    ):
        with pytest.raises(InputError, match=rf"a: was begun with other settings: {message}") as caught:
            answers(model, texts, tmp_path / "a", **(options | changes))
        assert "\n" not in str(caught.value)
    assert (tmp_path / "a").read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperatures": ()}, "temperatures is empty: give at least one, 0 is greedy"),
        ({"temperatures": (0, -1)}, r"temperature must be 0 \(greedy\) or positive, got -1"),
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number of at least 1, got 1.5"),
        ({"samples": True}, "samples must be a whole number of at least 1, got True"),
        ({"samples": 2**32}, "2 prompts x 4,294,967,296 samples are more than 10,000,000 answers: give fewer"),
        ({"batch_size": 10**9}, "batch_size must be at most 65,536, got 1000000000"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"prefix": (3, 2)}, "prefix must be two whole numbers, MIN,MAX with 1 <= MIN <= MAX, got 3,2"),
        ({"prefix": (0, 2)}, "prefix must be two whole numbers"),
        ({"prefix": (2,)}, "prefix must be two whole numbers, .* got 2"),
        ({"ids": ["a"]}, "ids has 1 entries for 2 prompts"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[], [V]]}, r"prompts\[1\]: token id 48 is outside the vocabulary of 48"),
        ({"prompts": ["hi"]}, r"prompts\[0\]: is text but target has no tokenizer"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(target, tmp_path, wrong, message):
    arguments = {"prompts": [[1], [2]]} | wrong
    with pytest.raises(InputError, match=message) as caught:
        answers(target, arguments.pop("prompts"), tmp_path / "a", **arguments)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def interrupt_at(count):
    """A progress that raises at its call of this number."""
    calls = []

    def progress(*state):
        calls.append(state)
        if len(calls) == count:
            raise KeyboardInterrupt

    return progress


class Dated(Opening):
    """A tokenizer whose template writes the day."""

    def encode_chat(self, messages, *, now=None, **arguments):
        return [1, (now or datetime.datetime.now()).day, len(messages[0]["content"])]

    def decode(self, ids):
        return str(ids)


def test_a_template_that_writes_the_date_goes_on_the_next_day(target, tmp_path, monkeypatch):
    """The date is that of the beginning, as the state keeps it."""
    spoken, chats = (
        dataclasses.replace(target, tokenizer=Dated([1]), stop_ids=()),
        [[{"role": "user", "content": "hi"}]] * 2,
    )
    days = []

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 2, 3 + len(days))

    monkeypatch.setattr(writer_module.datetime, "datetime", Clock)
    for way in (answers, decode):
        options = {"output": tmp_path / f"{way.__name__}.jsonl", "max_new_tokens": NEW}
        days.clear()
        with pytest.raises(KeyboardInterrupt):
            way(spoken, chats, progress=interrupt_at(2), **options)
        days.append(None)
        way(spoken, chats, **options)
    found = read(tmp_path / "answers.jsonl")
    assert [found[item]["prompt"] for item in (0, 1)] == [[1, 3, 2]] * 2
    assert read(tmp_path / "decode.jsonl")[0]["tokens"] == found[0]["answer"]


@pytest.fixture
def copied(stories_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(stories_dir, folder)
    return folder


def test_a_second_start_reads_no_file_again_unless_asked(copied, tmp_path):
    target, options = load_target(copied), {"max_new_tokens": 3}
    answers(target, [[1, 5]], tmp_path / "a", **options)
    assert target.digests.read > 10**6
    again = load_target(copied)
    answers(again, [[1, 5]], tmp_path / "a", **options)
    assert again.digests.read == 0

    weights = copied / "model.safetensors"
    times, content = weights.stat(), bytearray(weights.read_bytes())
    content[-3] ^= 1
    message = "a: was begun with other settings: the target's weights, configuration, tokenizer or dtype changed"
    with pytest.MonkeyPatch.context() as monkeypatch:
        keep_stamp(monkeypatch, weights)
        weights.write_bytes(content)
        answers(load_target(copied), [[1, 5]], tmp_path / "a", **options)  # size and time are trusted
        with pytest.raises(InputError, match=message):
            answers(load_target(copied), [[1, 5]], tmp_path / "a", verify=True, **options)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # the time of modification says nothing
    with pytest.raises(InputError, match=message):
        answers(load_target(copied), [[1, 5]], tmp_path / "a", **options)


@pytest.mark.parametrize("running", [{"0": [V]}, {"0": [1] * NEW}, {"99": [1]}, {"0": ["stop"]}])
def test_a_state_that_cannot_be_this_runs_is_refused(target, prompts, tmp_path, running):
    options = {"max_new_tokens": NEW}
    with pytest.raises(KeyboardInterrupt):
        answers(target, prompts, tmp_path / "a", progress=interrupt_at(1), **options)
    state = tmp_path / "a.state.json"
    values = json.loads(state.read_bytes())
    values["running"] = {key: [target.stop_ids[0] if t == "stop" else t for t in row] for key, row in running.items()}
    state.write_text(json.dumps(values | {"checksum": writer_module._checksum(values)}))
    with pytest.raises(InputError, match=r"a.state.json: is not the state of this run.*write to another output"):
        answers(target, prompts, tmp_path / "a", **options)
