"""Pretraining runs: the loss, what they leave behind, that they go on as if nothing had happened, and wrong input."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deer_jax
from deer_jax import InputError
from deer_jax.checkpoints.huggingface import load_params, read_config
from deer_jax.checkpoints.records import TARGET
from deer_jax.checkpoints.runs import is_run, read_best
from deer_jax.config import ModelConfig
from deer_jax.data.texts import Document, Windows, passages, tokens_of
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.models.transformer import abstract_params, bind, unstack_layers
from deer_jax.training.metrics import read_metrics
from deer_jax.training.objectives import next_token_loss
from deer_jax.training.recipe import PretrainRecipe, pretrain_recipe_from, read_pretrain_recipe, to_mapping
from tests import reference
from tests.fast import representing
from tests.tiny import REAL, random_params, tiny
from tests.training import pretraining, runs
from tests.training.naive import naive_cross_entropy

V, T = 24, 12
SMALL = {"vocab_size": V, "width": 8, "heads": 2, "kv_heads": 1, "head_width": 4, "mlp_width": 12}
SHAPES = {"tied": tiny("qwen2", **SMALL), "untied": tiny("llama", **SMALL, tied=False)}
LENGTHS = np.array([T, 5, 2, 1, 0], np.int32)  # of the last two nothing is predicted


def stop_after(count):
    """A `should_stop` that says so after so many steps."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= count


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pretraining.prepare(tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="module")
def whole(folder):
    """A run from start to end, its recipe and report."""
    values = pretraining.recipe(folder, "whole")
    return values, deer_jax.pretrain(values)


@pytest.fixture(scope="module")
def model(folder, whole):
    """The run's export."""
    return deer_jax.export(folder / "whole", folder / "model")


