"""Folders of conditioned drafters, in every layout: written, read again, refused; tests/drafters/golden has some."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Fast
from tokenizers import models

import deer_jax
from deer_jax.checkpoints.drafters import drafter_shapes, kept_by_runs
from deer_jax.checkpoints.tapped import target_in
from deer_jax.cli import export as cli
from deer_jax.config import ConditionedConfig
from deer_jax.data.answers import AnswerFiles
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.drafters.conditioned import ConditionedMethod, ConditionedReading, conditioned_drafter
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.heads import INDEPENDENT, Markov, PathSelector
from deer_jax.errors import InputError
from deer_jax.models.target import Target
from deer_jax.models.transformer import logical_axes, stack_layers
from deer_jax.sharding import make_mesh, placements
from tests.fast import representing
from tests.tiny import random_params, tiny
from tests.training import runs

GOLDEN = Path(__file__).parent.parent / "drafters" / "golden"
EMBEDDING_TAPPED = "speculators-dflash-next-token"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
KNOWN = [case for case in CASES if case != EMBEDDING_TAPPED]
TARGET = tiny("qwen3", vocab_size=64, layers=8, mlp_width=16)


@pytest.fixture(scope="module")
def target():
    return Target(config=TARGET, params=random_params(TARGET, scan=False))


def layout_of(case: str) -> str:
    return "dflash" if case.startswith("zlab") else "speculators"


def same_values(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def same_drafter(one, other):
    assert one.method == other.method
    same_values((one.params, one.shared), (other.params, other.shared))


@pytest.mark.parametrize("case", representing(KNOWN, "speculators-dspark-gated"))
def test_a_public_folder_is_written_as_it_was(case, target, tmp_path):
    drafter = deer_jax.load_drafter(GOLDEN / case, target=target, dtype="bfloat16")
    deer_jax.save_drafter(tmp_path / "again", drafter, layout=layout_of(case), target=target)
    before, after = load_file(GOLDEN / case / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    before.pop("embed_tokens.weight", None)  # the target's, frozen, in EAGLE-3 folders of the package
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert (value.dtype, value.shape) == (after[key].dtype, after[key].shape)
        np.testing.assert_array_equal(value, after[key])
    same_drafter(deer_jax.load_drafter(tmp_path / "again", target=target, dtype="bfloat16"), drafter)
    deer_jax.save_drafter(tmp_path / "ours", drafter)
    same_drafter(deer_jax.load_drafter(tmp_path / "ours", target=target, dtype="bfloat16"), drafter)
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("case", representing(["speculators-dspark-rnn", "zlab-dflash2"], "zlab-dflash2"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_drafter_is_loaded_into_its_places_on_a_mesh(case, dtype, target):
    mesh, stacked = make_mesh(2, 2, 2), stack_layers(target.params)
    build = dataclasses.replace(target.build, scan=True)
    params = jax.device_put(stacked, placements(mesh, stacked, logical_axes(TARGET)))
    spread = dataclasses.replace(target, mesh=mesh, build=build, params=params)
    sharded = deer_jax.load_drafter(GOLDEN / case, target=spread, dtype=dtype)
    plain = deer_jax.load_drafter(GOLDEN / case, target=target, dtype=dtype)
    wanted = drafter_shapes(sharded.method, mesh)
    for found, like in zip(jax.tree.leaves(sharded.params), jax.tree.leaves(wanted), strict=True):
        assert found.sharding.is_equivalent_to(like.sharding, found.ndim)
    same_values((sharded.params, sharded.shared), (stack_layers(plain.params), plain.shared))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a target, and a run of two steps of a drafter of a reduced vocabulary."""
    folder = runs.prepare(tmp_path_factory.mktemp("conditioned"))
    answers = folder / "answers.jsonl"
    answers.with_name("masked.jsonl").write_text(answers.read_text())
    answers.write_text(re.sub(r"\b31\b", "30", answers.read_text()))  # no text has the mask
    deer_jax.align(recipe_of(folder, drafter="random:1", conditioned=BEGUN))
    return folder


