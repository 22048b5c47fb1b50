"""Attention without a cache, piece by piece, forward and backward: no scores of a whole sequence ever exist.

Every row sees a stretch of the text: up to itself (causal), up to its block's anchor, or up to a text's end, from the
first key on or from a later one. Rows and keys are cut into pieces; a piece of rows goes over the pieces of keys from
the first to the last one that any of its rows sees. Rows of blocks have their own block besides. The backward pass
keeps the output and one number per row, and computes the scores again, piece by piece.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deer_jax.models.parts import HIDDEN, Part, by_keys, by_rows, merge, normalised, nothing, part, scores_of
from deer_jax.sharding import here, on_shards

# The name of what the backward pass keeps, for a policy of jax.checkpoint: output and log-sum-exp.
SAVED = "attention"

# Of a piece, at most. Its scores are to stay in what is fast (a TPU's on-chip memory, a CPU's cache), with the few
# arrays of the same size that become of them: at these sizes none of them is written out on v5e, and products are still
# large enough. Where heads are many, a piece has one row of the batch; where they are few, several.
ROWS, KEYS = 256, 256
SCORES = 2**22  # bytes
GPU_SCORES = 2**28  # there a piece's launches take longer than its memory, until it is large


class Before(NamedTuple):
    """Every row sees the keys before `end`, those behind itself too."""

    end: jax.Array  # int32 [B]; what lies behind the last key counts as that


class BlockMask(NamedTuple):
    """Who sees whom when M blocks of `rows` rows each stand behind a text: text, block 0, .., block M-1.

    Text rows are causal, or there are none and the text has keys alone; a block's rows see the text up to the block's
    anchor, and the real rows of their own block. Text behind the last anchor of a stretch of blocks costs nothing, nor
    does text before all that its rows see, so anchors had better be sorted.
    """

    anchor: jax.Array  # int32 [B, M] position in the text; -1: none of it is seen
    real: jax.Array  # int32 [B, M] how many of a block's rows are real, from its first on
    rows: int
    begin: jax.Array | None = None  # int32 [B, M*rows] the first text position that a block's row sees; None: 0
    inside: jax.Array | None = None  # bool [rows, rows] which real rows of its block (last axis) a row sees; None: all


class _Sight(NamedTuple):
    """What rows see, as arrays: of the text the keys from `begins` to before `ends`; of their own block `inside`."""

    ends: jax.Array  # int32 [B, T]
    begins: jax.Array | None  # int32 [B, T]; None: 0
    real: jax.Array  # int32 [B, M]
    inside: jax.Array | None  # bool [rows, rows]

    def of(self, rows: slice) -> "_Sight":
        """That of some of the T rows."""
        begins = None if self.begins is None else self.begins[:, rows]
        return self._replace(ends=self.ends[:, rows], begins=begins)


def attend_pieces(q, k, v, visible: Before | BlockMask | None) -> jax.Array:
    """Attention output [B, T, N, H] of q [B, T, N, H] over k, v [B, S, K, H]; None is causal. Rows that see nothing: 0.

    S is T, but under a BlockMask whose text has keys alone. On a mesh every device computes its own rows of the batch
    and its own heads, without communication.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    rows, real, begins, inside = 0, jnp.zeros((B, 0), jnp.int32), None, None
    if isinstance(visible, BlockMask):
        rows, real, begins, inside = visible.rows, visible.real, visible.begin, visible.inside
    keys = k.shape[1] - real.shape[1] * rows
    text = T - real.shape[1] * rows
    if isinstance(visible, Before):
        ends = jnp.broadcast_to(visible.end[:, None], (B, T))
    else:
        ends = jnp.broadcast_to(1 + jnp.arange(text, dtype=jnp.int32)[None], (B, text))
    if isinstance(visible, BlockMask):
        ends = jnp.concatenate([ends, jnp.repeat(visible.anchor + 1, rows, axis=1)], axis=1)
    ends = jnp.minimum(ends, keys)  # there are no pieces of keys behind the text
    if begins is not None:
        begins = jnp.pad(begins, ((0, 0), (text, 0)))
    queries = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)
    sides = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    out = _attention(queries, *sides, _Sight(ends, begins, real, inside), rows)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, sight: _Sight, rows: int):
    """q and the output [B, K, G, T, H]; k, v [B, K, S, H]."""
    return _forward(q, k, v, sight, rows)[0]


