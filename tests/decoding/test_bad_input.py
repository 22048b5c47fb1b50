"""Wrong input of decode and stream is refused in one line, before any work."""

import dataclasses

import pytest

from deer_jax import DrafterConfig, InputError, Target, decode, drafter_from_target, stream
from deer_jax.decoding import engine
from deer_jax.decoding.engine import Engine
from tests.doubles import Pieces, table_drafter
from tests.tiny import random_params, tiny

V, K = 48, 3


@pytest.fixture(scope="module")
def target() -> Target:
    config = tiny("qwen3", vocab_size=V, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24)
    return Target(config=config, params=random_params(config, 5, scan=False))


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
    with pytest.raises(InputError, match=message) as caught:
        decode(spoken, arguments.pop("prompts"), **arguments)
    assert "\n" not in str(caught.value)


def test_a_cache_that_does_not_fit_names_the_slots_that_would(target, no_work, monkeypatch):
    drafter = drafter_from_target(target)
    # 2 layers, keys and values, one head of 8 floats; target and drafter; the capacity of 4 + 20 tokens is 64.
    per_slot = 2 * 2 * 8 * 4 * 64 * 2
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
