"""Sampled decoding with a drafter has the target's own joint distribution, and the test would notice if it had not.

Many rows of one prompt are independent samples (the prompt's number is part of every key). Their first n >= k + 2
tokens, which span at least two rounds, are compared with the exact probabilities of all sequences.
"""

import dataclasses
import functools
from collections import Counter
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from deer_jax import DrafterConfig, Target, decode, drafter_from_target
from deer_jax.decoding import accept, loop, programs, sampling
from deer_jax.decoding.sampling import ACCEPT, DRAFT, RESAMPLE, log_probabilities
from deer_jax.drafters.heads import INDEPENDENT, Markov, PathSelector
from deer_jax.drafters.prompt_lookup import lookup_first
from tests import kinds
from tests.decoding.processed import processed
from tests.doubles import anchor_drafter, stepwise_drafter, table_drafter
from tests.fast import representing
from tests.kinds import Kind, conditioned, eagle3
from tests.tiny import random_params, tiny

ROWS = 16384
accept_q_at = accept.q_at  # itself, where a mistake stands in its place
LEVEL = 1e-4  # chance of a false alarm over all comparisons of this file
SEED = 11


def make_target(V: int, seed: int = 3, stop_ids=()) -> Target:
    config = tiny("qwen3", vocab_size=V, width=16, heads=2, kv_heads=1, head_width=4, mlp_width=16)
    return Target(config=config, params=random_params(config, seed, scan=False), stop_ids=stop_ids)


def standalone(target: Target, attention: str, head: str = "shifted"):
    """A standalone drafter that knows nothing of the target."""
    drafter = drafter_from_target(target, DrafterConfig(attention=attention, head=head, draft_length=3))
    weights = random_params(target.config, 77, scan=False) | {"special": drafter.params["special"]}
    return dataclasses.replace(drafter, params=weights)


def draft_logits(target: Target) -> np.ndarray:
    V = target.config.vocab_size
    logits = 1.5 * np.random.default_rng(5).normal(size=(V, 3, V))
    logits[..., -1] += 1  # a favourite: many rejections, behind which the other tokens are drawn again
    return logits


def fixed_logits(target: Target, label: str = ""):
    return anchor_drafter(draft_logits(target), label)


def few_logits(target: Target, label: str = ""):
    """Draws from three of the ids, not always the same."""
    return anchor_drafter(draft_logits(target), label, candidates=3)


def reading(target: Target, head=INDEPENDENT, layout="next_token", *, reduced=True):
    """A drafter that reads the target; it never proposes the last id, its mask, and if reduced not the first."""
    ids = range(1, target.config.vocab_size)
    return conditioned(target, Kind(head, layout, reduced), ids=ids, k=3)


def headed(target: Target, head):
    """A standalone drafter with a head."""
    return kinds.standalone(target, DrafterConfig(draft_length=3), head)


def eagle(target: Target, kind="eagle3 reduced"):
    """EAGLE-3; reduced it never proposes the first id."""
    return eagle3(target, kind, ids=range(1, target.config.vocab_size), k=3)


def by_position(target: Target, *, chained: bool):
    return stepwise_drafter(draft_logits(target), chained=chained)


def fixed_tokens(target: Target):
    """The same certain tokens for every row, likely ones and others."""
    return table_drafter(np.tile(np.arange(9) % target.config.vocab_size, (ROWS, 1)), target.config.vocab_size)


def lookup_first_of(target: Target, drafter):
    """Copies where the last token stands earlier, and drafts elsewhere; both happen in most texts of so few ids."""
    return lookup_first(drafter(target), longest=1)


