"""What compiled programs move and compute: small programs whose figures are known by hand, compiled here and now."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deer_jax.planning.hlo import Memory, Program, Total
from deer_jax.sharding import make_mesh

FLOAT = 4  # bytes


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled(function, *args, donate=()):
    return jax.jit(function, donate_argnums=donate).lower(*args).compile()


def program(function, *args, donate=(), **trips) -> Program:
    return Program(compiled(function, *args, donate=donate).as_text(), trips)


@pytest.fixture(autouse=True)
def as_users_compile(optimised):
    """Bytes and fusions are those of the optimised program."""


def test_products_in_a_scan_count_every_layer():
    L, B, D, F = 6, 8, 32, 48

    def run(x, up, down):
        def layer(x, weights):
            return x @ weights[0] @ weights[1], None

        return lax.scan(layer, x, (up, down))[0]

    found = program(run, abstract(B, D), abstract(L, D, F), abstract(L, F, D))
    assert found.whole().flops == L * 2 * (2 * B * D * F)
    assert found.unresolved == {}
    assert found.whole().collectives == Total(0, 0)


def test_a_batched_product_counts_its_batch():
    B, T, S, H = 3, 5, 7, 16
    found = program(lambda q, k: jnp.einsum("bth,bsh->bts", q, k), abstract(B, T, H), abstract(B, S, H)).whole()
    assert found.flops == 2 * B * T * S * H
    assert found.hbm_bytes == pytest.approx(FLOAT * (B * T * H + B * S * H + B * T * S), rel=0.5)


def test_a_round_reads_the_weights_once_and_writes_only_what_it_adds_to_the_cache():
    S, D = 4096, 64

    def run(weights, cache, limit):
        def step(carry):
            at, cache = carry
            fresh = jnp.tanh(lax.dynamic_slice(cache, (at - 1, jnp.int32(0)), (1, D)) @ weights)
            return at + 1, lax.dynamic_update_slice(cache, fresh, (at, jnp.int32(0)))

        return lax.while_loop(lambda carry: carry[0] < limit, step, (jnp.int32(1), cache))[1]

    args = abstract(D, D), abstract(S, D), abstract(dtype=jnp.int32)
    found = program(run, *args, donate=1)
    one = found.per_round()
    assert one.flops == 2 * D * D
    assert FLOAT * D * D <= one.hbm_bytes <= FLOAT * D * D + 20 * FLOAT * D  # of the cache a row, not S rows
    assert one.large_copies == Total(0, 0)
    assert len(found.unresolved) == 1
    # Not donated, the cache is copied once per call, and never in a round.
    kept = program(run, *args)
    assert kept.per_round().hbm_bytes == one.hbm_bytes
    assert kept.once().large_copies == Total(1, FLOAT * S * D)
    assert kept.once().hbm_bytes >= 2 * FLOAT * S * D > 2 * found.once().hbm_bytes
    assert kept.whole().hbm_bytes == kept.once().hbm_bytes + kept.per_round().hbm_bytes


def test_the_caller_says_how_often_a_loop_runs():
    D = 32

    def run(x, weights, count):
        def blocks(x):
            with jax.named_scope("blocks"):
                return lax.fori_loop(0, count, lambda i, x: x @ weights, x)

        return lax.fori_loop(0, 5, lambda i, x: blocks(x), x)

    args = abstract(D, D), abstract(D, D), abstract(dtype=jnp.int32)
    found = program(run, *args)
    assert found.whole().flops == 5 * 2 * D**3
    (origin,) = found.unresolved.values()
    assert "blocks/while" in origin
    for key in ("blocks", "blocks/while", "test_hlo.py"):  # a scope, or the file whose line made it
        found = program(run, *args, **{key: 3.5})
        assert found.whole().flops == 5 * 3.5 * 2 * D**3
        assert found.unresolved == {}


@pytest.mark.parametrize(
    ("kind", "spec_in", "spec_out", "size"),
    [
        ("all-reduce", P(None, None), P(None, None), 64 * 64),
        ("all-gather", P("tensor", None), P(None, None), 64 * 64),
        ("reduce-scatter", P(None, None), P("tensor", None), 64 * 64),
        ("all-to-all", P("tensor", None), P(None, "tensor"), 64 * 64 // 4),
        ("collective-permute", P("tensor", None), P("tensor", None), 64 * 64 // 4),
    ],
)
def test_collectives_in_a_loop_count_every_pass(kind, spec_in, spec_out, size):
    L, mesh = 5, make_mesh(tensor=4)
    run = {
        "all-reduce": lambda x: lax.psum(x, "tensor"),
        "all-gather": lambda x: lax.all_gather(x, "tensor", tiled=True),
        "reduce-scatter": lambda x: lax.psum_scatter(x, "tensor", tiled=True),
        "all-to-all": lambda x: lax.all_to_all(x, "tensor", 1, 0, tiled=True),
        "collective-permute": lambda x: lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)]),
    }[kind]

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec_in, out_specs=P("tensor"), check_vma=False)
    def on_each(x):
        def layer(total, i):
            return total + jnp.sum(jnp.sin(run(x * i))), None

        return lax.scan(layer, jnp.zeros(()), jnp.arange(1.0, L + 1))[0][None]

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, spec_in))
    found = program(on_each, x)
    assert found.whole().by_kind() == {kind: Total(L, L * size * FLOAT)}
    step = found.whole().dearest(1, "collectives")[0]
    assert (step.times, len(step.loops)) == (L, 1)
    assert "test_hlo.py" in step.origin


def test_memory_says_what_is_donated():
    def run(state, x):
        return state + x

    args = abstract(256, 256), abstract(256, 256)
    kept, donated = Memory.of(compiled(run, *args)), Memory.of(compiled(run, *args, donate=0))
    assert kept.arguments == donated.arguments == 2 * FLOAT * 256**2
    assert (kept.aliased, donated.aliased) == (0, FLOAT * 256**2)
    assert kept.results == FLOAT * 256**2


TPU_LOOP = """HloModule jit_run, is_scheduled=true

