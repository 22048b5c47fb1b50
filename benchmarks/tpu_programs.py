"""What the programs for TPU slices move and compute, per device: compiled ahead of time on this host, never run.

    python benchmarks/tpu_programs.py --list
    python benchmarks/tpu_programs.py --case 8b-drafter-b1-4k-v5e train-1x16x1 [--json FILE] [--dearest 10]
    python benchmarks/tpu_programs.py --case '8b-*-v5e'
    python benchmarks/tpu_programs.py --case '8b-dflash*-4k-v5e' 'align-*-v5e16'

Needs libtpu beside the environment, not in it (there every program on CPU would look for a TPU first):

    python -m pip install --no-deps --target .cache/libtpu 'libtpu==0.0.42.*'

or DEER_JAX_LIBTPU, a path to libtpu.so. The version is the one that this jax's extra `tpu` names.

Decoding: one round at full caches. `minimum` is what a round must read: the weights once as they are placed (of a
mixture of experts those that are expected to be active; an embedding that is no head is only looked up), and the
caches once as they are placed. On TPU a ratio below 1 is real: small arrays stay in on-chip memory across rounds. A
conditioned drafter reads the target's head once more; tables that are looked up in alone cost nothing. What it shares
with the target are arguments of the program twice, but the same arrays: `arguments` and `peak` count them once.

`once` is what a call costs beside its rounds, `copies` the large ones within a round, `not aliased` what of the state
is not updated in place. A `prefill` is one chunk, the last of a prompt that fills the cache.

Training: one step. `ideal` counts every product of the forward pass once and of the backward pass twice, nothing twice
for memory's sake. `allowed` is what the placement itself costs: weights gathered, gradients reduced, and under tensor
parallelism the activations that are summed. `train-` is the standalone drafter's step, `align-` that of a recipe in
configs/conditioned, on all devices of the slice as `fsdp`, with the texts that the recipe's first comment says.

One process per case; a case that does not fit its devices is reported with the compiler's words.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

# Before jax is imported. Several processes may compile at the same time, as none of them uses a TPU, and the last three
# keep libtpu from asking the network what machine this is.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_LIBRARY_PATH"] = os.environ.get("DEER_JAX_LIBTPU") or str(
    Path(__file__).resolve().parent.parent / ".cache" / "libtpu" / "libtpu" / "libtpu.so"
)
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-8"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from gpu.shapes import PUBLISHED
from jax.experimental import topologies
from jax.experimental.layout import Layout

from deer_jax.build import Build
from deer_jax.config import DrafterConfig, ModelConfig, Rope, Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.programs import PREFILL_CHUNK, compiled, formats_of
from deer_jax.decoding.sampling import Kind, Knobs
from deer_jax.decoding.state import StateShape, abstract_state
from deer_jax.drafters.conditioned import HEAD, ConditionedMethod
from deer_jax.drafters.heads import Markov, PathSelector
from deer_jax.drafters.protocol import Draft, Method
from deer_jax.drafters.standalone import StandaloneMethod
from deer_jax.drafters.start import ConditionedStart, Eagle3Start
from deer_jax.drafters.tapped import TappedMethod
from deer_jax.models.experts import TILE_ROWS
from deer_jax.models.piecewise import KEYS, ROWS
from deer_jax.models.target import Target
from deer_jax.models.transformer import abstract_params, logical_axes
from deer_jax.planning.hlo import Memory, Program
from deer_jax.sharding import batch_placement, bytes_per_device, make_mesh, on_mesh, placements, replicated
from deer_jax.training import step as training
from deer_jax.training.cross_entropy import CHUNK_ROWS
from deer_jax.training.objectives import CROSS_ENTROPY, Objective, drafter_loss, fixed_params
from deer_jax.training.recipe import Recipe, read_recipe

LIBTPU = Path(os.environ["TPU_LIBRARY_PATH"])

MODELS = PUBLISHED | {
    "llama8b": ModelConfig(family="llama", vocab_size=128256, width=4096, layers=32, heads=32, kv_heads=8,
                           head_width=128, mlp_width=14336, context=131072, norm_eps=1e-5,
                           rope=Rope(theta=500000.0, kind="llama3", factor=8.0, original_context=8192)),
}  # fmt: skip
# Drafters for Qwen3 that read it: five layers, as published; and EAGLE-3.
TAPPED = {
    "dflash": ConditionedStart(mask=151669, draft_length=15),
    "dflash2": ConditionedStart(mask=151669, draft_length=15, head="selector", conv_kernel=2),
    "dspark": ConditionedStart(mask=151669, draft_length=15, layout="next_token", head="markov"),
    "dspark32k": ConditionedStart(
        mask=151669, draft_length=15, layout="next_token", head="markov", draft_vocab=32000
    ),
    "rnn32k": ConditionedStart(
        mask=151669, draft_length=15, layout="next_token", head="markov", form="rnn", draft_vocab=32000, causal=True,
        conv_kernel=2,
    ),
    "eagle3": Eagle3Start(draft_length=8, draft_vocab=32000),
}  # fmt: skip
RECIPES = {"qwen3_8b": "8b", "qwen3_30b_a3b": "30b", "llama3_1_8b": "llama8b"}  # and their targets
SLICES = {"v5e": "v5e:2x4", "v6e": "v6e:2x4", "v5p": "v5p:2x2x2", "v5e16": "v5e:4x4", "v5e4": "v5e:2x2"}
Attention = Literal["bidirectional", "block_causal"]
Start = ConditionedStart | Eagle3Start
K = 16
SPECIAL_AXES = (None, "width")


@dataclasses.dataclass(frozen=True)
class FixedMethod(Method):
    """Proposes token 0 for nothing: a round is the target's pass over k + 1 rows."""

    target_vocab: int
    draft_length: int = 99

    def propose(self, params, shared, state, row, k, pick):
        return Draft(jnp.zeros((row.length.shape[0], k), jnp.int32), None), state


