"""Prompt lookup against a plain search, and in the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deer_jax
from deer_jax.drafters.prompt_lookup import PromptLookup, lookup_first
from deer_jax.drafters.protocol import Draft, Row
from tests.doubles import anchor_drafter
from tests.tiny import random_params, tiny

V = 6  # few, so that texts repeat themselves


def found(text: list[int], k: int, longest: int) -> list[int]:
    """What a plain search proposes."""
    for n in range(min(longest, len(text) - 1), 0, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                after = start + n
                return [text[min(after + i, len(text) - 1)] for i in range(k)]
    return [text[min(i, len(text) - 1)] for i in range(k)]  # as good as anything


@pytest.mark.representative
def test_it_proposes_what_a_plain_search_finds():
    rng, k, S = np.random.default_rng(0), 5, 30
    length = rng.integers(1, S - k, 200)
    tokens = rng.integers(0, V, (200, S))  # what lies behind the length is garbage
    method = PromptLookup(V)
    row = Row(jnp.asarray(tokens, jnp.int32), jnp.asarray(length, jnp.int32), jnp.arange(200))
    draft, _ = jax.jit(lambda row: method.propose({}, {}, (), row, k, lambda *_: None))(row)
    assert draft.log_q is None
    for b in range(200):
        assert draft.tokens[b].tolist() == found(tokens[b, : length[b]].tolist(), k, method.longest)


def test_it_repeats_what_the_target_repeats():
    """A tiny target soon goes round in circles, which is what there is to find; its words stay what they were."""
    config = tiny("llama", vocab_size=48)
    target = deer_jax.Target(config=config, params=random_params(config, 2, scan=False))
    drafter = deer_jax.load_drafter("prompt-lookup", target=target)
    options = {"max_new_tokens": 60, "ignore_stop": True}
    plain = deer_jax.decode(target, [[1, 2, 3], [9]], **options)
    ours = deer_jax.decode(target, [[1, 2, 3], [9]], drafter=drafter, draft_length=4, **options)
    assert ours.tokens == plain.tokens
    assert ours.stats.acceptance_length > 1.5


def test_it_copies_or_lets_a_drafter_draft():
    """Row by row: what a plain search finds for its last three tokens, or else the drafter's own draft."""
    rng, k, S = np.random.default_rng(1), 4, 40
    length = rng.integers(4, S - k, 100)
    tokens = rng.integers(0, V, (100, S))
    row = Row(jnp.asarray(tokens, jnp.int32), jnp.asarray(length, jnp.int32), jnp.arange(100))
    other = anchor_drafter(rng.normal(size=(V, k, V)))
    drafter = lookup_first(other)

    def pick(logits, first, ids=None):
        return Draft(jnp.argmax(logits, axis=-1).astype(jnp.int32), None)

    draft, _ = drafter.method.propose(drafter.params, {}, (), row, k, pick)
    own, _ = other.method.propose(other.params, {}, (), row, k, pick)
    copied = 0
    for b in range(100):
        text = tokens[b, : length[b]].tolist()
        repeats = any(text[i : i + 3] == text[-3:] for i in range(len(text) - 3))
        copied += repeats
        expected = found(text, k, 3) if repeats else own.tokens[b].tolist()
        assert draft.tokens[b].tolist() == expected
    assert 5 < copied < 95


def test_it_is_named_before_the_drafter_behind_it():
    """With copying: the target's own answer, and no fewer tokens a round than by drafting alone."""
    config = tiny("llama", vocab_size=48)
    target = deer_jax.Target(config=config, params=random_params(config, 2, scan=False))
    options = {"max_new_tokens": 60, "ignore_stop": True, "draft_length": 4}
    plain = deer_jax.decode(target, [[1, 2, 3], [9]], max_new_tokens=60, ignore_stop=True)
    taken = {}
    for source in ("from-target:0", "prompt-lookup+from-target:0"):
        drafter = deer_jax.load_drafter(source, target=target)
        ours = deer_jax.decode(target, [[1, 2, 3], [9]], drafter=drafter, **options)
        assert ours.tokens == plain.tokens
        taken[source] = ours.stats.acceptance_length
    assert taken["prompt-lookup+from-target:0"] > taken["from-target:0"] + 0.3
    with pytest.raises(deer_jax.InputError, match="name the drafter behind it"):
        deer_jax.load_drafter("prompt-lookup+", target=target)