FileNames
1 "/somewhere/layers.py"

FunctionNames
1 "linear"
2 "run"

FileLocations
1 {file_name_id=1 function_name_id=1 line=28 end_line=28 column=1 end_column=2}
2 {file_name_id=1 function_name_id=2 line=40 end_line=40 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

%fused_computation (param_0: bf16[12,512,256], param_1: s32[], param_2: bf16[8,256]) -> bf16[8,512] {
  %param_0 = bf16[12,512,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %param_2 = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %piece = bf16[1,512,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,512,256}
  %flat = bf16[512,256]{1,0:T(8,128)(2,1)} bitcast(%piece)
  ROOT %product = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} convolution(%param_2, %flat), dim_labels=bf_oi->bf
}

%body (arg: (s32[], bf16[8,256], bf16[12,512,256])) -> (s32[], bf16[8,256], bf16[12,512,256]) {
  %arg = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/bf16[12,512,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=1
  %w = bf16[12,512,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %y = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %i, %x), kind=kOutput, calls=%fused_computation, metadata={op_name="jit(run)/while/body/mlp/dot_general" stack_frame_id=2}
  %z = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} all-reduce(%y), channel_id=1, replica_groups={}, to_apply=%add
  %half = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} slice(%z), slice={[0:8], [0:256]}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, bf16[12,512,256]{2,1,0:T(8,128)(2,1)}) tuple(%next, %half, %w)
}

