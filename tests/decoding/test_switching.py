"""Rounds of different draft lengths, one after the other: what was left unread before is read before the next draft."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax import decode
from deer_jax.config import Sampling
from deer_jax.decoding.engine import Engine
from deer_jax.drafters.drafter import draft_scores
from deer_jax.drafters.protocol import Row, Seen
from deer_jax.models.transformer import bind
from tests.fast import representing
from tests.kinds import STANDALONE, K, drafter_of, target_of

MOST, NEW = K, 40
PROMPTS = [[1], [2, 3, 4, 5, 6], [7, 8, 9]]


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 7))
def from_text(config, method, target, drafter, build, tokens, length, k):
    """float32 [B, k, V]: drafts after texts int32 [B, S] of these lengths, with nothing kept from before."""
    (B, S), tapped = tokens.shape, None
    if method.taps:
        positions = jnp.broadcast_to(jnp.arange(S)[None], (B, S))
        model = bind(config, target)
        tapped = model(model.lookup(tokens), positions, taps=method.taps).tapped
    state = method.state(*drafter, B, S, build)
    seen = Seen(tokens, tapped, jnp.zeros_like(length), length - 1, first=True)
    state = method.observe(*drafter, state, seen, jnp.arange(B))
    return draft_scores(method, *drafter, state, Row(tokens, length, jnp.arange(B)), k)[0]


@pytest.mark.parametrize(
    "kind", representing((*STANDALONE, "standalone rnn", "selector", "rnn reduced", "eagle3"), "selector")
)
def test_draft_lengths_in_every_order(kind):
    """Greedy output is plain decoding's, and every draft is the one that is made from the text alone."""
    target, drafter = target_of(), drafter_of(kind)
    plain = decode(target, PROMPTS, max_new_tokens=NEW, ignore_stop=True).tokens
    engine = Engine(target, drafter, MOST, Sampling(), 0, (), len(PROMPTS), 64)
    engine.admit(PROMPTS, [len(prompt) + NEW for prompt in PROMPTS], range(3), range(3))
    now = jax.jit(draft_scores, static_argnums=(0, 5))
    orders = itertools.cycle(itertools.chain(*itertools.permutations((0, 1, MOST))))
    done, compared = np.zeros(3, bool), 0
    while not done.all():
        k = next(orders)
        after = engine.segment(1 if k else 7, draft_length=k)
        done, state = after["done"], engine.state
        if k:
            arrays = (drafter.params, drafter.shared)
            found, _ = now(drafter.method, *arrays, state.drafter, state.row, k)
            expected = from_text(
                target.config, drafter.method, target.params, arrays, target.build, state.tokens, state.length, k
            )
            np.testing.assert_allclose(found[~done], expected[~done], rtol=0, atol=1e-4)
            compared += (~done).sum()
    assert compared > 6
    for row, prompt in enumerate(PROMPTS):
        assert after["tokens"][row, len(prompt) : after["length"][row]].tolist() == plain[row]