def exact(target: Target, prompt, n: int, temperature: float, top_k: int = 0, top_p: float = 1.0):
    """Probability of every sequence of n tokens, or of fewer that end with a stop id."""
    V = target.config.vocab_size
    texts = np.array(list(np.ndindex(*(V,) * (n - 1))), np.int32)
    logits = np.asarray(target.logits(np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)))
    found = {}

    def extend(sequence: tuple[int, ...], probability: float):
        if len(sequence) == n or (sequence and sequence[-1] in target.stop_ids):
            found[sequence] = probability
            return
        padded = sequence + (0,) * (n - 1 - len(sequence))
        row = np.ravel_multi_index(padded, (V,) * (n - 1))
        step = processed(logits[row, len(prompt) - 1 + len(sequence)], temperature, top_k, top_p)
        for token in range(V):
            extend((*sequence, token), probability * step[token])

    extend((), 1.0)
    return found


def p_value(sequences, expected: dict[tuple[int, ...], float]) -> float:
    """G-test of observed sequences; outcomes expected fewer than five times are pooled, impossible ones are 0."""
    counts = Counter(map(tuple, sequences))
    total = sum(counts.values())
    if any(expected[outcome] == 0 for outcome in counts):
        return 0.0
    cells = sorted((total * p, counts.get(outcome, 0)) for outcome, p in expected.items() if p > 0)
    wanted, seen = map(np.array, zip(*cells, strict=True))
    rare = int((wanted < 5).sum())
    while rare and rare < len(wanted) and wanted[:rare].sum() < 5:
        rare += 1
    if rare:
        wanted = np.concatenate([[wanted[:rare].sum()], wanted[rare:]])
        seen = np.concatenate([[seen[:rare].sum()], seen[rare:]])
    assert len(wanted) > 5
    G = 2 * np.sum(seen * np.log(np.maximum(seen, 1) / wanted))
    return float(stats.chi2.sf(G, len(wanted) - 1))


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch):
    """Thousands of rows of a few tokens: buffers as short as can be, which is where off-by-one writes show too."""
    monkeypatch.setattr(programs, "bucket", lambda n, least: n)


@dataclasses.dataclass(frozen=True)
class Case:
    """V, k, n, the drafter by name, settings. Cases that differ by numbers alone share one program."""

    V: int
    k: int
    drafter: Any
    settings: dict
    n: int = 0
    prompt: tuple[int, ...] = (1,)
    stop_ids: tuple[int, ...] = ()

    def decode(self, label: str | None = None) -> list[list[int]]:
        target = make_target(self.V, stop_ids=self.stop_ids)
        drafter = self.drafter(target, *(() if label is None else (label,))) if self.drafter else None
        return decode(
            target, [list(self.prompt)] * ROWS, drafter=drafter, draft_length=self.k if drafter else None,
            max_new_tokens=self.n or self.k + 2, batch_size=ROWS, seed=SEED, **self.settings,
        ).tokens  # fmt: skip

    def p_value(self, label: str | None = None) -> float:
        tokens, target = self.decode(label), make_target(self.V, stop_ids=self.stop_ids)
        cuts = {name: self.settings[name] for name in ("temperature", "top_k", "top_p") if name in self.settings}
        assert len(tokens) == ROWS
        return p_value(tokens, exact(target, self.prompt, self.n or self.k + 2, **cuts))