%condition (arg.1: (s32[], bf16[8,256], bf16[12,512,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %arg.1 = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, bf16[12,512,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (p0: bf16[8,256], p1: bf16[12,512,256]) -> bf16[8,256] {
  %p0 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[12,512,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %copy-start = (bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, bf16[8,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%p0)
  %copy-done = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %in = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, bf16[12,512,256]{2,1,0:T(8,128)(2,1)}) tuple(%zero.1, %copy-done, %p1)
  %while = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, bf16[12,512,256]{2,1,0:T(8,128)(2,1)}) while(%in), condition=%condition, body=%body
  ROOT %result = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_of_a_tpu_program_what_is_on_chip_costs_nothing():
    found = Program(TPU_LOOP)
    one = found.whole()
    layer, x = 512 * 256 * 2, 8 * 256 * 2
    # Per layer its slice of the stack, and of the counter: read twice, one, and the next; x is read once, in front.
    assert one.hbm_bytes == 12 * (layer + 4 * 4) + x
    assert one.flops == 12 * 2 * 8 * 512 * 256
    assert one.by_kind() == {"all-reduce": Total(12, 12 * 8 * 512 * 2)}
    assert one.large_copies == Total(0, 0)
    assert found.unresolved == {}
    step = one.dearest(1)[0]
    assert step.origin == "jit(run)/while/body/mlp/dot_general | layers.py:28 linear < layers.py:40 run"
    assert (step.times, step.loops) == (12, ("while",))
    with pytest.raises(ValueError, match="no loop whose end depends on data"):
        found.per_round()


def test_a_loop_that_the_compiler_unrolled_runs_less_often():
    found = Program(TPU_LOOP.replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)"))
    assert found.whole().flops == 6 * 2 * 8 * 512 * 256


# A collective that runs beside other work: begun, carried on and ended in three fusions.
TPU_ASYNC = """HloModule jit_run, is_scheduled=true

%begin (a: bf16[4,64]) -> (bf16[4,64], bf16[16,64], u32[]) {
  %a = bf16[4,64]{1,0:T(4,128)(2,1)} parameter(0)
  %gather.1 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=1, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %started = (bf16[4,64]{1,0:T(4,128)(2,1)}, bf16[16,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (b: bf16[4,64], c: bf16[16,64], d: u32[], e: bf16[8,32], f: bf16[16,32]) -> (bf16[8,16], bf16[4,64], bf16[16,64], bf16[16,64], u32[]) {
  %b = bf16[4,64]{1,0:T(4,128)(2,1)} parameter(0)
  %c = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(1)
  %d = u32[]{:S(2)} parameter(2)
  %e = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(3)
  %f = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(4)
  %product = bf16[8,16]{1,0:T(8,128)(2,1)} convolution(%e, %f), dim_labels=bf_oi->bf
  %gather.2 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%b), channel_id=1, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %both = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[4,64]{1,0:T(4,128)(2,1)}, bf16[16,64]{1,0:T(8,128)(2,1)}, bf16[16,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) tuple(%product, %b, %c, %gather.2, %d)
}

%end (g: bf16[4,64], h: bf16[16,64], i: u32[]) -> bf16[16,64] {
  %g = bf16[4,64]{1,0:T(4,128)(2,1)} parameter(0)
  %h = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(1)
  %i = u32[]{:S(2)} parameter(2)
  %gather.3 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%g), channel_id=1, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %ended = bf16[16,64]{1,0:T(8,128)(2,1)} custom-call(%g, %h, %gather.3, %i), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[4,64], y: bf16[8,32], w: bf16[16,32]) -> (bf16[8,16], bf16[16,64]) {
  %x = bf16[4,64]{1,0:T(4,128)(2,1)} parameter(0)
  %y = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(1)
  %w = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(2)
  %async-collective-start = (bf16[4,64]{1,0:T(4,128)(2,1)}, bf16[16,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %g0 = bf16[4,64]{1,0:T(4,128)(2,1)} get-tuple-element(%async-collective-start), index=0
  %g1 = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1
  %g2 = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=2
  %beside = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[4,64]{1,0:T(4,128)(2,1)}, bf16[16,64]{1,0:T(8,128)(2,1)}, bf16[16,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%g0, %g1, %g2, %y, %w), kind=kOutput, calls=%async_collective_fusion
  %h0 = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%beside), index=0
  %h1 = bf16[4,64]{1,0:T(4,128)(2,1)} get-tuple-element(%beside), index=1
  %h2 = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%beside), index=2
  %h4 = u32[]{:S(2)} get-tuple-element(%beside), index=4
  %async-collective-done = bf16[16,64]{1,0:T(8,128)(2,1)} fusion(%h1, %h2, %h4), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
  ROOT %result = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[16,64]{1,0:T(8,128)(2,1)}) tuple(%h0, %async-collective-done)
}
"""  # noqa: E501


def test_a_collective_in_pieces_is_one():
    one = Program(TPU_ASYNC).whole()
    assert one.by_kind() == {"all-gather": Total(1, 16 * 64 * 2)}
    assert one.flops == 2 * 8 * 16 * 32
    # The gather reads its part and writes the whole; the product reads two operands and writes one.
    assert one.hbm_bytes == 2 * (4 * 64 + 16 * 64 + 8 * 32 + 16 * 32 + 8 * 16)


@pytest.mark.parametrize(
    ("left", "kernel", "result", "attrs", "flops"),
    [
        # 48 x 2 products of [231, 64] and [33, 64]: one tap of the dilated window meets each output.
        ("48,2,231,64", "48,2,33,64", "48,2,231,33",
         "window={size=48x2 stride=47x1 lhs_dilate=48x2}, dim_labels=01bf_01oi->01bf", 2 * 48 * 2 * 231 * 33 * 64),
        ("2,2840,896", "4864,896,1", "2,2840,4864",
         "window={size=1}, dim_labels=0bf_oi0->0bf", 2 * 2 * 2840 * 896 * 4864),
        # The batch is summed over: a gradient of weights.
        ("2,2840,4864", "2,2840,896", "4864,896,1",
         "window={size=2}, dim_labels=0fb_0io->bf0", 2 * 2 * 2840 * 4864 * 896),
        ("8,16,4", "3,4,6", "8,16,6", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 8 * 6 * 4 * (3 * 16 - 2)),
    ],
)  # fmt: skip
def test_products_written_as_convolutions(left, kernel, result, attrs, flops):
    text = f"""HloModule m

ENTRY %main (a: f32[{left}], b: f32[{kernel}]) -> f32[{result}] {{
  %a = f32[{left}]{{0}} parameter(0)
  %b = f32[{kernel}]{{0}} parameter(1)
  ROOT %c = f32[{result}]{{0}} convolution(%a, %b), {attrs}
}}
"""
    assert Program(text).whole().flops == flops


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        Program("ENTRY")


def test_a_group_of_one_moves_nothing():
    """What a sum over an axis of one device is compiled to."""
    groups = "{{0},{1},{2},{3}}", "[4,1]<=[4]", "{{0,1},{2,3}}", "[2,2]<=[4]"
    for group, moved in zip(groups, (False, False, True, True), strict=True):
        text = f"""
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={group}, to_apply=%add
}}
"""
        assert bool(Program(text).whole().by_kind()) is moved, group
