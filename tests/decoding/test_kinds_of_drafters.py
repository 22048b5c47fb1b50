"""What the loop promises holds for every kind of drafter and every head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax import decode
from deer_jax.build import Build
from deer_jax.config import Sampling
from deer_jax.decoding import programs
from deer_jax.decoding.engine import Engine
from deer_jax.drafters.drafter import Drafter, draft_scores
from deer_jax.drafters.heads import HEAD, Independent, Markov, PathSelector
from deer_jax.drafters.protocol import Row, Seen
from deer_jax.errors import NotFiniteError
from deer_jax.planning.hlo import Program
from tests.decoding.agreement import assert_greedy, assert_same_greedy
from tests.fast import representing
from tests.kinds import CONDITIONED, HEADED, KINDS, MASK, K, V, drafter_of, target_of, with_head

# Of one token, of one prefill pass and of several; more than slots.
LENGTHS, LIMITS, SLOTS = (1, 33, 5, 1, 16, 17, 40, 2), (24, 9, 30, 17, 40, 12, 26, 21), 3
CAPACITY = 32


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def plain(prompts):
    answers = decode(target_of(), prompts, max_new_tokens=LIMITS).tokens
    assert_greedy(target_of(), prompts, answers, LIMITS)
    return answers


@pytest.mark.accelerator
@pytest.mark.parametrize("kind", representing(KINDS, "selector reduced"))
def test_greedy_equals_plain(prompts, plain, kind, monkeypatch):
    monkeypatch.setattr(programs, "PREFILL_CHUNK", 16)
    result = decode(
        target_of(), prompts, drafter=drafter_of(kind), draft_length=K, max_new_tokens=LIMITS, batch_size=SLOTS
    )
    assert_same_greedy(target_of(), prompts, plain, result.tokens)
    assert result.stats.acceptance_length > 1  # some drafts are right, some wrong
    assert max(map(max, result.stats.accepted_histogram)) > 0


@functools.partial(jax.jit, static_argnums=0)
def drafted(method, params, shared, state, row):
    """What `pick` is given, float32 [B, K, V], and the drafter's state after it."""
    return draft_scores(method, params, shared, state, row, K)


def read_texts(drafter: Drafter, texts, count, garbage: float = 0.0):
    """The drafter's state when the target has read `count` tokens of texts int32 [B, S]; what else it holds is garbage,
    and so is what the target makes of the tokens behind them."""
    (B, S), method, width = texts.shape, drafter.method, target_of().config.width
    state = method.state(drafter.params, drafter.shared, B, CAPACITY, Build.of("cpu"))
    state = jax.tree.map(lambda x: x + garbage if x.ndim > 1 else x, state)
    tapped = np.random.default_rng(5).normal(size=(B, S, len(method.taps) * width)).astype(np.float32)
    tapped += garbage * (np.arange(S) >= np.array(count)[:, None])[..., None]
    seen = Seen(jnp.asarray(texts), jnp.asarray(tapped), jnp.zeros(B, jnp.int32), jnp.asarray(count))

    def observe(params, shared, state, seen):
        return method.observe(params, shared, state, seen._replace(first=True), jnp.arange(B))

    return jax.jit(observe)(drafter.params, drafter.shared, state, seen)


@pytest.mark.parametrize("kind", representing(CONDITIONED, "selector reduced"))
def test_nothing_behind_the_anchor_changes_a_draft(kind):
    """Bit for bit: tokens of another rejected draft, what the target read of it, and slots that hold nothing."""
    drafter, rng = drafter_of(kind), np.random.default_rng(2)
    texts = rng.integers(0, V, (3, 16)).astype(np.int32)
    length = np.array([1, 6, 13], np.int32)
    results = []
    for garbage in (0.0, 1e4):
        if garbage:
            texts = np.where(np.arange(16) < length[:, None], texts, rng.integers(0, V, texts.shape)).astype(np.int32)
        state = read_texts(drafter, texts, length - 1, garbage)
        row = Row(jnp.pad(texts, ((0, 0), (0, CAPACITY - 16)), constant_values=int(garbage)), length, jnp.arange(3))
        results.append(np.asarray(drafted(drafter.method, drafter.params, drafter.shared, state, row)[0]))
    np.testing.assert_array_equal(*results)
    # And what is before it does: a token only by what the target made of it.
    state = read_texts(drafter, texts, length - 1)
    moved = jax.tree.map(lambda x: jnp.concatenate([x[:, :, :, 1:], x[:, :, :, :1]], axis=3), state)
    other = np.asarray(drafted(drafter.method, drafter.params, drafter.shared, moved, row)[0])
    assert ((other != results[0]).any(axis=(1, 2)) == (length > 1)).all()


