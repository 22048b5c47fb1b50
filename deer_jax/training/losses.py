"""What a row loses: pure functions of the drafter's q, the row's label and the target's p, with their derivatives.

Each takes a `View` of some rows and returns the loss float32 [r, 1] and its derivative by the drafter's scores float32
[r, V]. On shards of the vocabulary a view is of one part of it, and only numbers of rows cross between the shards.
Derivatives are written out because a sum over shards would not be differentiated as it is meant.

The label is the text's token, or as some methods have it the id that the target finds best.

A drafter may have fewer ids than the target. Its q is 0 for the others, so what p has there is lost whatever it says:
total variation and acceptance are against the target's whole p, and only KL, which would be infinite, is against p
as it is among the drafter's ids.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.errors import InputError
from deer_jax.sharding import gathered, largest, total


class Target(NamedTuple):
    """What the target says at some rows, among the drafter's ids."""

    log_p: jax.Array  # float32 [r, V] normalised over the drafter's ids; -inf where it has no probability
    log_share: jax.Array  # float32 [r, 1] log of the probability that all of them have together
    log_best: jax.Array  # float32 [r, 1] log of the probability of the best of all its ids


class View(NamedTuple):
    """Some rows as the losses see them: a part, or all, of the drafter's ids."""

    log_q: jax.Array  # float32 [r, V]
    log_best: jax.Array  # float32 [r, 1] the largest log q of all parts
    is_label: jax.Array  # bool [r, V]; nowhere true in all parts for a row whose label is none of the drafter's
    has_label: jax.Array  # float32 [r, 1] 1, or 0 for such a row
    target: Target | None  # None where nothing but the label is known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """How much each loss counts in a row's loss.

    Attributes:
      ce: cross-entropy on the label; 0 at rows whose label is none of the drafter's.
      kl: KL(p || q), p as it is among the drafter's ids.
      tv: total variation, 1/2 sum |p - q| = 1 - acceptance.
    """

    ce: float = 0.0
    kl: float = 0.0
    tv: float = 0.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < math.inf:
                raise InputError(f"the weight of {name} must not be negative, got {value}")
        if not any(dataclasses.astuple(self)):
            raise InputError("a loss needs a weight above 0, for example ce")

    @property
    def reads_target(self) -> bool:
        """Whether the target's distribution is needed."""
        return any(value for name, value in dataclasses.asdict(self).items() if name != "ce")


def mixed(mix: Mix, view: View):
    """The weighted sum of a mix's losses."""
    loss, slope = jnp.zeros_like(view.has_label), jnp.zeros_like(view.log_q)
    for weight, function in (mix.ce, cross_entropy), (mix.kl, divergence), (mix.tv, total_variation):
        if weight:
            one, its_slope = function(view)
            loss, slope = loss + weight * one, slope + weight * its_slope
    return loss, slope


def cross_entropy(view: View):
    """-log q of the label."""
    slope = (jnp.exp(view.log_q) - view.is_label.astype(jnp.float32)) * view.has_label
    return -log_likelihood(view), slope


def log_likelihood(view: View):
    """float32 [r, 1]: log q of the label; 0 where it is none of the drafter's."""
    return _sum(jnp.where(view.is_label, view.log_q, 0))


def label_probability(view: View):
    """float32 [r, 1]: the target's p of the label, among all its ids; 0 where it is none of the drafter's."""
    log_p = _sum(jnp.where(view.is_label, _target(view).log_p, 0)) + _target(view).log_share
    return jnp.exp(log_p) * view.has_label


def divergence(view: View):
    """KL(p || q), p as it is among the drafter's ids."""
    p = jnp.exp(_target(view).log_p)
    return _sum(p * (_finite(_target(view).log_p) - view.log_q)), jnp.exp(view.log_q) - p


def entropy(view: View):
    """float32 [r, 1]: of p as it is among the drafter's ids."""
    log_p = _target(view).log_p
    return -_sum(jnp.exp(log_p) * _finite(log_p))


def acceptance(view: View):
    """Sum of min(p, q), the probability that a token drawn from q is kept: what is to grow, so not itself a loss."""
    p, q = _whole_p(view), jnp.exp(view.log_q)
    q_matters = jnp.where(q < p, 1, jnp.where(q == p, jnp.float32(0.5), 0))
    return _sum(jnp.minimum(p, q)), q * (q_matters - _sum(q * q_matters))


def total_variation(view: View):
    """1/2 sum |p - q| over all of the target's ids."""
    outside = -jnp.expm1(_target(view).log_share)
    loss = (_sum(jnp.abs(_whole_p(view) - jnp.exp(view.log_q))) + outside) / 2
    return loss, -acceptance(view)[1]


