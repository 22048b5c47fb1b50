"""Plain decoding and drafters side by side on tiny random models."""

import json

import pytest

from deer_jax.bench import runner
from deer_jax.bench.runner import bench
from deer_jax.config import DrafterConfig
from deer_jax.decoding.decode import decode
from deer_jax.decoding.state import acceptance_length
from deer_jax.drafters.standalone import drafter_from_target
from deer_jax.errors import InputError
from deer_jax.models.target import Target
from tests.tiny import random_params, tiny

PROMPTS = [[1, 2, 3], [4, 5], [7, 8, 9, 10]]


@pytest.fixture(scope="module")
def target():
    config = tiny("llama", layers=1)
    return Target(config=config, params=random_params(config, scan=False), name="tiny")


@pytest.fixture(scope="module")
def drafter(target):
    return drafter_from_target(target, DrafterConfig(draft_length=4))


@pytest.fixture(scope="module")
def greedy(target, drafter):
    runs = []
    report = bench(
        target, PROMPTS, drafters={"x": drafter}, draft_lengths=[1, 4], max_new_tokens=24, batch_size=3, repeats=2,
        progress=lambda *run: runs.append(run), command="deer-jax bench",
    )  # fmt: skip
    return report, runs


def test_schema(greedy):
    report, _ = greedy
    values = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert values.keys() >= {"methods", "machine", "date", "command", "target", "prompts"}
    assert list(values["methods"]) == ["plain", "x k=1", "x k=4"]
    assert [method["drafter"] for method in values["methods"].values()] == [None, "x", "x"]
    for method in values["methods"].values():
        assert method.keys() >= {
            "draft_length", "temperature", "batch_size", "acceptance_length", "ci95", "tokens_per_second",
            "decode_tokens_per_second", "speedup", "round_cost", "exact_match", "accepted_histogram",
            "acceptance_by_depth",
        }  # fmt: skip
        assert len(method["accepted_histogram"]) == method["draft_length"] + 1
        assert len(method["acceptance_by_depth"]) == method["draft_length"]
        assert method["ci95"][0] <= method["acceptance_length"] <= method["ci95"][1]
        assert method["decode_tokens_per_second"] > method["tokens_per_second"] > 0
        assert method["batch_size"] == 3
    assert values["machine"].keys() == {"platform", "device_kind", "devices", "cores", "jax"}
    assert (values["target"], values["prompts"], values["command"]) == ("tiny", 3, "deer-jax bench")


def test_numbers_are_those_of_decode(greedy, target, drafter):
    report, _ = greedy
    plain = report.methods["plain"]
    assert (plain.acceptance_length, plain.speedup, plain.exact_match) == (1, 1, 1)
    assert plain.new_tokens == 2 * 3 * 24
    once = decode(target, PROMPTS, drafter=drafter, draft_length=4, max_new_tokens=24).stats
    assert report.methods["x k=4"].acceptance_length == acceptance_length(once.accepted_histogram)
    assert report.methods["x k=4"].rounds == 2 * sum(once.rounds)


def test_an_always_right_drafter(greedy):
    # Started from the target with a shifted head, the first draft is the target's own next token.
    method = greedy[0].methods["x k=1"]
    assert method.acceptance_length == 2
    assert method.ci95 == (2, 2)
    assert method.exact_match == 1
    assert method.rows_differing == 0
    assert method.acceptance_by_depth == [1]


def test_methods_take_turns(greedy):
    _, runs = greedy
    names = ["plain", "x k=1", "x k=4"]
    assert [run[2] for run in runs] == [
        *names, *names, *names[1:], names[0], "comparing x k=1", "comparing x k=4", "",
    ]  # fmt: skip
    assert [run[:2] for run in runs] == [*((i, 9) for i in range(9)), *[(9, 9)] * 3]


def test_sampling(target, drafter, monkeypatch):
    seeds = []

    def recorded(*args, **kwargs):
        seeds.append(kwargs["seed"])
        return decode(*args, **kwargs)

    monkeypatch.setattr(runner, "decode", recorded)
    report = bench(
        target, PROMPTS, drafters={"x": drafter}, max_new_tokens=12, temperature=1.0, batch_size=3, repeats=2, seed=5
    )
    assert list(report.methods) == ["plain", "x k=4"]
    assert seeds == [5, 5, 5, 5, 6, 6]
    for method in report.methods.values():
        assert method.exact_match is None
        assert method.rows_differing is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft_lengths": [0]}, "draft_lengths must be 1 or more"),
        ({"draft_lengths": []}, "draft_lengths must be 1 or more"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"temperature": -1.0}, "temperature must be"),
    ],
)
def test_refused_arguments(target, drafter, arguments, message):
    with pytest.raises(InputError, match=message):
        bench(target, PROMPTS, drafters={"x": drafter}, **arguments)


def test_a_draft_length_that_is_chosen(target, drafter):
    """Beside fixed ones, with the rounds at each; the picture of speed has it as a level."""
    report = bench(
        target, PROMPTS, drafters={"x": drafter}, draft_lengths=[2, "auto"], max_new_tokens=24, batch_size=3, repeats=1
    )
    chosen, fixed = report.methods["x auto"], report.methods["x k=2"]
    assert list(report.methods) == ["plain", "x k=2", "x auto"]
    assert fixed.rounds_at is None
    assert chosen.rounds_at is not None
    assert chosen.draft_length == 4
    assert sum(chosen.rounds_at.values()) == chosen.rounds
    assert chosen.exact_match is not None
    assert chosen.rows_differing == chosen.near_ties
    labels = [text.get_text() for text in report.picture("speed").legends[0].get_texts()]
    assert "x auto" in labels
    with pytest.raises(InputError, match="draft_lengths must be 1 or more each"):
        bench(target, PROMPTS, drafters={"x": drafter}, draft_lengths=["fast"])
