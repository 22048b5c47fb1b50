"""Block verification by enumeration: exact whatever the draft, and never fewer tokens kept than token by token."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.decoding import accept
from deer_jax.drafters.protocol import Draft

V, FORMS = 3, ("dense", "few", "few, one twice", "point mass")


def tables(rng, k: int, sharp: float):
    """Of every text of up to k tokens the target's and the drafter's distribution behind it: [V**i, V] for each i."""

    def some(rows):
        return rng.dirichlet(np.full(V, sharp), rows)

    return [some(V**i) for i in range(k + 1)], [some(V**i) for i in range(k)]


def place(text) -> int:
    return int(np.ravel_multi_index(text, (V,) * len(text))) if text else 0


def drafts(p, q, k: int, form: str):
    """All drafts that are possible: tokens, their probability, and as `accept` is given them with log p [B, k+1, V]."""
    rows = []
    for text in itertools.product(range(V), repeat=k):
        behind = [place(text[:i]) for i in range(k + 1)]
        rows.append((text, np.stack([p[i][at] for i, at in enumerate(behind)]),
                     np.stack([q[i][at] for i, at in enumerate(behind[:k])])))  # fmt: skip
    tokens, each_p, each_q = (np.array(side) for side in zip(*rows, strict=True))
    if form == "point mass":
        each_q = np.eye(V)[tokens]
        chance = np.zeros(len(tokens))
        chance[place(tuple(row.argmax() for row in each_q[len(tokens) // 2]))] = 1  # one draft, certain
    elif form.startswith("few"):
        each_q[..., 0] = 0  # never proposed
        each_q /= each_q.sum(axis=-1, keepdims=True)
    if form != "point mass":
        chance = np.take_along_axis(each_q, tokens[..., None], axis=-1)[..., 0].prod(axis=1)
    with np.errstate(divide="ignore"):
        log_q, ids = jnp.log(jnp.asarray(each_q, jnp.float32)), None
    if form == "point mass":
        log_q = None
    elif form == "few":
        log_q, ids = log_q[..., 1:], jnp.array([[[1, 2]]])
    elif form == "few, one twice":
        log_q = jnp.concatenate([log_q[..., 1:], jnp.full_like(log_q[..., :1], -jnp.inf)], axis=-1)
        ids = jnp.array([[[1, 2, 2]]])
    draft = Draft(jnp.asarray(tokens, jnp.int32), log_q, ids)
    possible = chance > 0
    return tokens, chance, possible, jnp.log(jnp.asarray(each_p, jnp.float32)), each_q, draft


def kept_chances(log_p, draft, k: int, *, block: bool):
    """[B, k + 1]: how likely each number of tokens is kept of each draft; and w [B, k + 1] for what is drawn behind."""
    picked = np.take_along_axis(np.asarray(log_p[:, :k]), np.asarray(draft.tokens)[..., None], axis=-1)[..., 0]
    ratio = jnp.asarray(picked) - accept.log_q_of(draft, picked)
    if not block:
        reached = np.cumprod(np.minimum(np.exp(np.asarray(ratio, np.float64)), 1), axis=1)
        reached = np.pad(reached, ((0, 0), (1, 1)), constant_values=((0, 0), (1, 0)))
        return reached[:, :-1] - reached[:, 1:], np.ones((len(picked), k + 1))
    weight = accept.prefix_weights(ratio)
    rest = accept.left_over(weight[:, :-1], log_p[:, :k], draft)
    passes = np.asarray(accept.passing(weight, rest), np.float64)  # of prefixes of 1 to k tokens
    fails = np.cumprod((1 - passes)[:, ::-1], axis=1)[:, ::-1]  # of this and all longer ones
    none = fails[:, :1]
    longer = np.pad(fails[:, 1:], ((0, 0), (0, 1)), constant_values=1)
    return np.concatenate([none, passes * longer], axis=1), np.asarray(weight, np.float64)


def of_texts(p, q, k: int, form: str, *, block: bool):
    """The probability of every text of k + 1 tokens, and the tokens kept on average."""
    tokens, chance, possible, log_p, each_q, draft = drafts(p, q, k, form)
    kept, weight = kept_chances(log_p, draft, k, block=block)
    each_p, found = np.exp(np.asarray(log_p, np.float64)), np.zeros((V,) * (k + 1))
    for b in np.flatnonzero(possible):
        for i in range(k + 1):
            residual = each_p[b, i]
            if i < k:
                residual = np.maximum(weight[b, i] * each_p[b, i] - each_q[b, i], 0)
            if chance[b] * kept[b, i] < 1e-9:
                continue
            for token in np.flatnonzero(residual):
                begun = (*tokens[b, :i].tolist(), int(token))
                share = chance[b] * kept[b, i] * residual[token] / residual.sum()
                # What follows is the target's.
                for end in itertools.product(range(V), repeat=k - i):
                    whole = begun + end
                    behind = np.prod([p[n][place(whole[:n])][whole[n]] for n in range(i + 1, k + 1)])
                    found[whole] += share * behind
    return found, float(np.sum(chance[:, None] * kept * np.arange(k + 1)[None]))


def exact(p, k: int):
    found = np.zeros((V,) * (k + 1))
    for text in np.ndindex(found.shape):
        found[text] = np.prod([p[n][place(text[:n])][text[n]] for n in range(k + 1)])
    return found


@pytest.mark.parametrize("form", FORMS)
def test_texts_have_the_targets_distribution_and_no_fewer_tokens_are_kept(form):
    gained = []
    for seed, (k, sharp) in enumerate(itertools.product((1, 2, 3), (0.3, 1.0, 3.0))):
        p, q = tables(np.random.default_rng(seed), k, sharp)
        found, as_block = of_texts(p, q, k, form, block=True)
        np.testing.assert_allclose(found, exact(p, k), rtol=0, atol=2e-6)
        found, by_token = of_texts(p, q, k, form, block=False)
        np.testing.assert_allclose(found, exact(p, k), rtol=0, atol=2e-6)
        gained.append(as_block - by_token)
        assert gained[-1] > -2e-6
        assert k > 1 or abs(gained[-1]) < 2e-6  # one token is a block
    assert max(gained) > 0.01 or form == "point mass"  # which lends nothing: q is never below p


def test_where_both_distributions_are_the_same_all_is_kept():
    p, _ = tables(np.random.default_rng(0), 2, 1.0)
    _, kept = of_texts(p, p[:2], 2, "dense", block=True)
    assert kept == pytest.approx(2, abs=1e-5)


def test_the_example_of_the_docstring():
    weight = accept.prefix_weights(jnp.log(jnp.array([[0.5, 3.0]])))
    np.testing.assert_allclose(weight, [[1, 0.5, 1]], rtol=1e-6)
