"""Drafters in and out of folders: our own layout, open-dCoder's, and the target's weights."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Fast
from tokenizers import models

import deer_jax
from deer_jax.checkpoints.drafters import drafter_shapes
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.config import DrafterConfig
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.drafters.heads import HEAD, Independent, Markov, PathSelector
from deer_jax.errors import InputError
from deer_jax.sharding import make_mesh
from tests import kinds
from tests.fast import representing
from tests.tiny import random_params, tiny

V, MASK = 40, 30


def write_tokenizer(folder, words):
    folder.mkdir(exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(words)}
    Fast(models.WordLevel(vocabulary, unk_token=words[0])).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def words(**named):
    """One word per id; keywords rename some, as in w3="<M>"."""
    return [named.get(f"w{i}", f"w{i}") for i in range(V)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target, a public-layout drafter whose mask id is a word of the target, and folders that are no drafter."""
    root = tmp_path_factory.mktemp("folders")
    plain = write_tokenizer(root / "plain_words", words())
    masked = write_tokenizer(root / "masked_words", words(w30="<M>"))
    config = tiny("qwen3", vocab_size=V)
    save_folder(root / "target", config, random_params(config), tokenizer_source=plain, stop_ids=[1])
    config = tiny("qwen2", vocab_size=V + 8)  # padding rows, as public folders have
    save_folder(root / "public", config, random_params(config, 1), tokenizer_source=masked)
    save_folder(root / "no_drafter", config, random_params(config, 1), tokenizer_source=plain)
    other = write_tokenizer(root / "other_words", words(w7="different", w9="too"))
    save_folder(root / "stranger", config, random_params(config, 1), tokenizer_source=other)
    return root


@pytest.fixture(scope="module")
def target(folders):
    return deer_jax.load_target(folders / "target")


def test_the_public_layout_drafts_losslessly_and_never_its_mask(folders, target):
    drafter = deer_jax.load_drafter(folders / "public", target=target)
    config = drafter.method.reading
    assert (config.attention, config.head, config.separator) == ("bidirectional", "shifted", False)
    assert config.differing_ids == (MASK,)
    np.testing.assert_array_equal(drafter.params["special"][0], drafter.params["embed"][MASK])
    logits = np.asarray(drafter.draft_logits(target, [[3, MASK, 5]], [7], 4))
    assert logits.shape == (1, 4, V)
    assert np.isneginf(logits[..., MASK]).all()
    assert np.isfinite(np.delete(logits, MASK, axis=-1)).all()
    prompts = [[3, MASK, 5, 7], [2]]
    plain = deer_jax.decode(target, prompts, max_new_tokens=12)
    assert deer_jax.decode(target, prompts, drafter=drafter, draft_length=4, max_new_tokens=12).tokens == plain.tokens


@pytest.mark.parametrize("dtype", representing(["float32", "bfloat16"], "float32"))
def test_saving_and_loading_a_drafter_is_exact(folders, target, tmp_path, dtype):
    config = DrafterConfig(attention="bidirectional", head="in_place", draft_length=3, differing_ids=(4, 9))
    drafter = deer_jax.drafter_from_target(deer_jax.load_target(folders / "target", dtype=dtype), config, layers=(1,))
    deer_jax.save_drafter(tmp_path / "drafter", drafter)
    again = deer_jax.load_drafter(tmp_path / "drafter", target=target, dtype=dtype)
    assert again.method == drafter.method
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), again.params, drafter.params))
    assert isinstance(again.tokenizer, Tokenizer)


def with_head(target, head):
    return kinds.standalone(target, DrafterConfig(draft_length=3), head)


@pytest.mark.parametrize(
    "head",
    [Markov(rank=3, form="gated", has_confidence=True), PathSelector(rank=2), Independent(has_confidence=True)],
)
def test_a_head_is_written_and_read_with_its_drafter(target, tmp_path, head):
    drafter = with_head(target, head)
    deer_jax.save_drafter(tmp_path / "drafter", drafter)
    again = deer_jax.load_drafter(tmp_path / "drafter", target=target)
    assert again.method == drafter.method
    assert again.params.keys() == drafter.params.keys()
    jax.tree.map(np.testing.assert_array_equal, again.params, drafter.params)
    # How it reads may be said anew; its head stays what it is.
    config, other = DrafterConfig(draft_length=2), DrafterConfig(attention="bidirectional")
    assert deer_jax.load_drafter(tmp_path / "drafter", target=target, config=config).method.head == head
    with pytest.raises(InputError, match=r"\A[^\n]*drafter: a drafter whose attention is bidirectional [^\n]*\Z"):
        deer_jax.load_drafter(tmp_path / "drafter", target=target, config=other)