BEGUN = {"taps": [0], "mask": 31, "draft_length": 4, "layout": "next_token", "draft_vocab": 16, "head": "markov",
         "rank": 4, "form": "gated", "confidence": True}  # fmt: skip


def recipe_of(folder: Path, **changes) -> dict:
    """A run of two steps without evaluations."""
    stage = runs.recipe(folder)["stages"][0] | {"steps": 2, "loss": {"ce": 1, "confidence": 1}}
    return runs.recipe(folder, evaluation=None, stages=[stage], reading=None) | changes


@pytest.mark.parametrize("start", ["a recipe", "a run", "a folder"])
def test_a_text_with_the_mask_is_refused_wherever_training_begins(run, tmp_path, start, monkeypatch):
    read, record = [], AnswerFiles._read
    monkeypatch.setattr(AnswerFiles, "_read", lambda self, index: read.append(index) or record(self, index))
    rows = (run / "masked.jsonl").read_text().splitlines()
    number = next(i for i, row in enumerate(rows) if 31 in json.loads(row)["prompt"] + json.loads(row)["answer"])
    source: dict[str, Any] = {"drafter": str(run / "run")}
    if start == "a recipe":
        source = {"drafter": "random:1", "conditioned": BEGUN}
    elif start == "a folder":
        source = {"drafter": str(deer_jax.export(run / "run", tmp_path / "folder", dtype="float32"))}
    values = recipe_of(run, output=str(tmp_path / "on"), answers=str(run / "masked.jsonl"), **source)
    with pytest.raises(InputError, match=rf"\A{run}/masked.jsonl:{number + 1}: has id 31 in it, which is the draf"):
        deer_jax.align(values)
    assert not (tmp_path / "on").exists()
    assert sorted(read) == sorted([0, *range(len(rows)), number])  # to begin with, once each, and for the message


def test_a_run_is_exported_in_the_layouts_that_can_say_its_drafter(run, tmp_path):
    target = deer_jax.load_target(run / "target")
    trained = deer_jax.load_drafter(run / "run", target=target)
    for layout in ("deer_jax", "speculators"):
        how = {"dtype": "float32", "layout": layout, "target": None if layout == "deer_jax" else run / "target"}
        output = deer_jax.export(run / "run", tmp_path / layout, **how)
        found = deer_jax.load_drafter(output, target=target)
        assert found.method.reading == trained.method.reading
        assert found.method.head == trained.method.head
        same_values((found.params, found.shared), (trained.params, trained.shared))
        before = (output / "export.json").stat().st_mtime_ns
        assert deer_jax.export(run / "run", output, **how) == output
        assert (output / "export.json").stat().st_mtime_ns == before
    values = json.loads((tmp_path / "speculators" / "config.json").read_text())
    assert values["speculators_config"]["verifier"]["name_or_path"] == str(run / "target")
    with pytest.raises(
        InputError, match=r"\Alayout dflash: a drafter that reads in the next_token layout cannot be said"
    ):
        deer_jax.export(run / "run", tmp_path / "zlab", layout="dflash", target=run / "target")
    with pytest.raises(InputError, match=r"\Alayout speculators: its folders say what target they are for; give it as"):
        deer_jax.export(run / "run", tmp_path / "none", layout="speculators")
    assert not (tmp_path / "zlab").exists()
    cli.run(["--source", str(run / "run"), "--output", str(tmp_path / "cli"), "--layout", "speculators", "--dtype",
             "float32", "--target", str(run / "target")])  # fmt: skip
    assert (tmp_path / "cli" / "model.safetensors").read_bytes() == (
        tmp_path / "speculators" / "model.safetensors"
    ).read_bytes()


