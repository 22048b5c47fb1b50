"""Several verbs from one file: each done once, in order, with options that can be used alone afterwards."""

import json

import pytest
import yaml

from deer_jax.cli import main as cli

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

    status, said = run(steps, output, capsys)  # export would refuse its output if it ran again
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
        ([{"export": None}], "steps[0]: export must have keys and values, got None"),
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


def test_another_key(tmp_path, capsys):
    path = tmp_path / "steps.yaml"
    path.write_text("step: []\n")
    status, said = run(path, tmp_path / "out", capsys)
    assert status == 2
    assert "unknown key 'step', did you mean 'steps'?" in said.err
