"""Losses over a large vocabulary: scores for a few rows at a time, on shards of rows and vocabulary.

Scores are a sum of products, see `training.scores`; what a row loses is decided in `training.losses`. Here are the
rows, the chunks and the shards.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.drafters.protocol import Term
from deer_jax.errors import InputError
from deer_jax.models.layers import logits
from deer_jax.sharding import here, on_shards, shard_index, spread, total
from deer_jax.training import losses
from deer_jax.training.losses import Mix, Target, View
from deer_jax.training.scores import OnShard, at_ids, gradient_like, table_axes, table_here, term_axes

CHUNK_ROWS = 512  # rows whose scores exist at one time, on each shard of the rows


class SoftLabels(NamedTuple):
    """What another model, the target, says at each row; not differentiated."""

    hidden: jax.Array  # [B, R, D']
    head: jax.Array  # [V', D'], a row for each of the drafter's ids, or what `sharding.spread` made of it
    allowed: jax.Array | None = None  # bool [V] ids that may have probability; those from V' on have none
    whole: jax.Array | None = None  # [V'', D'] the head of all its ids; None: its p is normalised over the drafter's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selector:
    """A choice among each row's best K ids: cross-entropy over them of their scores plus one more term.

    The row's label takes the K-th place where it is not among them. Features, table and scores are all trained.

    Attributes:
      term: features [B, R, r], made of the predecessor and the state, and the table of successors [V, r].
      weights: float32 [B, R] of this loss, not differentiated.
      count: K.
    """

    term: Term
    weights: jax.Array
    count: int = dataclasses.field(metadata={"static": True})


class Rows(NamedTuple):
    """What is known of each row that has a weight, float32 [B, R]; 0 at the others. Not differentiated."""

    loss: jax.Array  # of the mix, not weighted
    likelihood: jax.Array  # q of its label; 0 where it has none
    acceptance: jax.Array  # sum of min(p, q); without soft labels the likelihood
    agrees: jax.Array  # 1 where q's best id is the target's best, or without soft labels its label
    entropy: jax.Array  # of the soft labels among the drafter's ids
    choice_loss: jax.Array  # of the selector, not weighted
    choice_agrees: jax.Array  # 1 where the selector's best is the label
    recall: jax.Array  # 1 where the label was among the best K by itself
    said: jax.Array  # the target's p of the label; without soft labels 0


def weighted_cross_entropy(hidden, head, labels, weights, soft: SoftLabels | None = None):
    """float32 []: sum of weights * -log softmax(hidden @ head.T)[label] over rows of non-zero weight.

    hidden [B, R, D], head [V, D] or what `sharding.spread` made of it, labels int32 [B, R], weights float32 [B, R] (not
    differentiated). With soft labels it is the cross-entropy against their distributions, and labels are not read.
    """
    if soft is None:
        return weighted_loss([Term(hidden, head)], labels, weights, Mix(ce=1))[0]
    loss, rows = weighted_loss([Term(hidden, head)], labels, weights, Mix(kl=1), soft)
    return loss + jnp.sum(weights * rows.entropy)


def weighted_loss(
    terms: Sequence[Term], labels, weights, mix: Mix, soft: SoftLabels | None = None, selector: Selector | None = None
) -> tuple[jax.Array, Rows]:
    """Sum of weights * the mix's loss, float32 [], and what is known of the rows.

    q is the softmax of the terms' sum. labels int32 [B, R] are ids of the drafter, negative where the token is none of
    them (see `draft_labels`); None for the best of the soft labels. weights float32 [B, R] are not differentiated. A
    selector's loss, with weights of its own, is added.

    Rows of zero weight, a selector's too, cost nothing and their labels may be anything: each shard moves its others to
    the front and takes them through its part of the vocabulary in chunks, gradients in the same pass, so scores exist
    for one chunk at a time, are computed once, and never leave their shard.
    """
    terms, soft, selector = _ready(terms, labels, mix, soft, selector)
    loss, rows = _loss(mix, terms, labels, weights, soft, selector)
    return loss, lax.stop_gradient(rows)


def measured(
    terms: Sequence[Term], labels, weights, soft: SoftLabels | None = None, selector: Selector | None = None
) -> Rows:
    """What is known of each row, with cross-entropy as its loss, in a pass of its own; nothing is differentiated."""
    terms, soft, selector = _ready(terms, labels, Mix(ce=1), soft, selector)
    terms, soft, selector = lax.stop_gradient((terms, soft, selector))
    return _run(Mix(ce=1), terms, labels, weights, soft, selector, gradients=False)[1]


def draft_labels(labels, ids):
    """int32 like labels: which of the drafter's ids each of these ids of the target is; -1 where it has none.

    ids: int32 [V_draft], which id of the target each of the drafter's is, ascending.
    """
    at = jnp.minimum(jnp.searchsorted(ids, labels), ids.shape[0] - 1).astype(jnp.int32)
    return jnp.where(ids[at] == labels, at, -1)


def _ready(terms: Sequence[Term], labels, mix: Mix, soft: SoftLabels | None, selector: Selector | None):
    """The arguments checked, with trained tables spread, so that their gradients are summed over the shards once."""
    V = terms[0].table.shape[-2]
    if soft is None and (mix.reads_target or labels is None):
        raise InputError("labels other than the text's tokens, and losses other than ce, need the target's soft labels")
    if soft is not None:
        known = soft.head.shape[-2]
        short = soft.head[..., :V, :]
        short = jnp.pad(short, [(0, 0)] * (short.ndim - 2) + [(0, V - min(V, known)), (0, 0)])
        allowed = jnp.arange(V) < known
        soft = soft._replace(head=short, allowed=allowed if soft.allowed is None else soft.allowed & allowed)
    if selector is not None:
        if not 1 <= selector.count <= V:
            raise InputError(f"a selector chooses among 1 to {V} ids, which is all there are, not {selector.count}")
        selector = dataclasses.replace(selector, term=_spread(selector.term))
    return tuple(_spread(term) for term in terms), soft, selector


def _spread(term: Term) -> Term:
    return dataclasses.replace(term, table=spread(term.table)) if term.trained and term.table.ndim == 2 else term


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(mix, terms, labels, weights, soft, selector):
    return _run(mix, terms, labels, weights, soft, selector, gradients=False)[:2]


def _forward(mix, terms, labels, weights, soft, selector):
    loss, rows, gradients = _run(mix, terms, labels, weights, soft, selector, gradients=True)
    return (loss, rows), gradients


def _backward(mix, gradients, cotangents):
    to_terms, to_selector = jax.tree.map(lambda x: x * cotangents[0].astype(x.dtype), gradients)
    return to_terms, None, None, None, to_selector


_loss.defvjp(_forward, _backward)


def _run(mix, terms, labels, weights, soft, selector, *, gradients: bool):
    """The loss, what is known of the rows, and gradients like (terms, selector) but for frozen tables, or None."""
    V = terms[0].table.shape[-2]
    rows: Any = here(weights.shape, "batch", None)
    terms_at, soft_at, selector_at = tuple(term_axes(term) for term in terms), None, None
    if soft is not None:
        hidden, allowed = here(soft.hidden.shape, "batch", None, None), here((V,), "vocab")
        whole = None if soft.whole is None else table_axes(soft.whole)
        soft_at = SoftLabels(cast(Any, hidden), table_axes(soft.head), cast(Any, allowed), whole)
    found = (tuple(gradient_like(term) for term in terms_at), None) if gradients else None
    if selector is not None:
        selector_at = dataclasses.replace(selector, term=term_axes(selector.term), weights=rows)
        if found is not None:
            found = found[0], _like_gradient(selector_at, gradient_like(selector_at.term))
    local = functools.partial(_local, mix, V, gradients)
    labels_at = None if labels is None else rows
    known = Rows(*[rows] * len(Rows._fields))
    run = on_shards(local, (terms_at, labels_at, rows, soft_at, selector_at), (here(()), known, found))
    return run(terms, labels, weights, soft, selector)


def _like_gradient(selector: Selector, term: Term) -> Selector:
    """A selector's like with what has a gradient."""
    return dataclasses.replace(selector, term=term, weights=cast(Any, None))