@dataclasses.dataclass(frozen=True)
class Decoding:
    """One program of decoding; attention is that of the drafter."""

    target: str
    drafting: str  # "plain", "fixed", "drafter" (standalone), or one of TAPPED
    rows: int
    capacity: int
    slice: str
    prefill: bool = False
    mesh: tuple[int, int, int] = (1, 1, 8)
    attention: Attention = "block_causal"


@dataclasses.dataclass(frozen=True)
class Training:
    """One step of the 0.5 B drafter on texts of 2048 tokens, with 24 blocks of 32 each where it is block-causal."""

    mesh: tuple[int, int, int]
    slice: str = "v5e16"
    teacher: str = ""  # whose distributions are the labels; "" takes tokens
    attention: Attention = "block_causal"
    texts: int = 2  # per device, and micro-batch
    accumulate: int = 1

    @property
    def devices(self) -> int:
        return self.mesh[0] * self.mesh[1] * self.mesh[2]


@dataclasses.dataclass(frozen=True)
class Align:
    """One step of a recipe in configs/conditioned; texts are those of a device."""

    recipe: str
    slice: str
    texts: int

    @property
    def file(self) -> Recipe:
        return read_recipe(Path(__file__).resolve().parent.parent / "configs" / "conditioned" / f"{self.recipe}.yaml")


def cases() -> dict[str, Decoding | Training | Align]:
    found: dict[str, Decoding | Training | Align] = {}
    for kind in ("v5e", "v6e", "v5p"):
        for rows in (1, 16):
            for name, capacity in (("4k", 4096), ("32k", 32768)):
                for drafting in ("plain", "fixed", "drafter"):
                    found[f"8b-{drafting}-b{rows}-{name}-{kind}"] = Decoding("8b", drafting, rows, capacity, kind)
                found[f"8b-prefill-b{rows}-{name}-{kind}"] = Decoding("8b", "drafter", rows, capacity, kind, True)
            for drafting in TAPPED:
                found[f"8b-{drafting}-b{rows}-4k-{kind}"] = Decoding("8b", drafting, rows, 4096, kind)
        found[f"8b-dflash-prefill-b1-4k-{kind}"] = Decoding("8b", "dflash", 1, 4096, kind, True)
        for drafting in ("plain", "fixed"):
            found[f"30b-{drafting}-b1-4k-{kind}"] = Decoding("30b", drafting, 1, 4096, kind)
        found[f"30b-prefill-b1-4k-{kind}"] = Decoding("30b", "plain", 1, 4096, kind, True)
    for mesh in ((16, 1, 1), (1, 16, 1), (2, 8, 1), (4, 1, 4), (4, 4, 1), (2, 4, 2)):
        name = "x".join(map(str, mesh))
        found[f"train-{name}"] = Training(mesh)
        found[f"train-{name}-target"] = Training(mesh, teacher="8b")
    for mesh in ((4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2)):
        found["train-" + "x".join(map(str, mesh))] = Training(mesh, "v5e4")
    for recipe in RECIPES:
        for kind, texts in (("v5e16", 4), ("v6e", 8), ("v5p", 8)):
            found[f"align-{recipe}-{kind}"] = Align(recipe, kind, texts)
    return found


