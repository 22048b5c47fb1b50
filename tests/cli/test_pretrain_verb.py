"""deer-jax pretrain and deer-jax export as a user meets them: tables, messages of one line, interruptions."""

import json
import os
import re
import signal

import pytest

from deer_jax.cli import main as cli
from deer_jax.cli.progress import Reporter
from deer_jax.cli.stopping import asked_to_stop
from tests.training import pretraining, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pretraining.prepare(tmp_path_factory.mktemp("verbs"))


@pytest.fixture
def say(run):
    """Runs a verb: the exit status, stdout, and the last line of stderr, as a slow machine shows progress before it."""

    def call(*argv):
        status, out, err = run(*map(str, argv))
        return status, out, (err.splitlines() or [""])[-1]

    return call


def test_a_run_from_text_to_a_folder(folder, say):
    recipe, numbers = runs.write(pretraining.recipe(folder, "whole")), folder / "report.json"
    command = ["pretrain", "--recipe", recipe, "--set", "steps=4", "--set", "model.layers=1"]
    status, out, last = say(*command, "--json", numbers)
    assert status == 0
    assert re.search(r"^ *step +loss \(nats/token\) +bits per byte *$", out, re.MULTILINE)
    assert re.search(r"^ *4 best +\d\.\d{3} +\d\.\d{3} *$", out, re.MULTILINE)
    assert re.search(r"^on [\d,]+ held-out tokens *$", out, re.MULTILINE)
    assert re.fullmatch(
        r"deer-jax: .*whole: 4 steps done, [\d,]+ tokens/s, [\d.]+ % of the time waiting for examples; "
        r"the best checkpoint is that of step 4",
        last,
    )
    values = json.loads(numbers.read_text())
    assert (values["output"], values["step"], values["finished"], values["best"]) == (str(folder / "whole"), 4, True, 4)
    assert values["evaluations"]["4"].keys() == {"loss", "bits_per_byte", "tokens"}
    assert values["evaluations"]["4"]["loss"] < values["evaluations"]["0"]["loss"]

    status, out, last = say(*command)
    assert status == 0
    assert re.findall(r"^ *(\d+)(?: best)? +\d\.\d{3}", out, re.MULTILINE) == ["0", "4"]
    assert last.endswith("whole: 4 steps done, nothing was left to do; the best checkpoint is that of step 4")
    status, _, last = say(*command, "--set", "batch=8")
    assert status == 2
    assert "whole: holds another run: batch was 4, is 8. Name another output" in last

    export = ["export", "--source", folder / "whole", "--output", folder / "model"]
    assert say(*export) == (0, "", f"deer-jax: {folder / 'model'}: 0.0 MB")
    assert json.loads((folder / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert say(*export)[0] == 0  # it is there already
    assert say(*export, "--dtype", "float32")[::2] == (
        2, f"deer-jax: error: {folder / 'model'}: exists and is not an empty folder; remove it or choose another"
    )  # fmt: skip
    status, out, _ = say("decode", "--target", folder / "model", "--prompt", "def step_", "--max-new-tokens", "3")
    assert status == 0
    assert re.match(r"== 1 \(\d tokens, \d rounds\)\n", out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("pretrain", "--recipe is missing; see deer-jax pretrain --help"),
        ("pretrain --recipe none.yaml", "none.yaml: no such file"),
        ("pretrain --recipes R", "unknown option '--recipes', did you mean '--recipe'?"),
        ("pretrain --recipe R --set stepz=3", "R: unknown key 'stepz', did you mean 'steps'?"),
        ("pretrain --recipe R --set model.heads=0", "R: model: heads must be a whole number of at least 1, got 0"),
        ("pretrain --recipe R --set texts=none", "none: no such folder or file, and not 'stdlib'"),
        ("pretrain --recipe R --set steps", "expected KEY=VALUE, as in "),
        ("pretrain --recipe R --json R", "R: is read or written under another option too"),
        ("pretrain --recipe R --json none/a.json", "none/a.json: no folder"),
        ("export --output o", "--source is missing; see deer-jax export --help"),
        ("export --source S", "--output is missing; see deer-jax export --help"),
        ("export --source S --output o", "S: is no folder of a pretrain or align run; give the `output` of its recipe"),
        ("export --source S --output o --dtype int8", "--dtype: invalid choice: 'int8'"),
    ],
)
def test_bad_input_is_one_line(folder, run, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    names = {"R": str(runs.write(pretraining.recipe(folder, "bad"))), "S": str(folder)}
    status, out, err = run(*(names.get(word, word) for word in argv.split()))
    assert (status, out) == (2, "")
    assert err.startswith("deer-jax: error: " + re.sub(r"^[RS](?=:)", lambda found: names[found[0]], message))
    assert err.count("\n") == 1
    assert not (folder / "bad").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("verb", "options", "sentence"),
    [
        ("pretrain", ("--recipe", "--set", "--json"), "a real target comes from Hugging Face"),
        ("export", ("--source", "--output", "--dtype"), "A target becomes a plain model that transformers loads."),
    ],
)
def test_help(capsys, verb, options, sentence):
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert out.startswith(f"usage: deer-jax {verb} [options]")
    assert all(f"\n  {option} " in out for option in options)
    assert sentence in out
    assert f"example, in the repository:\n  deer-jax {verb} " in out


def test_ctrl_c_writes_a_checkpoint_and_the_same_command_goes_on(folder, say, monkeypatch):
    show = Reporter.show

    def interrupting(reporter, done, total, note=""):
        show(reporter, done, total, note)
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(Reporter, "show", show)

    monkeypatch.setattr(Reporter, "show", interrupting)
    command = ["pretrain", "--recipe", runs.write(pretraining.recipe(folder, "stopped", steps=5, checkpoint_every=50))]
    before = signal.getsignal(signal.SIGINT)
    status, _, last = say(*command)
    assert (status, signal.getsignal(signal.SIGINT)) == (130, before)
    line = f"step 3 of 5 is written to {folder / 'stopped'}; the same command goes on from it"
    assert last == f"deer-jax: interrupted: {line}"
    assert {int(path.name) for path in (folder / "stopped" / "checkpoints").iterdir()} == {0, 3}
    status, out, last = say(*command)
    assert status == 0
    assert "5 steps done" in last
    assert re.findall(r"^ *(\d+)(?: best)? +\d\.\d{3}", out, re.MULTILINE) == ["0", "4", "5"]  # of the first call too


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(capsys, number):
    with asked_to_stop() as stopping:
        os.kill(os.getpid(), number)
        assert stopping.is_set()
        assert "stopping when this step or evaluation is done; once more stops at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt, match="the same command goes on from the newest checkpoint"):
            os.kill(os.getpid(), number)