CAUSAL = functools.partial(standalone, attention="block_causal")
BIDIRECTIONAL = functools.partial(standalone, attention="bidirectional")
SELECTOR = functools.partial(reading, head=PathSelector(rank=3, candidates=2), reduced=False)
MARKOV = {
    "vanilla": functools.partial(reading, head=Markov(rank=3), layout="fill_in", reduced=False),
    "gated": functools.partial(reading, head=Markov(rank=3, form="gated")),
    "rnn": functools.partial(reading, head=Markov(rank=3, form="rnn"), layout="fill_in"),
}
HEADED = {
    "selector": functools.partial(headed, head=PathSelector(rank=3, candidates=3)),
    "rnn": functools.partial(headed, head=Markov(rank=3, form="rnn")),
}
BLOCK = {"verification": "block"}
CASES = {
    "plain-top-k-top-p": Case(4, 0, None, {"temperature": 0.6, "top_k": 3, "top_p": 0.9}, n=4),
    "causal": Case(4, 2, CAUSAL, {"temperature": 1.0}, prompt=(1, 0, 2)),
    "causal-0.6": Case(4, 2, CAUSAL, {"temperature": 0.6}, prompt=(1, 0, 2)),
    "causal-other-temperature": Case(4, 2, CAUSAL, {"temperature": 1.0, "draft_temperature": 1.7}, prompt=(1, 0, 2)),
    "causal-top-k-top-p": Case(3, 3, CAUSAL, {"temperature": 1.0, "top_k": 2, "top_p": 0.95}),
    "bidirectional-top-p": Case(4, 2, BIDIRECTIONAL, {"temperature": 0.6, "top_p": 0.85}, prompt=(1, 0, 2)),
    "bidirectional-in-place": Case(
        3, 1, functools.partial(BIDIRECTIONAL, head="in_place"), {"temperature": 1.0}, n=4
    ),
    "fixed-top-k": Case(5, 1, fixed_logits, {"temperature": 1.0, "top_k": 3}),
    "fixed-top-k-ties-all": Case(5, 1, fixed_logits, {"temperature": 0.6, "top_k": 9}),
    "fixed-point-mass": Case(4, 2, fixed_logits, {"temperature": 1.0, "draft_temperature": 0.0}),
    "fixed-point-mass-0.6": Case(4, 2, fixed_logits, {"temperature": 0.6, "draft_temperature": 0.0}),
    "certain": Case(4, 2, fixed_tokens, {"temperature": 1.0}),
    "fixed": Case(4, 2, fixed_logits, {"temperature": 1.0}),
    "fixed-equal": Case(4, 2, fixed_logits, {"temperature": 0.6, "draft_temperature": 0.6}),
    "position-by-position": Case(4, 2, functools.partial(by_position, chained=True), {"temperature": 1.0}),
    "few": Case(5, 2, few_logits, {"temperature": 1.0}),
    "few-other-temperature": Case(5, 2, few_logits, {"temperature": 0.6, "draft_temperature": 1.7}),
    "few-top-k-top-p": Case(5, 2, few_logits, {"temperature": 0.8, "top_k": 4, "top_p": 0.9}),
    "selector": Case(5, 2, SELECTOR, {"temperature": 1.0}, prompt=(1, 0, 2)),
    "selector-other-temperature": Case(
        5, 2, SELECTOR, {"temperature": 0.6, "draft_temperature": 1.7}, prompt=(1, 0, 2)
    ),
    "selector-point-mass": Case(5, 2, SELECTOR, {"temperature": 1.0, "draft_temperature": 0.0}, prompt=(1, 0, 2)),
    "vanilla": Case(4, 2, MARKOV["vanilla"], {"temperature": 1.0}, prompt=(1, 0, 2)),
    "gated": Case(4, 2, MARKOV["gated"], {"temperature": 0.6}, prompt=(1, 0, 2)),
    "rnn-other-temperature": Case(
        4, 2, MARKOV["rnn"], {"temperature": 1.0, "draft_temperature": 1.7}, prompt=(1, 0, 2)
    ),
    "rnn-point-mass": Case(4, 2, MARKOV["rnn"], {"temperature": 0.6, "draft_temperature": 0.0}, prompt=(1, 0, 2)),
    "standalone-selector": Case(5, 2, HEADED["selector"], {"temperature": 1.0}, prompt=(1, 0, 2)),
    "standalone-rnn": Case(4, 2, HEADED["rnn"], {"temperature": 0.6, "draft_temperature": 1.7}, prompt=(1, 0, 2)),
    "eagle3": Case(4, 2, eagle, {"temperature": 1.0}, prompt=(1, 0, 2)),
    "block": Case(3, 3, fixed_logits, {"temperature": 1.0, **BLOCK}, n=6),
    "block-few": Case(4, 3, few_logits, {"temperature": 1.0, **BLOCK}),
    "block-rnn": Case(4, 2, MARKOV["rnn"], {"temperature": 1.0, **BLOCK}, prompt=(1, 0, 2), n=5),
    "block-eagle3": Case(4, 2, eagle, {"temperature": 1.0, **BLOCK}, n=5),
    "block-stop": Case(4, 3, fixed_logits, {"temperature": 1.0, **BLOCK}, n=5, stop_ids=(3, 1)),
    "lookup-first": Case(4, 2, functools.partial(lookup_first_of, drafter=fixed_logits), {"temperature": 1.0}, n=5),
    "lookup-first-few": Case(
        5, 2, functools.partial(lookup_first_of, drafter=few_logits), {"temperature": 1.0}, prompt=(1, 0, 2)
    ),
    "lookup-first-causal": Case(
        4, 2, functools.partial(lookup_first_of, drafter=CAUSAL), {"temperature": 0.6}, prompt=(1, 0, 2)
    ),
    "stop": Case(4, 3, fixed_logits, {"temperature": 1.0}, n=5, stop_ids=(3, 1)),
}  # fmt: skip