def test_a_head_lies_on_a_mesh_as_its_axes_say(folders, target, tmp_path):
    drafter, mesh = with_head(target, Markov(rank=4)), make_mesh(2, 2, 2)
    deer_jax.save_drafter(tmp_path / "drafter", drafter)
    spread = deer_jax.load_drafter(tmp_path / "drafter", target=deer_jax.load_target(folders / "target", mesh=mesh))
    for name, like in drafter_shapes(spread.method, mesh)[HEAD].items():
        found = spread.params[HEAD][name]
        assert found.sharding.is_equivalent_to(like.sharding, found.ndim)
        np.testing.assert_array_equal(found, drafter.params[HEAD][name])


@pytest.mark.parametrize(
    ("section", "tensors", "problem"),
    [
        ({"kind": "eagle"}, {}, "deer_jax: draft_head: kind must be one of none, selector, markov, got 'eagle'"),
        (7, {}, "deer_jax: draft_head must be keys and values, got 7"),
        ({"kind": "markov", "rnk": 3}, {}, "deer_jax: draft_head: unknown key 'rnk', did you mean 'rank'?"),
        ({"kind": "selector", "candidates": 41}, {}, "the selector chooses among 41 ids, more than the vocabulary of"),
        ({}, {"w1": None}, "missing: deer_jax.draft_head.w1"),
        ({}, {"w2": (4, 3)}, "deer_jax.draft_head.w2"),
        ({}, {"w3": (4, 3)}, "unknown: deer_jax.draft_head.w3"),
        (None, {}, "unknown: deer_jax.draft_head.w1"),
    ],
)
def test_damaged_heads_are_named(target, tmp_path, section, tensors, problem):
    deer_jax.save_drafter(tmp_path / "drafter", with_head(target, Markov(rank=3)))
    path, weights = tmp_path / "drafter" / "config.json", tmp_path / "drafter" / "model.safetensors"
    values, found = json.loads(path.read_text()), load_file(weights)
    if section is None:
        del values["deer_jax"]["draft_head"]
    elif section:
        values["deer_jax"]["draft_head"] = section
    path.write_text(json.dumps(values))
    for name, shape in tensors.items():
        found.pop(f"deer_jax.draft_head.{name}", None)
        if shape:
            found[f"deer_jax.draft_head.{name}"] = np.zeros(shape, np.float32)
    save_file(found, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"\A[^\n]*drafter[^\n]*{re.escape(problem)}"):
        deer_jax.load_drafter(tmp_path / "drafter", target=target)


def test_transformers_reads_a_saved_drafter(folders, target, tmp_path):
    """The backbone is that of a stock model; mask and separator are one tensor more."""
    transformers = pytest.importorskip("transformers")
    drafter = deer_jax.load_drafter("from-target:0", target=target)
    deer_jax.save_drafter(tmp_path / "drafter", drafter)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "drafter")
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach().numpy(), drafter.params["embed"])


def test_layers_are_taken_as_listed(target):
    drafter = deer_jax.load_drafter("from-target:1,0", target=target)
    assert drafter.method.shape.layers == 2
    np.testing.assert_array_equal(drafter.params["layers"][0]["q"], target.params["layers"][1]["q"])
    for wrong, message in (
        ("from-target:2", "layers 0..1"),
        ("from-target:a", "from-target:a: expected layer numbers"),
    ):
        with pytest.raises(InputError, match=message):
            deer_jax.load_drafter(wrong, target=target)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_targets_weights_are_cast_on_request(target, dtype):
    drafter = deer_jax.load_drafter("from-target:0", target=target, dtype=dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(drafter.params)} == {dtype}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(target.params)} == {"float32"}
    with pytest.raises(InputError, match="dtype must be bfloat16 or float32, got 'int8'"):
        deer_jax.load_drafter("from-target:0", target=target, dtype="int8")