def _forward(q, k, v, sight: _Sight, rows: int):
    wide, narrow, flat = _partitions(q, k, sight)
    run = on_shards(_by_platform(_forward_here, rows), (wide, narrow, narrow, flat), (wide, wide))
    out, norm = (checkpoint_name(x, SAVED) for x in run(q, k, v, sight))
    return out, (q, k, v, sight, out, norm)


def _backward(rows: int, kept, to_out):
    wide, narrow, flat = _partitions(kept[0], kept[1], kept[3])
    arguments, gradients = (wide, narrow, narrow, flat, wide, wide, wide), (wide, wide, wide)
    run = on_shards(_by_platform(_backward_here, rows), arguments, gradients)
    to_q, *sides = run(*kept, to_out)
    # Devices that share a key head have each their query heads' share of its gradient.
    to_k, to_v = (jnp.sum(side, axis=2).astype(x.dtype) for side, x in zip(sides, kept[1:3], strict=True))
    return to_q, to_k, to_v, None


_attention.defvjp(_forward, _backward)


def _by_platform(function, rows: int):
    """A function of the bytes of a piece's scores, and of rows, for whatever it is compiled for."""
    here, gpu = (functools.partial(function, scores, rows) for scores in (SCORES, GPU_SCORES))
    return lambda *args: lax.platform_dependent(*args, cuda=gpu, rocm=gpu, default=here)


def _partitions(q, k, sight: _Sight):
    """On the mesh, of q, of k, and of what rows see."""
    batch: Any = here(sight.ends.shape, "batch", None)
    same: Any = here(())
    flat = _Sight(batch, None if sight.begins is None else batch, batch, None if sight.inside is None else same)
    wide = here(q.shape, "batch", "kv_heads", "groups", None, None)
    return wide, here(k.shape, "batch", "kv_heads", None, None), flat


def _forward_here(scores: int, rows: int, q, k, v, sight: _Sight):
    """The output [B, K, G, T, H], and each row's log-sum-exp float32 [B, K, G, T, 1]; 0 if it sees nothing."""
    keys, values = _text(k, v, sight.real, rows)
    text, out = q.shape[3] - sight.real.shape[1] * rows, []
    if text:
        with jax.named_scope("attend_text"):
            out.append(_forward_rows(scores, q[..., :text, :], keys, values, sight.of(slice(text)), None))
    if rows:
        with jax.named_scope("attend_blocks"):
            own = part(*_own(q, k, v, sight, rows))
            own = Part(*(_beside(x, q.shape[0]) for x in own))
            out.append(_forward_rows(scores, q[..., text:, :], keys, values, sight.of(slice(text, None)), own))
    return out[0] if len(out) == 1 else tuple(jnp.concatenate(pair, axis=3) for pair in zip(*out, strict=True))


