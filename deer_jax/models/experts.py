"""Mixture of experts: routing, and three ways to run the chosen experts, by how many rows a device has.

A few rows (decoding) all pass through each expert that one of them chose: it is read once, the others not at all. More
pass through all experts at once where that is fast. Many (prefill, full forward, training) are sorted by expert, and
tiles of them pass through the expert that they chose. The stacks of all layers [L, E, ...] are passed whole and sliced
at (layer, expert): a layer sliced out first would be copied every round.

On a mesh each device holds some of the experts and runs its rows' choices among these; one sum over devices ends it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deer_jax.config import ModelConfig
from deer_jax.models.layers import gated_mlp, precision
from deer_jax.sharding import gathered, here, on_shards, shard_index, total

# The logical axis of each dimension of one layer's experts.
AXES = {
    "gate": ("experts", None, "width"),  # [E, F, D]
    "up": ("experts", None, "width"),
    "down": ("experts", "width", None),  # [E, D, F]
}
# Rows of a device up to which they pass through the active experts one by one. Compiled for 8 v5e, 8 layers of
# Qwen3-30B-A3B read 809 MB for 17 rows, all experts at once 1212 MB; at 32 rows 87 % of the experts are active.
LOOP_ROWS = 32
# Up to here, on a TPU, all experts at once: by the compiler's estimate 5.3 Mcycles for 272 rows (16 blocks of 17), by
# tiles 9.3; for 2048 rows 40 and 15. On a CPU that is 5 to 12 times as slow as tiles at 128 experts.
DENSE_ROWS = 320
# A tile has as many rows as an expert has on average, within these: below, it is read for too few rows; above, they
# compute for longer than the expert takes to be read.
TILE_ROWS = (16, 256)


def route(x, router, config: ModelConfig):
    """Expert ids int32 [R, top] and their weights [R, top] in x's dtype, for rows x [R, D] and router [E, D].

    Softmax over all experts in float32, then the best `experts_per_token`; Qwen3-MoE divides them by their sum.
    """
    scores = jnp.einsum("rd,ed->re", x, router, precision=precision(x.dtype))
    scores = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    weights, chosen = lax.top_k(scores, config.experts_per_token)
    if config.normalise_router:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return chosen, weights.astype(x.dtype)


def mix(x, router, experts, layer, config: ModelConfig):
    """The experts' weighted sum [B, T, D] for x [B, T, D].

    Args:
      experts: dict of gate, up [L, E, F, D] and down [L, E, D, F], of all layers or of some.
      layer: which of these L, traced or not.
    """

    def on_shard(x, router, experts, layer):
        rows = x.reshape(-1, x.shape[-1])
        chosen, weights = route(rows, router, config)
        held = experts["gate"].shape[1]
        chosen = chosen - shard_index("experts") * held
        chosen = jnp.where((chosen >= 0) & (chosen < held), chosen, held)
        return _run(config, rows, chosen, weights, experts, layer).reshape(1, *x.shape)

    x = jnp.asarray(x)
    stacks = {name: here(stack.shape, None, *AXES[name]) for name, stack in experts.items()}
    parts = on_shards(
        on_shard,
        in_specs=(here(x.shape, "batch", None, None), here(router.shape, None, None), stacks, here(())),
        out_specs=here((config.experts, *x.shape), "experts", "batch", None, None),
    )(x, router, experts, jnp.asarray(layer, jnp.int32))
    # Summed out here, since the gradient of a sum over shards would be summed over them once more.
    return lax.reduce_sum(parts, (0,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(config: ModelConfig, rows, chosen, weights, experts, layer):
    """The weighted sum [R, D] of what the held experts make of rows [R, D]; chosen is E for those held elsewhere."""
    arguments = (rows, chosen, weights, experts, layer)
    many, dense = functools.partial(_by_tile, config), _by_expert
    if rows.shape[0] <= LOOP_ROWS:
        return _by_active_expert(*arguments)
    if rows.shape[0] <= DENSE_ROWS:
        return lax.platform_dependent(*arguments, tpu=dense, default=many)
    return many(*arguments)


def _pick(stack, *index):
    """stack[index] for traced integers: one slice, never a copy of more."""
    start = (*index, *(0,) * (stack.ndim - len(index)))
    sizes = (1,) * len(index) + stack.shape[len(index) :]
    return lax.dynamic_slice(stack, [jnp.asarray(i, jnp.int32) for i in start], sizes).reshape(sizes[len(index) :])


def _whole(weight, name: str):
    """An expert [..] or several [E, ..] with all of its width, of which a shard holds a part."""
    axes = AXES[name][-weight.ndim :]
    return gathered(weight, "width", axes.index("width"))


def _by_active_expert(rows, chosen, weights, experts, layer):
    weight_of = _weight_of(rows, chosen, weights, experts)
    load = jnp.zeros((weight_of.shape[1],), jnp.int32).at[chosen.reshape(-1)].add(1, mode="drop")
    # Shards that hold parts of one expert put it together in step, so each runs what the rows of any of them chose.
    load = total(load, "width")
    by_load = jnp.argsort(-load)  # the active experts come first

    def one_expert(i, summed):
        expert = by_load[i]
        out = gated_mlp(rows, *(_whole(_pick(experts[name], layer, expert), name) for name in AXES))
        weight = lax.dynamic_slice_in_dim(weight_of, expert, 1, axis=1)
        # Not out * 0 for the rows that did not choose it: an expert that is not finite would reach them too.
        return summed + jnp.where(weight != 0, out * weight, jnp.zeros((), out.dtype))

    return lax.fori_loop(0, jnp.sum(load > 0), one_expert, jnp.zeros_like(rows))


def _by_expert(rows, chosen, weights, experts, layer):
    gate, up, down = _layer(experts, layer)
    product = functools.partial(jnp.einsum, precision=precision(rows.dtype))
    inner = jax.nn.silu(product("rd,efd->erf", rows, gate)) * product("rd,efd->erf", rows, up)
    out = product("erf,edf->erd", inner, down)
    weight = _weight_of(rows, chosen, weights, experts).T[..., None]
    return jnp.sum(jnp.where(weight != 0, out * weight, jnp.zeros((), out.dtype)), axis=0)


def _weight_of(rows, chosen, weights, experts):
    """[R, E]: of each row and held expert."""
    nothing = jnp.zeros((rows.shape[0], experts["gate"].shape[1]), rows.dtype)
    return nothing.at[jnp.arange(rows.shape[0])[:, None], chosen].set(weights, mode="drop")


def _layer(experts, layer):
    """One layer's gate, up [E, F, D] and down [E, D, F], put together from the shards."""
    return [_whole(_pick(experts[name], layer), name) for name in AXES]


