"""Drafters with heads on a mesh: the same tokens and the same training, and only rows move between the devices."""

import jax
import numpy as np
import pytest

from deer_jax import decode
from deer_jax.checkpoints.drafters import place_drafter, usable_drafter
from deer_jax.config import Sampling
from deer_jax.decoding import programs
from deer_jax.decoding.engine import Engine
from deer_jax.drafters.heads import Markov, PathSelector
from deer_jax.planning.hlo import Program
from deer_jax.sharding import on_mesh
from deer_jax.training.objectives import ACCEPTANCE, Objective, drafter_loss, fixed_params
from tests.fast import representing
from tests.kinds import CONVOLVED, EAGLE, HEADED, Kind, conditioned, eagle3, standalone
from tests.meshes import SCANNED, batches, made, mesh_of, placed

K, RANK, CANDIDATES = 3, 8, 4
IDS = range(1, 96, 2)  # the mask, which is the last id, among them
OWN = ", own drafts"  # the third stage
KINDS = {
    "selector": Kind(PathSelector(rank=RANK, candidates=CANDIDATES), "fill_in", True, CONVOLVED),
    "vanilla": Kind(Markov(rank=RANK), "next_token", shape=(("windows", (8,)), ("window_from", "anchor"))),
    "gated": Kind(Markov(rank=RANK, form="gated"), "fill_in", True),
    "rnn": Kind(Markov(rank=RANK, form="rnn", has_confidence=True), "fill_in", True),
}


def pair(kind: str, mesh):
    """Target and drafter with the same values on each mesh."""
    target = made("qwen3", mesh, scan=True)
    if kind in HEADED:
        drafter = standalone(target, *HEADED[kind])
    elif kind in EAGLE:
        drafter = eagle3(target, kind, ids=IDS, k=K, scan=True)
    else:
        drafter = conditioned(target, KINDS[kind], ids=IDS, k=K, scan=True)
    return target, usable_drafter(drafter, drafter.params, target)