def test_training_goes_on_with_the_head_that_its_run_is_loaded_with(run, tmp_path):
    """The target's: where a folder has it rounded, unrounded; where a folder has another one, none is trained."""
    target = deer_jax.load_target(run / "target")
    public = {"layout": "speculators", "target": run / "target"}
    rounded = deer_jax.load_drafter(deer_jax.export(run / "run", tmp_path / "rounded", **public), target=target)
    own = deer_jax.load_drafter(run / "run", target=target).shared
    assert (rounded.shared["head"] != own["head"]).any()
    same_values(kept_by_runs(rounded, target).shared, own)
    folder = deer_jax.export(run / "run", tmp_path / "other", dtype="float32", **public)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][-1, -1] += 0.1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"\Aother: its output head has other rows than target's, and a run[^\n]*\Z"):
        deer_jax.align(recipe_of(run, output=str(tmp_path / "on"), drafter=str(folder)))
    assert not (tmp_path / "on").exists()


def test_a_target_is_named_by_its_hub_id_or_its_path(run, tmp_path):
    hub = tmp_path / "models--an-owner--Its-Name" / "snapshots" / "0123"
    shutil.copytree(run / "target", hub)
    assert target_in(hub).name == "an-owner/Its-Name"
    assert target_in(run / "target").name == str(run / "target")


def test_drafters_of_text_alone_have_our_layout_only(target, tmp_path):
    drafter = deer_jax.drafter_from_target(target, layers=(0,))
    with pytest.raises(InputError, match=r"\Alayout dflash: is for drafters that read their target"):
        deer_jax.save_drafter(tmp_path / "no", drafter, layout="dflash", target=target)
    with pytest.raises(InputError, match=r"\Alayout must be one of deer_jax, dflash, eagle3, speculators, got 'zlab'"):
        deer_jax.save_drafter(tmp_path / "no", drafter, layout="zlab", target=target)
    with pytest.raises(InputError, match=r"the drafter reads its target; config is for drafters that read text alone"):
        deer_jax.load_drafter(GOLDEN / "zlab-dflash", target=target, config=deer_jax.DrafterConfig())


FILL = ConditionedReading(taps=(1, 4), mask=63, draft_length=7)
NEXT = dataclasses.replace(FILL, layout="next_token")
CONVOLVED = {"conv_kernel": 2, "conv_group": 8}
SELECTOR, MARKOV = PathSelector(rank=4, candidates=5), Markov(rank=4)


@pytest.mark.parametrize(
    ("layout", "reading", "head", "shape", "problem"),
    [
        ("dflash", NEXT, None, {}, "a drafter that reads in the next_token layout cannot"),
        ("dflash", dataclasses.replace(FILL, draft_vocab=16), None, {}, "a reduced vocabulary cannot"),
        ("dflash", FILL, MARKOV, {}, "a head of kind Markov cannot"),
        ("dflash", FILL, SELECTOR, {}, "convolutions without a selector, or the reverse, cannot"),
        ("dflash", FILL, None, CONVOLVED, "convolutions without a selector, or the reverse, cannot"),
        ("dflash", FILL, None, {"windows": (4, 5)}, r"windows that differ between layers \(4, 5\) cannot"),
        ("dflash", FILL, None, {"windows": (4, 0), "window_from": "anchor"}, "a window that counts from the anchor"),
        ("dflash", FILL, None, {"windows": (4, 0), "causal": (False, True)}, "some causal layers and windows on"),
        ("dflash", FILL, None, {"qk_norm": False}, "a backbone whose layers have no norms of queries and keys"),
        ("dflash", FILL, None, {"qkv_bias": True}, "biases of some of attention's projections and not of all"),
        ("speculators", dataclasses.replace(FILL, softcap=3.0), None, {}, "softcap 3 cannot"),
        ("speculators", dataclasses.replace(FILL, input_scale=2.0), None, {}, "input_scale 2 cannot"),
        ("speculators", dataclasses.replace(FILL, output_scale=2.0), None, {}, "output_scale 2 cannot"),
        ("speculators", dataclasses.replace(FILL, taps=(1, 7)), None, {}, "the drafter reads the target's last layer"),
        ("speculators", FILL, None, {"windows": (4, 0)}, "a window that counts from the row"),
        ("speculators", FILL, None, {"causal": (False, True)}, "layers that are causal without a window"),
        ("speculators", FILL, SELECTOR, {}, "a selector and convolutions can be said together only"),
        ("speculators", FILL, MARKOV, CONVOLVED, "a selector and convolutions can be said together only"),
        ("speculators", dataclasses.replace(FILL, draft_length=1), SELECTOR, CONVOLVED | {"conv_kernel": 3},
         "convolutions over more rows than a block has"),
        ("speculators", dataclasses.replace(FILL, draft_vocab=16), SELECTOR, CONVOLVED,
         "a reduced vocabulary cannot be said beside a selector"),
    ],
)  # fmt: skip
def test_what_a_layout_cannot_say_is_refused(target, tmp_path, layout, reading, head, shape, problem):
    values: dict[str, Any] = vars(TARGET) | {"layers": 2, "windows": (0, 0), "causal": (False, False)}
    config = ConditionedConfig(**values | {"tapped_width": 64} | shape)
    method = ConditionedMethod(config, reading, head or INDEPENDENT)
    shared = {"head": jnp.zeros((method.draft_vocab, method.shape.width))} if method.carries_head else {}
    drafter = Drafter(method=method, params={"norm": jnp.zeros(())}, shared=shared)
    with pytest.raises(InputError, match=rf"\Alayout {layout}: {problem}[^\n]*\Z"):
        deer_jax.save_drafter(tmp_path / "no", drafter, layout=layout, target=target)
    assert not (tmp_path / "no").exists()


