"""Alignment runs: what they leave behind, that they go on as if nothing had happened, and input that is wrong."""

import json
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deer_jax
from deer_jax import InputError
from deer_jax.data.answers import AnswerFiles
from deer_jax.errors import RunError
from deer_jax.formats import differences
from deer_jax.sharding import make_mesh
from deer_jax.training.acceptance import survey
from deer_jax.training.metrics import read_metrics
from tests.training import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("align"))


def align(values, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*2 prompts occur in training rows and are left out")
        return deer_jax.align(values, **options)


@pytest.fixture(scope="module")
def whole(folder):
    """A run from start to end, its recipe and report."""
    values = runs.recipe(folder, "whole")
    return values, align(values)


def stop_after(count):
    """A `should_stop` that says so after so many steps."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= count


def test_a_run_reports_and_logs_what_it_did(whole, folder):
    _, report = whole
    assert (report.step, report.steps, report.finished) == (12, 12, True)
    assert list(report.evaluations) == [0, 4, 6, 8, 12]  # start, every four steps, end of each stage
    assert 0 < report.data_seconds < report.seconds
    assert report.tokens == 10 * 4 * 23  # steps but those that compile, rows, tokens of a prompt and its answer
    for found in report.evaluations.values():
        assert [(each.draft_length, each.temperature) for each in found] == [(4, 0.0), (4, 1.0)]
        assert {each.prompts for each in found} == {8}
        assert all(each.new_tokens == 64 for each in found)
        assert all(each.ci95[0] <= each.acceptance_length <= each.ci95[1] for each in found)
    taus = {step: found[0].acceptance_length for step, found in report.evaluations.items()}
    assert taus[report.best] == max(taus.values())
    lines = read_metrics(folder / "whole")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["stage"] for line in steps] == ["continuation"] * 6 + ["refinement"] * 6
    assert steps[1]["learning_rate"] == pytest.approx(1e-2)
    evaluated = {line["step"]: line for line in lines if "evaluation" in line}
    assert {step: line["acceptance_length"]["k4_T0"] for step, line in evaluated.items()} == taus
    assert list((folder / "whole" / "tensorboard").iterdir())


def test_the_best_checkpoint_and_the_newest_stay(whole, folder):
    _, report = whole
    kept = {int(path.name) for path in (folder / "whole" / "checkpoints").iterdir()}
    assert kept == {report.best, 10, 12}


def test_load_drafter_reads_the_best_of_a_run(whole, folder):
    values, report = whole
    target = deer_jax.load_target(values["target"])
    drafter = deer_jax.load_drafter(folder / "whole", target=target)
    assert drafter.draft_length == 4
    prompts = [json.loads(line)["tokens"] for line in (folder / "held_out.jsonl").read_text().splitlines()][2:]
    found = deer_jax.decode(target, prompts, drafter=drafter, max_new_tokens=8)
    assert found.stats.acceptance_length == report.evaluations[report.best][0].acceptance_length
    assert found.tokens == deer_jax.decode(target, prompts, max_new_tokens=8).tokens
    deer_jax.save_drafter(folder / "exported", drafter)
    again = deer_jax.load_drafter(folder / "exported", target=target)
    for a, b in zip(jax.tree.leaves(drafter.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_replayed_rounds_accept_what_live_decoding_accepts(whole, folder):
    """Teacher-forced: training's own forward along the target's greedy answer, a block of masks after every token."""
    target = deer_jax.load_target(whole[0]["target"])
    drafter = deer_jax.load_drafter(folder / "whole", target=target)
    k, new = 4, 20
    prompts = np.random.default_rng(1).integers(0, runs.V, (8, 5)).tolist()
    answers = deer_jax.decode(target, prompts, max_new_tokens=new + k + 1).tokens
    live = deer_jax.decode(target, prompts, drafter=drafter, max_new_tokens=new, batch_size=2)
    text = np.concatenate([np.array(prompts), np.array(answers)], axis=1).astype(np.int32)
    B, T = text.shape
    anchors = np.arange(4, 4 + new)
    anchor = np.broadcast_to(anchors, (B, new)).astype(np.int32)
    batch = {
        "tokens": text, "anchor": anchor, "size": np.full((B, new), k, np.int32), "masked": np.ones((B, new, k), bool),
        "weight": np.ones((B, new, k), np.float32), "text_weight": np.zeros((B, T), np.float32),
    }  # fmt: skip
    (term,) = jax.jit(lambda batch: drafter.method.predict(drafter.params, {}, batch, None, "none").terms)(batch)
    drafts = np.asarray(term.features[:, T:] @ term.table.T).argmax(axis=-1).reshape(B, new, k)
    counts = set()
    for b in range(B):
        place, histogram = 4, [0] * (k + 1)
        while place < 4 + new:
            agree = drafts[b, place - 4] == text[b, place + 1 : place + 1 + k]
            accepted = int(agree.cumprod().sum())
            histogram[accepted] += 1
            counts.add(accepted)
            place += accepted + 1
        assert live.stats.accepted_histogram[b] == histogram
    assert len(counts) >= 3


def test_it_learns(folder):
    stages = [runs.long(folder)[1]] * 2
    evaluation = runs.recipe(folder)["evaluation"] | {"every": 100}
    report = align(runs.recipe(folder, "learns", stages=stages, evaluation=evaluation, checkpoint_every=100))
    lines = read_metrics(folder / "learns")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert report.best is not None


# After the first step of either stage, at their border, at a checkpoint and between two, at an evaluation, late.
@pytest.mark.parametrize("moments", [[1, 5, 1, 4], [2, 1, 1, 4]])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(folder, whole, tmp_path, moments):
    values = runs.recipe(folder) | {"output": str(tmp_path / "run")}
    done = 0
    for moment in moments:
        report = align(values, should_stop=stop_after(moment))
        done += moment
        assert (report.step, report.finished) == (done, False)
    assert align(values).finished
    runs.assert_same_run(runs.everything(values), runs.everything(whole[0]))
    report = align(values)  # nothing is left to do
    assert (report.step, report.finished, report.tokens) == (12, True, 0)


def test_the_other_attention_and_a_relative_output(folder, tmp_path, monkeypatch):
    attention = "bidirectional"
    monkeypatch.chdir(tmp_path)
    reading, stages = {"draft_length": 4, "attention": attention}, runs.averaged(folder)
    values = runs.recipe(folder, reading=reading, stages=stages) | {"output": "a"}
    other = values | {"output": str(tmp_path / "b")}
    align(values)
    align(other, should_stop=stop_after(7))
    align(other)
    runs.assert_same_run(runs.everything(values), runs.everything(other))
    target = deer_jax.load_target(values["target"])
    assert deer_jax.load_drafter(values["output"], target=target).method.reading.attention == attention


@pytest.fixture(scope="module")
def stopped(folder):
    """The folder of a run that was stopped at step 9, to be copied."""
    align(runs.recipe(folder, "stopped"), should_stop=stop_after(9))
    return folder / "stopped"


def damage_tree(step):
    """The index of the parameters is gone."""
    (step / "params" / "_METADATA").unlink()


def damage_values(step):
    """The values of the parameters are cut short."""
    file = max((step / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    file.write_bytes(file.read_bytes()[:100])


def damage_moments(step):
    """Of the optimiser's moments nothing is left."""
    for file in (step / "optimizer").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_tree, damage_values, damage_moments])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(folder, whole, stopped, tmp_path, damage):
    values = runs.recipe(folder) | {"output": str(shutil.copytree(stopped, tmp_path / "run"))}
    damage(tmp_path / "run" / "checkpoints" / "9")
    with pytest.warns(
        UserWarning, match=r"\Athe checkpoint of step 9 is damaged \([^\n]*damaged-9-1; that of step 8 is taken\Z"
    ):
        align(values)
    runs.assert_same_run(runs.everything(values), runs.everything(whole[0]))


