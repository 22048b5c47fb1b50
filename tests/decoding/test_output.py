"""decode(output=): answers in a file as they finish; whatever stops it, the same call goes on to the same end."""

import dataclasses
import json

import numpy as np
import pytest

from deer_jax import InputError, RunError, Target, decode, drafter_from_target
from deer_jax.data.answer_writer import AnswerWriter
from deer_jax.decoding import decode as module
from tests.doubles import table_drafter, text_table
from tests.tiny import random_params, tiny

V, K, NEW = 48, 3, 10


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, V, n).tolist() for n in (9, 1, 14, 3, 5, 1)]


@pytest.fixture(scope="module")
def target() -> Target:
    config = tiny("qwen3", vocab_size=V, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24, context=64)
    return Target(config=config, params=random_params(config, 5, scan=False))


@pytest.fixture(scope="module")
def drafters(target, prompts):
    """A table that is right at times, and one that is a model."""
    table = text_table(prompts, decode(target, prompts, max_new_tokens=NEW).tokens)
    table = np.where(np.random.default_rng(0).random(table.shape) < 0.4, 0, table)
    return {"none": None, "table": table_drafter(table, V, certain=False), "model": drafter_from_target(target)}


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(module, "ROUNDS_PER_SEGMENT", 2)


def read(path) -> dict[int, dict]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({record["item"] for record in found}) == len(found)
    return {record["item"]: record for record in found}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["none", "table", "model"])
def test_stopped_at_every_moment(target, prompts, drafters, tmp_path, name, settings):
    """The lines are those of an uninterrupted call, rounds and histograms too, and so are the result's numbers."""
    options = settings | {"max_new_tokens": NEW, "batch_size": 2, "drafter": drafters[name]}
    options |= {"draft_length": K} if drafters[name] else {}
    whole = decode(target, prompts, **options)
    expected = {
        i: {"id": str(i + 1), "item": i, "text": None, "tokens": whole.tokens[i], "new_tokens": NEW,
            "rounds": whole.stats.rounds[i], "accepted_histogram": whole.stats.accepted_histogram[i]}
        for i in range(len(prompts))
    }  # fmt: skip
    path, stops = tmp_path / "a.jsonl", 0

    def interrupt(done, total, tokens):
        nonlocal calls
        calls += 1
        if calls > 6:  # some answers take five segments, and begin again
            raise KeyboardInterrupt

    while True:
        calls = 0
        try:
            found = decode(target, prompts, output=path, progress=interrupt, **options)
            break
        except KeyboardInterrupt:
            stops += 1
            assert read(path).items() <= expected.items()
            with path.open("a") as stream:
                stream.write('{"item": 1, "tok')  # a kill in the middle of a line
    assert stops >= 1
    assert read(path) == expected
    assert found.tokens == whole.tokens
    assert found.stats.accepted_histogram == whole.stats.accepted_histogram
    assert (found.stats.rounds, found.stats.new_tokens) == (whole.stats.rounds, whole.stats.new_tokens)
    assert 0 < found.stats.resumed_tokens < NEW * len(prompts)
    assert found.stats.tokens_per_second == pytest.approx(
        (NEW * len(prompts) - found.stats.resumed_tokens) / found.stats.seconds
    )

    before = path.read_bytes()
    again = decode(target, prompts, output=path, **options)
    assert (again.tokens, again.stats.fetches, again.stats.tokens_per_second) == (whole.tokens, 0, 0)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.state.json"]


def test_another_call_is_refused(target, prompts, drafters, tmp_path):
    path, options = tmp_path / "a", {"max_new_tokens": 2, "draft_length": K, "drafter": drafters["model"]}
    decode(target, prompts, output=path, **options)
    before = path.read_bytes()
    params = dict(drafters["model"].params)
    params["special"] = params["special"].at[0, 0].add(1e-3)
    other = Target(config=target.config, params=random_params(target.config, 6, scan=False))
    moved = dataclasses.replace(drafters["model"], params=params)
    for model, texts, changes, message in (
        (other, prompts, {}, "the target's weights, configuration, tokenizer or dtype changed;"),
        (
            target,
            prompts,
            {"drafter": moved},
            "the drafter's weights or",
        ),
        (target, prompts[:-1], {}, "the prompts or their names changed;"),
        (target, prompts, {"ids": list("abcdef")}, "the prompts or their names changed;"),
        (target, prompts, {"draft_length": 2}, r"draft_length 3 \(now 2\);"),
        (target, prompts, {"temperature": 0.5, "seed": 1}, r"temperature 0.0 \(now 0.5\), seed 0 \(now 1\);"),
        (target, prompts, {"draft_temperature": 0.5}, r"draft_temperature None \(now 0.5\);"),
        (target, prompts, {"max_new_tokens": [2, 2, 2, 2, 2, 3]}, r"max_new_tokens 2 \(now '\w+'\);"),
        (target, prompts, {"ignore_stop": True}, r"ignore_stop False \(now True\);"),
    ):
        with pytest.raises(InputError, match=rf"a: was begun with other settings: {message}") as caught:
            decode(model, texts, output=path, **(options | changes))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000
    assert path.read_bytes() == before
    decode(target, prompts, output=path, batch_size=1, **options)  # another batch is the same call


@pytest.mark.parametrize("change", [
    {"tokens": [1, V]}, {"tokens": []}, {"tokens": "x"}, {"tokens": None}, {"rounds": -1}, {"rounds": None},
    {"accepted_histogram": [1]}, {"accepted_histogram": [1, 2, 3, "4"]}, {"rounds": True},
])  # fmt: skip
def test_a_line_that_is_no_answer_is_refused(target, prompts, drafters, tmp_path, change):
    """Appended behind what was saved, where no digest says that it is ours."""
    options = {"max_new_tokens": 2, "draft_length": K, "drafter": drafters["table"], "output": tmp_path / "a"}

    def stop(*state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(target, prompts, progress=stop, **options)
    line = {"item": 0, "tokens": [1, 2], "rounds": 1, "accepted_histogram": [0, 1, 0, 0]} | change
    (tmp_path / "a").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=r"a:1: is no answer of this run"):
        decode(target, prompts, **options)


def test_one_call_at_a_time_and_nothing_of_others(target, prompts, tmp_path):
    with AnswerWriter(tmp_path / "a"), pytest.raises(InputError, match=r"a: is being written by process \d+ on "):
        decode(target, prompts, output=tmp_path / "a", max_new_tokens=2)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b").write_text("mine")
    with pytest.raises(InputError, match=r"b: exists without b.state.json"):
        decode(target, prompts, output=tmp_path / "b", max_new_tokens=2)
    assert (tmp_path / "b").read_text() == "mine"
    with pytest.raises(InputError, match="must be a whole number"):
        decode(target, prompts, output=tmp_path / "c", max_new_tokens=0)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_output_that_is_removed_meanwhile_is_noticed(target, prompts, tmp_path):
    path = tmp_path / "a"

    def remove(done, total, tokens):
        path.unlink(missing_ok=True)

    with pytest.raises(RunError, match="a: was removed or changed while it was being written"):
        decode(target, prompts, output=path, max_new_tokens=4, progress=remove)