def test_causal_layers_without_a_window_are_not_written_as_sliding(target, tmp_path):
    """The package's loop makes its cache of the layers' types, and fails for a sliding one without a window."""
    drafter = conditioned_drafter(target, FILL, layers=2, causal=(True, True))
    deer_jax.save_drafter(tmp_path / "causal", drafter, layout="dflash", target=target)
    values = json.loads((tmp_path / "causal" / "config.json").read_text())
    assert values["layer_types"] == ["full_attention"] * 2
    assert values["is_causal"] is True
    same_drafter(deer_jax.load_drafter(tmp_path / "causal", target=target), drafter)


@pytest.mark.parametrize(
    ("family", "layers", "head", "shape"),
    [
        ("llama", (1, 0), None, {"windows": (0, 3), "causal": (True, False)}),  # no norms of queries and keys
        ("qwen2", (0,), SELECTOR, {"windows": (5,), "window_from": "anchor"}),  # some biases, no convolutions
        ("qwen3", 2, Markov(rank=3, form="rnn", has_confidence=True), CONVOLVED | {"qkv_bias": True, "o_bias": True}),
    ],
)
def test_our_layout_says_what_the_others_cannot(tmp_path, family, layers, head, shape):
    config = tiny(family, vocab_size=64, tied=True)
    target = Target(config=config, params=random_params(config, scan=False))
    reading = ConditionedReading(taps=(1, 0), mask=60, draft_length=3, draft_vocab=24, softcap=9.0, output_scale=0.5)
    drafter = conditioned_drafter(target, reading, layers=layers, head=head, ids=IDS, **shape)
    deer_jax.save_drafter(tmp_path / "ours", drafter, max_shard_bytes=9000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    same_drafter(deer_jax.load_drafter(tmp_path / "ours", target=target), drafter)
    with pytest.raises(InputError, match="is a drafter, architecture DeerJaxDrafter, and no target: name"):
        deer_jax.load_target(tmp_path / "ours")


IDS = [*range(10, 32), 50, 61]


@pytest.mark.parametrize(
    ("count", "ids", "problem"),
    [
        (
            16,
            IDS,
            "ids must be 16 ascending ids of the target's 64, as reading.draft_vocab says, got 24 of them, [10, ",
        ),
        (24, [*IDS[:-1], 64], "ids must be 24 ascending ids of the target's 64, "),
        (24, [-1, *IDS[1:]], "ids must be 24 ascending ids of the target's 64, "),
        (24, IDS[::-1], "ids must be 24 ascending ids of the target's 64, "),
        (24, [*IDS[:-1], 50], "ids must be 24 ascending ids of the target's 64, "),
        (24, [*IDS[:-1], 61.5], "ids must be 24 ascending ids of the target's 64, "),
        (24, [*IDS[:-1], [61]], "ids must be 24 ascending ids of the target's 64, "),
        (24, 7, "ids must be 24 ascending ids of the target's 64, as reading.draft_vocab says, got 7"),
        (24, None, "ids and reading.draft_vocab belong together: give both, or neither"),
        (None, IDS, "ids and reading.draft_vocab belong together: give both, or neither"),
    ],
)
def test_ids_of_a_reduced_vocabulary_are_those_that_its_method_says(target, tmp_path, count, ids, problem):
    """Of a user's own drafter, and of a folder."""
    reading = ConditionedReading(taps=(1, 4), mask=63, draft_length=3, draft_vocab=24)
    right = conditioned_drafter(target, reading, ids=np.array(IDS))
    np.testing.assert_array_equal(right.shared["head"], target.params["head"][np.array(IDS)])
    with pytest.raises(InputError, match=rf"\A{re.escape(problem)}[^\n]*\Z"):
        conditioned_drafter(target, dataclasses.replace(reading, draft_vocab=count), ids=ids)
    deer_jax.save_drafter(tmp_path / "ours", right)
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    values["deer_jax"] |= {"ids": ids, "reading": values["deer_jax"]["reading"] | {"draft_vocab": count}}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=rf"\A{tmp_path}/ours/config.json: deer_jax: {re.escape(problem)}[^\n]*\Z"):
        deer_jax.load_drafter(tmp_path / "ours", target=target)


