"""The standalone drafter: cached drafting against one explicit pass, what may see what, and vocabularies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax import DrafterConfig, InputError, Target, drafter_from_target
from deer_jax.config import Sampling
from deer_jax.decoding.engine import Engine
from deer_jax.drafters.drafter import draft_scores
from deer_jax.drafters.protocol import Row, Seen
from deer_jax.drafters.standalone import MASK, SEPARATOR, StandaloneMethod
from deer_jax.models.transformer import bind, unstack_layers
from tests import reference
from tests.fast import representing
from tests.tiny import HERE, random_params, tiny

V, K = 48, 3
SMALL = {"vocab_size": V, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 24}
MODES = [(attention, head) for attention in ("block_causal", "bidirectional") for head in ("shifted", "in_place")]


@pytest.fixture(scope="module")
def target() -> Target:
    config = tiny("qwen3", **SMALL)
    return Target(config=config, params=random_params(config, 5, scan=False))


def other_weights(drafter, seed: int = 99):
    """The drafter with weights that are not the target's."""
    weights = random_params(drafter.method.shape, seed, scan="q" in drafter.params["layers"])
    return dataclasses.replace(drafter, params=weights | {"special": drafter.params["special"]})


def full_pass(drafter, text, k: int):
    """One sequence as a drafter should read it: extended parameters, tokens, positions, visibility, and rows to read.

    Mask and separator are two more rows of the embedding, so that plain code for tokens reads them. text = p q r,
    k = 2: tokens p q r M M SEP at positions 0..5; causal up to r, then seeing all, or everything seeing all.
    """
    config, own = drafter.method.reading, drafter.method.shape.vocab_size
    known = [own + MASK if t >= own or t in config.differing_ids else t for t in text]
    tokens = np.array([known + [own + MASK] * k + [own + SEPARATOR] * config.separator])
    T, width = len(text), tokens.shape[1]
    visible = np.ones((width, width), bool)
    if config.attention == "block_causal":
        visible = np.tril(visible)
        visible[T:] = True
    first = T - 1 if config.head == "shifted" else T
    params = {name: value for name, value in drafter.params.items() if name != "special"}
    params["embed"] = jnp.concatenate([params["embed"], drafter.params["special"]])
    return params, tokens, np.arange(width)[None], visible[None], slice(first, first + k)


@functools.partial(jax.jit, static_argnames="config")
def _forward(config, params, tokens, positions, visible):
    model = bind(config, params)
    hidden, *_ = model(model.lookup(tokens), positions, visible=visible)
    return model.logits(hidden)


def from_scratch(drafter, text, k: int = K, size: int = 64) -> np.ndarray:
    """float32 [k, V'] of the drafter's own vocabulary: one pass without cache, padded by rows that nobody sees."""
    params, tokens, positions, visible, rows = full_pass(drafter, text, k)
    width = tokens.shape[1]
    pad = size - width
    hidden = np.pad(visible, ((0, 0), (0, pad), (0, pad)))
    hidden[:, range(size), range(size)] = True
    tokens, positions = (np.pad(x, ((0, 0), (0, pad))).astype(np.int32) for x in (tokens, positions))
    return np.asarray(_forward(drafter.method.shape, params, tokens, positions, hidden))[0, rows]


def texts(lengths, seed: int = 0, vocab_size: int = V):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


def drafted(drafter, text, k: int = K) -> np.ndarray:
    """float32 [k, V] of one text whose last token is the anchor, through the public method."""
    return np.asarray(drafter.draft_logits(HERE, np.array([text[:-1]], np.int32), np.array([text[-1]]), k))[0]


def finite(logits):
    return np.all(np.isfinite(logits), axis=0)


@functools.partial(jax.jit, static_argnames=("method", "k"))
def _draft(method, params, state, context, k):
    return draft_scores(method, params, {}, state, context, k)