# The cases in which mistakes are planted: draft and target differ, so that rejections are common.
BASE, FEW, BLOCK_BASE = CASES["fixed"], CASES["few"], CASES["block"]


def planted_accept(logits, draft, *, length, prompt_index, rounds, kind, knobs, mistake=""):
    """`accept_sampled` written a second time, token by token, right or with a mistake."""
    log_p = log_probabilities(logits, knobs.temperature, kind, knobs)
    p, q = jnp.exp(log_p), jnp.exp(draft.log_q)
    B, k = draft.tokens.shape
    rows = jnp.arange(B)
    running, accepted = jnp.ones(B, bool), jnp.zeros(B, jnp.int32)
    choice = jnp.zeros((B, k + 1), jnp.int32)
    for j in range(k + 1):
        at = length[:, None] + j
        residual = p[:, j]
        if j < k:
            if mistake != "residual-of-p":
                residual = jnp.maximum(residual - q[:, j], 0)
            token = draft.tokens[:, j]
            coin = sampling.uniform(sampling.keys_for(knobs.seed, prompt_index, rounds, at, ACCEPT))[:, 0]
            keep = coin * q[rows, j, token] < p[rows, j, token]
        else:
            keep = jnp.zeros(B, bool)
            token = jnp.zeros(B, jnp.int32)
            if mistake == "bonus-of-the-position-before":
                residual = p[:, j - 1]
        drawn = sampling.draw(
            sampling.keys_for(knobs.seed, prompt_index, rounds, at, RESAMPLE), jnp.log(residual)[:, None]
        )[:, 0]
        choice = choice.at[:, j].set(jnp.where(keep, token, drawn))
        running = running & keep
        accepted = accepted + running.astype(jnp.int32)
    return accept.Verdict(choice, accepted)


def wrong_temperature(logits, first, ids=None, *, row, rounds, kind, knobs):
    """The draft is drawn at one temperature and judged at another."""
    draft = sampling.pick_draft(logits, first, ids, row=row, rounds=rounds, kind=kind, knobs=knobs)
    return draft._replace(log_q=log_probabilities(logits, 1.5 * knobs.draft_temperature, kind, knobs))


def changed_draft(*args, change, **options):
    """What was drawn is right, what is said about it is not."""
    return change(sampling.pick_draft(*args, **options))


def places_for_ids(draft, at, vocab_size):
    """The residual takes the candidates for the first ids of the vocabulary."""
    return accept_q_at(draft._replace(ids=jnp.arange(draft.ids.shape[-1])[None, None]), at, vocab_size)


def keep_behind_a_rejection(kept):
    """Counts the kept tokens behind a rejection too."""
    return jnp.sum(kept, axis=1, dtype=jnp.int32)


def shared_purpose(seed, prompt, rounds, position, purpose, *, uses, instead_of):
    """One purpose uses the numbers of another."""
    return sampling.keys_for(seed, prompt, rounds, position, uses if purpose == instead_of else purpose)