def test_a_mesh_drafts_what_one_device_drafts():
    tokens = np.random.default_rng(1).integers(0, 96, (3, 7))
    alone, spread = (
        np.asarray(drafter.draft_logits(target, tokens[:, :-1], tokens[:, -1]))
        for target, drafter in (pair("gated", None), pair("gated", mesh_of("2x2x2")))
    )
    np.testing.assert_allclose(spread, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "shape", "temperature"),
    representing(
        [("selector", "2x2x2", 1.0), ("rnn", "2x1x4", 0.0), ("eagle3 reduced", "2x2x2", 1.0)],
        ("selector", "2x2x2", 1.0),
    ),
)
def test_the_same_tokens_on_a_mesh(kind, shape, temperature):
    """Greedy and sampled, more prompts than slots; and as many of them accepted."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 96, n).tolist() for n in (1, 5, 17, 4, 3, 9)]

    def answered(mesh):
        target, drafter = pair(kind, mesh)
        found = decode(target, prompts, drafter=drafter, max_new_tokens=10, batch_size=4, seed=3,
                       temperature=temperature)  # fmt: skip
        return found.tokens, found.stats.accepted_histogram

    expected = answered(None)
    assert answered(mesh_of(shape)) == expected
    if temperature:
        assert np.sum(expected[1], axis=0)[1:].any()


@pytest.mark.parametrize("kind", ["selector", "vanilla"])
def test_a_round_moves_rows_and_nothing_else(kind):
    """Never logits, a codebook or a cache: sums of each layer's two outputs, of look-ups and of the context."""
    mesh = mesh_of("2x1x4")
    target, drafter = pair(kind, mesh)
    engine = Engine(target, drafter, K, Sampling(), 0, (1,), slots=4, capacity=64)
    programs._compiled.clear()  # of what other tests have compiled nothing is meant
    engine.admit([[1, 2, 3], [4, 5]], [20, 20], [0, 1], engine.order[:2])
    engine.segment(max_rounds=1)
    moved = {key[0].__name__: Program(program.as_text()) for key, program in programs._compiled.items()}
    slots, number = 2, 4  # on a shard of the rows; bytes
    rows = K + drafter.method.reading.first
    width, L = target.config.width, target.config.layers
    # Target: look-up and layers of k + 1 rows. Drafter: of its block, and the context of k + 1 rows.
    summed = ((2 * L + 1) * (K + 1) + 3 * rows + (K + 1)) * width
    # Predecessors; of a selector also what may follow.
    summed += K * RANK + (K * CANDIDATES * RANK if kind == "selector" else 0)
    found, ways = moved["run_segment"].per_round().by_kind(), mesh.shape["tensor"]
    assert set(found) == {"all-reduce", "all-gather"}
    assert 1 <= found["all-reduce"].bytes / (slots * number * summed) < 1.02  # and numbers of positions
    # Of every shard value and place of the best: the target's, and the drafter's or a selector's candidates.
    compared = K + 1 + K * (CANDIDATES if kind == "selector" else 1)
    # And the kernels of convolutions, for each row two of attention and two of the MLP.
    shape = drafter.method.shape
    kernels = 4 * shape.conv_kernel * (shape.width // shape.conv_group) * shape.layers
    assert found["all-gather"].bytes == slots * number * (2 * ways * compared + rows * kernels)
    # A chunk of 16 of one row a shard: the target's, and the context once.
    found = moved["prefill"].whole().by_kind()
    assert set(found) == {"all-reduce"}
    assert found["all-reduce"].bytes == 16 * number * width * (2 * L + 1 + 1)
    assert all(total.bytes < 1000 for total in moved["admit"].whole().by_kind().values())


def loss_on(mesh, kind: str):
    """Target and drafter on a mesh, the program that gives loss and gradients of a batch, and its arguments."""
    own = kind.endswith(OWN)
    target, drafter = pair(kind.removesuffix(OWN), mesh)
    batch = next(batches("continuation", "block_causal", 1))
    objective = ACCEPTANCE if own else Objective(ce=0.5, tv=0.5, confidence=0.3, decay=4.0)
    params = drafter.params if mesh is None else place_drafter(drafter, mesh)
    loss = drafter_loss(drafter.method, target.config, objective, SCANNED.remat, own=own)
    fixed = fixed_params(drafter.method, target.config, objective, target.params, drafter.shared)

    def of_first(params, batch, fixed):
        return loss(params, {name: x[0] for name, x in batch.items()}, fixed)[0]

    arguments = params, batch if mesh is None else placed(batch, mesh), fixed
    with on_mesh(mesh):
        return target, drafter, jax.jit(jax.value_and_grad(of_first)).lower(*arguments).compile(), arguments


def test_a_step_gathers_each_table_once():
    """And all else of the target once, the drafter's layers for the forward and for the backward pass."""
    target, drafter, program, (_, _, fixed) = loss_on(mesh_of("1x8x1"), "vanilla")
    arrays = [id(x) for x in jax.tree.leaves(fixed)]
    assert len(arrays) == len(set(arrays))

    def size(*trees) -> int:
        """Bytes of the matrices, which are split; vectors are not."""
        return sum(x.nbytes for x in jax.tree.leaves(trees) if x.ndim > 1 and min(x.shape[-2:]) > target.config.layers)

    found = Program(program.as_text()).whole().by_kind()["all-gather"].bytes
    own = {name: x for name, x in drafter.params.items() if name != "layers"}
    assert found == size(target.params, own) + 2 * size(drafter.params["layers"])


@pytest.mark.parametrize("kind", ["selector", "rnn", "standalone rnn", "eagle3 reduced", f"gated{OWN}"])
def test_a_mesh_has_the_loss_and_gradients_of_one_device(kind):
    """Of the target's distribution and the text's tokens, of a selector's choice and of the confidence; and of what the
    drafter drafts on its own."""

    def of(mesh):
        _, _, program, arguments = loss_on(mesh, kind)
        return jax.device_get(program(*arguments))

    alone, spread = of(None), of(mesh_of("2x2x2"))
    np.testing.assert_allclose(spread[0], alone[0], rtol=1e-5)
    found, expected = (jax.tree_util.tree_leaves_with_path(gradients) for _, gradients in (spread, alone))
    for (path, one), (_, other) in zip(found, expected, strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale, err_msg=str(path))
        assert np.abs(other).max() > 0, path
