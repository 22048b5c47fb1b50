"""Prompts as the verbs take them: what is wrong with one names its file, line and id, or its option."""

import json
import os
import threading

import pytest

from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.data.bpe import train_bpe
from tests.tiny import random_params, tiny


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> str:
    """A folder whose tokenizer has a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "spoken", tmp_path_factory.mktemp("tokenizer")
    train_bpe(["hello the dog"], 260, tokenizer)
    path = tokenizer / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}{{ tools }}{% endif %}"
    path.write_text(json.dumps(settings), encoding="utf-8")
    config = tiny("llama", layers=1, context=128, vocab_size=300)
    save_folder(folder, config, random_params(config), tokenizer_source=tokenizer)
    return str(folder)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a dog"}, {"prompt": "the dog " * 200, "id": "long"}, {"prompt": "another"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def failed(result) -> str:
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("deer-jax: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("deer-jax: error: ").strip()


@pytest.mark.parametrize("verb", [["decode"], ["bench", "--drafter", "from-target", "--repeats", "1"]])
def test_an_overlong_row_is_named_by_file_line_and_id(run, spoken, prompts, verb):
    line = failed(run(*verb, "--target", spoken, "--prompts", str(prompts), "--max-new-tokens", "8"))
    assert line.startswith(f"{prompts}:2 (id long): ")
    assert "new ones exceed the context of 128" in line


def test_prompts_of_the_command_line_are_named_by_their_number(run, spoken):
    argv = ["--target", spoken, "--max-new-tokens", "8", "--prompt", "a"]
    assert failed(run("decode", *argv, "--prompt", "the dog " * 200)).startswith("--prompt 2: ")
    assert "--prompt: is not UTF-8" in failed(run("decode", *argv, "--prompt", "\udcff"))


def test_an_id_beyond_the_vocabulary_is_named(run, spoken, tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text('{"tokens": [1]}\n{"tokens": [300], "id": "x"}\n', encoding="utf-8")
    for verb in ("decode", "answers"):
        argv = [verb, "--target", spoken, "--prompts", str(path), *(["--output", f"{path}.out"] * (verb == "answers"))]
        assert failed(run(*argv)) == f"{path}:2 (id x): token id 300 is outside the vocabulary of 300 (0..299)"


@pytest.mark.filterwarnings("default")
def test_chats_of_a_data_set(run, spoken, tmp_path):
    path, output = tmp_path / "chats.json", tmp_path / "out.jsonl"
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    path.write_text(json.dumps([{"id": "a", "conversations": turns}, {"conversations": turns, "tools": [{"a": 1}]}]))
    argv = ["answers", "--target", spoken, "--prompts", str(path), "--output", str(output), "--max-new-tokens", "1"]
    status, _, err = run(*argv)
    assert status == 0
    warned = [line for line in err.splitlines() if "warning" in line]
    assert len(warned) == 1
    assert "2 of 2 prompts ended with the assistant's answer" in warned[0]
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    lengths = {record["id"]: len(record["prompt"]) for record in found}
    assert sorted(lengths) == ["2", "a"]
    assert lengths["2"] > lengths["a"]  # the tools are in it


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["thinking=1"], "the chat template has no argument 'thinking', it takes none"),
        (["tokenize=true"], "--template 'tokenize': is not for the template"),
        (["return_tensors=pt"], "--template 'return_tensors': is not for the template"),
        (["chat_template=x"], "--template 'chat_template': is not for the template"),
        (["a=1", "a=2"], "--template: 'a' is given twice"),
    ],
)
def test_arguments_that_no_template_takes(run, spoken, entries, message):
    options = [word for entry in entries for word in ("--template", entry)]
    assert message in failed(run("decode", "--target", spoken, "--prompt", "a", "--chat", *options))


def test_a_pipe_of_prompts(run, spoken, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"prompt": "a dog"}\n',))
    writer.start()
    status, out, _ = run("decode", "--target", spoken, "--prompts", str(pipe), "--max-new-tokens", "1")
    writer.join()
    assert status == 0
    assert out.startswith("== 1 (1 tokens, 1 rounds)")


@pytest.mark.parametrize(
    ("name", "message"),
    [("a\0b", "embedded null byte"), ("loop", "Too many levels of symbolic links"), ("", "is a folder")],
)
def test_paths_that_are_no_file(run, spoken, tmp_path, name, message):
    (tmp_path / "loop").symlink_to("loop")
    assert message in failed(run("decode", "--target", spoken, "--prompts", str(tmp_path / name)))