def changed(case: str, folder: Path, change) -> Path:
    """A copy of a golden folder, whose config.json and tensors `change` may alter in place."""
    shutil.copytree(GOLDEN / case, folder)
    values, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(values, tensors)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


def put(path: str, value):
    """Sets one entry of config.json, at a dotted path; None removes it."""

    def change(values, tensors):
        *parents, key = path.split(".")
        for parent in parents:
            values = values[parent]
        values.pop(key, None)
        if value is not None:
            values[key] = value

    return change


def tensor(key: str, value=None):
    """Sets a tensor, or removes it."""

    def change(values, tensors):
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = np.ascontiguousarray(value)

    return change


ZERO = np.zeros((3, 3), np.float32)
LAYER = "transformer_layer_config"


@pytest.mark.parametrize(
    ("case", "change", "problem"),
    [
        # Another target.
        ("zlab-dflash", put("hidden_size", 64), "the drafter is for another target: one of width 64, and target has"),
        ("zlab-dflash", put("vocab_size", 96), "the drafter is for another target: one of vocabulary 96, and target"),
        ("zlab-dflash", put("dflash_config.target_layer_ids", [1, 8]), "the drafter reads layer 8 of its target,"),
        ("zlab-dflash", put("dflash_config.mask_token_id", 64), "the mask is id 64, the target's vocabulary ends at 6"),
        ("speculators-dflash", put("aux_hidden_state_layer_ids", [1, 4, 8]), "the drafter reads the target's last"),
        ("speculators-dflash", put("aux_hidden_state_layer_ids", [0, 4, 7]), "has 0, the embedding's output, which"),
        ("speculators-dflash", put("aux_hidden_state_layer_ids", [1, 4, 4]), "taps must be different layers"),
        # Kinds and parts that are not supported.
        ("zlab-dflash", put("markov_rank", 8), "markov_rank is not supported for DFlash"),
        ("speculators-dspark", put("speculators_model_type", "eagle"), "is an EAGLE drafter of another kind than"),
        ("speculators-dspark", put("speculators_model_type", "mtp"), "'mtp' is not supported; supported: dflash"),
        ("speculators-dspark", put("markov_head_type", "lstm"), "markov_head_type 'lstm' is not supported; supported"),
        ("zlab-dflash", put("dflash_config.fc_layernorm", True), r"dflash_config\.fc_layernorm is not supported"),
        ("zlab-dflash", put("attn_output_gate", True), "attn_output_gate is not supported for DFlash"),
        ("zlab-dflash", put("quantization_config", {"bits": 4}), "quantised weights"),
        ("zlab-dflash", put("partial_rotary_factor", 0.5), r"partial_rotary_factor 0\.5 is not supported"),
        ("zlab-dflash", put("hidden_act", "gelu"), "hidden_act 'gelu' is not supported"),
        ("speculators-dflash", put(f"{LAYER}.model_type", "gemma3"), "model_type 'gemma3' is not supported"),
        # Tensors.
        ("zlab-dflash", tensor("mask_embedding", ZERO), r"\(1 unknown\); unknown: mask_embedding"),
        ("zlab-dflash", tensor("markov_head.markov_w1.weight", ZERO), r"unknown: markov_head\.markov_w1\.weight"),
        ("zlab-dflash", tensor("fc.weight"), r"\(1 missing\); missing: fc\.weight"),
        ("zlab-dflash2", put("architectures", ["DFlashDraftModel"]), r"unknown: candidate_selector\.hidden_projection"),
        ("zlab-dflash", put("architectures", ["DFlash2DraftModel"]), "conv_kernel_size is missing"),
        ("speculators-dspark", tensor("markov_head.markov_w1.weight"), r"missing: markov_head\.markov_w1\.weight"),
        ("speculators-dflash-reduced", tensor("d2t"), "d2t is missing: the ids of the reduced vocabulary"),
        ("speculators-dflash-reduced", tensor("d2t", np.arange(32) * 2), "what d2t gives must be 32 ascending ids of"),
        ("speculators-dflash-reduced", tensor("d2t", np.zeros(31, int)), r"d2t must be 32 whole numbers, got int64 \["),
        ("speculators-dflash-reduced", tensor("t2d", np.ones(64, bool)), "t2d and d2t are of different ids"),
        ("speculators-dflash-reduced", tensor("lm_head.weight"), r"missing: lm_head\.weight"),
        # Values.
        ("zlab-dflash2", put("dflash_config.selector_top_k", 65), "the selector chooses among 65 ids, more than"),
        ("zlab-dflash2", put("dflash_config.conv_group_size", 7), r"width \(32\) must be a multiple of conv_group \(7"),
        ("zlab-dflash2", put("dflash_config.conv_kernel_size", 0), "conv_kernel_size must be at least 1, got 0"),
        ("zlab-dflash2", put("dflash_config.selector_rank", None), "selector_rank is missing"),
        ("speculators-dflash2", put("draft_vocab_size", 32), "draft_vocab_size must be the target's 64 for dflash2"),
        ("zlab-dflash", put("dflash_config", [1]), r"dflash_config must be keys and values, got \[1\]"),
        ("zlab-dflash", put("dflash_config.mask_token_id", None), "mask_token_id is missing"),
        ("zlab-dflash", put("dflash_config.mask_token_id", "63"), "mask_token_id must be an integer, got '63'"),
        ("zlab-dflash", put("dflash_config.target_layer_ids", "1, 4"), "target_layer_ids must be numbers of layers, g"),
        ("zlab-dflash", put("block_size", 1), "block_size must be at least 2, got 1"),
        ("zlab-dflash", put("num_target_layers", None), "num_target_layers is missing"),
        ("zlab-dflash-sliding", put("layer_types", ["sliding_attention"]), "layer_types must be full_attention or sli"),
        ("zlab-dflash-sliding", put("sliding_window", 0), "sliding_window must be at least 1, got 0"),
        ("zlab-dflash-causal", put("is_causal", "no"), "is_causal must be true or false, got 'no'"),
        ("zlab-dflash-one-layer", put("dflash_config.output_multiplier", -1), "output_scale must be above 0"),
        ("speculators-dflash", put(LAYER, 3), f"{LAYER} must be keys and values, got 3"),
        ("speculators-dflash", put("draft_vocab_size", None), "draft_vocab 32000 is more than the target's 64 ids"),
        ("speculators-dspark-no-markov", put("confidence_head_with_markov", True), "confidence_head_with_markov must"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused_in_one_line(target, tmp_path, case, change, problem):
    folder = changed(case, tmp_path / "folder", change)
    with pytest.raises(InputError, match=rf"\A{folder}[^\n]*{problem}[^\n]*\Z"):
        deer_jax.load_drafter(folder, target=target)


@pytest.mark.parametrize("name", ["Qwen3DSparkModel", "MedusaModel", "XPressDraftModel"])
def test_other_drafters_are_named(target, tmp_path, name):
    def change(values, tensors):
        values.pop("dflash_config")
        values["architectures"] = [name]

    folder = changed("zlab-dflash", tmp_path / "folder", change)
    with pytest.raises(InputError, match=rf"\A{folder}: drafters of architecture {name} are not supported; "):
        deer_jax.load_drafter(folder, target=target)
    folder = changed("zlab-dflash", tmp_path / "nested", put("architectures", ["Qwen3DSparkModel"]))
    with pytest.raises(InputError, match=rf"\A{folder}: drafters of architecture Qwen3DSparkModel are not supported"):
        deer_jax.load_drafter(folder, target=target)


@pytest.mark.parametrize("name", ["LlamaForCausalLMEagle", "EagleModel"])
def test_an_earlier_eagle_is_said_to_be_of_another_kind(target, tmp_path, name):
    def change(values, tensors):
        values.pop("dflash_config")
        values |= {"architectures": [name]}

    folder = changed("zlab-dflash", tmp_path / "folder", change)
    with pytest.raises(InputError, match=rf"\A{folder}: is an EAGLE drafter of another kind than EAGLE-3"):
        deer_jax.load_drafter(folder, target=target)


def test_names_of_other_writers_are_read(target, tmp_path):
    """`model.` before all names, `.weight` behind the codebooks, the target's own tensors, and the flat keys."""

    def change(values, tensors):
        for key in list(tensors):
            tensors[f"model.{key}" + ".weight" * key.endswith("codebook")] = tensors.pop(key)
        tensors["model.embed_tokens.weight"] = tensors["model.lm_head.weight"] = ZERO

    folder = changed("speculators-dflash2", tmp_path / "prefixed", change)
    plain = deer_jax.load_drafter(GOLDEN / "speculators-dflash2", target=target)
    same_drafter(deer_jax.load_drafter(folder, target=target), plain)

    def flat(values, tensors):
        values |= values.pop("dflash_config")
        values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
        values["model_type"] = "llama"

    folder = changed("zlab-dflash2", tmp_path / "flat", flat)
    same_drafter(
        deer_jax.load_drafter(folder, target=target), deer_jax.load_drafter(GOLDEN / "zlab-dflash2", target=target)
    )


def test_speculators_llama_layers_are_those_of_qwen3(target, tmp_path):
    def change(values, tensors):
        values["transformer_layer_config"] |= {"model_type": "llama", "head_dim": None}
        del values["speculators_config"]

    folder = changed("speculators-dspark", tmp_path / "folder", change)
    plain = deer_jax.load_drafter(GOLDEN / "speculators-dspark", target=target)
    assert plain.method.taps == (0, 2)  # of the package's list 1 and 3, which begins with the embedding's output
    same_drafter(deer_jax.load_drafter(folder, target=target), plain)


def test_the_mask_is_no_ordinary_token_of_the_target(tmp_path):
    words = {f"w{i}": i for i in range(62)} | {"<mask>": 62}
    fast = Fast(models.WordLevel(words, unk_token="w0"))
    fast.add_special_tokens(["<mask>"])
    (tmp_path / "target").mkdir()
    fast.save(str(tmp_path / "target" / "tokenizer.json"))
    (tmp_path / "target" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = Tokenizer.load(tmp_path / "target")
    target = Target(config=TARGET, params=random_params(TARGET, scan=False), tokenizer=tokenizer)
    for mask in (62, 63):  # a special one, and one that no text becomes
        folder = changed("zlab-dflash", tmp_path / str(mask), put("dflash_config.mask_token_id", mask))
        drafter = deer_jax.load_drafter(folder, target=target)
        assert drafter.method.reading.mask == mask
        assert drafter.tokenizer is tokenizer
    folder = changed("zlab-dflash", tmp_path / "ordinary", put("dflash_config.mask_token_id", 61))
    with pytest.raises(InputError, match=r"the mask is id 61, an ordinary token of target \('w61'\), which texts"):
        deer_jax.load_drafter(folder, target=target)
