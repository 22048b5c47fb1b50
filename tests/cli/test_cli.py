"""The command line: what it prints and writes, and one line with status 2 for whatever is wrong with its input."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from deer_jax import decode, load_target
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.cli import main as cli
from deer_jax.cli.options import parse
from deer_jax.cli.progress import Reporter
from deer_jax.training.recipe import read_pretrain_recipe, read_recipe
from tests.tiny import random_params, tiny

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = ROOT / "configs"


@pytest.fixture
def ids(tmp_path):
    """A prompt file of token ids."""
    path = tmp_path / "ids.jsonl"
    path.write_text('{"id": "a", "tokens": [1, 2, 3]}\n{"id": "b", "tokens": [4]}\n', encoding="utf-8")
    return str(path)


def test_decode_to_files(run, tmp_path, folder, ids):
    output, numbers = tmp_path / "answers.jsonl", tmp_path / "numbers.json"
    status, out, err = run(
        "decode", "--target", folder, "--drafter", "from-target", "--prompts", ids, "--draft-length", "3",
        "--max-new-tokens", "9", "--output", str(output), "--json", str(numbers),
    )  # fmt: skip
    assert (status, out) == (0, "")
    assert err.splitlines()[-1].startswith(f"deer-jax: {output}: 2 answers, τ ")
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["item"])
    assert [(row["id"], row["item"]) for row in rows] == [("a", 0), ("b", 1)]
    keys = {"id", "item", "text", "tokens", "new_tokens", "rounds", "accepted_histogram"}
    assert all(row.keys() == keys for row in rows)
    assert [row["tokens"] for row in rows] == decode(load_target(folder), [[1, 2, 3], [4]], max_new_tokens=9).tokens
    values = json.loads(numbers.read_text(encoding="utf-8"))
    assert (values["prompts"], values["draft_length"], values["new_tokens"]) == (2, 3, 18)
    assert sum(values["accepted_histogram"]) == values["rounds"] == sum(row["rounds"] for row in rows)
    names = ["answers.jsonl", "answers.jsonl.state.json", "ids.jsonl", "numbers.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_decode_prints_answers(run, stories_dir):
    arguments = ["decode", "--target", str(stories_dir), "--prompt", "Once upon a time", "--max-new-tokens", "12"]
    status, out, err = run(*arguments)
    assert status == 0
    header, text = out.split("\n", 1)
    assert header == "== 1 (12 tokens, 12 rounds)"
    assert "τ" not in err  # which says nothing where nothing is drafted
    assert re.fullmatch(
        r"deer-jax: [\d,.]+ tokens/s, 12 tokens in [\d.]+ s \([\d.]+ s of compiling .*\), on 1 x cpu", last(err)
    )
    status, streamed, err = run(*arguments, "--stream", "--drafter", "from-target:0,1", "--draft-length", "auto")
    assert (status, streamed) == (0, text)
    assert re.fullmatch(r"deer-jax: τ [\d.]+, [\d,.]+ tokens/s, 12 tokens in .*", last(err))
    status, streamed, err = run(*arguments, "--stream")
    assert (status, streamed) == (0, text)
    assert re.fullmatch(r"deer-jax: [\d,.]+ tokens/s, 12 tokens in .*", last(err))


def last(err: str) -> str:
    return err.splitlines()[-1]


def test_decode_goes_on_where_it_was_stopped(run, monkeypatch, tmp_path, folder, ids):
    output = tmp_path / "o"
    argv = ["decode", "--target", folder, "--drafter", "from-target", "--prompts", ids, "--draft-length", "3",
            "--batch-size", "1", "--max-new-tokens", "9", "--output"]  # fmt: skip
    assert run(*argv, str(tmp_path / "whole"))[0] == 0
    show, stop = Reporter.show, KeyboardInterrupt

    def interrupt(self, done, total, note=""):
        show(self, done, total, note)
        if self.what == "decoding" and done == 1:
            raise stop

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "show", interrupt)
        status, out, err = run(*argv, str(output))
        assert (status, out) == (130, "")
        assert last(err) == f"deer-jax: interrupted: {output} keeps what is done; the same command goes on from there"
    assert len(output.read_text().splitlines()) == 1
    status, out, err = run(*argv, str(output))
    assert (status, out) == (0, "")
    assert re.search(
        r": 2 answers, τ [\d.]+, [\d,.]+ tokens/s, 9 tokens \(of 18, the others from before\) in", last(err)
    )
    assert output.read_text() == (tmp_path / "whole").read_text()
    status, out, err = run(*argv, str(output))
    assert (status, out, last(err)) == (0, "", f"deer-jax: {output}: is complete, 2 answers, nothing to do")
    status, _, err = run(*argv, str(output), "--seed", "3")
    assert status == 2
    assert "o: was begun with other settings: seed 0 (now 3); write to another output" in err


def test_decode_killed_and_started_again(run, environment, folder, tmp_path):
    """With a drafter, sampled: the lines are those of a run that nobody stopped, rounds and histograms too."""
    (tmp_path / "ids").write_text("".join(f'{{"tokens": [{i}, 7]}}\n' for i in range(8)), encoding="utf-8")
    options = "--drafter from-target --draft-length 2 --temperature 1 --batch-size 2 --max-new-tokens 400"
    argv = ["decode", *options.split(), "--target", folder, "--prompts", str(tmp_path / "ids"), "--output"]
    assert run(*argv, str(tmp_path / "whole"))[0] == 0
    command, killed = [sys.executable, "-m", "deer_jax.cli.main", *argv, str(tmp_path / "killed")], tmp_path / "killed"
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while not killed.exists() or len(killed.read_bytes().splitlines()) < 3:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert len(killed.read_bytes().splitlines()) < 8
    status, _, err = run(*argv, str(killed))
    assert status == 0
    assert "the others from before" in err
    assert sorted(killed.read_text().splitlines()) == sorted((tmp_path / "whole").read_text().splitlines())


@pytest.mark.parametrize("verb", ["decode", "answers"])
def test_a_prompt_that_is_not_finite_is_named(tmp_path, run, ids, folder, verb):
    config = tiny("llama", layers=1, context=512, tied=False)
    save_folder(tmp_path / "nan", config, random_params(config))
    weights = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][4] = float("nan")
    save_file(tensors, weights)
    message = r"ids.jsonl:2 \(id b\): the logits of the target nan are not finite after 0 new tokens; .* finite: embed"
    argv = [verb, "--target", str(tmp_path / "nan"), "--prompts", ids, "--max-new-tokens", "3"]
    status, _, err = run(*argv, "--output", str(tmp_path / "o"))
    assert status == 1
    assert re.search(message, err)


def test_bench(run, tmp_path, folder, ids):
    numbers = tmp_path / "report.json"
    argv = [
        "bench", "--target", folder, "--drafter", "mine=from-target", "--drafter", "from-target:0", "--draft-lengths",
        "2", "--prompts", ids, "--max-new-tokens", "6", "--batch-size", "2", "--repeats", "1", "--json", str(numbers),
    ]  # fmt: skip
    status, out, err = run(*argv)
    assert status == 0
    assert all(line.startswith("deer-jax: ") for line in err.splitlines())
    values = json.loads(numbers.read_text(encoding="utf-8"))
    assert list(values["methods"]) == ["plain", "mine k=2", "from-target:0 k=2"]
    assert values["command"].startswith("deer-jax bench --target ")
    assert all(name in out for name in values["methods"])


def test_config_file(run, tmp_path, folder, ids):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"target: {folder}\nprompts: {ids}\ndrafter: null\nmax-new-tokens: 7\nlimit: 1\nignore_stop: true\n",
        encoding="utf-8",
    )
    status, out, _ = run("decode", "--config", str(config))
    assert status == 0
    assert out.splitlines()[0] == "== a (7 tokens, 7 rounds)"
    status, out, _ = run("decode", "--config", str(config), "--max-new-tokens", "3", "--limit", "2")
    assert [line for line in out.splitlines() if "==" in line] == [
        "== a (3 tokens, 3 rounds)",
        "== b (3 tokens, 3 rounds)",
    ]


def test_config_values_of_every_kind(tmp_path):
    from deer_jax.cli.bench import Options

    config = tmp_path / "run.yaml"
    config.write_text(
        "target: t\ndrafter: {a: from-target, b: runs/x}\ndraft_lengths: [2, 4]\nchat: true\ntemperature: 0.5\n"
        'prompt: [--dashes, "two\\nlines"]\ntemplate: {enable_thinking: false, style: short}\ndtype: float32\n',
        encoding="utf-8",
    )
    options = parse(Options, "bench", ["--config", str(config), "--no-chat", "--drafter", "c"], "")
    assert options.drafter == ("c",)
    assert options.draft_lengths == (2, 4)
    assert (options.chat, options.temperature, options.dtype, options.seed) == (False, 0.5, "float32", 0)
    assert options.prompt == ("--dashes", "two\nlines")
    assert options.template_arguments() == {"enable_thinking": False, "style": "short"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("bench_*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_read(path):
    from deer_jax.cli.bench import Options

    options = parse(Options, "bench", ["--config", str(path), "--target", "t"], "")
    assert options.arguments()
    assert options.read()
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(word in first for word in ("# Purpose:", "# Command:", "# Hardware:", "# Expected:"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "name a verb first: demo, decode, pretrain, answers, align, bench, "),
        ("--drafter x", "name a verb first"),
        ("decod", "unknown verb 'decod', did you mean 'decode'?"),
        ("demo --speed", "unknown option '--speed'"),
        ("decode --target T --prompt a --tempratur 1", "unknown option '--tempratur', did you mean '--temperature'?"),
        ("decode --target T --prompt a --temp=1", "unknown option '--temp', did you mean '--template'?"),
        ("decode --target T hello", "unexpected argument 'hello'"),
        ("decode --target T --prompt", "--prompt: expected one argument"),
        ("decode --prompt a", "--target is missing"),
        ("bench --target T --prompt a", "--drafter is missing"),
        ("decode --target T --prompt a --temperature hot", "--temperature: invalid float value: 'hot'"),
        ("decode --target T --prompt a --temperature -1", "temperature must be 0 (greedy) or positive, got -1.0"),
        ("decode --target T --prompt a --top-p 0", "top_p must be in (0, 1], got 0.0"),
        ("decode --target T --prompt a --top-k -2", "top_k must be"),
        ("decode --target T --prompt a --max-new-tokens 0", "max_new_tokens must be at least 1, got 0"),
        ("decode --target T --prompt a --dtype int8", "--dtype: invalid choice: 'int8'"),
        ("decode --target T --prompts P --draft-length -1 --drafter from-target", "draft_length must be 0"),
        ("decode --target T --prompts P --draft-length 2", "there is no drafter"),
        ("decode --target T --prompts P --draft-length quick", "--draft-length: expected a whole number or auto"),
        ("decode --target T --prompts P --output P", "is read or written under another option too"),
        ("decode --target T --prompts P --output O --json O", "is read or written under another option too"),
        ("decode --target T --prompt a --temperature 1e-9", "is too small to divide by in float32: 0 is greedy"),
        ("decode --target T --prompt a --top-k 3000000000", "top_k must be 0 (all tokens) or a positive whole number"),
        ("decode --target T --prompts P --max-new-tokens 512", "ids.jsonl:1 (id a): 3 prompt tokens and 512 new ones"),
        ("decode --target T --prompts P --batch-size 0", "batch_size must be a whole number of at least 1, got 0"),
        ("decode --target T", "give prompts either with --prompt TEXT or with --prompts FILE"),
        ("decode --target T --prompt a --prompts P", "give prompts either with"),
        ("decode --target T --prompt a --limit 2", "--field and --limit are for a file"),
        ("decode --target T --prompt a", "--prompt 1: is text but tiny has no tokenizer"),
        ("decode --target T --prompt a --chat --template think", "--template: expected NAME=VALUE, got 'think'"),
        ("decode --target T --prompt a --chat --template think=[", "--template 'think': not valid YAML: line 1"),
        ("decode --target T --prompt a --template think=1", "--template has no effect on plain text: add --chat"),
        ("decode --target T --prompts P --template think=1", "--template has no effect on plain text: add --chat"),
        ("decode --target T --prompt=", "--prompt is empty"),
        ("decode --target T/none --prompt a", "no such folder"),
        ("decode --target T --prompts none.jsonl", "none.jsonl: no such file"),
        ("decode --target T --prompts P --stream", "--stream prints the answer to one prompt"),
        ("decode --target T --prompts P --draft-attention bidirectional", "--draft-attention is for"),
        ("decode --target T --prompts P --json none/a.json", "none/a.json: no folder"),
        ("decode --target T --prompts P --output .", ".: is a folder"),
        ("decode --config none.yaml", "none.yaml: no such file"),
        ("bench --target T --prompts P --drafter =x", "--drafter: expected NAME=SOURCE or SOURCE, got '=x'"),
        ("bench --target T --prompts P --drafter plain=x", "the name 'plain' is taken"),
        ("bench --target T --prompts P --drafter from-target --draft-lengths 2,x", "--draft-lengths: invalid"),
        ("bench --target T --prompts P --drafter from-target --draft-lengths 0", "draft_lengths must be 1 or more"),
        ("bench --target T --prompts P --drafter from-target --repeats 0", "repeats must be at least 1, got 0"),
        ("bench --target T --prompts P --drafter from-target:7", "the target has layers 0..0"),
    ],
)
def test_wrong_arguments_are_one_line(run, monkeypatch, tmp_path, folder, ids, argv, message):
    monkeypatch.chdir(tmp_path)
    arguments = [
        ids if word == "P" else word.replace("T", folder, 1) if word[:1] == "T" else word for word in argv.split()
    ]
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("deer-jax: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tempratur: 1", "run.yaml: unknown key 'tempratur', did you mean 'temperature'?"),
        ("temperature: warm", "run.yaml: --temperature: invalid float value: 'warm'"),
        ("config: run.yaml", "run.yaml: unknown key 'config'"),
        ("- temperature", "run.yaml: expected keys and values, found list"),
        ("a: [1", "run.yaml: not valid YAML"),
    ],
)
def test_wrong_config_files_are_one_line(run, monkeypatch, tmp_path, text, message):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text, encoding="utf-8")
    status, _, err = run("decode", "--config", "run.yaml", "--target", "t", "--prompt", "a")
    assert status == 2
    assert err.startswith(f"deer-jax: error: {message}")
    assert err.count("\n") == 1


def test_damaged_prompt_files_are_one_line(run, tmp_path, folder):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n', encoding="utf-8")
    status, _, err = run("decode", "--target", folder, "--prompts", str(path))
    assert status == 2
    assert err.startswith(f"deer-jax: error: {path}:2: not valid JSON")
    assert err.count("\n") == 1


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(run, monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda argv: warnings.warn("two\nlines", stacklevel=1) or 0)
    assert run() == (0, "", "deer-jax: warning: two lines\n")


@pytest.mark.parametrize("option", ["--output", "--json"])
def test_sources_are_never_written_over(run, tmp_path, folder, ids, option):
    link, config = tmp_path / "link", tmp_path / "run.yaml"
    link.symlink_to(ids)
    config.write_text("limit: 1\n", encoding="utf-8")
    before = Path(ids).read_text(encoding="utf-8")
    for path in (link, config):
        arguments = ["--target", folder, "--prompts", ids, "--config", str(config), option, str(path)]
        status, _, err = run("decode", *arguments)
        assert status == 2
        assert err.startswith(f"deer-jax: error: {path}: is read or written under another option too")
    assert (link.is_symlink(), Path(ids).read_text(encoding="utf-8")) == (True, before)
    arguments = ["--target", folder, "--drafter", "from-target", "--prompts", ids, "--json", str(link)]
    assert run("bench", *arguments)[0] == 2


def test_interrupted(run, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    status, _, err = run()
    assert status == 130
    assert err.startswith("deer-jax: interrupted: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", cli.VERBS)
def test_examples_run_as_they_stand(capsys, monkeypatch, verb):
    """In the repository, in the order of the verbs that make what others read: all that they name is there."""
    module, given = importlib.import_module(f"deer_jax.cli.{verb}"), []

    def parsed(cls, name, argv, *rest):
        given.append(parse(cls, name, argv, *rest))
        raise SystemExit

    monkeypatch.setattr(module, "parse", parsed)
    monkeypatch.chdir(ROOT)
    words = shlex.split(module.EXAMPLE, comments=True)
    assert words[:2] == ["deer-jax", verb]
    with pytest.raises(SystemExit):
        cli.main(words[1:])
    (options,) = given
    made = {"first-answers.jsonl", "runs/first"}  # by the examples of answers and align
    for name in ("target", "drafter", "prompts", "recipe", "steps", "config", "source"):
        found = getattr(options, name, None)
        for path in found if isinstance(found, tuple) else [found]:
            assert path is None or str(path) in made or (ROOT / path).exists(), path
    if verb == "align":
        recipe = read_recipe(ROOT / options.recipe)
        assert {*recipe.answers, recipe.output} == made
        assert all((ROOT / path).exists() for path in (recipe.target, recipe.evaluation.prompts))
    if verb == "answers":
        assert str(options.output) in made
    if verb == "pretrain":
        assert read_pretrain_recipe(ROOT / options.recipe).texts == ("stdlib",)


@pytest.mark.parametrize("verb", ["demo", "decode", "bench"])
def test_help_of_every_verb(capsys, verb):
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert out.startswith(f"usage: deer-jax {verb} [options]")
    assert f"example, in the repository:\n  deer-jax {verb}" in out


def test_version(run):
    status, out, _ = run("--version")
    assert status == 0
    assert out.strip()[0].isdigit()


def test_as_a_program(tmp_path):
    environment = os.environ | {"HOME": str(tmp_path)}
    command = [sys.executable, "-m", "deer_jax.cli.main"]
    help = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment, check=True)
    assert all(f"\n  {verb} " in help.stdout for verb in cli.VERBS)
    assert help.stderr == ""
    wrong = subprocess.run([*command, "decode"], capture_output=True, text=True, env=environment, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("deer-jax: error: --target is missing")


def test_a_closed_pipe_is_no_failure(tmp_path):
    """What `deer-jax ... | head` does to a program, here before it writes anything."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "deer_jax.cli.main", "--version"]
    environment = os.environ | {"HOME": str(tmp_path)}
    found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(writing)
    assert (found.returncode, found.stderr) == (0, "")
