"""Recipes: YAML in and out, and errors of one line that name the place and the remedy."""

import dataclasses
import random
import re

import pytest
import yaml

from deer_jax import DrafterConfig, InputError
from deer_jax.diffusion.corruption import Corruption
from deer_jax.formats import parse_yaml
from deer_jax.training.recipe import (
    Evaluation,
    Recipe,
    Stage,
    pretrain_recipe_from,
    read_recipe,
    recipe_from,
    to_mapping,
    with_settings,
)
from deer_jax.training.step import OptimizerConfig
from tests.training.pretraining import MODEL
from tests.training.refusals import taken_or_refused

FULL = """
target: models/target
answers: out/answers.jsonl
output: runs/one
drafter: from-target:0,2
reading: {attention: bidirectional, head: in_place, draft_length: 6, differing_ids: [5, 7]}
dtype: float32
length: 128
batch: 12
accumulate: 3
seed: 4
evaluation: {prompts: held_out.jsonl, every: 50, limit: 8, draft_lengths: [4, 6], temperatures: [0, 1e-1]}
stages:
  - {steps: 10, stage: continuation, learning_rate: 3e-4, ema: 0.99}
  - {steps: 5, stage: refinement, width: 4, max_masked: 4, alpha: 1.05, weight_decay: 0.1}
"""
SHORT = {"target": "t", "answers": "a", "output": "o", "stages": [{"steps": 1, "stage": "refinement"}]}


def read(tmp_path, values):
    path = tmp_path / "recipe.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return read_recipe(path)


def test_read(tmp_path):
    expected = Recipe(
        target="models/target",
        answers=("out/answers.jsonl",),
        output="runs/one",
        drafter="from-target:0,2",
        reading=DrafterConfig(attention="bidirectional", head="in_place", draft_length=6, differing_ids=(5, 7)),
        dtype="float32",
        length=128,
        batch=12,
        accumulate=3,
        seed=4,
        evaluation=Evaluation(
            prompts="held_out.jsonl", every=50, limit=8, draft_lengths=(4, 6), temperatures=(0.0, 0.1)
        ),
        stages=(
            Stage(
                steps=10,
                corruption=Corruption(stage="continuation"),
                optimizer=OptimizerConfig(learning_rate=3e-4, ema=0.99),
            ),
            Stage(
                steps=5,
                corruption=Corruption(stage="refinement", width=4, max_masked=4, alpha=1.05),
                optimizer=OptimizerConfig(weight_decay=0.1),
            ),
        ),
    )
    found = read(tmp_path, FULL)
    assert found == expected
    assert hash(found) == hash(expected)


@pytest.mark.parametrize("values", [FULL, SHORT, SHORT | {"draft_head": {"kind": "markov", "form": "rnn", "rank": 8}}])
def test_what_is_written_is_read_back(tmp_path, values):
    recipe = read(tmp_path, values)
    assert read(tmp_path, to_mapping(recipe)) == recipe


