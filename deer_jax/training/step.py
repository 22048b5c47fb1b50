"""One jitted training step: gradients of a stage's loss, accumulated, clipped, applied, averaged."""

import dataclasses
import math
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from deer_jax.build import Build
from deer_jax.errors import InputError
from deer_jax.models.transformer import Params, unstack_layers
from deer_jax.training.objectives import Loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay, clipping, and an average of the parameters.

    Attributes:
      learning_rate: the largest, behind the warm-up.
      warmup: steps of linear growth to `learning_rate`.
      final_rate: learning rate at the last step, as a share of `learning_rate`.
      clip: largest global gradient norm.
      b1, b2: how slowly Adam's two moments change.
      weight_decay: on matrices only.
      ema: decay of the averaged parameters, which are the ones evaluated and exported; 0 averages nothing.
    """

    learning_rate: float = 1e-4
    warmup: int = 100
    final_rate: float = 0.05
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    ema: float = 0.0

    def __post_init__(self):
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("ema", "b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("warmup", "final_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each step, counted from 0; the warm-up is at most half of the steps."""
    warmup = min(config.warmup, steps // 2)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, steps, config.learning_rate * config.final_rate
    )
    # The first step is the first of the warm-up, not one at rate 0, and the last one has the final rate.
    return lambda step: rate(step + 1)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping and AdamW."""

    def decayed(params: Params):
        # By name: the vectors of stacked layers have two axes as well.
        return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("norm", "bias")), params)

    adamw = optax.adamw(schedule(config, steps), config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a step takes and returns, and a checkpoint holds."""

    params: Params
    average: Params  # the averaged parameters; empty when nothing is averaged
    optimizer: optax.OptState


def init_state(params: Params, config: OptimizerConfig, steps: int) -> TrainState:
    """The state before the first step. It holds a copy: steps donate it, and a target may share the parameters."""
    params = jax.tree.map(jnp.copy, params)
    average = jax.tree.map(jnp.copy, params) if config.ema else {}
    where = jax.tree.map(lambda x: x.sharding, abstract_state(params, config, steps).optimizer)
    state = jax.jit(make_optimizer(config, steps).init, out_shardings=where)(params)
    return TrainState(params=params, average=average, optimizer=state)


def abstract_state(params: Params, config: OptimizerConfig, steps: int) -> TrainState:
    """`init_state` as shapes and the places where its arrays lie; nothing is computed."""
    optimizer = make_optimizer(config, steps)
    home = jax.tree.leaves(params)[0].sharding
    alone = NamedSharding(home.mesh, PartitionSpec()) if isinstance(home, NamedSharding) else home
    # Moments lie where their parameters do, counts everywhere; left to itself XLA would put them all on one device.
    state = optax.tree_map_params(
        optimizer.init, lambda x, param: _abstract(x, param.sharding), jax.eval_shape(optimizer.init, params), params,
        transform_non_params=lambda x: _abstract(x, alone),
    )  # fmt: skip
    shapes = jax.tree.map(lambda x: _abstract(x, x.sharding), params)
    return TrainState(params=shapes, average=shapes if config.ema else {}, optimizer=state)


def _abstract(x, where) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def computing(params: Params, build: Build) -> Params:
    """Parameters as training holds them, float32 and stacked, as the computation takes them."""
    params = jax.tree.map(lambda x: x.astype(build.dtype), params)
    return params if build.scan else unstack_layers(params, params["layers"]["input_norm"].shape[0])


def make_step(
    loss: Loss,
    config: OptimizerConfig,
    steps: int,
    *,
    build: Build,
    shardings: TrainState | None = None,
):
    """The jitted step: (state, batch, fixed parameters) -> (state, metrics); state is donated.

    batch: the arrays of an example, each with a leading axis of micro-batches whose gradients are accumulated, and
    `total`. The loss is the sum over all of them divided by the sum of their `total`, whatever the split. Arrays may be
    sharded over a mesh.

    Args:
      loss: see `objectives.Loss`; the fixed parameters are handed on to it.
      build: the dtype of the computation, and whether layers are scanned; parameters, averages and gradients' sums are
        float32.
      shardings: where the state lies, and stays; None on one device.
    """
    optimizer = make_optimizer(config, steps)

    def loss_of(params: Params, part: dict[str, jax.Array], fixed: Params):
        return loss(computing(params, build), part, fixed)

    def step(state: TrainState, batch: dict[str, jax.Array], fixed: Params):
        def micro(carry, part):
            gradients, summed, predicted = carry
            (more, count), fresh = jax.value_and_grad(loss_of, has_aux=True)(state.params, part, fixed)
            return (jax.tree.map(jnp.add, gradients, fresh), summed + more, predicted + count), None

        zero = jax.tree.map(jnp.zeros_like, state.params)
        start = (zero, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
        (gradients, summed, predicted), _ = lax.scan(micro, start, batch)
        total = jnp.maximum(jnp.sum(batch["total"]), 1e-6)
        gradients = jax.tree.map(lambda g: g / total.astype(g.dtype), gradients)
        norm = optax.tree.norm(gradients)
        # optax mixes dtypes that strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            params = cast(Params, optax.apply_updates(state.params, updates))
        average = state.average
        if config.ema:
            average = jax.tree.map(lambda a, p: a + (p - a) * jnp.asarray(1 - config.ema, a.dtype), average, params)
        after = TrainState(params=params, average=average, optimizer=optimizer_state)
        return after, {"loss": summed / total, "gradient_norm": norm, "predicted": predicted}

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