@pytest.mark.parametrize("head", SHAPES)
def test_the_loss_is_that_of_every_token_alone(head):
    config = SHAPES[head]
    params = random_params(config, 3)
    tokens = np.random.default_rng(0).integers(0, V, (len(LENGTHS), T)).astype(np.int32)
    run = jax.jit(jax.value_and_grad(lambda p, b: next_token_loss(config)(p, b, {}), has_aux=True))
    (loss, count), gradients = run(params, {"tokens": tokens, "length": LENGTHS})

    says = reference.softmax(reference.forward(config, unstack_layers(params, config.layers), tokens))
    expected = 0.0
    for row, length, said in zip(tokens, LENGTHS, says, strict=True):
        for p in range(1, length):
            expected -= math.log(said[p - 1, row[p]])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert int(count) == sum(max(length - 1, 0) for length in LENGTHS)

    changed = np.where(np.arange(T)[None] < LENGTHS[:, None], tokens, (tokens + 1) % V)
    (same, _), _ = run(params, {"tokens": changed, "length": LENGTHS})
    assert float(same) == float(loss)  # padding counts for nothing

    def naive(params):
        module = bind(config, params)
        positions = jnp.broadcast_to(jnp.arange(T)[None], tokens.shape)
        hidden = module(module.lookup(tokens), positions)[0][:, :-1].reshape(-1, config.width)
        weights = (np.arange(1, T)[None] < LENGTHS[:, None]).reshape(-1).astype(np.float32)
        labels = jnp.asarray(tokens[:, 1:].reshape(-1))
        return naive_cross_entropy(hidden, params["embed" if config.tied else "head"], labels, weights)

    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(jax.jit(jax.grad(naive))(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def held_out_windows(run):
    """The windows of the text that was kept apart, as tokens and lengths."""
    tokenizer = Tokenizer.load(run / "target")
    name = pretraining.HELD_OUT.removesuffix(".py")
    windows = Windows(tokens_of([Document(name, pretraining.text(name))], tokenizer, 0), 32, 0)
    rows = [windows[i] for i in range(len(windows))]
    return np.stack([row["tokens"] for row in rows]), np.stack([row["length"] for row in rows])


def test_a_run_learns_and_logs_what_it_did(whole, folder):
    _, report = whole
    assert (report.step, report.steps, report.finished) == (12, 12, True)
    assert list(report.evaluations) == [0, 4, 8, 12]  # start, every four steps, end
    losses = {step: found.loss for step, found in report.evaluations.items()}
    assert losses[0] == pytest.approx(math.log(288), abs=1)  # it knows nothing yet
    assert losses[12] < losses[0] - 1
    assert report.best == min(losses, key=lambda step: losses[step])
    tokens, lengths = held_out_windows(folder / "whole")
    assert len(tokens) < 64  # so all of them are evaluated
    characters = len(pretraining.text("omega"))
    for found in report.evaluations.values():
        assert found.tokens == (lengths - 1).sum()
        assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / characters)
    assert 11 * 3 * 32 < report.tokens <= 11 * 4 * 32  # steps but the one that compiles; one window is shorter
    lines = read_metrics(folder / "whole")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {line["stage"] for line in steps} == {"pretraining"}
    assert steps[1]["learning_rate"] == pytest.approx(3e-2)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert all(line["predicted"] <= 4 * 31 for line in steps)
    assert {line["step"]: line["held_out"]["loss"] for line in lines if "held_out" in line} == losses
    assert {int(path.name) for path in (folder / "whole" / "checkpoints").iterdir()} == {report.best, 10, 12}


def test_the_held_out_loss_is_that_of_the_exported_model(whole, folder, tmp_path):
    _, report = whole
    target = deer_jax.load_target(deer_jax.export(folder / "whole", tmp_path / "model", dtype="float32"))
    tokens, lengths = held_out_windows(folder / "whole")
    said = np.asarray(jax.nn.log_softmax(target.logits(tokens)))
    total = -sum(
        said[b, p - 1, tokens[b, p]] for b, length in enumerate(lengths) for p in range(1, length)
    )  # fmt: skip
    assert total / (lengths - 1).sum() == pytest.approx(report.evaluations[report.best].loss, rel=1e-5)


def test_prompts_are_beginnings_of_paragraphs(whole, folder):
    def read(name):
        return [json.loads(line)["prompt"] for line in (folder / "whole" / name).read_text().splitlines()]

    training = [pretraining.text(name) for name in pretraining.NAMES]
    prompts, held_out = read("prompts.jsonl"), read("held_out.jsonl")
    assert len(set(prompts)) == 20
    assert all(any(prompt in text for text in training) for prompt in prompts)
    # All there are that leave a quarter of the context for an answer.
    tokenizer = Tokenizer.load(folder / "whole" / "target")
    assert tokenizer is not None
    starts = passages([Document("omega", pretraining.text("omega"))], count=99, most=12, seed=0)
    fitting = [p for p in starts if len(tokenizer.encode(p)) <= 48]
    assert len(fitting) < len(starts) == 16
    assert sorted(held_out) == sorted(fitting)
    assert all(len(tokenizer.encode(prompt)) <= 48 for prompt in prompts)
    assert all(prompt.startswith("def step_") for prompt in prompts + held_out)


# At an evaluation, between two, and twice.
@pytest.mark.parametrize("moments", representing([[4], [3, 6]], [4]))
def test_a_run_that_was_stopped_ends_like_one_that_was_not(folder, whole, tmp_path, moments):
    values = pretraining.recipe(folder) | {"output": str(tmp_path / "run")}
    done = 0
    for moment in moments:
        report = deer_jax.pretrain(values, should_stop=stop_after(moment))
        done += moment
        assert (report.step, report.finished) == (done, False)
    assert deer_jax.pretrain(values | {"keep": 3, "checkpoint_every": 5}).finished  # these may change
    runs.assert_same_run(runs.everything(values), runs.everything(whole[0]))
    report = deer_jax.pretrain(values)  # nothing is left to do
    assert (report.step, report.finished, report.tokens, report.evaluations) == (12, True, 0, {})


def test_another_recipe_or_other_texts_are_refused_with_the_differences(folder, whole, tmp_path):
    values, _ = whole
    model = values["model"] | {"layers": 3}
    message = re.escape(f"{folder / 'whole'}: holds another run: seed was 0, is 3; ")
    with pytest.raises(InputError, match=rf"\A{message}model\.layers was 2, is 3\. Name another output[^\n]*\Z"):
        deer_jax.pretrain(values | {"model": model, "seed": 3})
    texts = folder / "texts"
    try:
        (texts / "zeta.py").write_text(pretraining.text("zeta"))
        with pytest.raises(InputError, match=r"cannot go on: the training texts changed \(zeta\.py\) since[^\n]*\Z"):
            deer_jax.pretrain(values)
        (texts / "zeta.py").unlink()
        (texts / "omega.py").write_text(pretraining.text("omega") + "more = 1\n")
        with pytest.raises(InputError, match=r"cannot go on: the held-out texts changed \(omega\.py\) since[^\n]*\Z"):
            deer_jax.pretrain(values)
    finally:
        (texts / "zeta.py").unlink(missing_ok=True)
        (texts / "omega.py").write_text(pretraining.text("omega"))
    assert deer_jax.pretrain(values).finished
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"mine: is no run but holds thesis\.txt; name another output"):
        deer_jax.pretrain(values | {"output": str(tmp_path / "mine")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lenght": 8}, "recipe: unknown key 'lenght', did you mean 'length'?"),
        ({"learning_rat": 1}, "recipe: unknown key 'learning_rat', did you mean 'learning_rate'?"),
        ({"optimizer": {}}, "recipe: unknown key 'optimizer', "),
        ({"model": {"widht": 8}}, "recipe: model: unknown key 'widht', did you mean 'width'?"),
        ({"model": {"heads": 3, "kv_heads": 2}}, "recipe: model: heads (3) must be a multiple of kv_heads (2)"),
        ({"model": {"layers": "two"}}, "recipe: model: layers must be a whole number, got 'two'"),
        ({"model": {"family": "gpt"}}, "recipe: model: family must be one of llama, qwen2, qwen3, qwen3_moe, got "),
        ({"model": {"family": "qwen3"}}, "recipe: model: qk_norm must be true in the qwen3 family, got false"),
        ({"model": {"experts": 2, "experts_per_token": 1, "expert_width": 8}}, "recipe: model: experts must"),
        ({"model": {"rope": {"kinds": "yarn"}}}, "recipe: model: rope: unknown key 'kinds', did you mean 'kind'?"),
        ({"mesh": {"fdsp": 2}}, "recipe: mesh: unknown key 'fdsp', did you mean 'fsdp'?"),
        ({"length": 65}, "recipe: length must be in 2..64, the model's context, got 65"),
        ({"length": 1}, "recipe: length must be in 2..64"),
        ({"steps": 0}, "recipe: steps must be at least 1, got 0"),
        ({"batch": 3}, "recipe: batch (3) must be a multiple of accumulate (2)"),
        ({"learning_rate": 0}, "recipe: learning_rate must be positive, got 0.0"),
        ({"texts": []}, "recipe: texts is empty: name at least one folder"),
        ({"texts": 7}, "recipe: texts must be a list, got 7"),
        ({"texts": "{folder}/none"}, "{folder}/none: no such folder or file, and not 'stdlib'"),
        ({"files": "*.txt", "held_out": []}, "{folder}/texts: no text to train on; check files, exclude and held_out"),
        ({"held_out": "psi.py"}, "held_out: psi.py matches no text of {folder}/texts"),
        ({"mesh": {"data": 16}, "batch": 32}, "a 16x1x1 mesh needs 16 devices, 8 are there"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, changes, message):
    values = pretraining.recipe(folder) | {"output": str(tmp_path / "run")}
    changes = json.loads(json.dumps(changes).replace("{folder}", str(folder)))
    model = values["model"] | changes.pop("model", {})
    values |= changes | {"model": model}
    with pytest.raises(InputError, match="^" + re.escape(message.replace("{folder}", str(folder)))) as error:
        deer_jax.pretrain(values)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 400}, r"the texts have [\d,]+ tokens, too few for a batch of 400 windows of 32; lower [^\n]+"),
        ({"model": pretraining.MODEL | {"vocab_size": 256}}, r"vocab_size must be at least 257, [^\n]*, got 256"),
    ],
)  # fmt: skip
def test_what_the_tokenizer_shows_to_be_wrong_does_not_bind_the_output(folder, tmp_path, changes, message):
    values = pretraining.recipe(folder) | {"output": str(tmp_path / "run")}
    with pytest.raises(InputError, match=rf"\A{message}\Z"):
        deer_jax.pretrain(values | changes)
    assert not is_run(tmp_path / "run", TARGET)
    report = deer_jax.pretrain(values, should_stop=stop_after(1))
    assert (report.step, is_run(tmp_path / "run", TARGET)) == (1, True)


