"""draft_length="auto": exact whatever it chooses, and never much slower than plain decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deer_jax import decode
from deer_jax.config import Sampling
from deer_jax.decoding import auto as choosing
from deer_jax.decoding import loop, sampling
from deer_jax.decoding.auto import AutoLength, Segment, auto_length
from deer_jax.decoding.sampling import Kind, Knobs
from deer_jax.decoding.state import CERTAINTIES, StateShape, idle_state
from deer_jax.errors import InputError
from tests.decoding.test_sampling_exact import draft_logits, exact, fixed_logits, make_target, p_value
from tests.doubles import table_drafters

LEVEL = 1e-4


class ByAcceptance(AutoLength):
    """Chooses by what the last round accepted, as no sensible rule would: for every round anew."""

    def __init__(self, most: int):
        super().__init__(most)
        self.accepted = 0

    def choose(self, slots, context):
        return self.accepted % (self.most + 1), 1, 0.4 * (self.accepted % 2)

    def note(self, slots, segment):
        self.accepted += int(np.arange(len(segment.histogram)) @ segment.histogram) + 1


def test_the_distribution_is_the_targets_whatever_the_choice_depends_on(monkeypatch):
    target = make_target(4)
    drafter = fixed_logits(target, "auto")
    monkeypatch.setitem(choosing._lengths, drafter, ByAcceptance(2))
    monkeypatch.setattr(type(drafter.method), "draft_length", 2)
    answers = decode(
        target, [[1]] * 8192, drafter=drafter, draft_length="auto", max_new_tokens=4, batch_size=32, seed=5,
        temperature=1.0,
    )  # fmt: skip
    rounds = answers.stats.rounds_at
    assert rounds is not None
    assert min(rounds[k] for k in (0, 1, 2)) > 1000
    assert sum(rounds.values()) == sum(answers.stats.rounds)
    assert p_value(answers.tokens, exact(target, [1], 4, 1.0)) > LEVEL


@pytest.mark.parametrize("by", ["distribution", "token"])
def test_what_is_drafted_has_no_part_in_whether_it_is_verified(monkeypatch, by):
    """Where a row's own draft decides, the distribution is another one; and that is noticed."""
    if by == "token":
        sampled = sampling.pick_draft

        def by_token(*args, **options):
            draft = sampled(*args, **options)
            first = jnp.take_along_axis(draft.log_q[:, 0], draft.tokens[:, :1], axis=-1)[:, 0]
            return draft._replace(certainty=jnp.exp(first))

        monkeypatch.setattr(loop, "pick_draft", by_token)
    target, rows, new = make_target(4), 16384, 4
    drafter = fixed_logits(target, by)
    likely = np.sort(np.max(np.asarray(jax.nn.softmax(draft_logits(target)[:, 0])), axis=-1))
    least = float(likely[1:3].mean())  # half of the anchors are followed by something that certain
    plan = loop.Plan(target.config, drafter.method, 2, Kind.of(Sampling(temperature=1.0)), gated=True)
    knobs = dataclasses.replace(Knobs.of(Sampling(temperature=1.0), 7), least=jnp.float32(least))
    weights = loop.Weights(target.params, drafter.params, drafter.shared)
    idle = idle_state(StateShape(target.config, drafter.method, 1, 16, 2, target.build), *weights[1:])
    stop_ids = jnp.zeros((0,), jnp.int32)

    def answer(index):
        """Of a batch of this row alone."""
        state = dataclasses.replace(
            idle, tokens=idle.tokens.at[0, 0].set(1), limit=idle.limit.at[0].set(1 + new),
            done=jnp.zeros_like(idle.done), prompt_index=index[None],
        )  # fmt: skip
        state = lax.fori_loop(0, new, lambda _, state: loop.one_round(plan, weights, state, knobs, stop_ids), state)
        return state.tokens[0, 1 : 1 + new], state.certain[0]

    answers, certain = jax.jit(jax.vmap(answer))(jnp.arange(rows, dtype=jnp.int32))
    drafted, verified, kept = np.sum(certain, axis=(0, 2))
    assert 0.2 < verified / drafted < 0.8
    assert 0.1 < kept / verified < 0.9
    p = p_value(np.asarray(answers).tolist(), exact(target, [1], new, 1.0))
    assert p > LEVEL if by == "distribution" else p < LEVEL


