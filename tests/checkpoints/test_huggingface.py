"""Reading configurations and folders: what is understood, and how everything else is refused in one line."""

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deer_jax.build import Build, parse_dtype
from deer_jax.checkpoints import huggingface
from deer_jax.checkpoints.families import config_from, tensor_slots, write_config
from deer_jax.checkpoints.huggingface import (
    load_params,
    read_bos_id,
    read_config,
    read_stop_ids,
    save_folder,
)
from deer_jax.checkpoints.load import load_target
from deer_jax.config import Rope
from deer_jax.errors import InputError, RunError
from deer_jax.models.weights import Weight
from tests.tiny import REAL, random_params, tiny

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 96,
    "max_position_embeddings": 256,
}  # fmt: skip


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
QWEN3_MOE = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def refused(*words):
    """pytest.raises for an InputError of one line that contains the words."""
    pattern = "".join(f"(?=.*{word})" for word in words)
    return pytest.raises(InputError, match=rf"\A{pattern}[^\n]*\Z")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of a tiny untied llama, saved by us; copy before spoiling."""
    folder = tmp_path_factory.mktemp("models") / "good"
    config = tiny("llama", tied=False)
    save_folder(folder, config, random_params(config, 0))
    return folder


@pytest.fixture
def spoiled(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.mark.parametrize("family", REAL)
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_configurations_survive_writing_and_reading(family, kind):
    scaling = {"factor": 4.0} if kind != "default" else {}
    if kind in ("llama3", "yarn"):
        scaling["original_context"] = 4096
    if kind == "yarn":
        scaling |= {"attention_factor": 1.2, "beta_fast": 24.0, "mscale": 0.7, "truncate": False}
    rope = Rope(theta=5e5, kind=kind, **scaling)
    config = dataclasses.replace(REAL[family], rope=rope)
    values = json.loads(json.dumps(write_config(config, jnp.bfloat16)))
    assert config_from(values, "x") == config
    for dropped in (("rope_theta", "rope_scaling"), ("rope_parameters",)):
        left = {key: value for key, value in values.items() if key not in dropped}
        assert config_from(left, "x") == config  # either spelling alone is enough


@pytest.mark.parametrize(
    ("values", "rope"),
    [
        ({}, Rope()),
        ({"rope_theta": 1e6, "rope_scaling": None}, Rope(theta=1e6)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, Rope(theta=1e6)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(kind="linear", factor=2.0)),
        (  # the model's context stands in for a missing original one, as in transformers
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            Rope(kind="yarn", factor=4.0, original_context=256),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}},
            Rope(kind="yarn", factor=4.0, original_context=64),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 32},
            Rope(kind="yarn", factor=2.0, original_context=32),
        ),
    ],
)
def test_spellings_of_rope(values, rope):
    config = config_from(LLAMA | values, "x")
    assert config.rope == rope
    from transformers import LlamaConfig

    theirs = LlamaConfig(**(LLAMA | json.loads(json.dumps(values))))
    theirs.standardize_rope_params()  # as the model does before it computes frequencies
    theirs = theirs.rope_parameters
    assert theirs["rope_type"] == rope.kind
    assert theirs["rope_theta"] == rope.theta
    assert theirs.get("original_max_position_embeddings", 0) == rope.original_context


def test_defaults_follow_transformers():
    bare = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "model_type")}
    assert config_from(bare, "x").kv_heads == 4
    assert config_from({**bare, "architectures": None, "model_type": "qwen2"}, "x").family == "qwen2"
    assert config_from({**bare, "architectures": ["Qwen3ForCausalLM"]}, "x").head_width == 128
    moe = {**bare, "architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 8, "num_experts_per_tok": 2}
    assert config_from(moe | {"num_local_experts": 4}, "x").experts == 4
    assert config_from(moe | {"num_experts": 4}, "x").normalise_router is False
    # A declared but unused window is no obstacle: published Qwen2.5 folders have it.
    windowed = {**bare, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "use_sliding_window": False}
    assert config_from(windowed, "x").family == "qwen2"
    assert config_from(windowed | {"use_sliding_window": True, "max_window_layers": 2}, "x").family == "qwen2"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "LlamaForCausalLM", "Qwen3MoeForCausalLM"]),
        ({"architectures": None, "model_type": None}, ["None", "supported"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["longrope", "default, linear, llama3, yarn"]),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ["dynamic"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor is missing"]),
        ({"rope_scaling": [1]}, ["rope_scaling must be keys and values"]),
        ({"rope_parameters": []}, ["rope_parameters must be keys and values"]),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": False}, ["rope_parameters must be keys"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings must be true or false, got 'false'"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["differ between layers"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["gelu"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1}, ["sliding"]),
        ({"architectures": ["Qwen3MoeForCausalLM"], "use_sliding_window": True}, ["sliding"]),
        ({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [1]}, ["mlp_only_layers"]),
        ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}, ["decoder_sparse_step"]),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, ["num_experts is missing"]),
        ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
        ({"hidden_size": 32.5}, ["hidden_size", "32.5"]),
        ({"vocab_size": float("inf")}, ["vocab_size"]),
        ({"vocab_size": None}, ["vocab_size is missing"]),
        ({"num_attention_heads": 3}, ["heads", "multiple"]),
        ({"num_attention_heads": 0}, ["heads"]),
        ({"architectures": {"a": 1}}, ["architecture {'a': 1} is not supported"]),
        (
            {"architectures": ["LlamaForCausalLMEagle3"]},
            ["is a drafter, architecture LlamaForCausalLMEagle3, and no"],
        ),
        (
            {"architectures": ["DFlashDraftModel"]},
            ["is a drafter, architecture DFlashDraftModel", "this folder as its dr"],
        ),
        ({"architectures": "x" * 9000}, ["is not supported"]),
        ({"hidden_act": ["silu"]}, ["hidden_act"]),
        ({"attention_bias": "false"}, ["attention_bias must be true or false, got 'false'"]),
        ({"rms_norm_eps": -1}, ["norm_eps must be above 0"]),
        ({"rms_norm_eps": 1e30}, ["norm_eps must be above 0 and at most 0.1, got 1e\\+30"]),
        ({"rope_theta": 1e-30}, ["theta must be in 1..1e\\+15, got 1e-30"]),
        ({"rope_theta": 10**400}, ["rope_theta must be a number"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor must be in 1"]),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 8.0}}, ["low_freq_factor must be below high_freq_factor"]),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": -1.0}}, ["low_freq_factor must be above 0"]),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}}, ["original_max_position_embeddings"]),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, ["beta_slow must be below beta_fast"]),
        ({"rope_scaling": YARN | {"beta_slow": -1}}, ["beta_slow must be above 0"]),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, ["attention_factor must be above 0"]),
        ({"rope_scaling": YARN | {"mscale": -0.1}}, ["mscale must be in 0"]),
        ({"rope_scaling": YARN | {"truncate": "no"}}, ["truncate must be true or false, got 'no'"]),
        ({"rope_scaling": YARN, "rope_theta": 1}, ["theta must be above 1"]),
        ({"partial_rotary_factor": "half"}, ["partial_rotary_factor 'half'"]),
        ({"num_hidden_layers": 10**9}, ["layers must be", "at most 10,000, got 1000000000"]),
        ({"vocab_size": 2**31}, ["vocab_size must be", "at most"]),
        (QWEN3_MOE | {"num_experts": 10**9}, ["experts must be", "at most 100,000"]),
        (QWEN3_MOE | {"num_experts": 0}, ["num_experts must be at least 1"]),
        (QWEN3_MOE | {"num_experts": 4, "norm_topk_prob": "yes"}, ["norm_topk_prob must be true or false, got 'yes'"]),
        ({"architectures": ["Qwen2ForCausalLM"], "max_window_layers": "all"}, ["max_window_layers must be an integer"]),
    ],
)
def test_unsupported_configurations_are_refused(values, words):
    with refused("^folder/config.json: ", *words):
        config_from(LLAMA | values, "folder/config.json")


def test_configurations_without_a_family_are_refused():
    with refused("llama", "q_bias"):
        tensor_slots(tiny("llama", qkv_bias=True))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_damaged_configurations_are_refused(content, spoiled):
    (spoiled / "config.json").write_bytes(content)
    with refused("config.json"):
        read_config(spoiled)


def test_counts_are_compared_before_anything_is_listed(spoiled):
    path = spoiled / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"num_hidden_layers": 9_999}))
    with refused(r"config.json says 9,999 layers, 89,994 tensors; the files hold 21"):
        load_target(spoiled)
    experts = {"num_experts": 99_999, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "num_hidden_layers": 9_999}
    path.write_text(json.dumps(values | experts | {"architectures": ["Qwen3MoeForCausalLM"]}))
    with refused("says 9,999 layers of 99,999 experts, 2,99[0-9],[0-9]*,[0-9]* tensors; the files hold 21"):
        load_target(spoiled)


def test_an_index_names_files_in_its_folder_only(good, tmp_path):
    secret = tmp_path / "secret.safetensors"
    shutil.copyfile(good / "model.safetensors", secret)
    keys = load_file(secret)
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(good / "config.json", folder / "config.json")
    names = ["../secret.safetensors", str(secret), "..", ".", "", "a/b.safetensors", "a\nb", "\0", "x" * 300]
    for name in names:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
        with refused("model.safetensors.index.json: ", "is no name of a file in this folder"):
            load_target(folder)
    linked = {"weight_map": dict.fromkeys(keys, "linked.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(linked))
    (folder / "linked.safetensors").symlink_to(secret)
    with refused("linked.safetensors: is a link out of its folder"):
        load_target(folder)
    (folder / "linked.safetensors").unlink()
    os.mkfifo(folder / "linked.safetensors")
    with refused("linked.safetensors: is no regular file"):
        load_target(folder)
    # A link within the folder is none of these, and the hub's cache is made of links to its own blobs.
    (folder / "linked.safetensors").unlink()
    secret.rename(folder / "here.safetensors")
    (folder / "linked.safetensors").symlink_to("here.safetensors")
    assert load_target(folder).config.layers == 2
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "1"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (snapshot / "here.safetensors").rename(blobs / "abc")
    (snapshot / "linked.safetensors").unlink()
    (snapshot / "linked.safetensors").symlink_to("../../blobs/abc")
    assert load_target(snapshot).config.layers == 2
    (snapshot / "linked.safetensors").unlink()
    blobs.rename(tmp_path / "blobs")
    (snapshot / "linked.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    with refused("is a link out of its folder"):
        load_target(snapshot)


def test_a_tensor_in_two_files_is_refused(spoiled):
    shutil.copyfile(spoiled / "model.safetensors", spoiled / "b.safetensors")
    (spoiled / "model.safetensors").rename(spoiled / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}
    (spoiled / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("b.safetensors: .* stands in a.safetensors too"):
        load_target(spoiled)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:100], lambda b: b[:-10], lambda b: b"\xff" * 99])
def test_damaged_weights_are_refused(damage, spoiled):
    file = spoiled / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with refused("model.safetensors: damaged or truncated"):
        load_target(spoiled)


def test_folders_without_weights_are_refused(spoiled):
    (spoiled / "model.safetensors").unlink()
    with refused("no model.safetensors"):
        load_target(spoiled)
    (spoiled / "pytorch_model.bin").touch()
    with refused("convert"):
        load_target(spoiled)
    index = spoiled / "model.safetensors.index.json"
    index.write_text("{}")
    with refused("weight_map"):
        load_target(spoiled)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with refused("model-1.safetensors", "no such file"):
        load_target(spoiled)


def test_all_wrong_tensors_are_reported_at_once(spoiled):
    tensors = load_file(spoiled / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.norm.weight"] = np.zeros((7,), np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 32), np.int8)
    tensors["model.rotary_emb.inv_freq"] = np.zeros((4,), np.float32)  # a constant, not a weight
    # Spread over two files, each with something wrong, and more than the report names.
    late = {f"stray.{i}": np.zeros((1,), np.float32) for i in range(10)}
    (spoiled / "model.safetensors").unlink()
    save_file(tensors, spoiled / "a.safetensors")
    save_file(late, spoiled / "b.safetensors")
    where = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(late, "b.safetensors")
    (spoiled / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with refused(
        "2 missing, 10 unknown, 2 wrong", "lm_head.weight, model.layers.1.mlp.up_proj.weight", "stray.0", "and 6 more",
        r"model.norm.weight is \[7\], expected \[32\]", "q_proj.weight is I8",
    ):  # fmt: skip
        load_params(spoiled, read_config(spoiled), jnp.float32, scan=False)


def test_tied_folders_may_repeat_the_head(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "COMPARED_ROWS", 40)  # three slices, the last one short
    config = tiny("llama")
    params = random_params(config, 0)
    save_folder(tmp_path / "model", config, params, extra={"lm_head.weight": np.asarray(params["embed"])})
    loaded, _ = load_params(tmp_path / "model", config, jnp.float32, scan=True)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    save_folder(tmp_path / "other", config, params, extra={"lm_head.weight": np.asarray(params["embed"].at[90].add(1))})
    with refused("ties lm_head.weight", "values differ", "tie_word_embeddings"):
        load_params(tmp_path / "other", config, jnp.float32, scan=True)


def test_extra_tensors_and_entries(tmp_path):
    config = tiny("llama")
    special = np.arange(64, dtype=np.float32).reshape(2, 32)
    save_folder(
        tmp_path / "model", config, random_params(config, 0), extra={"deer.mask_and_separator": special},
        extra_config={"deer": {"draft_length": 4}}, stop_ids=(2,), bos_id=1,
    )  # fmt: skip
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (values["deer"], values["eos_token_id"], values["bos_token_id"]) == ({"draft_length": 4}, 2, 1)
    wanted = {"deer.mask_and_separator": Weight((2, 32), (None, None))}
    _, extras = load_params(tmp_path / "model", config, jnp.bfloat16, scan=False, extra=wanted)
    assert extras["deer.mask_and_separator"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(extras["deer.mask_and_separator"], np.float32), special)
    with refused("1 unknown", "deer.mask_and_separator"):
        load_params(tmp_path / "model", config, jnp.float32, scan=False)
    with refused("deer.mask_and_separator", r"expected \[3, 32\]"):
        other = {"deer.mask_and_separator": Weight((3, 32), (None, None))}
        load_params(tmp_path / "model", config, jnp.float32, scan=False, extra=other)


def test_saving_replaces_nothing_and_leaves_nothing_behind(tmp_path):
    config = tiny("llama")
    params = random_params(config, 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for taken in (tmp_path / "full", tmp_path / "full" / "file"):
        with refused("not an empty folder"):
            save_folder(taken, config, params)
    with refused("below: cannot be written: "):
        save_folder(tmp_path / "full" / "file" / "below", config, params)
    with refused("no tokenizer files"):
        save_folder(tmp_path / "new", config, params, tokenizer_source=tmp_path)
    with refused("embed"):
        save_folder(tmp_path / "new", tiny("llama", vocab_size=97), params)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    save_folder(tmp_path / "empty", config, params)
    assert read_config(tmp_path / "empty") == config
    assert len({path.stat().st_mode for path in (tmp_path / "empty").iterdir()}) == 1  # who may read one may read all


@pytest.mark.parametrize(
    ("generation", "model", "ids"),
    [({"eos_token_id": [5, 6]}, 7, (5, 6)), ({"eos_token_id": 5}, 7, (5,)), ({}, 7, (7,)), (None, [7, 8], (7, 8)),
     (None, None, ())],
)  # fmt: skip
def test_stop_ids(generation, model, ids, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": model}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_stop_ids(tmp_path) == ids


@pytest.mark.parametrize("ids", ["</s>", -1, 2**31, 2.0, True, [[2]], [2, None], {"a": 2}, [2**31], list(range(2000))])
def test_wrong_stop_ids_are_refused(tmp_path, ids):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": ids}))
        with refused(f"{name}: eos_token_id must be an id or a list of ids, got "):
            read_stop_ids(tmp_path)


def test_wrong_bos_ids_are_refused(tmp_path):
    for found in ("<s>", [1], -1, 2**31, True):
        (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": found}))
        with refused("config.json: bos_token_id must be an id, got "):
            read_bos_id(tmp_path)


def test_wrong_arguments_say_what_to_call(good):
    with refused(r"mesh must be what make_mesh returns, as in make_mesh\(fsdp=8\), got 8"):
        load_target(good, mesh=8)
    with refused("a model is named by a folder or a hub id, got 8"):
        load_target(8)


def test_a_target_prints_as_one_line(good):
    assert repr(load_target(good)) == ("Target(good: llama, 2 layers of width 32, 96 tokens, context 256, float32)")


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    config = tiny("llama")
    params = random_params(config, 0)
    params["layers"]["up"] = params["layers"]["up"].at[1, 0, 0].set(jnp.nan)
    with pytest.raises(RunError, match=r"\Amodel.layers.1.mlp.up_proj.weight has values that are not finite[^\n]*\Z"):
        save_folder(tmp_path / "model", config, params)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path):
    """The kernel refuses a large file to this process as it would a full disk, with another word."""
    config = tiny("llama", vocab_size=2000)
    params = random_params(config, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"\A[^\n]*model: cannot be written: File too large\Z"):
            save_folder(tmp_path / "model", config, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_dtypes():
    assert Build.here().dtype == Build.of("cpu").dtype == jnp.float32
    assert Build.of("tpu").dtype == Build.of("gpu").dtype == jnp.bfloat16
    assert parse_dtype("bfloat16") == parse_dtype(jnp.bfloat16) == jnp.bfloat16
    for wrong in ("float16", "bf16", int):
        with refused("dtype must be bfloat16 or float32"):
            parse_dtype(wrong)


def test_a_tokenizer_may_have_ids_beyond_the_vocabulary(spoiled, stories_dir):
    """transformers adds such a token to folders that it saves; a prompt that has it is refused where it is read."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories_dir / name, spoiled / name)
    target = load_target(spoiled)
    assert max(target.tokenizer.vocabulary().values()) > target.config.vocab_size
    with refused("outside the vocabulary of 96"):
        target.logits([[1, 400]])


def test_loading_a_target_without_tokenizer(good):
    target = load_target(str(good), "bfloat16")
    assert target.tokenizer is None
    assert target.stop_ids == ()
    assert target.dtype == jnp.bfloat16
    assert target.logits([[1, 2, 3]]).shape == (1, 3, 96)
