"""EAGLE-3: against plain NumPy that computes the whole text anew, against the package speculators, in folders."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import deer_jax
from deer_jax.checkpoints.drafters import save_drafter
from deer_jax.drafters.eagle3 import Eagle3Method, default_taps, eagle3_drafter
from deer_jax.drafters.protocol import Draft, Row, Seen
from deer_jax.drafters.tapped import TappedReading
from deer_jax.errors import InputError
from deer_jax.models.layers import logits
from deer_jax.models.target import Target
from deer_jax.training.objectives import read_text
from tests import reference
from tests.fast import representing
from tests.kinds import EAGLE, K, V, drafter_of, target_of
from tests.tiny import random_params, tiny

GOLDEN = Path(__file__).parent / "golden"
CASES = ("eagle3", "eagle3-normed", "eagle3-residual")


def scores_of(drafter, tokens, tapped, following=None):
    """float [K, V]: the twin's scores behind a text, along its own greedy chain, or along the tokens that are given."""
    embed, head = (np.asarray(drafter.shared[name], np.float64) for name in ("embed", "head"))
    ids = np.asarray(drafter.shared.get("ids", np.arange(len(embed))))
    found, chain = np.full((K, len(embed)), -np.inf), []
    for j in range(K):
        # The whole text anew, with all that is drafted so far.
        found[j, ids] = reference.eagle3(drafter.method.shape, drafter.params, embed, tokens, tapped, chain) @ head.T
        chain.append(int(found[j].argmax()) if following is None else int(following[j]))
    return found