@pytest.mark.parametrize("kind", ["independent", "selector"])
def test_fewer_tokens_are_the_first_of_a_whole_draft(kind):
    """Masks see each other: with fewer of them than in training, the first ones would say something else."""
    drafter, texts = drafter_of(kind), np.random.default_rng(2).integers(0, V, (3, 16)).astype(np.int32)
    length = np.array([1, 6, 13], np.int32)
    arrays = drafter.params, drafter.shared, read_texts(drafter, texts, length - 1)
    row = Row(jnp.pad(texts, ((0, 0), (0, CAPACITY - 16))), jnp.asarray(length), jnp.arange(3))
    few, _ = jax.jit(functools.partial(draft_scores, drafter.method, k=2))(*arrays, row)
    np.testing.assert_allclose(few, drafted(drafter.method, *arrays, row)[0][:, :2], rtol=0, atol=1e-5)


def cost(drafter: Drafter, capacity: int) -> float:
    """Flops of the products of a draft of two rows, over a cache that is read at once."""
    method, build = drafter.method, Build.of("cpu")

    def propose(params, shared, row):
        state = method.state(params, shared, 2, capacity, build)
        return draft_scores(method, params, shared, dataclasses.replace(state, block=None), row, K)[0]

    tokens, length = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, capacity), (2,)))
    program = jax.jit(propose).lower(drafter.params, drafter.shared, Row(tokens, length, length)).compile()
    return Program(program.as_text()).whole().flops


def test_a_draft_costs_the_same_behind_any_context_but_for_attention():
    drafter = drafter_of("selector")
    short, long = 256, 4096
    shape, rows = drafter.method.shape, K + drafter.method.reading.first
    scores = 2 * shape.layers * shape.heads * rows * (long - short)
    assert cost(drafter, long) - cost(drafter, short) == scores * 2 * 2 * shape.head_width  # with keys, with values


@dataclasses.dataclass(frozen=True)
class States(Independent):
    """A head that shows states and scores, side by side, in place of its scores; nothing beside an anchor's state."""

    def draft(self, params, block, pick):
        scores = jnp.pad(block.scores, ((0, 0), (block.first, 0), (0, 0)))
        return pick(jnp.concatenate([block.hidden, scores], axis=-1), 0)


def path_of(head, weights, states, scores, anchor: int, ids):
    """float [k, V]: the scores along the greedy path, token by token, without a head's float [k, V'], of these ids.

    states: [n, D], of which the last k predict.
    """
    found, token, memory = [], anchor, np.zeros(getattr(head, "rank", 0))
    first = len(states) - len(scores)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for at, state in enumerate(states):
        row = np.zeros(len(ids)) if at < first else scores[at - first].astype(np.float64)
        if isinstance(head, PathSelector):
            few = np.argsort(-row, kind="stable")[: head.candidates]
            follows = weights["successor"][few] @ (weights["predecessor"][token] * (weights["projection"] @ state))
            row = np.array([row[i] + follows[few == i][0] if i in few else -np.inf for i in range(len(ids))])
        elif isinstance(head, Markov):
            features = weights["w1"][token]
            if head.form == "gated":
                gate = weights["gate"] @ np.concatenate([state, features]) + weights["gate_bias"]
                features = features * sigmoid(gate)
            if head.form == "rnn":
                joint = weights["joint"] @ np.concatenate([memory, features, state]) + weights["joint_bias"]
                gate, fresh, out = np.split(joint, 3)
                memory = sigmoid(gate) * memory + (1 - sigmoid(gate)) * np.tanh(fresh)
                features = np.tanh(out)
            row = row + weights["w2"] @ features
        if at >= first:
            found.append(np.full(V, -np.inf))
            found[-1][ids] = row
            token = int(found[-1].argmax())
    return np.stack(found)