class _Theirs:
    """What the target says, on one shard and for a few rows at a time."""

    def __init__(self, soft: SoftLabels):
        self.hidden, self.head = soft.hidden.reshape(-1, soft.hidden.shape[-1]), table_here(soft.head)
        self.allowed, self.whole = cast(jax.Array, soft.allowed), None if soft.whole is None else table_here(soft.whole)

    def at(self, rows) -> Target:
        x = self.hidden.at[rows].get(mode="clip")
        scores = jnp.where(self.allowed[None], logits(x, self.head), -jnp.inf)
        norm, best = losses.log_normaliser(scores)
        if self.whole is None:
            return Target(scores - norm, jnp.zeros_like(norm), best - norm)
        of_all, best = losses.log_normaliser(logits(x, self.whole))
        return Target(scores - norm, jnp.minimum(norm - of_all, 0), best - of_all)


def _local(mix: Mix, count: int, gradients: bool, terms, labels, weights, soft, selector: Selector | None):
    """The loss of all rows, and of one shard's rows what is known of them and the gradients of its part of the tables.

    count: ids of the whole vocabulary.
    """
    (B, R), weights = weights.shape, weights.reshape(-1)
    parts = [OnShard(term) for term in terms]
    theirs = None if soft is None else _Theirs(soft)
    choice = None if selector is None else OnShard(selector.term)
    V, N, chunk = parts[0].table.shape[0], B * R, min(CHUNK_ROWS, B * R)
    ids = shard_index("vocab") * V + jnp.arange(V)
    counts = weights != 0
    if selector is not None:
        choice_weights = selector.weights.reshape(-1)
        counts, choice_weights = counts | (choice_weights != 0), jnp.pad(choice_weights, (0, 1))
    order = jnp.argsort(~counts, stable=True)
    order = jnp.pad(order, (0, -N % chunk), constant_values=N)  # N points at a row of zeros
    weights, counts, used = jnp.pad(weights, (0, 1)), jnp.pad(counts, (0, 1)), jnp.sum(counts)
    if labels is not None:
        labels = jnp.pad(labels.reshape(-1), (0, 1))

    def seen(rows, scores) -> tuple[View, Any]:
        """The rows for the losses, and their labels int32 [r, 1], -1 for none."""
        target = None if theirs is None else theirs.at(rows)
        label = losses.best_id(cast(Target, target).log_p, ids) if labels is None else labels[rows][:, None]
        label = jnp.where(label < count, label, -1)
        norm, best = losses.log_normaliser(scores)
        return View(scores - norm, best - norm, label == ids[None], (label >= 0).astype(jnp.float32), target), label

    def one_chunk(i, carry):
        loss, known, to_terms, to_choice = carry
        rows = lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        each = [part.scores(rows) for part in parts]
        weight, scores = weights[rows][:, None], functools.reduce(jnp.add, each)
        view, label = seen(rows, scores)
        row_loss, slope = losses.mixed(mix, view)
        loss, slope = loss + jnp.sum(weight * row_loss), slope * weight
        likelihood = jnp.exp(losses.log_likelihood(view)) * view.has_label
        none = jnp.zeros_like(likelihood)
        accepted, entropy = (likelihood, none) if theirs is None else (losses.acceptance(view)[0], losses.entropy(view))
        new = [row_loss, likelihood, accepted, losses.agreement(view), entropy]
        if choice is None or selector is None:
            new += [none, none, none]
        else:
            chosen = losses.candidates(scores, ids, label, selector.count)
            chosen_scores = chosen.scores + choice.scores_of(rows, chosen.ids)
            chosen_loss, chosen_slope = losses.choice_loss(chosen_scores, chosen.is_label)
            new += [chosen_loss, losses.chosen_right(chosen_scores, chosen.is_label), chosen.found]
            weight = choice_weights[rows][:, None]
            loss, chosen_slope = loss + jnp.sum(weight * chosen_loss), chosen_slope * weight
            slope = slope + at_ids(chosen_slope, chosen.ids - ids[0], V)
            to_choice = choice.add_of(to_choice, rows, chosen.ids, chosen_slope) if gradients else None
        new.append(none if theirs is None else losses.label_probability(view))
        if gradients:
            to_terms = [part.add(one, rows, own, slope) for part, one, own in zip(parts, to_terms, each, strict=True)]
        fresh = jnp.where(counts[rows][:, None], jnp.concatenate(new, axis=-1), 0)
        return loss, known.at[rows].set(fresh), to_terms, to_choice

    to_terms = [part.zeros() for part in parts] if gradients else None
    to_choice = choice.zeros() if choice is not None and gradients else None
    start = jnp.zeros(()), jnp.zeros((N + 1, len(Rows._fields))), to_terms, to_choice
    loss, known, to_terms, to_choice = lax.fori_loop(0, -(-used // chunk), one_chunk, start)
    found: Any = None
    if gradients:
        found = tuple(part.done(one) for part, one in zip(parts, cast(list, to_terms), strict=True)), None
        if selector is not None and choice is not None:
            found = found[0], _like_gradient(selector, choice.done(to_choice))
    return total(loss, "batch"), Rows(*(known[:N, i].reshape(B, R) for i in range(known.shape[1]))), found