def without_position(seed, prompt, rounds, position, purpose, *, keys_for=sampling.keys_for):
    """All positions of a round share their numbers."""
    return keys_for(seed, prompt, rounds, jnp.zeros_like(position), purpose)


def without_round(seed, prompt, rounds, position, purpose, *, keys_for=sampling.keys_for):
    """A position that is drafted again gets the same numbers again."""
    return keys_for(seed, prompt, jnp.zeros_like(rounds), position, purpose)


def weights_of_one(log_ratio, *, prefix_weights=accept.prefix_weights):
    """As if each token stood alone."""
    return jnp.pad(jnp.exp(jnp.minimum(log_ratio, 0)), ((0, 0), (1, 0)), constant_values=1)


def unbounded_weights(log_ratio):
    """A token that is likelier to the target lends more than was lacking."""
    return jnp.pad(jnp.minimum(jnp.exp(jnp.cumsum(log_ratio, axis=1)), 1), ((0, 0), (1, 0)), constant_values=1)


def up_to_the_first_that_fails(weight, rest, coins, *, longest_prefix=accept.longest_prefix):
    """Stops at the first prefix that does not pass."""
    found = [longest_prefix(weight[:, : j + 2], rest[:, : j + 1], coins[:, : j + 1]) for j in range(rest.shape[1])]
    return accept.accepted_prefix(jnp.stack([each == j + 1 for j, each in enumerate(found)], axis=1))


def change_draft(change):
    return [(loop, "pick_draft", functools.partial(changed_draft, change=change))]


def accept_with(mistake):
    return [(loop, "accept_sampled", functools.partial(planted_accept, mistake=mistake))]


MISTAKES = {
    "residual-of-p": accept_with("residual-of-p"),
    "bonus-of-the-position-before": accept_with("bonus-of-the-position-before"),
    "q-of-another-temperature": [(loop, "pick_draft", wrong_temperature)],
    "continue-after-a-rejection": [(accept, "accepted_prefix", keep_behind_a_rejection)],
    "coin-of-the-draft": [(accept, "keys_for", functools.partial(shared_purpose, uses=DRAFT, instead_of=ACCEPT))],
    "redraw-of-the-draft": [(accept, "keys_for", functools.partial(shared_purpose, uses=DRAFT, instead_of=RESAMPLE))],
    "redraw-of-the-coin": [(accept, "keys_for", functools.partial(shared_purpose, uses=ACCEPT, instead_of=RESAMPLE))],
    "keys-without-the-position": [(accept, "keys_for", without_position), (sampling, "keys_for", without_position)],
}
# Those that only a q over few ids can have.
MISTAKES_OF_FEW = {
    "few-q-of-another-temperature": MISTAKES["q-of-another-temperature"],
    "few-q-of-all-ids": change_draft(lambda draft: draft._replace(log_q=draft.log_q + np.float32(np.log(0.8)))),
    "few-ids-shifted": change_draft(lambda draft: draft._replace(ids=(draft.ids + 1) % 5)),
    "few-residual-of-places": [(accept, "q_at", places_for_ids)],
}
# Those that only verification of whole blocks can have. Keys without the round: what is kept hangs on the tokens behind
# it, which are then drawn by the same numbers again.
MISTAKES_OF_BLOCKS = {
    "block-residual-of-a-token": [(accept, "prefix_weights", weights_of_one)],
    "block-weights-without-a-bound": [(accept, "prefix_weights", unbounded_weights)],
    "block-first-that-fails": [(accept, "longest_prefix", up_to_the_first_that_fails)],
    "block-keys-without-the-round": [(accept, "keys_for", without_round), (sampling, "keys_for", without_round)],
}
# Right although it looks different. A second writing of the test; and keys without the round: the numbers of a draft
# behind a rejection decided nothing, so using them again correlates nothing as long as tokens are judged one by one.
HARMLESS = {
    "second-writing": accept_with(""),
    "keys-without-the-round": [(accept, "keys_for", without_round), (sampling, "keys_for", without_round)],
}
LEVEL_EACH = LEVEL / (len(CASES) + len(MISTAKES) + len(MISTAKES_OF_FEW) + len(MISTAKES_OF_BLOCKS) + len(HARMLESS))