def test_with_no_readable_checkpoint_nothing_is_touched(folder, tmp_path):
    values = runs.recipe(folder) | {"output": str(tmp_path / "run")}
    align(values, should_stop=stop_after(2))
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in checkpoints.iterdir():
        damage_tree(step)
    before = sorted(path.name for path in checkpoints.iterdir())
    with pytest.raises(
        RunError, match=r"none of its 2 checkpoints can be read, that of step 2 for: [^\n]*; name anoth"
    ):
        align(values)
    assert sorted(path.name for path in checkpoints.iterdir()) == before


def test_settings_that_do_not_touch_the_training_may_change(folder, whole, stopped, tmp_path):
    values = runs.recipe(folder) | {"output": str(shutil.copytree(stopped, tmp_path / "moved"))}
    evaluation = values["evaluation"] | {"batch_size": 2}
    again = values | {"checkpoint_every": 5, "keep": 1, "evaluation": evaluation}
    align(again)
    runs.assert_same_run(runs.everything(again), runs.everything(whole[0]))


def test_rows_whose_prompt_fills_the_length_are_left_out(folder, whole, tmp_path):
    answers = tmp_path / "answers.jsonl"
    long = json.dumps({"prompt": [1] * 24, "answer": [2]}) + "\n"
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    answers.write_text("".join([*lines[:7], long, *lines[7:], long]))
    changes = {"answers": [str(answers)], "evaluation": None}
    with pytest.warns(UserWarning, match="2 prompts leave no room for an answer in length 24; their rows are left out"):
        align(runs.recipe(folder, **changes) | {"output": str(tmp_path / "run")})
    found, expected = (
        [line["loss"] for line in read_metrics(run) if "loss" in line] for run in (tmp_path / "run", folder / "whole")
    )
    assert found == expected
    assert len(found) == 12


