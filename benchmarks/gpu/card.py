"""What the card can do, and what models ask of it: bytes over bandwidth, operations over rate."""

import functools
import time
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from results import Results

from deer_jax.config import ModelConfig

BYTES = 2  # of a number in bfloat16
# Bytes per second of a copy, read and written, and bfloat16 operations per second of a large product, as others have
# measured them.
KNOWN = {"H100": (3.0e12, 800e12), "H200": (4.3e12, 800e12)}


class Card(NamedTuple):
    """What was measured: bytes per second of a copy, operations per second of a large product."""

    bandwidth: float
    rate: float

    def seconds(self, size: float, operations: float) -> float:
        """The least time for reading so many bytes and computing so much beside it."""
        return max(size / self.bandwidth, operations / self.rate)

    def why(self, size: float, operations: float) -> str:
        return (
            f"{size / 1e9:.4g} GB at {self.bandwidth / 1e12:.3g} TB/s, {operations / 1e9:.4g} GFLOP at "
            f"{self.rate / 1e12:.3g} TFLOP/s, whichever takes longer"
        )


def fastest(function, *args, times: int = 10) -> float:
    """Seconds of the fastest of some calls."""
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        found.append(time.perf_counter() - begin)
    return min(found)


def measure_card(results: Results, tiny: bool) -> Card:
    """Also written down."""
    size, width = (1 << 20, 256) if tiny else (1 << 30, 8192)
    x = jnp.ones((size // 4,), jnp.float32)
    bandwidth = 2 * x.nbytes / fastest(jax.jit(lambda x: x + 1), x)
    a = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
    rate = 2 * width**3 / fastest(jax.jit(jnp.dot), a, a)
    kind = jax.devices()[0].device_kind
    known = next((value for name, value in KNOWN.items() if name in kind), None)
    results.add(
        f"{kind}, jax {jax.__version__}",
        {"TB/s": bandwidth / 1e12, "TFLOP/s": rate / 1e12},
        None if known is None else {"TB/s": known[0] / 1e12, "TFLOP/s": known[1] / 1e12},
        "a copy of 1 GiB and a bfloat16 product of 8192 x 8192 x 8192, as others have measured on such a card"
        if known else "no such card is known here: nothing is expected",
    )  # fmt: skip
    return Card(bandwidth, rate)


def matrices(config: ModelConfig, experts: float | None = None) -> float:
    """Entries of the layers' weights, with so many of the experts; None: those that one row chooses."""
    attention = config.width * config.head_width * 2 * (config.heads + config.kv_heads)
    experts = config.experts_per_token if experts is None else experts
    mlp = config.expert_width * experts if config.experts else config.mlp_width
    return config.layers * (attention + 3 * config.width * mlp)


def reached_experts(config: ModelConfig, rows: int) -> float:
    """How many experts at least one of so many rows chooses, each by itself and evenly."""
    return config.experts * (1 - (1 - config.experts_per_token / config.experts) ** rows) if config.experts else 0.0


def pass_bytes(config: ModelConfig, batch: int, rows: int, context: int) -> float:
    """Bytes that a pass of `rows` rows for each of `batch` texts reads: weights and the head once, and the caches."""
    weights = matrices(config, reached_experts(config, batch * rows)) + config.vocab_size * config.width
    cache = batch * context * 2 * config.layers * config.kv_heads * config.head_width
    return BYTES * (weights + cache)


def pass_flops(config: ModelConfig, batch: int, rows: int, context: int) -> float:
    """Operations of the same pass, each row with a line of logits."""
    each = 2 * (matrices(config) + config.vocab_size * config.width)
    each += 4 * config.layers * config.heads * config.head_width * context
    return batch * rows * each


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "plain"))
def _filled(key, shape: tuple[int, ...], dtype, plain: bool):
    if plain:
        return jnp.ones(shape, dtype)
    own = jax.random.normal(key, shape[-2:], jnp.float32) * shape[-1] ** -0.5
    return jnp.broadcast_to(own.astype(dtype), shape)


def filled(shapes: Any, seed: int = 0) -> Any:
    """Arrays of these shapes, made on the card: norms are one, matrices random, those of all layers and experts alike.

    Times do not depend on the values, but for the experts that are chosen: so the router is random.
    """

    def fill(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(jax.tree_util.keystr(path).encode()))
        return _filled(key, x.shape, x.dtype, jax.tree_util.keystr(path[-1:]).strip("[']").endswith("norm"))

    return jax.tree_util.tree_map_with_path(fill, shapes)
