"""Attention by pieces against whole scores, forward and backward: pieces of every kind, on a mesh, in memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.errors import InputError
from deer_jax.models import piecewise
from deer_jax.models.attention import attend
from deer_jax.models.piecewise import SAVED, Before, BlockMask
from deer_jax.sharding import Heads, make_mesh, on_mesh, placement
from tests.fast import representing

B, N, K, H = 2, 4, 2, 8
M, R = 5, 3
HIGHEST = jax.lax.Precision.HIGHEST


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 16 rows and 8 keys, one row of the batch at a time."""
    monkeypatch.setattr(piecewise, "ROWS", 16)
    monkeypatch.setattr(piecewise, "KEYS", 8)
    monkeypatch.setattr(piecewise, "SCORES", 1)


def example(rows, *, batch=B, heads=N, kv_heads=K, keys=None):
    """q, k, v and a gradient of the output; keys: as many as rows, unless told."""
    rng = np.random.default_rng(rows)
    keys = rows if keys is None else keys
    sizes = (rows, heads), (keys, kv_heads), (keys, kv_heads), (rows, heads)
    return [rng.normal(size=(batch, *size, H)).astype(np.float32) for size in sizes]


def block_mask(text, batch=B):
    """Sorted anchors, the last one unused; the first block of the first text sees no text and has no real rows."""
    rng = np.random.default_rng(0)
    anchor = np.sort(rng.integers(0, text, (batch, M))).astype(np.int32)
    real = rng.integers(1, R + 1, (batch, M)).astype(np.int32)
    anchor[:, -1] = real[:, -1] = real[0, 0] = 0
    anchor[0, 0] = -1
    return BlockMask(anchor, real, R)


def windows(text, batch=B):
    """A block mask whose rows see the last few positions of their stretch, and what of their block is not ahead."""
    mask = block_mask(text, batch)
    begin = np.maximum(np.repeat(mask.anchor, R, axis=1) - np.tile(np.arange(3, 3 + R), M)[None], 0).astype(np.int32)
    return mask._replace(begin=begin, inside=np.tril(np.ones((R, R), bool)))


def masks(text):
    """Every kind over a text, and how many rows there are; of "alone", the text has keys but no rows."""
    return {
        "causal": (text, None),
        "before": (text, Before(np.array([text + 50, text // 3], np.int32))),
        "nothing": (text, Before(np.array([0, 1], np.int32))),
        "blocks": (text + M * R, block_mask(text)),
        "windows": (text + M * R, windows(text)),
        "alone": (M * R, windows(text)),
    }


def sees(mask, b, row, key, rows, keys):
    """Whether a row sees a key, said anew."""
    if isinstance(mask, Before):
        return key < mask.end[b]
    text, rows_text = (keys, rows) if mask is None else (keys - M * R, rows - M * R)
    if row < rows_text:
        return key <= row
    block, step = divmod(row - rows_text, R)
    if key < text:
        begin = 0 if mask.begin is None else mask.begin[b, row - rows_text]
        return begin <= key <= mask.anchor[b, block]
    other, ahead = divmod(key - text, R)
    return other == block and ahead < mask.real[b, block] and (mask.inside is None or mask.inside[step, ahead])


def plain(mask, rows, keys=None):
    """Attention from the scores of all rows with all keys; rows that see nothing are 0."""
    keys = rows if keys is None else keys
    everything = np.ndindex(B, rows, keys)
    visible = [sees(mask, b, row, key, rows, keys) for b, row, key in everything]
    visible = np.array(visible).reshape(B, 1, rows, keys)

    def attention(q, k, v):
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision=HIGHEST) * H**-0.5
        weights = jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1), 0)
        return jnp.einsum("bnts,bsnh->btnh", weights, v, precision=HIGHEST)

    return attention


def by_pieces(mask):
    return lambda q, k, v: attend(q, k, v, visible=mask)


def with_gradients(attention, q, k, v, to_out):
    """The output and the gradients of q, k and v."""

    @jax.jit
    def run(q, k, v, to_out):
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(to_out)

    return run(q, k, v, to_out)


# In one piece, in whole pieces, and with a remainder of rows and keys.
@pytest.mark.parametrize(
    ("kind", "text"),
    representing(
        [("causal", 32), ("before", 37), ("nothing", 20), ("blocks", 5), ("blocks", 37), ("windows", 37), ("alone", 5),
         ("alone", 37)],
        ("blocks", 37),
    ),
)  # fmt: skip
def test_pieces_equal_whole_scores(kind, text, small_pieces):
    rows, mask = masks(text)[kind]
    keys = text + M * R if kind == "alone" else rows
    inputs = example(rows, keys=keys)
    found, expected = with_gradients(by_pieces(mask), *inputs), with_gradients(plain(mask, rows, keys), *inputs)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_pieces_of_the_real_size():
    text = piecewise.KEYS + 30
    q, k, v, to_out = (x[:, :, :1] for x in example(text))
    visible = np.tril(np.ones((1, text, text), bool))

    def whole(q, k, v):
        scores = jnp.einsum("btnh,bsnh->bts", q, k, precision=HIGHEST) * H**-0.5
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
        return jnp.einsum("bts,bsnh->btnh", weights, v, precision=HIGHEST)

    found, expected = with_gradients(attend, q, k, v, to_out), with_gradients(whole, q, k, v, to_out)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "windows"])
