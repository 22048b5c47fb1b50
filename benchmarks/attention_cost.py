"""What attention costs in training: one layer's, forward and backward, piece by piece against whole scores, in turn.

    python benchmarks/attention_cost.py [--texts 256 2048] [--batch 1] [--repeats N] [--dtype float32]

A text and 24 blocks of 33 rows behind it, anchors at random. Time is the wall clock of one call, bytes are the
temporaries of the compiled program.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from deer_jax.models.attention import attend
from deer_jax.models.parts import HIDDEN, scores_of
from deer_jax.models.piecewise import BlockMask

BLOCKS, ROWS = 24, 33


def whole_scores(q, k, v, mask: BlockMask):
    """The same from the scores of all rows over the text and of each block over itself, kept for the backward pass.

    This is how it was done before, but for the order of a few lines.
    """
    B, T, N, H = q.shape
    K, (_, M), R = k.shape[2], mask.anchor.shape, mask.rows
    text = T - M * R
    rows = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def part(rows, keys, values, seen):
        scores = jnp.where(seen, scores_of(rows, keys), HIDDEN)
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - top)
        exact = jax.lax.Precision.HIGHEST if v.dtype == jnp.float32 else None
        mixed = jnp.einsum("bkgqs,bksh->bkgqh", weights.astype(v.dtype), values, precision=exact,
                           preferred_element_type=jnp.float32)  # fmt: skip
        return top, jnp.sum(weights, axis=-1, keepdims=True), mixed

    causal = jnp.tril(jnp.ones((1, 1, 1, text, text), bool))
    _, total, mixed = part(rows[..., :text, :], keys[:, :, :text], values[:, :, :text], causal)
    before = jnp.arange(text)[None, None] <= jnp.repeat(mask.anchor, R, axis=1)[..., None]
    one = part(rows[..., text:, :], keys[:, :, :text], values[:, :, :text], before[:, None, None])

    def alone(x):  # [.., M*R, H] -> [B*M, .., R, H]
        x = jnp.moveaxis(x.reshape(*x.shape[:-2], M, R, H), -3, 1)
        return x.reshape(B * M, *x.shape[2:])

    seen = jnp.arange(R)[None] < mask.real.reshape(-1, 1)
    own = part(*(alone(x[..., text:, :]) for x in (rows, keys, values)), seen[:, None, None, None])
    own = (x.reshape(B, M, *x.shape[1:]) for x in own)
    own = [jnp.moveaxis(x, 1, 3).reshape(B, K, N // K, M * R, -1) for x in own]
    top = jnp.maximum(one[0], own[0])
    a, b = jnp.exp(one[0] - top), jnp.exp(own[0] - top)
    blocks = (one[2] * a + own[2] * b) / (one[1] * a + own[1] * b)
    return jnp.moveaxis(jnp.concatenate([mixed / total, blocks], axis=3).astype(v.dtype), 3, 1).reshape(q.shape)


def by_pieces(q, k, v, mask: BlockMask):
    """As the models do it."""
    return attend(q, k, v, visible=mask)


def example(text: int, batch: int, heads: int, kv_heads: int, width: int, dtype):
    """q, k, v, anchors and a gradient of the output."""
    rng = np.random.default_rng(0)
    T = text + BLOCKS * ROWS

    def normal(heads):
        return jnp.asarray(rng.normal(size=(batch, T, heads, width)), dtype)

    anchor = np.stack([np.sort(rng.choice(text - 1, BLOCKS, replace=False)) for _ in range(batch)]).astype(np.int32)
    return normal(heads), normal(kv_heads), normal(kv_heads), jnp.asarray(anchor), normal(heads)


def layer_program(attention):
    """q, k, v, anchors, gradient of the output -> output and gradients of q, k, v."""

    def run(q, k, v, anchor, to_out):
        mask = BlockMask(anchor, jnp.full(anchor.shape, ROWS, jnp.int32), ROWS)
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
        return out, pull(to_out)

    return jax.jit(run)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=int, default=[256, 2048], help="lengths of the text")
    parser.add_argument("--batch", type=int, default=1, help="texts at a time")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved calls of each")
    parser.add_argument("--heads", nargs=3, type=int, default=[14, 2, 64], help="query heads, key heads, head width")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    print(f"{jax.default_backend()}, jax {jax.__version__}, {args}; ms, fastest and median")
    for text in args.texts:
        inputs = example(text, args.batch, *args.heads, jnp.dtype(args.dtype))
        forms = {"whole": layer_program(whole_scores), "pieces": layer_program(by_pieces)}
        programs = {name: form.lower(*inputs).compile() for name, form in forms.items()}
        results = [jax.block_until_ready(program(*inputs)) for program in programs.values()]
        apart = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), *results)
        times = {name: [] for name in programs}
        for _ in range(args.repeats):
            for name, program in programs.items():  # one right after the other
                begin = time.perf_counter()
                jax.block_until_ready(program(*inputs))
                times[name].append((time.perf_counter() - begin) * 1e3)
        for name, program in programs.items():
            temporary = program.memory_analysis().temp_size_in_bytes / 1e6
            fastest, median = min(times[name]), statistics.median(times[name])
            print(f"T {text:5d} {name:6s} {fastest:9.1f} / {median:9.1f} ms, {temporary:9.1f} MB of temporaries")
        print(f"T {text:5d} largest difference {max(jax.tree.leaves(apart)):.1e}")


if __name__ == "__main__":
    main()