def test_a_row_that_is_no_answer_is_noticed_before_any_work(folder, tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text((folder / "answers.jsonl").read_text() + '{"prompt": [1]}\n')
    with pytest.raises(InputError, match=r"answers\.jsonl:41: missing answer; found: prompt"):
        align(runs.recipe(folder, answers=[str(answers)], evaluation=None) | {"output": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_another_recipe_or_other_answers_are_refused_with_the_differences(folder, whole, tmp_path):
    values, _ = whole
    changed = values | {"seed": 3, "stages": [values["stages"][0] | {"learning_rate": 2e-2}, values["stages"][1]]}
    message = re.escape(f"{folder / 'whole'}: holds another run: seed was 0, is 3; ")
    with pytest.raises(
        InputError, match=rf"\A{message}stages\.0\.learning_rate was 0\.01, is 0\.02\. Name another output[^\n]*\Z"
    ):
        align(changed)
    run = shutil.copytree(folder / "whole", tmp_path / "run")
    answers = tmp_path / "answers.jsonl"
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    answers.write_text("".join(reversed(lines)))
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(folder / "answers.jsonl"), str(answers)))
    with pytest.raises(
        InputError,
        match=r"\A[^\n]*run: cannot go on: the answers changed \([^\n]*answers\.jsonl\) since",
    ):
        align(values | {"answers": [str(answers)], "output": str(folder / "whole")} | {"output": str(run)})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"mine: is no run but holds thesis\.txt; name another output"):
        align(values | {"output": str(tmp_path / "mine")})


