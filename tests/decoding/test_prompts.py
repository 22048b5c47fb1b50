"""Every form that a prompt may have, and what is wrong with one of several."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax import Target, decode, load_target
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.data.bpe import train_bpe
from deer_jax.data.sources import placed, read_prompts
from deer_jax.decoding.prompts import encode_prompts
from deer_jax.errors import InputError, NotFiniteError, PromptError, RunError
from tests.doubles import Pieces
from tests.tiny import random_params, tiny

USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}{{ documents }}{{ style }}"
    "{% if mood %}{{ mood }}{% endif %}{% if dated %}{{ strftime_now('%Y') }}{% endif %}"
)


@pytest.fixture(scope="module")
def target() -> Target:
    config = tiny("qwen3", vocab_size=48, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24)
    return Target(config=config, params=random_params(config, 5, scan=False))


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Target:
    """A target in a folder whose tokenizer has a template, and a [PAD] beyond the model's vocabulary."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "spoken", tmp_path_factory.mktemp("tokenizer")
    train_bpe(["hello the dog"], 260, tokenizer)
    values = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    size = len(values["model"]["vocab"])
    values["added_tokens"].append(dict(values["added_tokens"][0], id=size, content="[PAD]"))
    (tokenizer / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"chat_template": TEMPLATE, "split_special_tokens": False, "pad_token": "[PAD]"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = tiny("llama", layers=1, vocab_size=size)
    save_folder(folder, config, random_params(config), tokenizer_source=tokenizer)
    return load_target(folder)


def said(target: Target, prompt, *arguments) -> str:
    return target.tokenizer.decode(encode_prompts(target, prompt, *arguments)[0])


def test_ids_in_every_form(target):
    expected = [[1, 2], [3]]
    assert encode_prompts(target, expected) == expected
    assert encode_prompts(target, [np.asarray([1, 2]), (np.int64(3),)]) == expected
    assert encode_prompts(target, np.asarray([[1, 2], [3, 4]], np.uint8)) == [[1, 2], [3, 4]]
    for wrong in ([np.asarray([[1, 2]])], [np.asarray([1.0])], [[True]], [b"ab"], [{1: 2}]):
        with pytest.raises(PromptError, match=r"prompts\[0\]: "):
            encode_prompts(dataclasses.replace(target, tokenizer=Pieces({})), wrong)
    with pytest.raises(InputError, match="one list of token ids: wrap it"):
        encode_prompts(target, [1, 2])


def test_arrays_of_ids(target):
    for array in (np.asarray([1, 2]), jnp.asarray([1, 2]), np.asarray([[1, 2]], np.uint8)):
        assert encode_prompts(target, array) == [[1, 2]]
    assert encode_prompts(target, [jnp.asarray([1, 2]), np.asarray([3])]) == [[1, 2], [3]]
    assert (
        decode(target, np.asarray([1, 2]), max_new_tokens=4).tokens == decode(target, [[1, 2]], max_new_tokens=4).tokens
    )
    for wrong in (np.asarray([1.0]), np.zeros((1, 1, 1), int), np.asarray("text")):
        with pytest.raises(InputError, match=r"as an array must be token ids, integers \[T\] of one prompt or"):
            encode_prompts(target, wrong)
    with pytest.raises(PromptError, match="is empty"):
        encode_prompts(target, np.zeros(0, int))


def test_chats_in_every_form(spoken):
    assert said(spoken, [USER]) == "helloNoneNone"
    assert said(spoken, {"messages": [USER]}) == "helloNoneNone"
    assert said(spoken, [{"messages": [USER]}]) == "helloNoneNone"
    assert said(spoken, [[USER]]) == "helloNoneNone"
    assert said(spoken, {"messages": [USER], "tools": [{"a": 1}]}) == "hello[{'a': 1}]None"
    assert said(spoken, {"messages": [USER], "documents": [{"b": 1}], "tools": ()}) == "helloNone[{'b': 1}]"
    parts = {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
    assert said(spoken, [parts, USER]) == "hellohelloNoneNone"
    arguments = {"style": "calm", "mood": "glad"}
    own = {"messages": [USER], "chat_template_kwargs": {"style": "loud"}}
    assert said(spoken, own, arguments) == "helloNoneNoneloudglad"
    assert len(encode_prompts(spoken, [{"messages": [USER]}, "hello", [USER, ANSWER, USER], [5]])) == 4


def test_the_moment_is_passed_on(spoken):
    import datetime

    assert said(spoken, [USER], {"dated": True}, datetime.datetime(1999, 1, 1)).endswith("1999")


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([USER, ANSWER], "ends with a message of the assistant, which the target would answer once more; leave it out"),
        ({"messages": [USER], "tool": []}, r"has an unknown key 'tool', did you mean 'tools'\?"),
        ({"tools": []}, "is a mapping without messages"),
        ({"messages": []}, "has no messages"),
        (USER, "is a message alone; put it into a list"),
        (
            [{"role": "user", "content": {"a": 1}}],
            "message 1: content must be a text or a list of .*, got dict",
        ),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "content has a part of type 'image'; only text can be",
        ),
        ({"messages": [USER], "tools": [print]}, r"tools\[0\] must be a mapping, got .*get_json_schema"),
        ({"messages": [USER], "chat_template_kwargs": {"styl": 1}}, "has no argument 'styl', did you mean 'style'"),
        ({"messages": [USER], "chat_template_kwargs": {"tokenize": 1}}, "'tokenize': is not for the template"),
        ([{"role": "user", "content": "\ud83d"}], "content: character 1 is half of a surrogate pair"),
        ([10**5000], "token id of type int is outside"),
        ([10**100], "token id 10+...* is outside"),
        ("a \udcff", "the text: character 3 is half of a surrogate pair"),
        ("hello [PAD]", r"token id \d+ \('\[PAD\]'\) is outside the vocabulary"),
    ],
)
def test_what_is_wrong_with_a_prompt_names_it(spoken, prompt, reason):
    with pytest.raises(PromptError, match=reason) as caught:
        encode_prompts(spoken, ["fine", prompt])
    assert caught.value.index == 1
    assert str(caught.value).startswith("prompts[1]: ")
    assert "\n" not in str(caught.value)


def test_arguments_of_the_call_are_no_fault_of_a_prompt(spoken):
    for arguments in ({"styl": 1}, {"return_tensors": "pt"}, {"style": {1: 2}}, {"style": object()}):
        with pytest.raises(InputError) as caught:
            encode_prompts(spoken, ["fine", [USER]], arguments)
        assert not isinstance(caught.value, PromptError)


def test_ids_of_the_tokenizer_beyond_the_vocabulary_do_not_stop_a_folder(spoken):
    """transformers adds a [PAD] to folders that it saves."""
    assert max(spoken.tokenizer.vocabulary().values()) == spoken.config.vocab_size
    assert said(spoken, "hello the dog") == "hello the dog"
    assert spoken.tokenizer.decode([*spoken.tokenizer.plain("dog"), spoken.config.vocab_size + 9]) == "dog"


def test_prompts_of_a_file_are_named_by_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "id": "x"}\n', encoding="utf-8")
    prompts = read_prompts(path)
    for index, place in ((0, f"{path}:1"), (1, f"{path}:3 (id x)")):
        with pytest.raises(InputError) as caught, placed(prompts):
            raise PromptError(index, "is wrong")
        assert str(caught.value) == f"{place}: is wrong"
        with pytest.raises(RunError) as failed, placed(prompts):
            raise NotFiniteError(index, "not finite")
        assert str(failed.value) == f"{place}: not finite"