@pytest.mark.accelerator
@pytest.mark.parametrize("name", representing(CASES, "fixed"))
def test_joint_distribution_is_the_targets(name):
    assert CASES[name].p_value() > LEVEL_EACH


def test_a_pick_for_each_position_draws_what_one_for_the_block_does():
    """The same logits and keys: the same tokens, as `first` says where in the block a pick is."""
    assert dataclasses.replace(BASE, drafter=functools.partial(by_position, chained=False)).decode() == BASE.decode()


def planted_p_value(monkeypatch, label: str, patches, base: Case = BASE) -> float:
    """The base case with pieces replaced; the label makes its plan another one, so no compiled program is shared."""
    calls = []
    for module, name, replacement in patches:

        def counted(*args, name=name, replacement=replacement, **kwargs):
            calls.append(name)
            return replacement(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(programs, "_compiled", {})
    value = base.p_value(label)
    assert calls, "the replacement was never traced"
    return value


@pytest.mark.parametrize("name", representing(MISTAKES, "residual-of-p"))
def test_planted_mistakes_are_noticed(name, monkeypatch):
    assert planted_p_value(monkeypatch, name, MISTAKES[name]) < LEVEL_EACH


@pytest.mark.parametrize("name", MISTAKES_OF_FEW)
def test_planted_mistakes_about_few_ids_are_noticed(name, monkeypatch):
    assert planted_p_value(monkeypatch, name, MISTAKES_OF_FEW[name], FEW) < LEVEL_EACH


@pytest.mark.parametrize("name", MISTAKES_OF_BLOCKS)
def test_planted_mistakes_about_blocks_are_noticed(name, monkeypatch):
    assert planted_p_value(monkeypatch, name, MISTAKES_OF_BLOCKS[name], BLOCK_BASE) < LEVEL_EACH


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_differences_are_not(name, monkeypatch):
    assert planted_p_value(monkeypatch, name, HARMLESS[name]) > LEVEL_EACH


def test_a_point_mass_is_right_for_any_draft_but_accepts_less():
    """What draft_temperature 0 and drafters without a distribution rely on: any token may be judged as certain."""
    target = make_target(4)
    both = [
        decode(target, [[1]] * ROWS, drafter=fixed_logits(target), draft_length=2, max_new_tokens=4,
               batch_size=ROWS, seed=SEED, temperature=1.0, draft_temperature=draft).stats.acceptance_length
        for draft in (0.0, 1.0)
    ]  # fmt: skip
    assert 1 < min(both) < max(both) < 3


def test_the_comparison_itself():
    """Right samples pass, a shift of four percent does not, and an impossible outcome is enough."""
    rng = np.random.default_rng(0)
    expected = {(i,): p for i, p in enumerate([0.3, 0.2, 0.15, 0.15, 0.1, 0.0999, 0.0001, 0.0])}
    p = np.array(list(expected.values()))
    right = [(int(i),) for i in rng.choice(8, ROWS, p=p)]
    assert p_value(right, expected) > 1e-3
    shifted = p + np.array([0.04, -0.04, 0, 0, 0, 0, 0, 0])
    assert p_value([(int(i),) for i in rng.choice(8, ROWS, p=shifted)], expected) < LEVEL_EACH
    assert p_value([*right[1:], (7,)], expected) == 0


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_enumeration_sums_to_one(temperature):
    target = make_target(3, stop_ids=(2,))
    found = exact(target, (0, 1), 3, temperature, top_k=2)
    assert sum(found.values()) == pytest.approx(1)
    assert (2,) in found
    assert min(found.values()) >= 0
