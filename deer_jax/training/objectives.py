"""What is minimised: losses of what a drafter says at masked positions, and scores computed only there.

DEER (arXiv 2512.15176) equations 1 and 4, and what drafters that read the target are trained with; what is masked and
weighted how is decided in `diffusion.corruption`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.build import Remat
from deer_jax.config import ModelConfig, check_number
from deer_jax.drafters.protocol import Predictions, Trainable
from deer_jax.models.transformer import Params, bind
from deer_jax.sharding import spread
from deer_jax.training.cross_entropy import (
    Selector,
    SoftLabels,
    draft_labels,
    measured,
    weighted_cross_entropy,
    weighted_loss,
)
from deer_jax.training.losses import Mix, confidence_loss
from deer_jax.training.own_drafts import drafted, read_drafts
from deer_jax.training.slot_weights import accepted_at_stake, decay

MOST_WEIGHT = 1e6  # of a loss

# (parameters, batch, fixed parameters) -> the summed weighted cross-entropy, and the number of tokens predicted
Loss = Callable[[Params, dict[str, jax.Array], Params], tuple[jax.Array, jax.Array]]


class View(NamedTuple):
    """The target's view of a batch: what it says after each text position, and what its tapped layers give."""

    hidden: jax.Array | None  # [B, T, D'] final hidden states over the clean texts; None where nothing needs them
    head: jax.Array  # [V', D']
    tapped: jax.Array | None  # [B, T, n*D']
    drafted: tuple[jax.Array, jax.Array] | None = (
        None  # own drafts [B, M, W], and the states [B, M*W, D'] that say them
    )


def read_text(config: ModelConfig, params: Params, tokens, taps: tuple[int, ...] = ()) -> View:
    """The target reads clean texts int32 [B, T]; nothing is differentiated."""
    model = bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    read = lax.stop_gradient(model(model.lookup(tokens), positions, taps=taps))
    return View(read.hidden, params["embed" if config.tied else "head"], read.tapped)