CASES = cases()


def devices(name: str):
    return topologies.get_topology_desc(platform="tpu", topology_name=SLICES[name]).devices


def placed(mesh, tree, axes):
    """Shapes and dtypes with the places that the axes give them."""
    places = placements(mesh, tree, axes)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, places)


def everywhere(mesh, tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree)


def drafter_params(mesh, dtype):
    model = MODELS["0.5b"]
    params = abstract_params(model, dtype) | {"special": jax.ShapeDtypeStruct((2, model.width), dtype)}
    return placed(mesh, params, logical_axes(model) | {"special": SPECIAL_AXES})


def begun(start: Start, layers: int, config: ModelConfig) -> tuple[TappedMethod, dict, dict]:
    """What such a drafter begins as: its method, and as shapes its parameters and what it shares."""
    found: list[TappedMethod] = []

    def begin(params):
        target = Target(config=config, params=params, build=Build.of("tpu"))
        drafter = start.begin(target, layers, np.zeros(config.vocab_size, np.int64), 0)
        found.append(drafter.method)
        return drafter.params, drafter.shared

    params, shared = jax.eval_shape(begin, abstract_params(config, jnp.bfloat16))
    return found[0], params, shared


def placed_drafter(mesh, method: TappedMethod, params, shared, dtype):
    """Its parameters in a dtype and what it shares, with their places."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    axes = {"embed": ("vocab", "width"), "head": ("vocab", "width"), "ids": (None,)}
    return placed(mesh, params, method.axes()), placed(mesh, shared, {name: axes[name] for name in shared})


def tables(method: TappedMethod, params) -> dict:
    """Of its head the tables that are only looked up in."""
    if not isinstance(method, ConditionedMethod):
        return {}
    names = {PathSelector: ("predecessor", "successor"), Markov: ("w1",)}.get(type(method.head), ())
    return {name: params[HEAD][name] for name in names}


def twice(method: Method | None, shared) -> int:
    """Bytes of the target's own arrays in what a drafter shares, which are arguments of a program twice."""
    if not isinstance(method, TappedMethod):
        return 0
    return bytes_per_device({name: x for name, x in shared.items() if name == "embed" or "ids" not in shared})


def held_gb(**trees) -> dict[str, float]:
    """What a device holds of each."""
    return {name: bytes_per_device(tree) / 1e9 for name, tree in trees.items()}


# Decoding