def test_a_gpu_takes_the_whole_batch_at_once_and_says_the_same(kind, monkeypatch):
    """What is made of it for a GPU: no loop over the batch, and equal values here."""
    rows, mask = masks(20)[kind]
    monkeypatch.setattr(piecewise, "SCORES", 1)
    arguments = example(rows)
    lowered = jax.jit(by_pieces(mask)).trace(*arguments[:3]).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" not in lowered
    assert "stablehlo.while" in jax.jit(by_pieces(mask)).lower(*arguments[:3]).as_text()
    one = with_gradients(by_pieces(mask), *arguments)
    monkeypatch.setattr(piecewise, "SCORES", piecewise.GPU_SCORES)
    for ours, whole in zip(one, with_gradients(by_pieces(mask), *arguments), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-6)


def test_rows_that_see_nothing_are_zero_and_teach_nothing(small_pieces):
    text = 20
    q, k, v, to_out = example(text + M * R)
    found = with_gradients(by_pieces(block_mask(text)), q, k, v, to_out)
    for x in found[:2]:
        np.testing.assert_array_equal(x[0, text : text + R], 0)
    to_out[0, text : text + R] = 1e6
    for one, other in zip(found, with_gradients(by_pieces(block_mask(text)), q, k, v, to_out), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.isfinite(one).all()


@pytest.mark.parametrize("kind", ["causal", "before", "blocks"])
def test_keys_that_no_row_of_a_piece_sees_are_not_read(kind, small_pieces):
    """Were they read, a weight of 0 times a value of NaN would be NaN."""
    rows, mask = masks(48)[kind]
    if isinstance(mask, Before):
        mask, blind = Before(np.array([16, 32], np.int32)), np.s_[0, :]
    elif isinstance(mask, BlockMask):
        mask, blind = BlockMask(np.minimum(mask.anchor, 31), mask.real, R), np.s_[:, 48:]
    else:
        blind = np.s_[:, :32]
    q, k, v, to_out = example(rows)
    v[:, 32:48] = np.nan
    out, to_q, *_ = with_gradients(by_pieces(mask), q, k, v, to_out)
    assert np.isfinite(out[blind]).all()
    assert np.isfinite(to_q[blind]).all()
    assert kind == "before" or not np.isfinite(out).all()


def test_keys_before_all_that_a_piece_sees_are_not_read(small_pieces):
    """Neither by rows that see a later stretch, nor by those that see nothing."""
    text = 48
    mask = windows(text)
    anchor = np.maximum(mask.anchor, 40)
    anchor[0, 0] = -1
    mask = mask._replace(anchor=anchor, begin=np.full_like(mask.begin, 35))
    q, k, v, to_out = example(M * R, keys=text + M * R)
    v[:, :32] = np.nan
    for x in with_gradients(by_pieces(mask), q, k, v, to_out):
        assert np.isfinite(x).all()
    v[:, 32] = np.nan  # of a piece that is read
    assert not np.isfinite(with_gradients(by_pieces(mask), q, k, v, to_out)[0]).all()


def test_bfloat16_keeps_its_dtype_and_is_close(small_pieces):
    rows, mask = masks(37)["blocks"]
    half = [jnp.asarray(x, jnp.bfloat16) for x in example(rows)]
    expected = with_gradients(plain(mask, rows), *(x.astype(jnp.float32) for x in half))
    for one, other in zip(with_gradients(by_pieces(mask), *half), expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0.02, atol=0.06)


@pytest.mark.parametrize("kind", ["before", "blocks", "windows"])
def test_memory_grows_with_the_text_and_not_with_its_square(kind):
    def temporaries(text):
        rows, mask = masks(text)[kind]
        inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in example(rows)]

        def run(q, k, v, to_out):
            return jax.vjp(by_pieces(mask), q, k, v)[1](to_out)

        return jax.jit(run).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(2048), temporaries(4096)
    assert long < 2.1 * short
    assert long < B * N * 4 * 4096**2 / 8  # bytes of all scores