def stage(**changes):
    return {"stages": [SHORT["stages"][0], SHORT["stages"][0] | changes]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lenght": 8}, "unknown key 'lenght', did you mean 'length'?"),
        ({"reading": {"heads": "shifted"}}, "reading: unknown key 'heads', did you mean 'head'?"),
        ({"evaluation": {"prompts": "p", "evry": 1}}, "evaluation: unknown key 'evry', did you mean 'every'?"),
        (stage(learning_rat=1), "stages[1]: unknown key 'learning_rat', did you mean 'learning_rate'?"),
        (stage(blok=1), "stages[1]: unknown key 'blok', did you mean 'blocks'?"),
        (stage(corruption={}), "stages[1]: unknown key 'corruption', valid: alpha, b1, b2, blocks, clip, ema, "),
        (stage(next_token=-1), "stages[1]: next_token must not be negative, got -1.0"),
        (stage(step=1), "stages[1]: unknown key 'step', did you mean 'steps'?"),
        ({1: 2}, "unknown key '1', valid: accumulate, answers, "),
        ({"stages": []}, "stages is empty: give at least one"),
        ({"stages": {"steps": 1}}, "stages must be a list, got {'steps': 1}"),
        ({"stages": [3]}, "stages[0] must be keys and values, got 3"),
        ({"stages": [{"steps": 1}]}, "stages[0]: missing stage"),
        ({"stages": [{"stage": "refinement"}]}, "stages[0]: missing steps"),
        ({"reading": 3}, "reading must be keys and values, got 3"),
        ({"mesh": {"fdsp": 2}}, "mesh: unknown key 'fdsp', did you mean 'fsdp'?"),
        ({"mesh": {"tensor": 0}}, "mesh: tensor must be at least 1, got 0"),
        (
            {"batch": 6, "accumulate": 2, "mesh": {"data": 2}},
            "a micro-batch of 3 texts cannot be split over 2 devices (data x fsdp of the mesh)",
        ),
        ({"answers": []}, "answers is empty: name at least one file"),
        ({"answers": 7}, "answers must be a list, got 7"),
        ({"evaluation": {}}, "evaluation: missing prompts"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": 4, "accumulate": 3}, "batch (4) must be a multiple of accumulate (3)"),
        ({"batch": "many"}, "batch must be a whole number, got 'many'"),
        ({"batch": 2.5}, "batch must be a whole number, got 2.5"),
        ({"length": True}, "length must be a whole number, got True"),
        ({"seed": -1}, "seed must be in 0..4294967295, got -1"),
        ({"target": 3}, "target must be text, got 3"),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float32, got 'float16'"),
        ({"reading": {"head": "raised"}}, "reading: head must be one of shifted, in_place, got 'raised'"),
        ({"reading": {"separator": 1}}, "reading: separator must be true or false, got 1"),
        ({"reading": {"differing_ids": 5}}, "reading: differing_ids must be a list, got 5"),
        ({"reading": {"draft_length": 0}}, "reading: draft_length must be a whole number of at least 1, got 0"),
        ({"evaluation": {"prompts": "p", "every": 0}}, "evaluation: every must be at least 1, got 0"),
        (
            {"evaluation": {"prompts": "p", "draft_lengths": 8}},
            "evaluation: draft_lengths must be a list, got 8",
        ),
        (
            {"evaluation": {"prompts": "p", "draft_lengths": [0]}},
            "evaluation: draft_lengths must be one or more numbers from 1 on, got [0]",
        ),
        (
            {"evaluation": {"prompts": "p", "temperatures": [-1]}},
            "evaluation: temperature must be 0 (greedy) or positive, got -1.0",
        ),
        ({"evaluation": {"prompts": "p", "temperatures": []}}, "evaluation: temperatures is empty: give at least one"),
        (
            {"evaluation": {"prompts": "p", "temperatures": [1e-9]}},
            "evaluation: temperature 1e-09 is too small to divide by in float32: 0 is greedy",
        ),
        (stage(steps=0), "stages[1]: steps must be at least 1, got 0"),
        (stage(stage="third"), "stages[1]: stage must be one of continuation, refinement, acceptance, got 'third'"),
        (stage(width=0), "stages[1]: width must be at least 1, got 0"),
        (stage(learning_rate="fast"), "stages[1]: learning_rate must be a number, got 'fast'"),
        (stage(learning_rate=0), "stages[1]: learning_rate must be positive, got 0.0"),
        (stage(clip=-1), "stages[1]: clip must be positive, got -1.0"),
        (stage(ema=1), "stages[1]: ema must be in [0, 1), got 1.0"),
        (stage(warmup=-1), "stages[1]: warmup must not be negative, got -1"),
        ({"learning_rate": 1}, "unknown key 'learning_rate', it belongs into a stage, one of the list `stages`"),
        ({"draft_length": 4}, "unknown key 'draft_length', it belongs into reading or conditioned"),
        ({"max_new_tokens": 4}, "unknown key 'max_new_tokens', it belongs into evaluation"),
        ({"tensor": 4}, "unknown key 'tensor', it belongs into mesh"),
        ({"k" * 100_000: 4}, f"unknown key '{'k' * 80}', valid: accumulate, "),
        ({"output": ""}, "output is empty; give one, or leave the key out"),
        ({"target": ""}, "target is empty; give one, or leave the key out"),
        ({"answers": ["a", ""]}, "answers is empty; give one, or leave the key out"),
        ({"answers": {"a": 1}}, "answers must be a list, got {'a': 1}"),
        ({"output": "a\0b"}, "output must not have a NUL in it, got 'a\\x00b'"),
        ({"output": ["o"]}, "output must be text, got ['o']"),
        ({"output": {"a": 1}}, "output must be text, got {'a': 1}"),
        ({"output": "x" * 10**6 + "\0"}, "output must not have a NUL in it, got 'xxxx"),
        ({"batch": [8]}, "batch must be a whole number, got [8]"),
        ({"batch": 10**30}, "batch must be below 4,294,967,296, got 10000000000000"),
        ({"batch": 16**4000}, "batch must be below 4,294,967,296, got a int that is too large to print"),
        ({"dtype": ["float32"]}, "dtype must be one of bfloat16, float32, got ['float32']"),
        ({"mesh": None}, "mesh must be keys and values, got None"),
        (stage(learning_rate=".nan"), "stages[1]: learning_rate must be a number, got '.nan'"),
        (stage(learning_rate=float("nan")), "stages[1]: learning_rate must be finite, got nan"),
        (stage(alpha="inf"), "stages[1]: alpha must be finite, got inf"),
        (stage(alpha=16**4000), "stages[1]: alpha must be a number, got a int that is too large to print"),
        (stage(learning_rate=True), "stages[1]: learning_rate must be a number, got True"),
        (stage(learning_rate=-1), "stages[1]: learning_rate must be positive, got -1.0"),
    ],
)
def test_errors_are_one_line_with_place_and_remedy(tmp_path, changes, message):
    where = str(tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match="^" + re.escape(f"{where}: {message}")) as error:
        recipe_from(SHORT | changes, where)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