@pytest.mark.parametrize("family", REAL)
def test_every_family_has_its_recipe(family):
    model = to_mapping(PretrainRecipe(texts=("t",), output="o", steps=1, model=REAL[family]))["model"]
    values = {"texts": "t", "output": "o", "steps": 1, "model": model}
    assert pretrain_recipe_from(values, "here").model == REAL[family]
    for name in ("qk_norm", "qkv_bias"):
        with pytest.raises(InputError, match=rf"\Ahere: model: {name} must be (true|false) in the {family} "):
            pretrain_recipe_from(values | {"model": model | {name: not model[name]}}, "here")


def test_without_texts_kept_apart_nothing_is_evaluated(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("alpha", "beta", "copy_of_beta"):
        (tmp_path / "texts" / f"{name}.py").write_text(pretraining.text(name.removeprefix("copy_of_")))
    values = pretraining.recipe(tmp_path, held_out=[], steps=3)
    with pytest.warns(UserWarning, match=r"\A1 texts mostly repeat others and are left out: copy_of_beta\.py\Z"):
        report = deer_jax.pretrain(values)
    assert (report.best, report.evaluations) == (None, {})
    assert not (tmp_path / "run" / "held_out.jsonl").exists()
    target = deer_jax.load_target(deer_jax.export(tmp_path / "run", tmp_path / "model", dtype="float32"))
    newest = read_best(tmp_path / "run", abstract_params(target.config))
    np.testing.assert_array_equal(target.params["embed"], newest["embed"])


def test_a_mesh_trains_the_same_target(whole, tmp_path):
    values, expected = whole
    values = values | {"output": str(tmp_path / "run"), "mesh": {"fsdp": 2}}
    found = deer_jax.pretrain(values, should_stop=stop_after(4))
    assert list(found.evaluations) == [0, 4]
    for step, evaluated in found.evaluations.items():
        assert evaluated.loss == pytest.approx(expected.evaluations[step].loss, rel=2e-4)
    lines = [
        [line for line in read_metrics(folder) if "loss" in line and line["step"] <= 4]
        for folder in (tmp_path / "run", expected.output)
    ]
    for a, b in zip(*lines, strict=True):
        assert a["predicted"] == b["predicted"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=2e-3)


def test_an_exported_run_is_a_target(whole, folder, model):
    run, target = folder / "whole", deer_jax.load_target(model)
    assert target.config == ModelConfig(**pretraining.MODEL)
    assert target.stop_ids == (0,)
    assert isinstance(target.tokenizer, Tokenizer)
    prompt = "def step_omega_1(value):\n"
    assert target.tokenizer.encode(prompt) == [0, *Tokenizer.load(run / "target").plain(prompt)]
    config = json.loads((model / "config.json").read_text())
    assert (config["dtype"], config["bos_token_id"], config["eos_token_id"]) == ("bfloat16", 0, 0)
    best = read_best(run, abstract_params(target.config))
    saved, _ = load_params(model, read_config(model), jnp.bfloat16, scan=True)
    for a, b in zip(jax.tree.leaves(best), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(np.asarray(a.astype(jnp.bfloat16)), np.asarray(b))
    found = deer_jax.decode(target, prompt, max_new_tokens=8)
    assert 1 <= len(found.tokens[0]) <= 8
    assert found.texts is not None


def test_transformers_reads_an_exported_run(model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = deer_jax.load_target(model, dtype="float32")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        model, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (0, 0)
    text = pretraining.text("omega")[:150]
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]  # pyrefly: ignore
    assert ids == target.tokenizer.encode(text)
    tokens = np.array([ids[:60]])
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(target.logits(tokens), expected, rtol=0, atol=1e-4)


def test_a_recipe_is_written_as_it_is_read(tmp_path):
    values = pretraining.recipe(tmp_path, files="*.py", mesh={"data": 2}, dtype="bfloat16")
    values["model"] = values["model"] | {"rope": {"theta": "1e6"}}
    recipe = read_pretrain_recipe(runs.write(values))
    assert (recipe.texts, recipe.files) == ((str(tmp_path / "texts"),), ("*.py",))
    assert (recipe.model.rope.theta, recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == (1e6, 3e-2, 0.1)
    assert pretrain_recipe_from(to_mapping(recipe), "again") == recipe
    assert isinstance(hash(recipe), int)
    least = {name: values[name] for name in ("texts", "output", "model", "steps")} | {"length": 64}
    assert isinstance(pretrain_recipe_from(least, "least"), PretrainRecipe)
    with pytest.raises(InputError, match=r"\Aempty: missing output, texts, model, steps\Z"):
        pretrain_recipe_from({}, "empty")