def test_differences_of_plain_values():
    before, now = {"a": 1, "b": {"c": [1, 2]}, "d": None}, {"a": 1, "b": {"c": [1, 3]}, "e": 5}
    assert differences(before, now) == ["b.c.1 was 2, is 3", "e was None, is 5"]
    assert differences(now, now) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": ["{folder}/none.jsonl"]}, "{folder}/none.jsonl: no such file"),
        ({"stage": {"width": 3}}, "stages[1]: width 3 is less than the draft length 4, so the later tokens of a draft"),
        ({"stage": {"loss": {"kl": 1}}, "length": 65}, "length 65 exceeds the drafter's context of 64; lower length"),
        (
            {"batch": 41, "accumulate": 1},
            "{folder}/answers.jsonl: 40 records are fewer than a batch of 41; lower batch",
        ),
        ({"stage": {"width": 24}}, "stages[1]: a block of width 24 does not fit into texts of length 24 behind"),
        (
            {"reading": {"head": "in_place"}},
            "stages[0]: next_token 1 trains the shifted head, and this drafter reads in",
        ),
        (
            {"evaluation": {"prompts": "{folder}/answers.jsonl", "max_new_tokens": 8}},
            "{folder}/answers.jsonl: all 40 prompts occur in",
        ),
        (
            {"evaluation": {"prompts": "{folder}/held_out.jsonl", "max_new_tokens": 61}},
            "{folder}/held_out.jsonl:1: 4 tokens and 61 new ones exceed the context of 64; lower",
        ),
        ({"mesh": {"data": 16}, "batch": 16, "accumulate": 1}, "a 16x1x1 mesh needs 16 devices, 8 are there"),
        ({"drafter": "from-target:7"}, "layers [7]: the target has layers 0..1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, changes, message):
    values = runs.recipe(folder) | {"output": str(tmp_path / "run")}
    if stage := changes.pop("stage", None):
        values["stages"][1] |= stage
    values |= json.loads(json.dumps(changes).replace("{folder}", str(folder)))
    with pytest.raises(InputError, match="^" + re.escape(message.replace("{folder}", str(folder)))) as error:
        align(values)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_answers_of_another_model_are_refused(tmp_path):
    def write(*records):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return [tmp_path / "a.jsonl"]

    good = {"prompt": [1], "answer": [2], "tokenizer": "aaaa"}
    files = write(good, good | {"answer": [32]})
    records = AnswerFiles(files, vocab_size=32, tokenizer="aaaa")
    with pytest.raises(
        InputError, match=r"a\.jsonl:2: token id 32 in 'answer' is outside the target's vocabulary of 32"
    ):
        records[1]
    with pytest.raises(InputError, match=r"a\.jsonl:1: the answers were made with another tokenizer \('aaaa'\) than"):
        AnswerFiles(files, vocab_size=33, tokenizer="bbbb")
    assert len(AnswerFiles(write({"prompt": [1], "answer": [2]}), vocab_size=3, tokenizer="bbbb")) == 1


def test_prompts_that_occur_in_a_row_are_found_wherever_they_are(tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, 12).tolist() for _ in range(6)]  # ids whose bytes are mostly zero
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": row[:2], "answer": row[2:]}) + "\n" for row in rows))
    prompts = [rng.integers(0, 3, n).tolist() for n in (1, 2, 3, 4, 5) for _ in range(20)] + [[256, 0], [65536]]
    plain = [any(row[i : i + len(p)] == p for row in rows for i in range(len(row))) for p in prompts]
    found = survey(AnswerFiles([path], vocab_size=3), prompts, room=10)
    assert (found.met, found.cut, found.overlong) == (plain, 6, [])  # of 12 tokens each
    assert survey(AnswerFiles([path], vocab_size=3), [], room=12).cut == 0
    assert (survey(AnswerFiles([path], vocab_size=3), [], room=2).cut) == 0  # without room for an answer they are none
    assert 10 < sum(plain) < len(plain) - 10


def test_a_mesh_trains_the_same_drafter(folder, tmp_path):
    common = {"stages": runs.averaged(folder), "evaluation": None, "batch": 8, "accumulate": 1, "checkpoint_every": 100}
    found = []
    for number, mesh in enumerate(({}, {"data": 2, "fsdp": 2}, {"tensor": 2})):
        values = runs.recipe(folder, mesh=mesh, **common) | {"output": str(tmp_path / str(number))}
        align(values)
        found.append(runs.everything(values))
    for other in found[1:]:
        for a, b in zip(found[0]["lines"], other["lines"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
        for a, b in zip(found[0]["arrays"], other["arrays"], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)


def test_in_bfloat16_the_trained_values_are_float32(folder, tmp_path):
    evaluation = runs.recipe(folder)["evaluation"] | {"temperatures": [0]}
    changes = {"stages": runs.averaged(folder), "evaluation": evaluation, "dtype": "bfloat16"}
    values = runs.recipe(folder, **changes) | {"output": str(tmp_path / "run")}
    align(values)
    assert {x.dtype for x in runs.everything(values)["arrays"] if x.dtype.kind != "i"} == {np.dtype("float32")}
    drafter = deer_jax.load_drafter(tmp_path / "run", target=deer_jax.load_target(values["target"], dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(drafter.params)} == {jnp.dtype("bfloat16")}
    mesh = make_mesh(fsdp=2)
    meshed = deer_jax.load_target(values["target"], dtype="bfloat16", mesh=mesh)
    drafter = deer_jax.load_drafter(tmp_path / "run", target=meshed)
    assert {x.dtype for x in jax.tree.leaves(drafter.params)} == {jnp.dtype("bfloat16")}
