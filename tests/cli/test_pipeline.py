"""Several verbs from one file: each done once, in order, with options that can be used alone afterwards."""

import json
import random
import shutil

import pytest
import yaml

from deer_jax.cli import main as cli
from deer_jax.errors import Terminated
from deer_jax.files import Lock

MODEL = {"family": "llama", "vocab_size": 300, "width": 16, "layers": 1, "heads": 1, "kv_heads": 1, "head_width": 16,
         "mlp_width": 16, "context": 32, "tied": True}  # fmt: skip


@pytest.fixture
def steps(tmp_path):
    """A file that pretrains for two steps and exports."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some words, and other words; " * 40)
    recipe = {"texts": str(tmp_path / "texts"), "output": "{output}/run", "model": MODEL, "length": 16, "batch": 2,
              "steps": 2}  # fmt: skip
    found = [{"pretrain": recipe}, {"export": {"source": "{output}/run", "output": "{output}/model"}}]
    return write(tmp_path, found)


def write(folder, steps):
    path = folder / "steps.yaml"
    path.write_text(yaml.safe_dump({"steps": steps}))
    return path


def run(path, output, capsys):
    status = cli.main(["pipeline", "--steps", str(path), "--output", str(output)])
    return status, capsys.readouterr()


def test_every_step_once(steps, tmp_path, capsys):
    output = tmp_path / "out"
    status, said = run(steps, output, capsys)
    assert status == 0
    assert "step 1 of 2: pretrain" in said.err
    assert "together" in said.out
    assert (output / "model" / "model.safetensors").is_file()
    assert [each["verb"] for each in json.loads((output / "pipeline.json").read_text())] == ["pretrain", "export"]
    # The written options work alone: the run is complete, so there is nothing left to do.
    assert cli.main(["pretrain", "--recipe", str(output / "1-pretrain.yaml")]) == 0
    assert "nothing was left to do" in capsys.readouterr().err

    status, said = run(steps, output, capsys)
    assert status == 0
    assert said.err.count("done before") == 2

    changed = yaml.safe_load(steps.read_text())["steps"]
    changed[0]["pretrain"]["steps"] = 3
    status, said = run(write(tmp_path, changed), output, capsys)
    assert status == 2
    assert "its step 1, pretrain, was done with other options" in said.err


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        ([{"pretain": {}}], "steps[0]: unknown verb 'pretain', did you mean 'pretrain'?"),
        ([{"export": None}], "steps[0]: export must have keys and values, got 'None'"),
        (["export"], "steps[0] must be one verb with its options, got 'export'"),
        ([{"export": {"sauce": 1}}], "unknown key 'sauce', did you mean 'source'?"),
        ([], "steps is empty: give at least one"),
    ],
)
def test_wrong_steps(tmp_path, capsys, steps, line):
    status, said = run(write(tmp_path, steps), tmp_path / "out", capsys)
    assert status == 2
    assert line in said.err
    assert len([row for row in said.err.splitlines() if "error" in row]) == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("steps: 5", "steps must be a list of verbs with their options, got '5'"),
        ("steps: {export: {}}", "steps must be a list"),
        ("steps: '{output}'", "steps must be a list"),
        ("steps: ['{output}']", "steps[0] must be one verb with its options, got '{output}'"),
        ("steps: [[export]]", "steps[0] must be one verb with its options, got '['export']'"),
        ("steps: [{export: {}, bench: {}}]", "steps[0] must be one verb"),
        ("steps: [{'{output}': {}}]", "unknown verb '{output}'"),
        ("steps: [{export: '{output}'}]", "export must have keys and values, got '{output}'"),
        ("steps: [{export: {'{output}': 1}}]", "unknown key '{output}'"),
        ("steps: [{export: {1: x}}]", "steps[0]: export: the key '1' is no text"),
        (
            "steps: [{export: {source: 2024-01-01}}]",
            "export.source: expected text or a number, got '2024-01-01', a YAML date",
        ),
        ("steps: [{export: {source: .nan}}]", "export.source: expected text or a number, got 'nan', a YAML float"),
        ("steps: [{export: {source: {a: 1}, output: x}}]", "key 'source' takes one value"),
        ("steps: [{export: {source: [a, b], output: x}}]", "key 'source' takes one value"),
        ("steps: [{export: {source: x, output: '{output}'}}]", "would write over the pipeline's own"),
        ("steps: [{bench: {target: x, drafter: y, prompts: z, json: '{output}/pipeline.json'}}]", "the pipeline's own"),
        ("steps: [{export: {source: x, output: '{output}/a/..'}}]", "no folder of a pretrain or align run"),
        (f"steps: [{{export: {{source: 0x{'f' * 5000}}}}}]", "may be read in several ways"),
    ],
)
def test_wrong_values(tmp_path, capsys, text, line):
    path = tmp_path / "steps.yaml"
    path.write_text(text)
    status, said = run(path, tmp_path / "out", capsys)
    assert status == 2
    assert line in said.err
    assert len([row for row in said.err.splitlines() if "error" in row]) == 1
    assert len(said.err) < 1000


def forget_the_last(output):
    """The state of a pipeline that was killed after its last step and before it was noted."""
    note = output / "pipeline.json"
    note.write_text(json.dumps(json.loads(note.read_text())[:-1]))


def test_an_export_whose_note_is_missing_is_recognised(steps, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(steps, output, capsys)[0] == 0
    before = (output / "model" / "model.safetensors").read_bytes()
    forget_the_last(output)
    status, said = run(steps, output, capsys)
    assert status == 0, said.err
    assert "is complete, nothing to do" in said.err
    assert len(json.loads((output / "pipeline.json").read_text())) == 2
    assert (output / "model" / "model.safetensors").read_bytes() == before


def test_training_whose_note_is_missing_is_recognised_and_an_output_that_is_gone_made_again(steps, tmp_path, capsys):
    training = write(tmp_path, yaml.safe_load(steps.read_text())["steps"][:1])
    output = tmp_path / "out"
    assert run(training, output, capsys)[0] == 0
    forget_the_last(output)
    status, said = run(training, output, capsys)
    assert status == 0, said.err
    assert "nothing was left to do" in said.err
    shutil.rmtree(output / "run")
    status, said = run(training, output, capsys)
    assert status == 0, said.err
    assert "2 steps done" in said.err
    assert (output / "run" / "recipe.yaml").is_file()
    assert not (output / ".lock").exists()


def test_one_pipeline_per_folder(steps, tmp_path, capsys):
    with Lock(tmp_path / "out", inside=True):
        status, said = run(steps, tmp_path / "out", capsys)
    assert status == 2
    assert f"{tmp_path / 'out'}: is being written by process" in said.err
    assert said.err.count("\n") == 1


def test_a_folder_of_something_else_is_left_alone(steps, tmp_path, capsys):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "1-pretrain.yaml").write_text("mine")
    status, said = run(steps, output, capsys)
    assert status == 2
    assert "mine: is no pipeline's folder but holds 1-pretrain.yaml; name another output" in said.err
    assert [path.read_text() for path in output.iterdir()] == ["mine"]


def test_the_folder_removed_while_a_step_runs(steps, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr("deer_jax.cli.pretrain.run", lambda argv: shutil.rmtree(output))
    status, said = run(steps, output, capsys)
    assert status == 1
    assert "was removed or replaced while it was being written" in said.err


def test_interrupted_between_steps(steps, tmp_path, capsys, monkeypatch):
    def interrupted(argv):
        raise Terminated

    monkeypatch.setattr("deer_jax.cli.pretrain.run", interrupted)
    status, said = run(steps, tmp_path / "out", capsys)
    assert status == 143
    assert said.err.splitlines()[-1] == (
        "deer-jax: terminated: step 1 of 2: pretrain: the same command does this step again"
    )


def test_damaged_notes_are_one_line(steps, tmp_path, capsys):
    """Random damage to pipeline.json: it is refused in one line, or what it says is used."""
    (tmp_path / "texts").rename(tmp_path / "gone")  # a step that is begun ends at once
    values = [
        {"verb": "pretrain", "options": {"texts": "x", "steps": 2}, "seconds": 1.5},
        {"verb": "export", "options": {"source": "y"}, "seconds": 0},
    ]
    odd = [None, True, -1, 1e400, 10**400, "", "x" * 5000, "\ud800", [], [[]], {}, {"verb": 1}, float("nan")]
    rng, text = random.Random(7), json.dumps(values)
    output = tmp_path / "out"
    for case in range(400):
        if case % 2:
            at = rng.randrange(len(text))
            damaged = (
                text[:at]
                + rng.choice(["", "[", "}", "9" * 5000, '"', "\0", "[" * 9000])
                + text[at + rng.randrange(9) :]
            )
        else:
            changed = json.loads(text)
            part = rng.choice([changed, *changed])
            key = rng.choice(list(part)) if isinstance(part, dict) else rng.randrange(len(part))
            part[key] = rng.choice(odd)
            damaged = json.dumps(rng.choice([changed, changed, changed[0], odd[rng.randrange(len(odd))]]))
        output.mkdir(exist_ok=True)
        (output / "pipeline.json").write_text(damaged)
        status, said = run(steps, output, capsys)
        last = said.err.splitlines()[-1]
        wrong = f"seed 7, case {case}: {damaged[:300]!r} -> {status}: {said.err[:2000]}"
        assert status == 2, wrong
        assert last.startswith("deer-jax: error: "), wrong
        assert "unexpected" not in last, wrong
        assert len(last) < 1000, wrong


def test_another_key(tmp_path, capsys):
    path = tmp_path / "steps.yaml"
    path.write_text("step: []\n")
    status, said = run(path, tmp_path / "out", capsys)
    assert status == 2
    assert "unknown key 'step'; its one key is steps" in said.err