class _Tiles(NamedTuple):
    """Choices sorted by expert and cut into tiles of one expert each; those of experts held elsewhere are in none."""

    rows: int  # of a tile
    top: int  # choices of a row
    order: jax.Array  # [R * top + rows] choices, as indices into [R * top]
    sizes: jax.Array  # [E] choices of each expert
    starts: jax.Array  # [E] where in the order they start
    ends: jax.Array  # [E] tiles up to and with this expert

    def __getitem__(self, i):
        """Of tile i: its expert, and its choices [rows]; in the place of those that it lacks, numbers out of bounds."""
        expert = jnp.sum(self.ends <= i)
        size = self.sizes[expert]
        behind = (i - self.ends[expert] - -size // self.rows) * self.rows
        choices = lax.dynamic_slice_in_dim(self.order, self.starts[expert] + behind, self.rows)
        place = jnp.arange(self.rows)
        return expert, jnp.where(place < size - behind, choices, self.order.size + self.top * place)


def _tiles(chosen, held: int, config: ModelConfig) -> _Tiles:
    flat = chosen.reshape(-1)
    mean = -(-flat.size // config.experts)
    rows = min(max(TILE_ROWS[0], 1 << (mean - 1).bit_length()), TILE_ROWS[1])
    sizes = jnp.zeros((held,), jnp.int32).at[flat].add(1, mode="drop")
    starts, ends = jnp.cumsum(sizes) - sizes, jnp.cumsum(-(-sizes // rows))
    return _Tiles(rows, chosen.shape[1], jnp.pad(jnp.argsort(flat), (0, rows)), sizes, starts, ends)


def _at(values, choices):
    """Of values [n, ...]; zeros for those out of bounds."""
    return values.at[choices].get(mode="fill", fill_value=0)


def _add(values, choices, more):
    """Values [n, ...] with more; what is out of bounds is dropped. An expert has each row and choice at most once."""
    return values.at[choices].add(more.astype(values.dtype), mode="drop", unique_indices=True)


def _by_tile(config: ModelConfig, rows, chosen, weights, experts, layer):
    top, weights = chosen.shape[1], weights.reshape(-1, 1)
    tiles = _tiles(chosen, experts["gate"].shape[1], config)
    split = experts["gate"].shape[-1] < rows.shape[1]
    # Put together once for all tiles, whose number differs between shards; what is whole stays in its stack.
    stacks, where = (_layer(experts, layer), ()) if split else ([experts[name] for name in AXES], (layer,))

    def one_tile(i, summed):
        expert, choices = tiles[i]
        out = gated_mlp(_at(rows, choices // top), *(_pick(stack, *where, expert) for stack in stacks))
        return _add(summed, choices // top, out * _at(weights, choices))

    return lax.fori_loop(0, tiles.ends[-1], one_tile, jnp.zeros_like(rows))


def _backward(config: ModelConfig, arguments, gradient):
    """By tiles for any number of rows; what a tile made is made again. gradient: of the sum [R, D]."""
    rows, chosen, weights, experts, layer = arguments
    top, flat = chosen.shape[1], weights.reshape(-1, 1)
    tiles = _tiles(chosen, experts["gate"].shape[1], config)
    stacks, to_experts = jax.vjp(lambda experts: _layer(experts, layer), experts)

    def one_tile(i, sums):
        of_rows, of_weights, *of_stacks = sums
        expert, choices = tiles[i]

        def weighted(x, weight, *gate_up_down):
            return gated_mlp(x, *gate_up_down) * weight

        x, weight = _at(rows, choices // top), _at(flat, choices)
        _, pull = jax.vjp(weighted, x, weight, *(_pick(stack, expert) for stack in stacks))
        of_x, of_weight, *of_expert = pull(_at(gradient, choices // top))
        return (
            _add(of_rows, choices // top, of_x),
            _add(of_weights, choices, of_weight),
            *(stack.at[expert].add(one.astype(stack.dtype)) for stack, one in zip(of_stacks, of_expert, strict=True)),
        )

    nothing = [jnp.zeros(x.shape, jnp.float32) for x in (rows, flat, *stacks)]
    sums = lax.fori_loop(0, tiles.ends[-1], one_tile, tuple(nothing))
    of_rows, of_weights, *of_stacks = (x.astype(rows.dtype) for x in sums)
    return of_rows, None, of_weights.reshape(weights.shape), *to_experts(of_stacks), None


def _forward(config: ModelConfig, *arguments):
    return _run(config, *arguments), arguments


_run.defvjp(_forward, _backward)