def agreement(view: View):
    """float32 [r, 1]: 1 where q's best id is the target's best, or without a target the label.

    Two ids whose probabilities are within 0.01 % of each other are both the target's best.
    """
    best = view.log_q >= view.log_best
    if view.target is None:
        right = best & view.is_label
        return largest(jnp.max(right.astype(jnp.float32), axis=-1, keepdims=True), "vocab")
    theirs = largest(jnp.max(jnp.where(best, view.target.log_p, -jnp.inf), axis=-1, keepdims=True), "vocab")
    return (theirs + view.target.log_share >= view.target.log_best - 1e-4).astype(jnp.float32)


def log_normaliser(scores):
    """Of scores [r, V], over all parts of the vocabulary: log of the sum of exp(scores), and the largest; [r, 1]."""
    best = largest(jnp.max(scores, axis=-1, keepdims=True), "vocab")
    return best + jnp.log(_sum(jnp.exp(scores - best))), best


def best_id(scores, ids):
    """int32 [r, 1]: which of ids int32 [V] has the largest score [r, V] of all parts; the lowest of several."""
    best = scores >= largest(jnp.max(scores, axis=-1, keepdims=True), "vocab")
    least = jnp.iinfo(jnp.int32).min
    return -largest(jnp.max(jnp.where(best, -ids[None], least), axis=-1, keepdims=True), "vocab")


def _sum(x):
    """float32 [r, 1]: of [r, V] over all parts of the vocabulary."""
    return total(jnp.sum(x, axis=-1, keepdims=True), "vocab")


def _finite(log_p):
    """0 in place of -inf, where p is 0 and the product with it is to be 0 too."""
    return jnp.where(log_p == -jnp.inf, 0, log_p)


def _whole_p(view: View):
    """float32 [r, V]: the target's probabilities as they are among all its ids."""
    return jnp.exp(_target(view).log_p + _target(view).log_share)


def _target(view: View) -> Target:
    assert view.target is not None
    return view.target


class Chosen(NamedTuple):
    """The candidates of some rows, as all parts of the vocabulary know them."""

    ids: jax.Array  # int32 [r, K], best first; the last is the row's label where that was not among the best
    scores: jax.Array  # float32 [r, K]
    is_label: jax.Array  # bool [r, K]
    found: jax.Array  # float32 [r, 1] whether the label was among the best K


def candidates(scores, ids, label, count: int) -> Chosen:
    """The best `count` of each row's scores [r, V], of ids int32 [V], over all parts of the vocabulary.

    label int32 [r, 1]: the id that must be among them; negative for none. Of equal scores the lower id is first.
    """
    said = _sum(jnp.where(label == ids[None], scores, 0))
    best, at = lax.top_k(scores, min(count, scores.shape[-1]))
    ids = ids[at]
    best, ids = gathered(best, "vocab", 1), gathered(ids, "vocab", 1)
    best, at = lax.top_k(best, count)
    ids = jnp.take_along_axis(ids, at, axis=1)
    found = jnp.any(ids == label, axis=-1, keepdims=True)
    injected = ~found & (label >= 0) & (jnp.arange(count) == count - 1)[None]
    ids, best = jnp.where(injected, label, ids), jnp.where(injected, said, best)
    return Chosen(ids, best, (ids == label) & (label >= 0), found.astype(jnp.float32))


def choice_loss(scores, is_label):
    """Cross-entropy over K candidates: loss float32 [r, 1] and its derivative [r, K]; 0 for a row without a label."""
    log_q = jax.nn.log_softmax(scores, axis=-1)
    has_label = jnp.any(is_label, axis=-1, keepdims=True)
    slope = jnp.where(has_label, jnp.exp(log_q) - is_label.astype(jnp.float32), 0)
    return -jnp.sum(jnp.where(is_label, log_q, 0), axis=-1, keepdims=True), slope


def chosen_right(scores, is_label):
    """float32 [r, 1]: 1 where the best of K candidates is the label."""
    best = jnp.argmax(scores, axis=-1, keepdims=True)
    return jnp.take_along_axis(is_label, best, axis=-1).astype(jnp.float32)


def confidence_loss(scores, acceptance, weights):
    """float32 []: sum of weights * binary cross-entropy of sigmoid(scores) against the acceptance of each row.

    scores float32 [...], as the confidence head gives them; acceptance and weights the same shape, not differentiated.
    """
    acceptance, scores = lax.stop_gradient(acceptance), scores.astype(jnp.float32)
    return jnp.sum(weights * (jax.nn.softplus(scores) - acceptance * scores))