def test_greedy_answers_are_those_of_plain_decoding():
    target = make_target(16)
    prompts = [[1, 2, 3], [4], [5, 6]]
    plain = decode(target, prompts, max_new_tokens=60, ignore_stop=True)
    for drafter in table_drafters(target, prompts, plain.tokens).values():
        answers = decode(
            target, prompts, drafter=drafter, draft_length="auto", max_new_tokens=60, ignore_stop=True, batch_size=2
        )
        assert answers.tokens == plain.tokens
        assert answers.stats.rounds_at is not None
        assert sum(answers.stats.rounds_at.values()) == sum(answers.stats.rounds)


class Machine:
    """Seconds and acceptances of a machine that is made up, with some noise in both.

    rates: by depth; the first draft's differs from round to round by `spread`, and the draft `says` how high it is.
    """

    def __init__(self, rates, costs, seed=0, spread=0.0, says=True):
        self.rates, self.costs, self.spread, self.says = rates, costs, spread, says
        self.random = np.random.default_rng(seed)

    def run(self, auto: AutoLength, tokens: int) -> tuple[float, float]:
        """Seconds for so many tokens, and what plain decoding takes."""
        seconds = made = 0.0
        while made < tokens:
            k, rounds, least = auto.choose(1, 200)
            sure = np.clip(self.random.normal(self.rates[0], self.spread, rounds), 0.01, 0.99)
            verified = [p for p in sure if p >= least or not self.says] if k else []
            accepted = [self.accepted(p, k) for p in verified]
            took = len(verified) * self.costs(k) + (rounds - len(verified)) * (self.costs(0) + DRAFTING * (k > 0))
            took *= self.random.normal(1, 0.05)
            histogram = np.bincount(accepted + [0] * (rounds - len(verified)), minlength=auto.most + 1)
            firsts = [p for p, each in zip(verified, accepted, strict=True) if each]
            kinds = [sure, verified, firsts] if k and self.says else [[], [], []]
            certain = np.array([np.histogram(kind, CERTAINTIES, (0, 1))[0] for kind in kinds])
            auto.note(1, Segment(k, rounds, took, 200, histogram, certain))
            seconds, made = seconds + took, made + rounds + sum(accepted)
        return seconds, made * self.costs(0)

    def accepted(self, first: float, k: int) -> int:
        """Of k drafts whose first is kept with this probability."""
        return next((i for i, rate in enumerate([first, *self.rates[1:k]]) if self.random.random() > rate), k)


DRAFTING = 0.08  # plain steps


def cpu(k: int) -> float:
    return 1 + (0.5 + 0.08 * k if k else 0)


@pytest.mark.parametrize(
    ("rates", "least"), [([0.05] * 8, 0.985), ([0.45] * 8, 0.98), ([0.65] * 8, 1.3), ([0.95] * 8, 2.8)]
)
def test_speed_is_that_of_the_best_length_or_of_plain_decoding(rates, least):
    auto = AutoLength(8)
    seconds, plain = Machine(rates, cpu).run(auto, 5000)
    assert plain / seconds > least
    best = max((1 + sum(np.prod(rates[:i]) for i in range(1, k + 1))) / cpu(k) for k in auto.sizes)
    assert plain / seconds > 0.93 * best


def test_drafts_that_are_hardly_likely_are_not_verified():
    rates = [0.4, *[0.6] * 7]
    seconds, plain = Machine(rates, cpu, spread=0.35).run(AutoLength(8), 5000)
    without, same = Machine(rates, cpu).run(AutoLength(8), 5000)
    assert plain / seconds > 1.08 * same / without


@pytest.mark.parametrize(("rates", "least"), [([0.05] * 8, 0.98), ([0.95] * 8, 2.8)])
def test_a_drafter_need_not_say_how_certain_it_is(rates, least):
    seconds, plain = Machine(rates, cpu, says=False).run(AutoLength(8), 5000)
    assert plain / seconds > least


def test_a_change_is_noticed():
    auto = AutoLength(8)
    Machine([0.05] * 8, cpu).run(auto, 3000)
    seconds, plain = Machine([0.95] * 8, cpu).run(auto, 6000)
    assert plain / seconds > 2
    seconds, plain = Machine([0.05] * 8, cpu).run(auto, 3000)
    assert plain / seconds > 0.95


def test_what_one_call_learns_serves_the_next():
    target = make_target(16)
    drafter = fixed_logits(target, "memory")
    assert auto_length(drafter) is auto_length(drafter)
    assert auto_length(drafter) is not auto_length(fixed_logits(target, "memory"))


def test_a_word_that_is_none_is_refused():
    target = make_target(4)
    with pytest.raises(InputError, match="got 'fast'"):
        decode(target, [[1]], drafter=fixed_logits(target), draft_length="fast")
    with pytest.raises(InputError, match="no drafter"):
        decode(target, [[1]], draft_length="auto")
