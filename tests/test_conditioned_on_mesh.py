"""Conditioned drafters on a mesh: the same tokens and the same training, and only rows move between the devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax import decode
from deer_jax.checkpoints.drafters import place_drafter, usable_drafter
from deer_jax.config import Sampling
from deer_jax.decoding import programs
from deer_jax.decoding.engine import Engine
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.heads import INDEPENDENT, Markov, PathSelector
from deer_jax.planning.hlo import Program
from deer_jax.sharding import on_mesh
from deer_jax.training.objectives import Objective, drafter_loss
from tests.fast import representing
from tests.kinds import CONVOLVED, Kind, conditioned
from tests.meshes import BATCH, SCANNED, batches, made, mesh_of, placed

K, RANK, CANDIDATES = 3, 8, 4
IDS = range(1, 96, 2)  # the mask, which is the last id, among them
KINDS = {
    "independent": Kind(INDEPENDENT, "next_token", shape=(("windows", (8,)), ("window_from", "anchor"))),
    "selector": Kind(PathSelector(rank=RANK, candidates=CANDIDATES), "fill_in", True, CONVOLVED),
    "vanilla": Kind(Markov(rank=RANK), "next_token", True),
    "gated": Kind(Markov(rank=RANK, form="gated", has_confidence=True), "fill_in"),
    "rnn": Kind(Markov(rank=RANK, form="rnn"), "fill_in", True),
}


def pair(kind: str, mesh):
    """Target and drafter with the same values on each mesh."""
    target = made("qwen3", mesh, scan=True)
    drafter = conditioned(target, KINDS[kind], ids=IDS, k=K, scan=True)
    return target, usable_drafter(drafter, drafter.params, target)


@pytest.mark.parametrize(
    ("kind", "shape"),
    representing(
        [("independent", "2x1x4"), ("selector", "2x2x2"), ("vanilla", "1x1x4"), ("gated", "2x2x2"), ("rnn", "2x1x4")],
        ("selector", "2x2x2"),
    ),
)
def test_a_mesh_drafts_what_one_device_drafts(kind, shape):
    tokens = np.random.default_rng(1).integers(0, 96, (3, 7))
    alone, spread = (
        np.asarray(drafter.draft_logits(target, tokens[:, :-1], tokens[:, -1]))
        for target, drafter in (pair(kind, None), pair(kind, mesh_of(shape)))
    )
    np.testing.assert_allclose(spread, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("kind", "shape"), [("selector", "2x2x2"), ("rnn", "2x1x4")])
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
    # Predecessors; of a selector also what may follow. Convolutions' kernels go with the rows.
    summed += K * RANK + (K * CANDIDATES * RANK if kind == "selector" else 0)
    found = moved["run_segment"].per_round().by_kind()
    print(kind, found, slots * number * summed)
    for name in ("prefill", "admit"):
        print(name, moved[name].whole().by_kind())


@pytest.mark.parametrize("kind", ["selector", "gated", "rnn"])
def test_a_mesh_has_the_loss_and_gradients_of_one_device(kind):
    """Of the target's distribution and the text's tokens, of a selector's choice and of the confidence."""
    batch = {name: x[0] for name, x in next(batches("continuation", "block_causal", 1)).items()}
    objective = Objective(ce=0.5, tv=0.5, confidence=0.3 if kind == "gated" else 0.0, decay=4.0)

    def of(mesh):
        target, drafter = pair(kind, mesh)
        params = drafter.params if mesh is None else place_drafter(drafter, mesh)
        loss = drafter_loss(drafter.method, target.config, objective, SCANNED.remat)
        given = batch if mesh is None else {k: x[0] for k, x in placed({k: x[None] for k, x in batch.items()}, mesh).items()}
        with on_mesh(mesh):
            run = jax.jit(jax.value_and_grad(lambda *a: loss(*a)[0]))
            return jax.device_get(run(params, given, {"target": target.params, "shared": drafter.shared}))

    alone, spread = of(None), of(mesh_of("2x2x2"))
    np.testing.assert_allclose(spread[0], alone[0], rtol=1e-5)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(spread[1]), jax.tree.leaves(alone[1]), strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale, err_msg=str(path))
        assert np.abs(other).max() > 0, path
