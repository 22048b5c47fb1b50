"""Wrong input of decode and stream is refused in one line, before any work."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest

from deer_jax import (
    DrafterConfig,
    InputError,
    Target,
    answers,
    bench,
    decode,
    drafter_from_target,
    stream,
    stream_blocks,
)
from deer_jax.decoding import engine
from deer_jax.decoding.engine import Engine
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.prompt_lookup import prompt_lookup
from deer_jax.drafters.protocol import Method
from tests.doubles import Pieces, table_drafter
from tests.tiny import random_params, tiny

V, K = 48, 3


@pytest.fixture(scope="module")
def target() -> Target:
    config = tiny("qwen3", vocab_size=V, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24)
    return Target(config=config, params=random_params(config, 5, scan=False))


@dataclasses.dataclass(frozen=True)
class Reading(Method):
    """Of a user: reads these layers of the target."""

    taps: tuple[int, ...]
    target_vocab: int = V
    draft_length: int = K


GOOD = {"prompts": [[1, 2, 3], [4]], "max_new_tokens": 4}
BAD = {
    "no prompts": ({"prompts": []}, "prompts is empty: give at least one"),
    "an empty prompt": ({"prompts": [[1], []]}, r"prompts\[1\]: is empty: give at least one token"),
    "an empty text": ({"prompts": [""], "tokenizer": Pieces({})}, r"prompts\[0\]: is empty: give at least one token"),
    "an id too large": ({"prompts": [[1], [V]]}, r"s\[1\]: token id 48 is outside the vocabulary of 48 \(0\.\.47\)"),
    "an id below zero": ({"prompts": [[-1]]}, r"prompts\[0\]: token id -1 is outside the vocabulary"),
    "a flat list": ({"prompts": [1, 2, 3]}, r"one list of token ids: wrap it in a list"),
    "a number": ({"prompts": 5}, "prompts must be a string, a chat or a list of these, got int"),
    "ids that are no integers": ({"prompts": [[1.5]]}, r"prompts\[0\]: must be a string, .* got \[1\.5\]"),
    "text without tokenizer": ({"prompts": ["hi"]}, r"prompts\[0\]: is text but target has no tokenizer: give"),
    "a temperature below zero": ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or positive, got -0.1"),
    "a temperature of nan": ({"temperature": float("nan")}, "temperature must be .*, got nan"),
    "an infinite temperature": ({"temperature": float("inf")}, "temperature must be .*, got inf"),
    "a draft temperature": ({"draft_temperature": -1.0}, "draft_temperature must be .*, got -1.0"),
    "no mass": ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    "too much mass": ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    "top_k below zero": ({"top_k": -1}, r"top_k must be 0 \(all tokens\) or a positive whole number below .*, got -1"),
    "a draft length below zero": ({"drafter": True, "draft_length": -1}, "draft_length must be 0 .* got -1"),
    "no drafter": ({"draft_length": 4}, "draft_length is 4 but there is no drafter: give one, or draft_length=0"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
    "half a token": ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number of at least 1, got 1.5"),
    "no new tokens for one": ({"max_new_tokens": [3, 0]}, "max_new_tokens must be a whole number of at least 1, got 0"),
    "too few limits": ({"max_new_tokens": [3]}, "max_new_tokens has 1 entries for 2 prompts"),
    "beyond the context": (
        {"max_new_tokens": [254, 252]},
        r"prompts\[0\]: 3 prompt tokens and 254 new ones exceed the context of 256; .* max_new_tokens <= 253",
    ),
    "a drafter for another vocabulary": (
        {"drafter": table_drafter([[1]], 7)},
        r"table drafts for a vocabulary of 7, target has 48: load it for this target, load_drafter\(",
    ),
    "a layer that the target has not": (
        {"drafter": Drafter(method=Reading((0, 2)), params={})},
        r"the drafter reads layer 2 of its target, target has layers 0\.\.1: give it the target that it was trained",
    ),
    "a layer before the first": (
        {"drafter": Drafter(method=Reading((-1,)), params={})},
        r"the drafter reads layer -1 of its target, target has layers 0\.\.1",
    ),
    "more slots than there are": ({"batch_size": 2**40}, "batch_size must be at most 65,536, got 1099511627776"),
    "a flag as slots": ({"batch_size": True}, "batch_size must be a whole number of at least 1, got True"),
    "a flag as seed": ({"seed": True}, "seed must be a whole number from 0 to 4294967295, got True"),
    "a flag as length": ({"max_new_tokens": True}, "max_new_tokens must be a whole number of at least 1, got True"),
    "a flag as draft length": ({"drafter": True, "draft_length": True}, "draft_length must be 0 .* got True"),
    "a draft beyond the context": (
        {"drafter": True, "draft_length": 10**9}, "draft_length 1000000000 exceeds the target's context of 256"
    ),
    "names without an output": ({"ids": ["a", "b"]}, "ids name the lines of an output: give output too"),
    "a drafter's name": ({"drafter": "runs/mine"}, r"drafter must be a Drafter, got 'runs/mine': load it first, lo"),
    "a target as drafter": ({"drafter": "the target"}, "drafter must be a Drafter, got a Target: give what load_draf"),
    "no slots": ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
}  # fmt: skip


@pytest.fixture
def no_work(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("work was begun")

    for name in ("_run", "admit", "segment"):
        monkeypatch.setattr(Engine, name, refuse)


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_one_line_before_any_work(target, name, no_work):
    wrong, message = BAD[name]
    arguments = GOOD | wrong
    spoken = dataclasses.replace(target, tokenizer=arguments.pop("tokenizer", None))
    if arguments.get("drafter") is True:
        arguments["drafter"] = drafter_from_target(target)
    elif arguments.get("drafter") == "the target":
        arguments["drafter"] = target
    with pytest.raises(InputError, match=message) as caught:
        decode(spoken, arguments.pop("prompts"), **arguments)
    assert "\n" not in str(caught.value)


def test_what_is_no_target_is_said_by_every_way_in(target, no_work, tmp_path):
    for wrong, message in (
        ("models/a", r"target must be a Target, got 'models/a': load it first, load_target\("),
        (Path("models/a"), r"target must be a Target, got PosixPath\('models/a'\): load it first"),
        (
            drafter_from_target(target),
            "target must be a Target, got a Drafter: give what load_ta",
        ),
    ):
        for way in (
            lambda wrong: decode(wrong, [[1]]),
            lambda wrong: stream(wrong, [[1]]),
            lambda wrong: stream_blocks(wrong, [[1]]),
            lambda wrong: answers(wrong, [[1]], tmp_path / "a"),
            lambda wrong: bench(wrong, [[1]], drafters={"d": drafter_from_target(target)}),
        ):
            with pytest.raises(InputError, match=message):
                way(wrong)
    assert list(tmp_path.iterdir()) == []


def test_drafters_that_are_not_named_are_refused(target, no_work):
    drafter = drafter_from_target(target)
    for wrong, what in (([drafter], "list"), (drafter, "Drafter"), ("runs/mine", "str")):
        with pytest.raises(InputError, match=rf'drafters must be .* as in {{"mine": drafter}}, got a {what}'):
            bench(target, [[1]], drafters=wrong)
    with pytest.raises(InputError, match=r"draft_lengths must be a list, as in \[8\], got 8"):
        bench(target, [[1]], drafters={"a": drafter}, draft_lengths=8)
    name: Any = "runs/mine"
    for way in (
        lambda: bench(target, [[1]], drafters={"a": name}),
        lambda: stream(target, [[1]], drafter=name),
        lambda: stream_blocks(target, [[1]], drafter=name),
    ):
        with pytest.raises(InputError, match=r"drafter must be a Drafter, got 'runs/mine': load it first"):
            way()
    for way in (lambda: drafter_from_target(name), lambda: drafter.draft_logits(name, [[1]], [2])):
        with pytest.raises(InputError, match=r"target must be a loaded one, as in load_target\('runs/mine'\), got"):
            way()


def test_a_cache_that_does_not_fit_names_the_slots_that_would(target, no_work, monkeypatch):
    drafter = drafter_from_target(target)
    # 2 layers, keys and values, one head of 8 floats; target and drafter; the capacity of 4 + 20 tokens is 64.
    # And the slot's tokens, histogram (k + 1), three counts by certainty, six numbers and one flag.
    per_slot = 2 * 2 * 8 * 4 * 64 * 2 + 64 * 4 + 4 * 4 + 3 * 10 * 4 + 6 * 4 + 1
    monkeypatch.setattr(engine, "free_bytes", lambda devices: 3 * per_slot + 5)
    with pytest.raises(InputError, match=rf"need {8 * per_slot:,} bytes, {3 * per_slot + 5:,} are free: 3 slots would"):
        decode(target, [[1, 2, 3, 4]] * 8, drafter=drafter, draft_length=3, max_new_tokens=20, batch_size=100)
    with pytest.raises(AssertionError, match="work was begun"):
        decode(target, [[1, 2, 3, 4]] * 8, drafter=drafter, draft_length=3, max_new_tokens=20, batch_size=3)


def test_stream_refuses_what_it_cannot_do(target, no_work):
    with pytest.raises(InputError, match="no tokenizer, so there is no text to stream"):
        stream(target, [[1]])
    spoken = dataclasses.replace(target, tokenizer=Pieces({}))
    with pytest.raises(InputError, match="streaming takes one prompt, got 2"):
        stream(spoken, ["a", "b"])
    with pytest.raises(InputError, match="top_p"):
        stream(spoken, "a", top_p=2.0)


def test_a_draft_longer_than_trained_warns(target):
    drafter = drafter_from_target(target, DrafterConfig(draft_length=2))
    with pytest.warns(UserWarning, match="draft_length 3 is beyond the 2 that from-target was trained for"):
        decode(target, [[1, 2, 3]], drafter=drafter, draft_length=K, max_new_tokens=4)


def test_prompt_lookup_is_trained_for_no_length(target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(target, [[1, 2, 3]], drafter=prompt_lookup(target, 2), draft_length=K, max_new_tokens=4)