def kept_view(config: ModelConfig, params: Params, batch: dict[str, jax.Array]) -> View | None:
    """What `target_states` has added to a batch; None for a batch without."""
    if not {"hidden", "tapped"} & batch.keys():
        return None
    return View(batch.get("hidden"), params["embed" if config.tied else "head"], batch.get("tapped"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a stage minimises: a sum of losses, each with a weight, at the tokens that are to be predicted.

    Where a recipe has `loss`, `ce` is 0 unless it is named there.

    Attributes:
      ce, kl, tv: weights of a row's losses, see `losses.Mix`. `ce` alone reads nothing but the texts (the paper); the
        others read the target's distributions.
      selector: weight of the choice that a path selector makes, for drafters that have one.
      confidence: weight of the confidence head's loss, for drafters that have one; it needs the target as well.
      decay: the i-th token of a block, from 0, weighs exp(-i / decay); None: all the same. Blocks only.
    """

    ce: float = 1.0
    kl: float = 0.0
    tv: float = 0.0
    selector: float = 1.0
    confidence: float = 0.0
    decay: float | None = None

    def __post_init__(self):
        for name in ("selector", "confidence"):
            check_number(name, getattr(self, name), 0, MOST_WEIGHT)
        if self.decay is not None:
            check_number("decay", self.decay, 0, MOST_WEIGHT, above=True)
        _ = self.mix

    @property
    def mix(self) -> Mix:
        return Mix(ce=self.ce, kl=self.kl, tv=self.tv)

    @property
    def reads_target(self) -> bool:
        """Whether the target's distributions are needed."""
        return self.mix.reads_target or self.confidence > 0


CROSS_ENTROPY = Objective()
ACCEPTANCE = Objective(ce=0.0, tv=1.0)  # of the drafter's own drafts, see `own_drafts`


def drafter_loss(
    method: Trainable,
    target: ModelConfig | None = None,
    objective: Objective = CROSS_ENTROPY,
    remat: Remat = "none",
    *,
    own: bool = False,
) -> Loss:
    """The loss of a drafter's stages. Its fixed parameters are those of `fixed_params`.

    target: its shape, where it is read. remat: what its gradients compute again, see `build.Remat`. own: blocks are
    what the drafter itself drafts, see `own_drafts`.
    """

    def of(params: Params, batch: dict[str, jax.Array], fixed: Params):
        tokens, view, shared = batch["tokens"], None, fixed.get("shared", {})
        if reads_target(method, objective):
            assert target is not None
            view = kept_view(target, fixed["target"], batch) or read_text(target, fixed["target"], tokens, method.taps)
            shared = shared | {name: fixed["target"][key] for name, key in method.borrowed(target).items()}
        if objective.decay is not None:
            weight = batch["weight"]
            batch = batch | {"weight": weight * decay(weight.shape[-1], objective.decay)[None, None]}
        tapped = None if view is None else view.tapped
        if own:
            assert view is not None
            assert target is not None
            drafts = drafted(method, params, shared, batch, tapped)
            batch = batch | {"drafted": drafts}
            states = read_drafts(target, fixed["target"], tokens, batch["anchor"], drafts)
            view = view._replace(drafted=(drafts, states))
        said = method.predict(spread_vocabulary(params), shared, batch, tapped, remat)
        loss = loss_of(said, tokens, objective, view if objective.reads_target else None, batch["masked"].shape)
        return loss, jnp.sum(batch["masked"])

    return of


def fixed_params(
    method: Trainable, target: ModelConfig, objective: Objective, params: Params, shared: Params
) -> Params:
    """What the loss of a stage is handed beside what it trains: `target`, the target's parameters where it is read, and
    `shared`, what the drafter has of it. Each array once: on a mesh each is gathered."""
    if not reads_target(method, objective):
        return {"target": {}, "shared": shared}
    borrowed = method.borrowed(target)
    return {"target": params, "shared": {name: x for name, x in shared.items() if name not in borrowed}}


def reads_target(method: Trainable, objective: Objective) -> bool:
    """Whether the target reads the texts in every step."""
    return bool(method.taps) or objective.reads_target


def loss_of(said: Predictions, tokens, objective: Objective, view: View | None, masked: tuple[int, ...]):
    """float32 []: the summed weighted loss of predictions about texts int32 [B, T]; masked: shape of the masks."""
    labels = jnp.take_along_axis(tokens, said.place, axis=1, mode="clip")
    text = labels.shape[1] - math.prod(masked[1:])  # so many are of the text itself, and come before those of blocks
    if view is not None and view.drafted is not None:
        labels = jnp.concatenate([labels[:, :text], view.drafted[0].reshape(labels.shape[0], -1)], axis=1)
    labels = labels if said.ids is None else draft_labels(labels, said.ids)
    V = said.terms[0].table.shape[-2]
    known = (labels >= 0) & (labels < V)
    if said.allowed is not None:
        known &= said.allowed.at[labels].get(mode="clip")
    labels = jnp.where(known, labels, -1)
    weights = said.weight if objective.mix.reads_target else jnp.where(known, said.weight, 0)
    in_blocks = (jnp.arange(weights.shape[1]) >= text)[None]  # where a head has a part
    soft = None
    if view is not None:
        assert view.hidden is not None
        before = (said.place - 1)[..., None]  # the target says the token at `place` one position earlier
        theirs = jnp.take_along_axis(view.hidden, before, axis=1, mode="clip")
        if view.drafted is not None:
            theirs = jnp.concatenate([theirs[:, :text], view.drafted[1]], axis=1)
        head, whole = (view.head, None) if said.ids is None else (said.terms[0].table, view.head)
        soft = SoftLabels(theirs, head, said.allowed, whole)
    selector = None
    if said.choice is not None and objective.selector:
        selector = Selector(said.choice.term, objective.selector * jnp.where(in_blocks, weights, 0), said.choice.count)
    if view is not None and view.drafted is not None:
        B, M, W = masked
        rows = measured(said.terms, labels, weights, soft, selector)
        likelihood, said_by, counts = (x[:, text:].reshape(B, M, W) for x in (rows.likelihood, rows.said, weights != 0))
        chance = jnp.minimum(said_by / jnp.where(likelihood > 0, likelihood, 1), 1)
        factor = accepted_at_stake(chance, counts)
        weights = weights * jnp.pad(factor.reshape(B, M * W), ((0, 0), (text, 0)), constant_values=1)
    loss, rows = weighted_loss(said.terms, labels, weights, objective.mix, soft, selector)
    if said.confidence is not None and objective.confidence:
        weights = jnp.where(in_blocks, weights, 0)
        loss = loss + objective.confidence * confidence_loss(said.confidence, rows.acceptance, weights)
    return loss


def next_token_loss(config: ModelConfig, remat: Remat = "none") -> Loss:
    """The loss of an autoregressive model, on texts int32 [B, T] of which `length` int32 [B] tokens are real.

    remat: as for `drafter_loss`.
    """

    def of(params: Params, batch: dict[str, jax.Array], fixed: Params):
        tokens, length = batch["tokens"], batch["length"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        params = spread_vocabulary(params)
        model = bind(config, params)
        hidden = model(model.lookup(tokens), positions, remat=remat).hidden
        real = positions[:, 1:] < length[:, None]
        head = params["embed" if config.tied else "head"]
        loss = weighted_cross_entropy(hidden[:, :-1], head, tokens[:, 1:], real.astype(jnp.float32))
        return loss, jnp.sum(real)

    return of


def spread_vocabulary(params: Params) -> Params:
    """The parameters with the tables of the vocabulary as every shard of the rows has them; see `sharding.spread`."""
    return params | {name: spread(params[name]) for name in ("embed", "head") if name in params}