def compile_decoding(case: Decoding):
    """The program as the engine compiles it, and the abstract arguments of its call."""
    mesh = make_mesh(*case.mesh, devices=devices(case.slice))
    config, k = MODELS[case.target], draft_length(case)
    build = Build.of("tpu")
    params = placed(mesh, abstract_params(config, build.dtype), logical_axes(config))
    method, drafter, shared = None, {}, {}
    if case.drafting == "fixed":
        method = FixedMethod(config.vocab_size)
    elif case.drafting == "drafter":
        reading = DrafterConfig(draft_length=K, attention=case.attention)
        method = StandaloneMethod(MODELS["0.5b"], reading, config.vocab_size)
        drafter = drafter_params(mesh, build.dtype)
    elif case.drafting in TAPPED:
        method, *own = begun(TAPPED[case.drafting], layers_of(case), config)
        drafter, shared = placed_drafter(mesh, method, *own, build.dtype)
    weights = loop.Weights(params, drafter, shared)
    state = abstract_state(StateShape(config, method, case.rows, case.capacity, k, build), drafter, shared, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    knobs = jax.eval_shape(lambda: Knobs.of(Sampling(), 0))
    rest = everywhere(mesh, (knobs, jax.ShapeDtypeStruct((2,), jnp.int32), number, number))
    plan, args = loop.Plan(config, method, k, Kind.of(Sampling())), (state, weights, *rest)
    with on_mesh(mesh):
        executable, _ = compiled(loop.run_segment, (plan,), *args, formats=Layout.AUTO)
        if not case.prefill:
            return executable, args
        # The last chunk of prompts that fill the caches; more than one chunk goes row by row.
        tokens, rows = jax.ShapeDtypeStruct((1, PREFILL_CHUNK), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        args = ((state.cache, state.drafter), weights, *everywhere(mesh, (tokens, number, rows, rows)))
        formats = formats_of(executable)
        formats = (formats.cache, formats.drafter)
        return compiled(loop.prefill, (config, method), *args, formats=formats, first=False)[0], args


def layers_of(case: Decoding) -> int:
    return 1 if case.drafting == "eagle3" else 5


def draft_length(case: Decoding) -> int:
    if case.drafting in TAPPED:
        return TAPPED[case.drafting].draft_length
    return 0 if case.drafting == "plain" else K


def active_share(config: ModelConfig, rows: int) -> float:
    """Share of the experts that at least one of so many rows chooses, routed at random."""
    return 1 - (1 - config.experts_per_token / config.experts) ** rows if config.experts else 1.0


def read_once(config: ModelConfig, params, rows: int) -> float:
    """Bytes per device of the weights that a pass over so many rows must read."""
    total = bytes_per_device(params)
    if not config.tied:
        total -= bytes_per_device(params["embed"])
    if config.experts:
        total -= bytes_per_device(params["experts"]) * (1 - active_share(config, rows))
    return total


def minimum_bytes(case: Decoding, args) -> float:
    """Bytes per device of a round, or of a chunk of a prefill with its caches full."""
    config = MODELS[case.target]
    state, (params, drafter, shared), *_ = args
    if case.prefill:
        weights = read_once(config, params, PREFILL_CHUNK) - bytes_per_device(params["head"])  # no logits are made
        if case.drafting in TAPPED:  # keys and values of the context alone
            weights += bytes_per_device((drafter["fc"], *(drafter["layers"][name] for name in ("k", "v"))))
        elif drafter:
            weights += bytes_per_device(drafter) - bytes_per_device(drafter["embed"])
        return weights + bytes_per_device(state) / case.rows  # of one row
    weights = read_once(config, params, case.rows * (draft_length(case) + 1))
    if case.drafting in TAPPED:
        method, *_ = begun(TAPPED[case.drafting], layers_of(case), config)
        own = bytes_per_device((drafter, shared["head"])) - bytes_per_device(tables(method, drafter))
        # EAGLE-3 passes once for each token of a draft, the tapped outputs go through fc once.
        again = draft_length(case) - 1 if case.drafting == "eagle3" else 0
        weights += own + again * (own - bytes_per_device(drafter["fc"]))
    elif drafter:
        weights += read_once(MODELS["0.5b"], drafter, 1)
    return weights + bytes_per_device((state.cache, state.drafter))


def decoding_trips(case: Decoding) -> dict[str, float]:
    """How often the loops run whose end depends on data."""
    config = MODELS[case.target]
    rows = PREFILL_CHUNK if case.prefill else case.rows * (draft_length(case) + 1)
    block = Build.of("tpu").block_of(case.capacity)
    return {
        "attend_cache": case.capacity / block if block else 1,
        "experts.py": active_share(config, rows) * config.experts / 8 if config.experts else 1,  # per device
    }


def measure_decoding(case: Decoding, executable, args) -> dict:
    program, memory = Program(executable.as_text(), decoding_trips(case)), Memory.of(executable)
    if case.drafting in TAPPED and not case.prefill:  # which reads nothing of what is shared
        method, *_ = begun(TAPPED[case.drafting], layers_of(case), MODELS[case.target])
        memory = without(memory, twice(method, args[1].shared))
    one = program.whole() if case.prefill else program.per_round()
    minimum = minimum_bytes(case, args)
    state, (params, drafter, _), *_ = args
    caches = state if case.prefill else (state.cache, state.drafter)
    result = {
        "round_gb": one.hbm_bytes / 1e9,
        "minimum_gb": minimum / 1e9,
        "ratio": one.hbm_bytes / minimum,
        "once_gb": 0.0 if case.prefill else program.once().hbm_bytes / 1e9,
        "round_copies_gb": one.large_copies.bytes / 1e9,
        "flops": one.flops,
        "held_gb": held_gb(parameters=(params, drafter), caches=caches),
        "not_aliased_gb": max(0, bytes_per_device(state) - memory.aliased) / 1e9,
    }
    return result | {"program": program, "cost": one, "memory": memory}


def without(memory: Memory, size: int) -> Memory:
    """Without so many bytes of arguments."""
    return dataclasses.replace(memory, arguments=memory.arguments - size, peak=memory.peak - size)


# Training

LENGTH, BLOCKS, WIDTH = 2048, 24, 32  # of each text: tokens, blocks, tokens of a block


def compile_training(case: Training):
    """The program and the abstract arguments of its call."""
    mesh = make_mesh(*case.mesh, devices=devices(case.slice))
    reading = DrafterConfig(draft_length=WIDTH, attention=case.attention)
    method = StandaloneMethod(MODELS["0.5b"], reading, MODELS["0.5b"].vocab_size)
    optimizer, steps = training.OptimizerConfig(), 1000
    state = training.abstract_state(drafter_params(mesh, jnp.float32), optimizer, steps)
    shapes = {"tokens": ("int32", (LENGTH,)), "length": ("int32", ()), "total": ("float32", ())}
    if method.cached:
        shapes |= {"anchor": ("int32", (BLOCKS,)), "size": ("int32", (BLOCKS,)), "masked": ("bool", (BLOCKS, WIDTH)),
                   "weight": ("float32", (BLOCKS, WIDTH)), "text_weight": ("float32", (LENGTH,))}  # fmt: skip
    else:
        shapes |= {"masked": ("bool", (LENGTH,)), "weight": ("float32", (LENGTH,))}
    texts = (case.accumulate, case.texts * case.devices)
    batch = {
        name: jax.ShapeDtypeStruct((*texts, *shape), dtype, sharding=batch_placement(mesh))
        for name, (dtype, shape) in shapes.items()
    }
    fixed, teacher = {}, MODELS.get(case.teacher)
    if teacher:
        fixed = {"target": placed(mesh, abstract_params(teacher, jnp.bfloat16), logical_axes(teacher))}
    build, objective = Build.of("tpu"), Objective(ce=0, kl=1) if teacher else CROSS_ENTROPY
    run = training.make_step(
        drafter_loss(method, teacher, objective, build.remat), optimizer, steps, build=build,
        shardings=jax.tree.map(lambda x: x.sharding, state),
    )  # fmt: skip
    args = (state, batch, fixed)
    with on_mesh(mesh):
        return run.lower(*args).compile(), args


def matrices(config: ModelConfig, *, stored: bool = False) -> int:
    """Entries of the weights of all layers that a row is multiplied with; stored: all that there are."""
    attention = config.width * config.head_width * 2 * (config.heads + config.kv_heads)
    experts = config.experts if stored else config.experts_per_token
    mlp = config.expert_width * experts if config.experts else config.mlp_width
    return config.layers * (attention + 3 * config.width * mlp)


def ideal_flops(case: Training) -> float:
    """Of a step per device, all rows being predicted: forward once, backward twice that."""
    model = MODELS["0.5b"]
    blocks = BLOCKS * (WIDTH + 1)  # a block's separator is a row as well
    per_text = 2 * matrices(model) * (LENGTH + blocks)
    per_text += 2 * model.vocab_size * model.width * (LENGTH + BLOCKS * WIDTH)  # the head
    # Scores and values: text against text (what is hidden too), blocks against text, blocks against themselves.
    pairs = LENGTH * LENGTH + blocks * LENGTH + blocks * (WIDTH + 1)
    per_text += 2 * 2 * model.layers * model.heads * model.head_width * pairs
    total = 3 * per_text
    if teacher := MODELS.get(case.teacher):  # forward only
        total += 2 * matrices(teacher) * LENGTH
        total += 2 * 2 * teacher.layers * teacher.heads * teacher.head_width * LENGTH**2
        total += 2 * teacher.vocab_size * teacher.width * (LENGTH + BLOCKS * WIDTH)
    return case.texts * total


def allowed_collectives(case: Training) -> float:
    """Bytes of collectives that the placement itself costs, of a step without teacher, in bfloat16."""
    data, fsdp, tensor = case.mesh
    model, size = MODELS["0.5b"], 2
    layers, table = size * matrices(model) / tensor, size * model.vocab_size * model.width / tensor
    total = 0.0
    if fsdp > 1:
        total += 2 * layers + table  # gathered for the forward pass, and layers once more for the backward pass
    if data * fsdp > 1:
        # Gradients summed once: over fsdp whole, over data what is left of them. The table has two, one as the
        # embedding and one as the head, which is summed in float32.
        total += (layers + table + 2 * table) * ((fsdp > 1) + (data > 1) / fsdp)
    if tensor > 1:
        # Each layer sums x twice in the forward pass, twice when that is made again, and twice in the backward pass.
        rows = case.texts * tensor * (LENGTH + BLOCKS * (WIDTH + 1))
        total += 6 * model.layers * size * rows * model.width
    return total


def training_trips(case: Training) -> dict[str, float]:
    """How often the loops run whose end depends on data: texts are full, and blocks stand evenly over them."""
    keys, rows = -(-LENGTH // KEYS), -(-BLOCKS * (WIDTH + 1) // ROWS)  # pieces
    predicted = case.texts * case.mesh[2] * (LENGTH + BLOCKS * WIDTH)
    return {
        "cross_entropy": -(-predicted // CHUNK_ROWS),
        "attend_blocks": keys * (rows + 1) / (2 * rows),  # the mean over the pieces of rows
        "attend_text": (keys + 1) / 2,
        "piecewise.py": (keys + 1) / 2,
    }


def measure_training(case: Training, executable, args) -> dict:
    program = Program(executable.as_text(), training_trips(case))
    one, memory = program.whole(), Memory.of(executable)
    result = {
        "flops": one.flops,
        "ideal_flops": ideal_flops(case),
        "flops_ratio": one.flops / ideal_flops(case),
        "hbm_gb": one.hbm_bytes / 1e9,
        "collectives_gb": one.collectives.bytes / 1e9,
        "allowed_gb": allowed_collectives(case) / 1e9,
        "held_gb": held_gb(parameters=(args[0].params, args[2]), optimizer=args[0].optimizer),
    }
    return result | {"program": program, "cost": one, "memory": memory}


# The step of a recipe for a conditioned drafter


def compile_align(case: Align):
    """The program and the abstract arguments of its call."""
    recipe, config, build = case.file, MODELS[RECIPES[case.recipe]], Build.of("tpu")
    mesh = make_mesh(fsdp=len(devices(case.slice)), devices=devices(case.slice))
    (stage,), start = recipe.stages, recipe.conditioned
    assert start is not None
    method, *own = begun(start, int(recipe.drafter.removeprefix("random:")), config)
    params, shared = placed_drafter(mesh, method, *own, jnp.float32)
    state = training.abstract_state(params, stage.optimizer, stage.steps)
    T, M, W = recipe.length, stage.corruption.blocks, method.draft_length
    shapes = {"tokens": ("int32", (T,)), "length": ("int32", ()), "total": ("float32", ()), "anchor": ("int32", (M,)),
              "size": ("int32", (M,)), "masked": ("bool", (M, W)), "weight": ("float32", (M, W)),
              "text_weight": ("float32", (T,))}  # fmt: skip
    batch = {
        name: jax.ShapeDtypeStruct((1, recipe.batch, *shape), dtype, sharding=batch_placement(mesh))
        for name, (dtype, shape) in shapes.items()
    }
    target = placed(mesh, abstract_params(config, jnp.bfloat16), logical_axes(config))
    fixed = fixed_params(method, config, stage.loss, target, shared)
    run = training.make_step(
        drafter_loss(method, config, stage.loss, build.remat), stage.optimizer, stage.steps, build=build,
        shardings=jax.tree.map(lambda x: x.sharding, state),
    )  # fmt: skip
    args = (state, batch, fixed)
    with on_mesh(mesh):
        return run.lower(*args).compile(), args


def align_ideal_flops(case: Align, method: ConditionedMethod) -> float:
    """Of a step per device: what is not trained once forward, and of what lies behind it the gradient of rows alone."""
    recipe, config, shape, head = case.file, MODELS[RECIPES[case.recipe]], method.shape, method.head
    (stage,), T = recipe.stages, recipe.length
    D, rows = config.width, stage.corruption.blocks * (method.draft_length + method.reading.first)
    predicted = stage.corruption.blocks * method.draft_length
    # The target reads the text.
    total = 2 * matrices(config) * T + 2 * 2 * config.layers * config.heads * config.head_width * T * T
    if stage.loss.reads_target:
        total += 2 * config.vocab_size * D * predicted
    # Context: no gradient of what the target says.
    total += 2 * 2 * shape.tapped_width * D * T + 3 * 2 * shape.layers * D * 2 * shape.kv_heads * shape.head_width * T
    # Blocks.
    total += 3 * 2 * matrices(shape) * rows
    total += 3 * 2 * 2 * shape.layers * shape.heads * shape.head_width * rows * (T + rows // stage.corruption.blocks)
    if shape.conv_kernel:
        total += 3 * 2 * shape.layers * 2 * 2 * shape.conv_kernel * (D // shape.conv_group) * D * rows
    # Scores: the target's head is not trained.
    total += 2 * 2 * method.draft_vocab * D * predicted
    if isinstance(head, Markov):
        total += 3 * 2 * method.draft_vocab * head.rank * predicted
    if isinstance(head, PathSelector):
        total += 3 * 2 * head.rank * (D + head.candidates) * predicted
    return case.texts * total


def align_allowed_collectives(case: Align, args, method: ConditionedMethod) -> float:
    """Bytes of collectives that the placement itself costs, over fsdp, in bfloat16."""
    state, _, fixed = args
    config = MODELS[RECIPES[case.recipe]]
    tables = 2 * 2 * config.vocab_size * config.width  # embedding and head, once for target and drafter
    own = 2 * sum(x.size for name, x in state.params.items() if name not in ("layers", HEAD))
    own += 2 * sum(x.size for x in jax.tree.leaves(state.params["layers"]))
    # Gathered for the forward pass, and once more for the backward pass; gradients summed.
    total = 2 * matrices(config, stored=True) + tables + 3 * own
    total += 2 * fixed["shared"]["head"].size if "ids" in fixed["shared"] else 0
    # A head's tables are gathered once, and their gradients summed in float32.
    return total + 3 * 2 * sum(x.size for x in jax.tree.leaves(state.params.get(HEAD, {})))


def align_trips(case: Align, method: ConditionedMethod) -> dict[str, float]:
    """How often loops run whose end depends on data: texts are full, blocks stand evenly, experts are chosen alike."""
    recipe = case.file
    blocks = recipe.stages[0].corruption.blocks
    keys, rows = -(-recipe.length // KEYS), -(-blocks * (method.draft_length + method.reading.first) // ROWS)
    config = MODELS[RECIPES[case.recipe]]
    choices = case.texts * recipe.length * config.experts_per_token
    return {
        "_by_tile": choices / TILE_ROWS[1] + config.experts / 2,  # an expert's last tile is half full
        "cross_entropy": -(-case.texts * blocks * method.draft_length // CHUNK_ROWS),
        "attend_blocks": keys * (rows + 1) / (2 * rows),
        "attend_text": (keys + 1) / 2,
        "piecewise.py": (keys + 1) / 2,
    }


def measure_align(case: Align, executable, args) -> dict:
    start, config = case.file.conditioned, MODELS[RECIPES[case.recipe]]
    assert start is not None
    method, *_ = begun(start, int(case.file.drafter.removeprefix("random:")), config)
    program = Program(executable.as_text(), align_trips(case, method))
    state, _, fixed = args
    one, ideal = program.whole(), align_ideal_flops(case, method)
    held = held_gb(target=fixed["target"], drafter=state.params, optimizer=state.optimizer)
    kept = bytes_per_device((fixed, state.params))  # and what training started from
    kept += bytes_per_device((state.params, state.optimizer))
    result = {
        "flops": one.flops,
        "ideal_flops": ideal,
        "flops_ratio": one.flops / ideal,
        "hbm_gb": one.hbm_bytes / 1e9,
        "collectives_gb": one.collectives.bytes / 1e9,
        "allowed_gb": align_allowed_collectives(case, args, method) / 1e9,
        "held_gb": held,
        "keeps_gb": kept / 1e9,
    }
    memory = Memory.of(executable)
    result["makes_gb"] = (memory.peak - memory.arguments) / 1e9
    return result | {"program": program, "cost": one, "memory": memory}


# Running

COMPILED = {
    Decoding: (compile_decoding, measure_decoding),
    Training: (compile_training, measure_training),
    Align: (compile_align, measure_align),
}


def measure(name: str, dearest: int, text: str | None) -> dict:
    case = CASES[name]
    begin = time.perf_counter()
    try:
        compile_case, report = COMPILED[type(case)]
        executable, args = compile_case(case)
    except jax.errors.JaxRuntimeError as error:
        return {"case": name, "error": str(error).replace("\n", " ")[:600]}
    result = {"case": name, "compile_seconds": time.perf_counter() - begin} | report(case, executable, args)
    if text:
        Path(text).write_text(executable.as_text(), encoding="utf-8")
    program, cost, memory = (result.pop(part) for part in ("program", "cost", "memory"))
    result |= {
        "collectives": {kind: total._asdict() for kind, total in cost.by_kind().items()},
        "memory": dataclasses.asdict(memory),
        "unresolved": program.unresolved,
    }  # fmt: skip
    parts = [(key, cost.dearest(dearest, key)) for key in ("hbm_bytes", "flops", "collectives")]
    if "once_gb" in result:
        parts.append(("once", program.once().dearest(dearest)))
    for key, steps in parts:
        result[f"dearest_{key}"] = [
            {"name": x.instruction.name, "type": x.instruction.type[:100], "times": x.times, "hbm_bytes": x.hbm_bytes,
             "flops": x.flops, "collectives": [[part.kind, part.bytes] for part in x.collectives], "origin": x.origin}
            for x in steps
        ]  # fmt: skip
    return result


HEADS = {
    Decoding: ("case", "round GB", "minimum", "ratio", "once GB", "copies GB", "collectives", "parameters / caches GB",
               "arguments / peak GB", "not aliased GB"),
    Training: ("case", "peak GB", "flops / ideal", "HBM GB", "collectives GB", "allowed GB", "collectives",
               "parameters / optimizer GB", "arguments / peak GB"),
}  # fmt: skip
HEADS[Align] = (*HEADS[Training][:7], "target / drafter / optimizer GB", "arguments / peak GB", "keeps / makes GB")


def table_row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def shown(result: dict) -> str:
    """One row of the table of its kind."""
    if "error" in result:
        return table_row([result["case"], f"does not compile: {result['error']}"])
    memory = {name: value / 1e9 for name, value in result["memory"].items()}
    totals = result["collectives"]
    count, size = (sum(total[key] for total in totals.values()) for key in ("count", "bytes"))
    kinds = ", ".join(f"{kind} {total['count']:.0f}, {total['bytes'] / 1e6:.1f} MB" for kind, total in totals.items())
    held = " / ".join(f"{value:.2f}" for value in result["held_gb"].values())
    sizes = f"{memory['arguments']:.2f} / {memory['peak']:.2f}"
    if "ratio" in result:
        cells = [f"{result['round_gb']:.3f}", f"{result['minimum_gb']:.3f}", f"{result['ratio']:.2f}",
                 f"{result['once_gb']:.2f}", f"{result['round_copies_gb']:.2f}", f"{count:.0f}, {size / 1e6:.1f} MB",
                 held, sizes, f"{result['not_aliased_gb']:.2f}"]  # fmt: skip
    else:
        cells = [f"{memory['peak']:.2f}", f"{result['flops_ratio']:.2f}", f"{result['hbm_gb']:.0f}",
                 f"{size / 1e9:.2f}", f"{result['allowed_gb']:.2f}", kinds, held, sizes]  # fmt: skip
        cells += [f"{result['keeps_gb']:.2f} / {result['makes_gb']:.2f}"] if "keeps_gb" in result else []
    return table_row([result["case"], *cells])


def shown_steps(result: dict) -> list[str]:
    lines = []
    for key in ("hbm_bytes", "flops", "collectives", "once"):
        for step in result.get(f"dearest_{key}", []):
            one = sum(part[1] for part in step["collectives"])
            one = one if key == "collectives" else step["hbm_bytes" if key == "once" else key]
            lines.append(f"    {key:11} {one * step['times'] / 1e6:12.1f} M {step['times']:6.0f}x {step['name']:34} "
                         f"{step['type'][:60]:60} {step['origin']}")  # fmt: skip
    return lines


def in_its_own_process(name: str, dearest: int, quick: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--case", name, "--json", str(file), "--dearest", str(dearest)]
        command += ["--quick"] if quick else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not file.is_file():
            return {"case": name, "error": done.stderr.strip()[-600:]}
        return json.loads(file.read_text(encoding="utf-8"))["results"][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="cases, or patterns of their names")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--dearest", type=int, default=0, metavar="N", help="also the N dearest instructions of each")
    parser.add_argument("--quick", action="store_true", help="compile four times faster by trying less: flops and "
                        "collectives stay as they are, HBM bytes and peaks do not")  # fmt: skip
    parser.add_argument("--text", metavar="FILE", help="of a single case: write the compiled program's text")
    args = parser.parse_args()
    if args.list:
        print("\n".join(CASES))
        return
    names = [name for name in CASES if any(fnmatch.fnmatch(name, pattern) for pattern in args.case)]
    if not names:
        parser.error("no such case; --list prints them")
    if not LIBTPU.is_file():
        parser.error(f"no {LIBTPU}: install libtpu there (see --help), or set DEER_JAX_LIBTPU")
    if args.quick:
        jax.config.update("jax_exec_time_optimization_effort", -1.0)
    versions = versions_used()
    if len(names) > 1 or not args.json:
        print(", ".join(f"{name} {version}" for name, version in versions.items()))
    results, kind = [], None
    for name in names:
        if kind is not type(CASES[name]):
            kind = type(CASES[name])
            print("", table_row(HEADS[kind]), table_row(["---"] * len(HEADS[kind])), sep="\n")
        alone = len(names) == 1
        result = measure(name, args.dearest, args.text) if alone else in_its_own_process(name, args.dearest, args.quick)
        results.append(result)
        print(shown(result), *shown_steps(result), sep="\n", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"versions": versions, "results": results}, indent=1), encoding="utf-8")


def versions_used() -> dict[str, str]:
    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "libtpu": libtpu_version()}


def libtpu_version() -> str:
    found = sorted(LIBTPU.parent.parent.glob("libtpu-*.dist-info"))
    return found[-1].name.removeprefix("libtpu-").removesuffix(".dist-info") if found else "unknown"


if __name__ == "__main__":
    main()
