"""The backbone: one decoder for every supported family, causal or not, for target and drafter.

Flax NNX declares it; plain JAX runs it. `abstract_params`, `init_params` and the checkpoint importers speak of one pure
nested dict:

    embed [V, D] · norm [D] · head [V, D] (untied only)
    layers: name -> [L, ...] (scanned) or index -> name -> [...] (unrolled)
    experts: gate, up [L, E, F, D], down [L, E, D, F] (mixture of experts only; always stacked)

(of drafters that read a target, see `models.conditioned` and `models.eagle3`, others instead of embed and head), and
`bind` merges it back into modules inside the jitted function. Weights are [out, in], as in Hugging Face folders.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from deer_jax.build import Remat
from deer_jax.config import ConditionedConfig, ModelConfig
from deer_jax.models import experts as moe
from deer_jax.models.attention import attend, with_finite_values
from deer_jax.models.blocks import Blocks
from deer_jax.models.cache import KVCache, rows_of, write_cache
from deer_jax.models.layers import TwoWays, convolve, gated_mlp, linear, logits, look_up, rms_norm, rotary, rotate
from deer_jax.models.piecewise import SAVED, BlockMask
from deer_jax.models.weights import Weight, expert_weights, layer_weights, outer_weights, parameter
from deer_jax.sharding import constrain, whole

Params = dict[str, Any]
# What is not computed again; the outputs of attention are as small as what lies between layers, and dear.
KEPT = jax.checkpoint_policies.save_only_these_names(SAVED)
POLICIES = {
    "cheap": jax.checkpoint_policies.save_from_both_policies(
        KEPT, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "layers": KEPT,
}


class Layer(nnx.Module):
    """One pre-norm block; with `stack` its weights carry leading axes and only `lax.scan` may call it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, stack: tuple[int, ...] = ()):
        self.config = config
        for name, weight in layer_weights(config).items():
            setattr(self, name, parameter(weight, rngs, dtype, stack))

    def weight(self, name: str):
        return whole(getattr(self, name)[...], layer_weights(self.config)[name].axes)

    def _heads(self, h, name: str, groups: int):
        config, (B, T, _) = self.config, h.shape
        K, H = config.kv_heads, config.head_width
        y = linear(h, self.weight(name), self.weight(f"{name}_bias") if config.qkv_bias else None)
        y = constrain(y.reshape(B, T, K, groups, H), "batch", None, "kv_heads", "groups", None)
        y = y.reshape(B, T, K * groups, H)
        if config.qk_norm and name != "v":
            y = rms_norm(y, self.weight(f"{name}_norm"), config.norm_eps)
        return y

    def queries(self, h, cos_sin):
        """Queries [B, T, N, H] of normalised rows [B, T, D]."""
        return rotate(self._heads(h, "q", self.config.heads // self.config.kv_heads), cos_sin)

    def keys_values(self, h, cos_sin):
        """Keys and values [B, T, K, H] of normalised rows [B, T, D]."""
        k, v = rotate(self._heads(h, "k", 1), cos_sin), self._heads(h, "v", 1)
        # A row alone is seen by all that follow it.
        return with_finite_values(k, v) if h.shape[1] > 1 else (k, v)

    def _convolved(self, name: str, h, visible):
        """A sublayer's normalised input, convolved, and a function that does so with its output."""
        config = self.config
        if not isinstance(config, ConditionedConfig) or not config.conv_kernel:
            return h, lambda y: y
        base, dynamic = self.weight(f"{name}_base"), linear(h, self.weight(f"{name}_projection"))
        dynamic = constrain(dynamic, "batch", None, "mlp")  # so that these are gathered, and not the projection
        dynamic = constrain(dynamic, "batch", None, None).reshape(*h.shape[:2], *base.shape[:2], -1)
        into, after = ((base[side], dynamic[:, :, side], visible.rows) for side in (0, 1))
        return convolve(h, *into), lambda y: convolve(y, *after)

    def _attend(self, q, k, v, index, visible, cache, start, context):
        """Attention's output; of a conditioned drafter over the cached context, or the one that is given."""
        config = self.config
        if not isinstance(visible, Blocks) or not isinstance(config, ConditionedConfig):
            return attend(q, k, v, visible=visible, cache=cache, layer=index, start=start)
        begin, inside = visible.begin(config, index), visible.inside(config, index)
        if context is None:
            return attend(q, k, v, visible=inside[None], cache=cache, layer=index, start=start, begin=begin)
        k, v = (jnp.concatenate(sides, axis=1) for sides in zip(self.keys_values(*context), (k, v), strict=True))
        real = jnp.full(visible.anchor.shape, visible.rows, jnp.int32)
        return attend(q, k, v, visible=BlockMask(visible.anchor - 1, real, visible.rows, begin, inside))

    def __call__(self, x, cos_sin, experts, index, *, visible, cache, start, context):
        """The block's output [B, T, D] and its fresh keys and values [B, K, T, H].

        context: what keys and values are made of besides the rows' own [B, S, D], and its cos and sin; or None.
        """
        config, (B, T, _) = self.config, x.shape
        with jax.named_scope("attention"):
            h = rms_norm(x, self.weight("input_norm"), config.norm_eps)
            h, after = self._convolved("attention_conv", h, visible)
            q = self.queries(h, cos_sin)
            k, v = self.keys_values(h, cos_sin)
            mixed = self._attend(q, k, v, index, visible, cache, start, context)
            o_bias = self.weight("o_bias") if isinstance(config, ConditionedConfig) and config.o_bias else None
            out = linear(mixed.reshape(B, T, -1), self.weight("o"), o_bias)
            x = constrain(x + after(out), "batch", None, None)
        with jax.named_scope("mlp"):
            h = rms_norm(x, self.weight("post_norm"), config.norm_eps)
            h, after = self._convolved("mlp_conv", h, visible)
            if config.experts:
                out = moe.mix(h, self.weight("router"), experts, index, config)
            else:
                out = gated_mlp(h, self.weight("gate"), self.weight("up"), self.weight("down"))
            x = constrain(x + after(out), "batch", None, None)
        fresh = (constrain(jnp.swapaxes(side, 1, 2), "batch", "kv_heads", None, None) for side in (k, v))
        return x, tuple(fresh)


class Experts(nnx.Module):
    """The stacks of all layers' experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        for name, weight in expert_weights(config).items():
            setattr(self, name, parameter(weight, rngs, dtype, (config.layers,)))


class Pass(NamedTuple):
    """What a model's pass over some rows gives."""

    hidden: jax.Array  # [B, T, D] final hidden states
    fresh: KVCache  # keys and values [L, B, K, T, H] of these rows
    tapped: (
        jax.Array | None
    )  # [B, T, n*D] outputs of the tapped layers side by side; of the last one after the final norm


class Transformer(nnx.Module):
    """Embedding, layers, final norm and head. `scan` stacks the layers; otherwise they are unrolled (faster on CPU)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, scan: bool = True):
        self.config, self.scan = config, scan
        for name, weight in outer_weights(config).items():
            setattr(self, name, parameter(weight, rngs, dtype))
        if scan:
            self.layers = Layer(config, rngs=rngs, dtype=dtype, stack=(config.layers,))
        else:
            self.layers = nnx.List([Layer(config, rngs=rngs, dtype=dtype) for _ in range(config.layers)])
        if config.experts:
            self.experts = Experts(config, rngs=rngs, dtype=dtype)

    def lookup(self, tokens):
        """Embeddings [B, T, D] of tokens int [B, T]."""
        with jax.named_scope("lookup"):
            table = self.embed[...]
            return look_up(table.rows if isinstance(table, TwoWays) else table, tokens)

    def logits(self, hidden):
        """float32 logits [..., V] of final hidden states [..., D]."""
        with jax.named_scope("head"):
            head = whole((self.embed if self.config.tied else self.head)[...], ("vocab", "width"))
            return constrain(logits(hidden, head), "batch", None, "vocab")

    def __call__(
        self, x, positions, *, visible=None, cache: KVCache | None = None, start=None, remat: Remat = "none",
        taps: tuple[int, ...] = (), context=None,
    ):  # fmt: skip
        """What a pass over some rows gives.

        Args:
          x: embeddings [B, T, D]; positions: int [B, T].
          visible: who sees whom among the fresh rows, see `attention.attend`; None is causal. `Blocks`: the rows are
            a conditioned drafter's, with the context's keys and values in the cache or the context given.
          cache: earlier keys and values, only read; start int [B]: how many slots of it exist.
          remat: what gradients compute again, see `build.Remat`.
          taps: layers whose outputs are wanted, from 0 and in this order.
          context: [B, S, D] at positions 0..S-1, see `models.conditioned`; None: there is none, or it is cached.
        """
        config = self.config
        cos_sin = rotary(positions, config.rope, config.head_width, x.dtype)
        if context is not None:
            context = context, rotary(jnp.arange(context.shape[1])[None], config.rope, config.head_width, x.dtype)
        experts = None
        if config.experts:
            experts = {name: getattr(self.experts, name)[...] for name in expert_weights(config)}

        def layer(module, x, index):
            return module(
                x, cos_sin, experts, index, visible=visible, cache=cache, start=start, context=context
            )  # fmt: skip

        def saving(run):
            return run if remat == "none" else jax.checkpoint(run, policy=POLICIES[remat], prevent_cse=not self.scan)

        if self.scan:
            graph, weights = nnx.split(self.layers)

            def body(carry, xs):
                (x, tapped), (index, weights) = carry, xs
                x, fresh = layer(nnx.merge(graph, weights), x, index)
                if taps:
                    tapped = lax.dynamic_update_index_in_dim(tapped, x, places[index], 0)
                return (x, tapped), fresh

            # Tapped layers write into a carry, the others into a place behind it: the outputs of all never exist.
            places = np.full(config.layers, len(taps), np.int32)
            places[list(taps)] = np.arange(len(taps))
            places = jnp.asarray(places)
            tapped = jnp.zeros((len(taps) + 1, *x.shape), x.dtype) if taps else None
            steps = (jnp.arange(config.layers), weights)
            (x, tapped), (keys, values) = lax.scan(saving(body), (x, tapped), steps)
        else:
            fresh: list[Any] = []
            tapped: Any = [None] * len(taps)
            for index, module in enumerate(self.layers):
                graph, weights = nnx.split(module)
                run = saving(lambda weights, x, graph=graph, index=index: layer(nnx.merge(graph, weights), x, index))
                x, pair = run(weights, x)
                fresh.append(pair)
                if index in taps:
                    tapped[taps.index(index)] = x
            keys, values = (jnp.stack(side) for side in zip(*fresh, strict=True))
            if cache is not None:
                keys, values = _after(x, keys), _after(x, values)
        hidden = rms_norm(x, self.norm[...], config.norm_eps)
        if not taps:
            return Pass(hidden, KVCache(keys, values), None)
        outputs = [hidden if tap == config.layers - 1 else tapped[place] for place, tap in enumerate(taps)]
        tapped = constrain(jnp.concatenate(outputs, axis=-1), "batch", None, None)
        return Pass(hidden, KVCache(keys, values), tapped)


def _after(x, fresh):
    """`fresh`, in a way that it depends on x.

    What is written to the cache must wait for every layer to have read it. The last layer's fresh keys do not depend
    on its own reading, and XLA, seeing no order, would write into a copy. It drops barriers before it decides, so
    the order is made of a comparison that is false for every x and that it does not see through.
    """
    never = x[:1, :1, :1] * 0 > 0
    return jnp.where(never[None, ..., None], jnp.zeros((), fresh.dtype), fresh)


@functools.lru_cache
def _declared(config: ModelConfig, scan: bool, dtype) -> tuple[nnx.GraphDef, Params]:
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, scan=scan))
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def abstract_params(config: ModelConfig, dtype=jnp.float32, *, scan: bool = True) -> Params:
    """The parameters as shapes and dtypes, without memory."""
    return _declared(config, scan, jnp.dtype(dtype))[1]


def logical_axes(config: ModelConfig) -> Params:
    """The logical axis of each dimension of the stacked parameters, as tuples (see `sharding`)."""

    def stacked(table: dict[str, Weight]) -> Params:
        return {name: (None, *weight.axes) for name, weight in table.items()}

    axes: Params = {name: weight.axes for name, weight in outer_weights(config).items()}
    axes["layers"] = stacked(layer_weights(config))
    if config.experts:
        axes["experts"] = stacked(expert_weights(config))
    return axes


def init_params(config: ModelConfig, seed: int, dtype=jnp.float32, *, scan: bool = True) -> Params:
    """Random parameters."""

    @jax.jit
    def init():
        return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(seed), dtype=dtype, scan=scan)))

    return init()


def is_stacked(params: Params) -> bool:
    """Whether the layers' weights are stacked on a leading axis."""
    return "q" in params["layers"]


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The module around given parameters, for use inside a jitted function."""
    graph, _ = _declared(config, is_stacked(params), jnp.dtype(params["norm"].dtype))
    return nnx.merge(graph, params)


def unstack_layers(params: Params, layers: int) -> Params:
    """Scanned parameters as unrolled ones."""
    stacks = params["layers"].items()
    return params | {"layers": {i: {name: w[i] for name, w in stacks} for i in range(layers)}}


def stack_layers(params: Params) -> Params:
    """Unrolled parameters as scanned ones."""
    layers = [params["layers"][i] for i in range(len(params["layers"]))]
    return params | {"layers": {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}}


def in_two_ways(params: Params, *tables: str) -> Params:
    """Parameters whose layers' weights, and those of these names, lie both ways, see `TwoWays`; stacked ones as they
    are."""
    if is_stacked(params):
        return params

    def both(name: str, weight):
        return TwoWays(weight, weight.T) if weight.ndim == 2 and name != "router" else weight

    layers = {i: {name: both(name, w) for name, w in layer.items()} for i, layer in params["layers"].items()}
    return params | {"layers": layers} | {name: both(name, params[name]) for name in tables}


def read_prompts(
    model: Transformer, x, cache: KVCache, start, rows, *, first: bool, taps: tuple[int, ...] = ()
) -> tuple[KVCache, jax.Array | None]:
    """Read a prompt chunk's embeddings x [R, P, D], at positions start [R].. of the given rows, into the cache.

    Returns the cache, and what the taps read, see `Pass`. rows: see `cache.write_rows`. `first`: nothing lies before,
    so the cache is not attended to at all.
    """
    positions = start[:, None] + jnp.arange(x.shape[1], dtype=start.dtype)[None]
    before: dict[str, Any] = {} if first else {"cache": rows_of(cache, rows), "start": start}
    read = model(x, positions, taps=taps, **before)
    return write_cache(cache, read.fresh, start, rows), read.tapped