@pytest.mark.parametrize("kind", representing((*HEADED, *CONDITIONED), "selector reduced"))
def test_scores_are_those_along_the_drafters_own_greedy_path(kind):
    drafter, texts = drafter_of(kind), np.random.default_rng(4).integers(0, V, (3, 16)).astype(np.int32)
    length = np.array([16, 2, 9], np.int32)
    state = read_texts(drafter, texts, length - 1)
    row = Row(jnp.pad(texts, ((0, 0), (0, CAPACITY - 16))), jnp.asarray(length), jnp.arange(3))

    def shown(drafter):
        return np.asarray(drafted(drafter.method, drafter.params, drafter.shared, state, row)[0])

    found, beneath = shown(drafter), shown(with_head(drafter, States()))
    first = beneath.shape[1] - K  # states of an anchor alone
    states, scores = np.split(beneath, [target_of().config.width], axis=-1)
    ids = np.asarray(drafter.shared.get("ids", np.arange(V)))
    weights = {name: np.asarray(weight, np.float64) for name, weight in drafter.params.get(HEAD, {}).items()}
    for b, at in enumerate(length - 1):
        path = path_of(drafter.method.head, weights, states[b], scores[b, first:], int(texts[b, at]), ids)
        np.testing.assert_allclose(found[b], path, rtol=0, atol=1e-4)
    differs = ids[scores[:, first:].argmax(axis=-1)] != found.argmax(axis=-1)
    assert differs.any() != ("independent" in kind)  # the head has a say


def test_draft_logits_are_those_of_a_draft():
    """Of a drafter that reads the target, behind texts that it has not read, one of them a single token."""
    drafter, target = drafter_of("rnn reduced"), target_of()
    for length in (1, 9):
        text = np.random.default_rng(4).integers(0, V, (2, length)).astype(np.int32)
        found = np.asarray(drafter.draft_logits(target, text[:, :-1], text[:, -1]))
        engine = Engine(target, drafter, K, Sampling(), 0, (), 2, 64)
        engine.admit(text.tolist(), [40, 40], range(2), range(2))
        expected, _ = drafted(drafter.method, drafter.params, drafter.shared, engine.state.drafter, engine.state.row)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


# Of each head's own weights, and of what all have; the confidence says nothing about a draft.
BROKEN = {
    "independent reduced": ["fc", "layers.0.q"],
    "selector": ["predecessor", "successor", "projection", "layers.0.attention_conv_base"],
    "vanilla": ["w1", "w2"],
    "gated": ["gate", "gate_bias"],
    "rnn": ["joint"],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_are_not_finite_end_a_decode_with_the_drafters_name(prompts, kind, monkeypatch):
    monkeypatch.setattr(programs, "PREFILL_CHUNK", 16)  # the programs of the greedy test
    drafter = drafter_of(kind)
    for name in BROKEN[kind]:
        path = name if name.split(".")[0] in drafter.params else f"{HEAD}.{name}"

        def spoil(at, x, path=path):
            found = ".".join(str(key.key) for key in at)
            return jnp.full_like(x, np.nan) if found == path else x

        broken = dataclasses.replace(drafter, params=jax.tree_util.tree_map_with_path(spoil, drafter.params))
        with pytest.raises(NotFiniteError, match=rf"drafter conditioned are not .* after 0 new .* not finite: {path}$"):
            decode(target_of(), prompts[:3], drafter=broken, draft_length=K, max_new_tokens=40)


def test_a_mask_that_is_not_finite_is_named_though_it_is_the_targets(prompts, monkeypatch):
    monkeypatch.setattr(programs, "PREFILL_CHUNK", 16)
    params = target_of().params
    broken = dataclasses.replace(target_of(), params=params | {"embed": params["embed"].at[MASK].set(np.nan)})
    texts = [[token % MASK for token in prompt] for prompt in prompts[:3]]
    with pytest.raises(NotFiniteError, match=r"drafter conditioned are not .* after 0 new .* not finite: embed$"):
        decode(broken, texts, drafter=drafter_of("independent", broken), draft_length=K, max_new_tokens=40)