def test_missing_keys_and_files(tmp_path):
    with pytest.raises(InputError, match=r"recipe\.yaml: missing output, target, answers, stages$"):
        read(tmp_path, "")
    with pytest.raises(InputError, match=r"none\.yaml: no such file$"):
        read_recipe(tmp_path / "none.yaml")


def test_settings_replace_values_wherever_they_are():
    values = {"target": "a", "stages": [{"steps": 1}, {"steps": 2}], "seed": 0}
    settings = ("target=b=c", "stages.1.steps=30", "stages.0.learning_rate=1e-3", "evaluation.limit=4", "seed=7")
    assert with_settings(values, settings) == {
        "target": "b=c",
        "stages": [{"steps": 1, "learning_rate": "1e-3"}, {"steps": 30}],
        "evaluation": {"limit": 4},
        "seed": 7,
    }
    assert values["stages"][1] == {"steps": 2}  # a copy
    assert recipe_from(SHORT | {"answers": ["a", "b"]}, "x").answers == ("a", "b")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed", "expected KEY=VALUE, as in stages.0.steps=100, got 'seed'"),
        (".=3", "expected KEY=VALUE, as in stages.0.steps=100, got '.=3'"),
        ("stages.2.steps=3", "stages.2.steps: 2 must be a number from 0 to 0"),
        ("stages.x=3", "stages.x: x must be a number from 0 to 0"),
        ("target.name=3", "target.name: target holds 't', nothing is inside it"),
        (
            "seed=[1",
            "seed: not valid YAML: line 1: while parsing a flow sequence expected ',' or ']', but got '<stream end>'",
        ),
        ("seed={a: 1, a: 2}", "seed: not valid YAML: line 1: the key 'a' stands here and in line 1"),
        ("stages.99999999999=1", "stages.99999999999: 99999999999 must be a number from 0 to 0"),
        ("stages.²=1", "stages.²: ² must be a number from 0 to 0"),
        (f"stages.{'9' * 5000}=1", f"stages.{'9' * 73}: {'9' * 80} must be a number from 0 to 0"),
    ],
)
def test_settings_that_fit_nowhere(setting, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        with_settings(SHORT, [setting])


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    with pytest.raises(InputError, match=r"line 4: the key 'batch' stands here and in line 2\Z"):
        read(tmp_path, "target: t\nbatch: 4\nseed: 1\nbatch: 8\n")


def test_the_output_of_a_recipe_made_in_python_is_checked_too():
    with pytest.raises(InputError, match=r"\Aoutput is empty; name a folder\Z"):
        dataclasses.replace(recipe_from(SHORT, "x"), output="")


def test_a_model_that_no_machine_holds_is_refused():
    model = MODEL | {"vocab_size": 2**31 - 1, "width": 2**16}
    with pytest.raises(InputError, match=r"\Ax: model: has 1\.4e\+14 parameters, more than 1e\+12; lower its sizes\Z"):
        pretrain_recipe_from({"texts": "t", "output": "o", "steps": 1, "length": 8, "model": model}, "x")


ODD = (
    "[]", "{}", "[[]]", "{a: {b: c}}", "null", "true", "''", "-1", "0", "1e400", ".nan", "-.inf", "1e-400", "2.5",
    "9" * 400, "0x" + "f" * 5000, "9" * 5000, "2020-01-01", "!!set {a}", "!!binary aGk=", "&a [*a]", "*b", "? [a]\n: 1",
    '"\\0"', '"\\ud800"', "x" * 3000, "[" * 300 + "]" * 300, "[" * 3000, "- a\n- b", "1:2:3", "~", "=", "<<: 3",
)  # fmt: skip
PRETRAIN = yaml.safe_dump({
    "texts": ["t"], "output": "o", "steps": 3, "length": 16, "model": MODEL, "learning_rate": 0.1, "mesh": {"data": 1},
})  # fmt: skip


def test_whatever_stands_in_a_recipe_is_read_or_refused_in_one_line():
    """A value replaced by an odd one, a line repeated or lost, a character changed; as a file and as a setting."""
    rng = random.Random(0)
    for number in range(150):
        source, build = (FULL, recipe_from) if number % 2 else (PRETRAIN, pretrain_recipe_from)
        lines = source.strip().splitlines()
        at = rng.randrange(len(lines))
        kind = rng.randrange(4)
        if kind == 0 and ": " in lines[at]:
            lines[at] = lines[at].split(": ")[0] + ": " + rng.choice(ODD)
        elif kind == 1:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif kind == 2:
            place = rng.randrange(len(lines[at]))
            lines[at] = lines[at][:place] + rng.choice("{}[]:,-#&*!|>'\"%@`\t0\x00é") + lines[at][place + 1 :]
        else:
            del lines[at]
        text = "\n".join(lines)
        path = rng.choice(["seed", "stages.0.steps", "mesh.data", "model.rope", "stages", "evaluation.limit", "texts"])
        settings = [f"{path}={rng.choice(ODD)}"] if rng.random() < 0.3 else []
        with taken_or_refused((number, text, settings)):
            values = parse_yaml(text, "recipe.yaml")
            build(with_settings(values if isinstance(values, dict) else {}, settings), "recipe.yaml")