@pytest.mark.parametrize("length", [1, 9])
def test_the_first_draft_of_an_untrained_drafter_is_the_targets(target, length):
    drafter = drafter_from_target(target)
    rows = np.array(texts([length] * 4))
    ours = np.asarray(drafter.draft_logits(target, rows[:, :-1], rows[:, -1], K))
    theirs = np.asarray(target.logits(rows))[:, -1]
    assert ours.shape == (4, K, V)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[:, 0], theirs, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ours[:, 0].argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize(
    ("attention", "head", "separator"),
    representing(
        [*((*mode, True) for mode in MODES), ("block_causal", "shifted", False), ("bidirectional", "in_place", False)],
        (*MODES[0], True),
    ),
)
def test_one_pass_equals_plain_numpy(target, attention, head, separator):
    config = DrafterConfig(attention=attention, head=head, separator=separator, draft_length=K)
    drafter = drafter_from_target(target, config)
    (text,) = texts([7], seed=3)
    params, tokens, positions, visible, rows = full_pass(drafter, text, K)
    model = dataclasses.replace(drafter.method.shape, vocab_size=V + 2)
    expected = reference.forward(model, params, tokens, positions, visible)[0, rows]
    np.testing.assert_allclose(from_scratch(drafter, text), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(drafted(drafter, text), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("attention", "head"), MODES)
def test_every_round_of_the_loop_drafts_as_from_scratch(target, attention, head):
    """Whatever was accepted, rejected or left in scratch slots before."""
    config = DrafterConfig(attention=attention, head=head, draft_length=K)
    drafter = drafter_from_target(target, config)
    prompts = texts((1, 8, 17))
    engine = Engine(target, drafter, K, Sampling(), 0, (), 3, 64)
    engine.admit(prompts, [len(prompt) + 14 for prompt in prompts], [0, 1, 2], [0, 1, 2])
    committed, rounds, done = [], 0, np.zeros(3, bool)
    while not done.all():
        logits, _ = _draft(drafter.method, drafter.params, engine.state.drafter, engine.state.row, K)
        tokens, length = np.asarray(engine.state.tokens), np.asarray(engine.state.length)
        for row in np.flatnonzero(~done):
            expected = from_scratch(drafter, tokens[row, : length[row]].tolist())
            np.testing.assert_allclose(logits[row], expected, rtol=0, atol=1e-4)
        after = engine.segment(1)
        committed += (after["length"] - length)[~done].tolist()
        done, rounds = after["done"], rounds + 1
    if attention == "block_causal" and head == "shifted":
        assert len(set(committed)) > 1  # rounds that kept much and rounds that kept little
    assert rounds > 3


@pytest.mark.parametrize(("attention", "head"), MODES)
def test_nothing_behind_the_anchor_counts(target, attention, head):
    """Committed tokens alone are read: another rejected draft, bit for bit the same logits and cache."""
    drafter = drafter_from_target(target, DrafterConfig(attention=attention, head=head, draft_length=K))
    method, capacity = drafter.method, 24
    text = np.array(texts([capacity] * 2), np.int32)
    length, rows = jnp.array([5, 9], jnp.int32), jnp.arange(2, dtype=jnp.int32)
    state = method.state(drafter.params, {}, 2, capacity, target.build)
    # All but two of the rows' tokens are read, and all but one: as after rounds that committed so many.
    count = length - jnp.array([2, 1], jnp.int32)
    seen = Seen(jnp.asarray(text[:, :8]), None, jnp.zeros(2, jnp.int32), count, first=True)
    state = jax.jit(lambda state: method.observe(drafter.params, {}, state, seen, rows))(state)
    changed = text.copy()
    for row in range(2):
        changed[row, length[row] :] = (changed[row, length[row] :] + 5) % V
    one, state_one = _draft(method, drafter.params, state, Row(jnp.asarray(text), length, rows), K)
    two, state_two = _draft(method, drafter.params, state, Row(jnp.asarray(changed), length, rows), K)
    np.testing.assert_array_equal(one, two)
    earlier = text.copy()
    earlier[:, 3] = (earlier[:, 3] + 1) % V
    if attention == "bidirectional":
        three, _ = _draft(method, drafter.params, state, Row(jnp.asarray(earlier), length, rows), K)
        assert (np.abs(one - three).max(axis=-1) > 1e-4).all()
        return
    assert state_one["read"].tolist() == state_two["read"].tolist() == length.tolist()
    for side in ("keys", "values"):
        for row in range(2):
            a, b = (getattr(s["cache"], side)[:, row, :, : int(length[row])] for s in (state_one, state_two))
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("attention", "head"), [("block_causal", "shifted"), ("bidirectional", "in_place")])
def test_masks_see_each_other_and_the_separator(target, attention, head):
    drafter = drafter_from_target(target, DrafterConfig(attention=attention, head=head, draft_length=K))
    (text,) = texts([6])
    base, special = drafted(drafter, text), drafter.params["special"]

    def with_special(row, drafter=drafter):
        changed = special.at[row].set(-special[row])
        return dataclasses.replace(drafter, params=drafter.params | {"special": changed})

    def differs(a, b):
        return np.abs(a - b).max(axis=-1) > 1e-4

    # With a causal prefix the anchor's own row sees neither masks nor separator.
    blind = [attention == "block_causal" and head == "shifted"] + [False] * (K - 1)
    for row in (MASK, SEPARATOR):
        np.testing.assert_array_equal(differs(base, drafted(with_special(row), text)), np.logical_not(blind))
    longer = drafted(drafter, text, K + 1)[:K]
    np.testing.assert_array_equal(differs(base, longer), np.logical_not(blind))

    config = dataclasses.replace(drafter.method.reading, separator=False)
    method = drafter.method
    assert isinstance(method, StandaloneMethod)
    without = dataclasses.replace(drafter, method=dataclasses.replace(method, reading=config))
    bare = drafted(without, text)
    np.testing.assert_array_equal(differs(base, bare), np.logical_not(blind))
    np.testing.assert_array_equal(drafted(with_special(SEPARATOR, without), text), bare)