def _text(k, v, real, rows: int):
    """The text's keys and values [B, K, S, H], padded to whole pieces."""
    text = k.shape[2] - real.shape[1] * rows
    pad = -text % KEYS if text > KEYS else 0
    return [jnp.pad(x[:, :, :text], ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (k, v)]


def _own(q, k, v, sight: _Sight, rows: int):
    """Each block alone: rows [B*M, K, G, R, H], keys and values [B*M, K, R, H], and who is seen."""
    M = sight.real.shape[1]
    text, keys_text = q.shape[3] - M * rows, k.shape[2] - M * rows
    keys, values = (_alone(x[:, :, None, keys_text:], M)[:, :, 0] for x in (k, v))
    seen = _seen(sight.real.reshape(-1, 1), None, 0, rows)
    if sight.inside is not None:
        seen = seen & sight.inside[None, None, None]
    return _alone(q[..., text:, :], M), keys, values, seen


def _alone(x, M: int):
    """[B, K, G, M*R, x] -> [B*M, K, G, R, x]"""
    B, K, G, rows, width = x.shape
    return jnp.moveaxis(x.reshape(B, K, G, M, rows // M, width), 3, 1).reshape(B * M, K, G, rows // M, width)


def _beside(x, B: int):
    """[B*M, K, G, R, x] -> [B, K, G, M*R, x]"""
    _, K, G, rows, width = x.shape
    return jnp.moveaxis(x.reshape(B, -1, K, G, rows, width), 1, 3).reshape(B, K, G, -1, width)


def _together(scores: int, q, keys) -> int:
    """How many rows of the batch go into a piece: as many as keep its scores within so many bytes."""
    B, K, G, T, _ = q.shape
    one = 4 * K * G * min(ROWS, T) * min(KEYS, keys.shape[2])
    return max(b for b in range(1, B + 1) if B % b == 0 and (b == 1 or b * one <= scores))


def _pieces(x, batch: int, axis: int = 3):
    """[B, ..] -> [n, batch, ..]: some of the batch's rows, and of those along an axis, padded with zeros at the end."""
    length = x.shape[axis]
    count = -(-length // ROWS)
    width = -(-length // count)
    width += -width % 8 if count > 1 else 0  # whole tiles of a TPU's memory
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * width - length)
    x = jnp.pad(x, pad)
    x = x.reshape(-1, batch, *x.shape[1:axis], count, width, *x.shape[axis + 1 :])
    x = jnp.moveaxis(x, axis + 1, 1)
    return x.reshape(-1, *x.shape[2:])


def _whole(pieces, B: int, length: int):
    """`_pieces` undone: [n, batch, K, G, rows, x] -> [B, K, G, length, x]"""
    n, batch, K, G, _, width = pieces.shape
    x = pieces.reshape(B // batch, n * batch // B, batch, *pieces.shape[2:])
    return jnp.moveaxis(x, 1, 4).reshape(B, K, G, -1, width)[..., :length, :]


def _firsts(pieces, B: int):
    """int32 [n]: the first row of the batch in each of `_pieces`."""
    n, batch = pieces.shape[:2]
    return jnp.repeat(jnp.arange(B // batch, dtype=jnp.int32) * batch, n * batch // B)


def _scan(step, carry, xs):
    """`lax.scan`; without a loop where there is one piece."""
    if len(xs[0]) > 1:
        return lax.scan(step, carry, xs)
    carry, y = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], y)


def _over_keys(read, ends, begins, length: int, carry):
    """`read(first key, number of keys, carry)` for the pieces of `length` keys that these rows see."""
    if length <= KEYS:
        return read(0, length, carry)
    lowest = 0
    if begins is not None:  # rows that see nothing do not count
        lowest = jnp.min(jnp.where(begins < ends, begins, length)) // KEYS
    count = -(-jnp.max(ends) // KEYS)
    return lax.fori_loop(lowest, count, lambda i, carry: read(i * KEYS, KEYS, carry), carry)


def _seen(ends, begins, first, width: int):
    """bool [B, 1, 1, rows, keys]: which of the keys from `first` on lie before the rows' ends int32 [B, rows], and not
    before their begins."""
    keys = (first + jnp.arange(width)).reshape(1, 1, 1, 1, -1)
    seen = keys < ends[:, None, None, :, None]
    return seen if begins is None else seen & (keys >= begins[:, None, None, :, None])


def _near(side, at, batch: int, first, width: int):
    """Keys or values [B, K, S, H] -> [batch, K, width, H], from the batch's row `at` and the key `first` on."""
    _, K, _, H = side.shape
    zero = jnp.zeros((), jnp.int32)
    return lax.dynamic_slice(side, (at, zero, jnp.asarray(first, jnp.int32), zero), (batch, K, width, H))


def _add(side, more, at, first):
    """more [batch, K, width, H] added to side [B, K, S, H], where `_near` reads."""
    zero = jnp.zeros((), jnp.int32)
    more = _near(side, at, more.shape[0], first, more.shape[2]) + more
    return lax.dynamic_update_slice(side, more, (at, zero, jnp.asarray(first, jnp.int32), zero))


def _bounds(sight: _Sight, batch: int):
    """Ends and begins of the rows in each of `_pieces`."""
    begins = None if sight.begins is None else _pieces(sight.begins, batch, 1)
    return _pieces(sight.ends, batch, 1), begins


def _forward_rows(scores: int, q, keys, values, sight: _Sight, own: Part | None):
    """Output and log-sum-exp of rows over their stretches of text, and over what their `own` part is of."""
    B, batch = q.shape[0], _together(scores, q, keys)
    others = None if own is None else Part(*(_pieces(x, batch) for x in own))

    def step(carry, xs):
        at, rows, (ends, begins), own = xs

        def read(first, width, whole):
            near_keys, near_values = (_near(x, at, batch, first, width) for x in (keys, values))
            seen = _seen(ends, begins, first, width)
            return merge(whole, part(rows, near_keys, near_values, seen))

        whole = _over_keys(read, ends, begins, keys.shape[2], nothing(rows) if own is None else own)
        norm = jnp.where(whole.total == 0, 0, whole.top + jnp.log(whole.total))
        return carry, (normalised(whole).astype(values.dtype), norm)

    pieces = _pieces(q, batch)
    _, out = _scan(step, None, (_firsts(pieces, B), pieces, _bounds(sight, batch), others))
    return tuple(_whole(x, B, q.shape[3]) for x in out)


def _backward_here(scores: int, rows: int, q, k, v, sight: _Sight, out, norm, to_out):
    """Gradients of q [B, K, G, T, H], and of k and v float32 [B, K, 1, S, H] by the query heads that are here."""
    keys, values = _text(k, v, sight.real, rows)
    M = sight.real.shape[1]
    text, keys_text = q.shape[3] - M * rows, k.shape[2] - M * rows
    to_keys = to_values = jnp.zeros(keys.shape, jnp.float32)
    to_q, own = [], []
    if text:
        with jax.named_scope("attend_text"):
            of = [x[..., :text, :] for x in (q, out, norm, to_out)]
            to_text, to_keys, to_values = _backward_rows(
                scores, of, sight.of(slice(text)), keys, values, to_keys, to_values
            )
            to_q.append(to_text)
    if rows:
        with jax.named_scope("attend_blocks"):
            of = [x[..., text:, :] for x in (q, out, norm, to_out)]
            its = sight.of(slice(text, None))
            to_blocks, to_keys, to_values = _backward_rows(scores, of, its, keys, values, to_keys, to_values)
            own_out, own_norm, own_to_out = (_alone(x, M) for x in of[1:])
            own_shared = _shared(own_out, own_to_out)
            to_own, *own = _gradients(*_own(q, k, v, sight, rows), own_norm, own_shared, own_to_out)
            to_q.append(to_blocks + _beside(to_own, q.shape[0]))
    sides = [side[:, :, None, :keys_text] for side in (to_keys, to_values)]
    for i, side in enumerate(own):
        sides[i] = jnp.concatenate([sides[i], _beside(side[:, :, None], q.shape[0])], axis=3)
    whole = to_q[0] if len(to_q) == 1 else jnp.concatenate(to_q, axis=3)
    return whole.astype(q.dtype), *sides


def _backward_rows(scores: int, of, sight: _Sight, keys, values, to_keys, to_values):
    """Gradient float32 [B, K, G, T, H] of rows over their text, added to the keys' and values' what these get.

    of: the rows, their output, log-sum-exp and the output's gradient.
    """

    B, batch, T = of[0].shape[0], _together(scores, of[0], keys), of[0].shape[3]

    def step(carry, xs):
        at, rows, out, norm, to_out, (ends, begins) = xs
        shared = _shared(out, to_out)

        def read(first, width, carry):
            to_rows, to_keys, to_values = carry
            near_keys, near_values = (_near(x, at, batch, first, width) for x in (keys, values))
            seen = _seen(ends, begins, first, width)
            more, *sides = _gradients(rows, near_keys, near_values, seen, norm, shared, to_out)
            return to_rows + more, _add(to_keys, sides[0], at, first), _add(to_values, sides[1], at, first)

        to_rows, *carry = _over_keys(read, ends, begins, keys.shape[2], (jnp.zeros(rows.shape, jnp.float32), *carry))
        return tuple(carry), to_rows

    pieces = [_pieces(x, batch) for x in of]
    xs = (_firsts(pieces[0], B), *pieces, _bounds(sight, batch))
    (to_keys, to_values), to_rows = _scan(step, (to_keys, to_values), xs)
    return _whole(to_rows, B, T), to_keys, to_values


def _shared(out, to_out):
    """float32 [B, K, G, T, 1]: what normalising takes from the gradient of each of a row's weights."""
    return jnp.sum(out.astype(jnp.float32) * to_out.astype(jnp.float32), axis=-1, keepdims=True)


def _gradients(rows, keys, values, seen, norm, shared, to_out):
    """float32 gradients of rows [B, K, G, T, H], keys and values [B, K, S, H] by these keys' part of the output."""
    weights = jnp.exp(jnp.where(seen, scores_of(rows, keys), HIDDEN) - norm)
    to_weights = by_keys(to_out, jnp.swapaxes(values, 2, 3))
    to_scores = (weights * (to_weights - shared) * rows.shape[-1] ** -0.5).astype(rows.dtype)
    return by_keys(to_scores, keys), by_rows(to_scores, rows), by_rows(weights.astype(to_out.dtype), to_out)