@pytest.mark.parametrize(
    ("shape", "batch", "heads", "kv_heads", "apart"),
    representing(
        [
            ((4, 1, 1), 4, 4, 2, True),
            ((1, 1, 4), 2, 8, 4, True),
            ((1, 1, 4), 2, 4, 2, False),  # two devices share a key head: its gradient is summed
            ((1, 4, 1), 4, 4, 2, True),
        ],
        ((2, 1, 2), 2, 4, 2, True),
    ),
)
def test_devices_of_a_mesh_do_not_talk(shape, batch, heads, kv_heads, apart, small_pieces):
    text = 19
    inputs = example(text + M * R, batch=batch, heads=heads, kv_heads=kv_heads)
    anchor, real, _, begin, inside = windows(text, batch)

    def run(q, k, v, to_out, anchor, real, begin):
        out, pull = jax.vjp(by_pieces(BlockMask(anchor, real, R, begin, inside)), q, k, v)
        return out, *pull(to_out)

    alone = jax.jit(run)(*inputs, anchor, real, begin)
    mesh = make_mesh(*shape)
    queries, keys = Heads(kv_heads, heads // kv_heads), Heads(kv_heads)
    axes: list = [("batch", None, x, None) for x in (queries, keys, keys, queries)] + [("batch", None)] * 3
    placed = [
        jax.device_put(x, placement(mesh, x.shape, names))
        for x, names in zip((*inputs, anchor, real, begin), axes, strict=True)
    ]
    with on_mesh(mesh):
        program = jax.jit(run).lower(*placed).compile()
    for one, other in zip(program(*placed), alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    if apart:
        talk = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
        assert re.findall(talk, str(program.as_text())) == []


def test_what_the_backward_pass_keeps_can_be_saved():
    """By its name, for a policy of rematerialisation; then the forward pass is not run again."""
    q, k, v, _ = example(8)

    def products(policy):
        def loss(q, k, v):
            return jnp.sum(jax.checkpoint(attend, policy=policy)(q, k, v) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).as_text().count("stablehlo.dot_general")

    assert products(jax.checkpoint_policies.save_only_these_names(SAVED)) == 2 + 5
    assert products(None) == 2 + 2 + 5


def test_rows_that_a_mesh_does_not_divide_are_refused():
    """Every device would compute them all otherwise; whoever calls fills them up."""
    q, k, v, _ = example(5, batch=2)
    with (
        on_mesh(make_mesh(fsdp=4)),
        pytest.raises(InputError, match=r"\(batch\) has 2 entries, .* the 4 of data x fsdp"),
    ):
        jax.jit(by_pieces(None)).lower(q, k, v)