@pytest.mark.parametrize("ids", [None, 4, "4", [4.0], [-1]])
def test_differing_ids_of_a_folder_are_checked(target, tmp_path, ids):
    deer_jax.save_drafter(tmp_path / "drafter", deer_jax.load_drafter("from-target:0", target=target))
    path = tmp_path / "drafter" / "config.json"
    values = json.loads(path.read_text())
    values["deer_jax"]["differing_ids"] = ids
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"\A[^\n]*deer_jax: differing_ids must be token ids[^\n]*\Z"):
        deer_jax.load_drafter(tmp_path / "drafter", target=target)


def test_no_drafter_and_another_tokenizer_are_refused(folders, target, tmp_path):
    with pytest.raises(InputError, match=r"no drafter: config\.json has no 'deer_jax' section"):
        deer_jax.load_drafter(folders / "no_drafter", target=target)
    # The same folder with a section: now its tensors are what is wrong.
    folder = shutil.copytree(folders / "no_drafter", tmp_path / "section")
    path = folder / "config.json"
    values = json.loads(path.read_text())
    section = {"attention": "block_causal", "head": "shifted", "separator": True, "draft_length": 4}
    path.write_text(json.dumps(values | {"deer_jax": section | {"atention": 1}}))
    with pytest.raises(InputError, match="unknown key 'atention', did you mean 'attention'"):
        deer_jax.load_drafter(folder, target=target)
    path.write_text(json.dumps(values | {"deer_jax": section}))
    with pytest.raises(InputError, match=r"missing: deer_jax\.mask_and_separator"):
        deer_jax.load_drafter(folder, target=target)
    with pytest.raises(InputError, match="differ at id 7"):
        deer_jax.load_drafter(folders / "stranger", target=target, config=DrafterConfig())


def test_a_plain_model_becomes_a_drafter_by_saying_how_it_reads(folders, target):
    config = DrafterConfig(draft_length=3)
    drafter = deer_jax.load_drafter(folders / "no_drafter", target=target, config=config)
    assert drafter.method.reading == config
    embed = np.asarray(drafter.params["embed"])
    special = np.asarray(drafter.params["special"])
    assert np.abs(special - embed.mean(axis=0)).max() < embed.std()
    # A public folder keeps its mask and the ids that its tokenizer names otherwise.
    drafter = deer_jax.load_drafter(folders / "public", target=target, config=config)
    assert drafter.method.reading == dataclasses.replace(config, differing_ids=(MASK,))
    np.testing.assert_array_equal(drafter.params["special"][0], drafter.params["embed"][MASK])


def test_wrong_arguments_say_what_to_call(folders, target):
    with pytest.raises(InputError, match=r"\Atarget must be a loaded one, as in load_target\('a/b'\), got 'a/b'\Z"):
        deer_jax.load_drafter(folders / "public", target="a/b")
    with pytest.raises(InputError, match=r"\Aconfig must be a DrafterConfig, got {'draft_length': 4}\Z"):
        deer_jax.load_drafter(folders / "public", target=target, config={"draft_length": 4})
    with pytest.raises(InputError, match=r"\A[^\n]*runs/mine: no such folder here[^\n]*hub:runs/mine\Z"):
        deer_jax.load_drafter("runs/mine", target=target)


def test_a_drafter_prints_as_one_line(folders, target):
    assert repr(deer_jax.load_drafter("from-target:0", target=target)) == (
        "Drafter(from-target:0: block_causal, draft length 8, qwen3, 1 layers of width 32, 40 tokens, "
        "context 256, float32)"
    )


def test_a_mask_beyond_the_vocabulary_is_refused(folders, target, tmp_path):
    folder = tmp_path / "small"
    config = tiny("qwen2", vocab_size=MASK)
    save_folder(folder, config, random_params(config), tokenizer_source=folders / "masked_words")
    with pytest.raises(InputError, match=r"\A[^\n]*<M> is id 30, the vocabulary ends at 29\Z"):
        deer_jax.load_drafter(folder, target=target)


def test_the_first_differing_token_is_named(folders, target, tmp_path):
    drafter = deer_jax.drafter_from_target(target)
    deer_jax.save_drafter(tmp_path / "drafter", drafter)
    (tmp_path / "drafter" / "tokenizer.json").write_bytes((folders / "other_words" / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match="differ at id 7: 'w7' for the target, 'different' for the drafter"):
        deer_jax.load_drafter(tmp_path / "drafter", target=target)