@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
@pytest.mark.parametrize("own", [40, V, 56])
def test_vocabularies_of_other_widths_and_ids_that_differ(target, attention, own):
    """An id that the drafter does not share is never proposed, and read as a mask."""
    differing = (3, 7, 50)
    config = DrafterConfig(attention=attention, draft_length=K, differing_ids=differing)
    drafter = drafter_from_target(target, config)
    model = dataclasses.replace(target.config, vocab_size=own)
    method = drafter.method
    assert isinstance(method, StandaloneMethod)
    drafter = dataclasses.replace(drafter, method=dataclasses.replace(method, shape=model))
    drafter = other_weights(drafter)
    text = [1, 3, 45, 12, 7, 47, 20, 7]
    logits = drafted(drafter, text)
    assert logits.shape == (K, V)
    shared = np.array([t < own and t not in differing for t in range(V)])
    np.testing.assert_array_equal(finite(logits), shared)
    assert (logits[:, ~shared] == -np.inf).all()
    own_logits = from_scratch(drafter, text)
    assert own_logits.shape == (K, own)
    np.testing.assert_allclose(logits[:, shared], own_logits[:, :V][:, shared[:own]], rtol=0, atol=1e-4)
    # Between two ids that are both read as masks there is no difference to see.
    np.testing.assert_array_equal(drafted(drafter, [1, 7, *text[2:]]), logits)
    assert (drafted(drafter, [1, 8, *text[2:]])[:, shared] != logits[:, shared]).any()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_chosen_layers_in_the_given_order(family):
    config = tiny(family, **SMALL, layers=3)
    params = random_params(config, 5)
    (text,) = texts([5])
    layers, results = (2, 0), []
    for form in (params, unstack_layers(params, 3)):
        drafter = drafter_from_target(Target(config=config, params=form), layers=layers)
        assert drafter.method.shape.layers == len(layers)
        results.append(drafted(drafter, text))
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(results[0], from_scratch(drafter, text), rtol=0, atol=1e-4)
    for i, layer in enumerate(layers):
        for name, weight in params["layers"].items():
            np.testing.assert_array_equal(drafter.params["layers"][i][name], weight[layer])


@pytest.mark.parametrize("layers", [(), (0, 2), (-1,)])
def test_layers_that_do_not_exist(target, layers):
    with pytest.raises(InputError, match=r"the target has layers 0\.\.1"):
        drafter_from_target(target, layers=layers)


def test_bad_tokens_and_configurations(target):
    drafter = drafter_from_target(target)
    for prefix, anchor in (([[1, V]], [0]), ([[1]], [V]), ([[-1]], [0])):
        with pytest.raises(InputError, match="outside the vocabulary of 48"):
            drafter.draft_logits(target, prefix, anchor)
    for field, value in (("attention", "causal"), ("head", "left"), ("draft_length", 0)):
        with pytest.raises(InputError, match=field):
            DrafterConfig(**{field: value})


def test_a_drafter_without_prefix_takes_the_default_length(target):
    drafter = drafter_from_target(target, DrafterConfig(draft_length=2))
    logits = drafter.draft_logits(target, np.zeros((2, 0), np.int32), [1, 5])
    assert logits.shape == (2, 2, V)
    np.testing.assert_allclose(logits[0], from_scratch(drafter, [1], 2), rtol=0, atol=1e-4)