@pytest.mark.parametrize("kind", EAGLE)
def test_the_drafted_chain_equals_plain_numpy_that_computes_the_whole_text_anew(kind):
    """Behind one token, and behind many."""
    drafter, target = drafter_of(kind), target_of()
    for length in (1, 9):
        text = np.random.default_rng(length).integers(0, V, (2, length)).astype(np.int32)
        found = np.asarray(drafter.draft_logits(target, text[:, :-1], text[:, -1]))
        read = read_text(target.config, target.params, text, drafter.method.taps).tapped
        for b in range(2):
            expected = scores_of(drafter, text[b], np.asarray(read)[b, : length - 1])
            np.testing.assert_allclose(found[b], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", EAGLE)
def test_every_step_of_training_equals_plain_numpy(kind):
    """Chains behind every anchor, on the text's own tokens; the target's later states are not seen."""
    drafter, target = drafter_of(kind), target_of()
    text = np.random.default_rng(3).integers(0, V, (1, 10)).astype(np.int32)
    read = np.asarray(read_text(target.config, target.params, text, drafter.method.taps).tapped)
    scores = trained(drafter, text, read, np.arange(10 - K)[None], K)
    ids = np.asarray(drafter.shared.get("ids", np.arange(V)))
    for anchor in range(10 - K):
        for garbage in (0.0, 1e4):
            seen = read[0] + garbage * (np.arange(10) >= anchor)[:, None]
            expected = scores_of(drafter, text[0, : anchor + 1], seen[:anchor], text[0, anchor + 1 :])
            np.testing.assert_allclose(scores[0, anchor], expected[:, ids], rtol=0, atol=1e-4)
        spoiled = read + 1e4 * (np.arange(10) >= anchor)[None, :, None]
        again = trained(drafter, text, spoiled, np.arange(10 - K)[None], K)
        np.testing.assert_array_equal(again[0, anchor], scores[0, anchor])


def trained(drafter, text, read, anchor, width: int) -> np.ndarray:
    """float32 [B, M, W, V']: what training says behind anchors int [B, M]."""
    return np.asarray(_trained(drafter.method, width, drafter.params, drafter.shared, text, read, anchor))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trained(method, width, params, shared, text, read, anchor):
    shape = (*anchor.shape, width)
    batch = {"tokens": text, "anchor": anchor, "masked": jnp.ones(shape, bool), "weight": jnp.ones(shape)}
    (term,) = method.predict(params, shared, batch, read, "none").terms
    return logits(term.features, term.table).reshape(*shape, -1)


def target_for(given, layers: int = 8) -> Target:
    """A target with the embedding of a golden file; its layers and its head are of no account."""
    config = tiny("qwen3", vocab_size=len(given["embedding"]), layers=layers, mlp_width=16)
    params = random_params(config, scan=False) | {"embed": jnp.asarray(given["embedding"])}
    return Target(config=config, params=params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def drafted(method, build, params, shared, text, states, length, following):
    """What `pick` is given in drafts behind texts, float32 [R, k, V'], if `following` is picked."""
    (R, T), k, found = text.shape, method.draft_length, []

    def pick(scores, first, ids=None):
        found.append(scores)
        return Draft(following[:, first : first + 1], None)

    state = method.state(params, shared, R, T + k + 1, build)
    seen = Seen(text, states, jnp.zeros_like(length), length - 1, first=True)
    state = method.observe(params, shared, state, seen, jnp.arange(R))
    method.propose(params, shared, state, Row(text, length, jnp.arange(R)), k, pick)
    return jnp.concatenate(found, axis=1)


@pytest.mark.parametrize("case", representing(CASES, "eagle3-normed"))
def test_features_to_logits_of_every_step_equal_those_of_the_package(case):
    """In training and in drafts, on the same tokens. Our texts have the token before the package's first pair."""
    given = dict(np.load(GOLDEN / case / "golden.npz"))
    drafter = deer_jax.load_drafter(GOLDEN / case, target=target_for(given), dtype="float32")
    method, text, states = drafter.method, given["tokens"][None], given["states"][None]
    assert isinstance(method, Eagle3Method)
    assert method.taps == (1, 3, 4)
    np.testing.assert_array_equal(drafter.shared["head"], given["head"])
    theirs = given["logits"]  # [steps, places, V']; step j of place t says the token at t + 2 + j
    steps, places = theirs.shape[:2]
    anchors = np.arange(1, places + 1 - steps + 1)
    ours = trained(drafter, text, states, anchors[None], steps)[0]
    expected = np.stack([theirs[:, anchor - 1] for anchor in anchors])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    following = np.stack([text[0, anchor + 1 : anchor + 1 + steps] for anchor in anchors[:-1]])
    rows = [np.repeat(x, len(following), axis=0) for x in (text, states)]
    length = anchors[:-1].astype(np.int32) + 1
    drafts = drafted(method, target_of().build, drafter.params, drafter.shared, *rows, length, following)
    np.testing.assert_allclose(drafts, expected[:-1], rtol=0, atol=1e-4)


def draft_of(drafter, target) -> np.ndarray:
    text = np.random.default_rng(1).integers(0, target.config.vocab_size, (2, 7))
    return np.asarray(drafter.draft_logits(target, text[:, :-1], text[:, -1], draft_length=3))


def with_own_head(target: Target, ids=None, **shape):
    """A drafter as a public folder may give it: with a head that is not the target's."""
    taps = default_taps(target.config.layers)
    reading = TappedReading(taps=taps, draft_length=3, draft_vocab=None if ids is None else len(ids))
    drafter = eagle3_drafter(target, reading, ids=ids, **shape)
    head = np.random.default_rng(2).normal(size=drafter.shared["head"].shape).astype(np.float32)
    return dataclasses.replace(drafter, shared=drafter.shared | {"head": jnp.asarray(head)})


@pytest.mark.parametrize(
    ("layout", "ids", "shape"),
    [
        ("deer_jax", (1, 4, 7, 30), {"norm_output": True}),
        ("eagle3", (1, 4, 7, 30), {}),
        ("eagle3", None, {"mlp_width": 24}),
        ("speculators", (0, 2, 3), {"norm_residual": True}),
        ("speculators", None, {"family": "qwen3", "qk_norm": True, "norm_tapped": True, "norm_output": True}),
    ],
)
def test_a_saved_folder_gives_the_same_drafts(layout, ids, shape, tmp_path):
    target = target_for({"embedding": np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)})
    drafter = with_own_head(target, ids, **shape)
    save_drafter(tmp_path / "drafter", drafter, layout=layout, target=target)
    again = deer_jax.load_drafter(tmp_path / "drafter", target=target, dtype="float32")
    np.testing.assert_array_equal(draft_of(again, target), draft_of(drafter, target))
    keys = load_file(tmp_path / "drafter" / "model.safetensors").keys()
    assert ("midlayer.self_attn.q_proj.weight" in keys) == (layout == "eagle3")
    assert "lm_head.weight" in keys
    assert ("d2t" in keys) == (ids is not None and layout != "deer_jax")


def test_a_folder_with_the_targets_embedding_in_it_loads(tmp_path):
    """Its own rows are not read: EAGLE-3 keeps them frozen."""
    target = target_for({"embedding": np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)})
    drafter = with_own_head(target)
    options: Any = {"layout": "eagle3", "target": target}
    save_drafter(tmp_path / "a", drafter, **options)
    from safetensors.numpy import save_file

    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["embed_tokens.weight"] = np.zeros((32, 32), np.float32)
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    again = deer_jax.load_drafter(tmp_path / "a", target=target, dtype="float32")
    np.testing.assert_array_equal(draft_of(again, target), draft_of(drafter, target))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc_norm": True}, "fc_norm is not supported for EAGLE-3"),
        ({"transformer_layer_config": {"num_hidden_layers": 2}}, "one layer with one MLP, got 2 layers"),
        ({"transformer_layer_config": {"attention_bias": True}}, "attention_bias is not supported for EAGLE-3"),
        ({"transformer_layer_config": {"model_type": "gpt_oss"}}, "model_type 'gpt_oss' is not supported"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}, "has 0, the embedding's output"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 8]}, "reads the target's last layer"),
        ({"target_hidden_size": 64}, "target_hidden_size 64 is not supported"),
        ({"speculators_model_type": "peagle"}, "EAGLE drafter of another kind than EAGLE-3"),
        ({"draft_vocab_size": 31}, "do not fit config.json|d2t must be 31"),
    ],
)
def test_a_folder_that_is_not_supported_is_refused_by_name(changes, message, tmp_path):
    folder = shutil.copytree(GOLDEN / "eagle3", tmp_path / "drafter")
    values = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(values))
    given = dict(np.load(GOLDEN / "eagle3" / "golden.npz"))
    with pytest.raises(InputError, match=message):
        deer_jax.load_drafter(folder, target=target_for(given))


def test_a_drafter_that_a_layout_cannot_say_is_refused(tmp_path):
    target = target_for({"embedding": np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)})
    other = eagle3_drafter(target, TappedReading(taps=(0, 2, 3)))
    for layout, drafter, message in (
        ("eagle3", with_own_head(target, norm_output=True), "norm_output cannot be said in this layout"),
        ("eagle3", with_own_head(target, family="qwen3", qk_norm=True), "norms of queries and keys"),
        ("eagle3", other, r"taps \[0, 2, 3\] cannot be said in this layout, only \[1, 3, 4\]"),
        ("dflash", with_own_head(target), "an EAGLE-3 drafter cannot be said in this layout"),
    ):
        with pytest.raises(InputError, match=message):
            save_drafter(tmp_path / layout, drafter, layout=layout, target=target)
