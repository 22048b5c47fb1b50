"""Mixed losses of scores that are sums of products, with a reduced vocabulary and a selector, alone and on shards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax.errors import InputError
from deer_jax.planning.hlo import Program
from deer_jax.sharding import make_mesh, on_mesh
from deer_jax.training import cross_entropy
from deer_jax.training.cross_entropy import Selector, SoftLabels, draft_labels, measured, weighted_loss
from deer_jax.training.losses import Mix
from deer_jax.training.scores import Term
from tests.training.naive import naive_choice, naive_losses

B, R, D, RANK, V, OTHERS = 4, 8, 8, 4, 20, 12  # the target has V + OTHERS ids, of which the drafter has V
IDS = np.sort(np.random.default_rng(3).choice(V + OTHERS, V, replace=False)).astype(np.int32)
EVERYTHING = Mix(ce=0.1, kl=0.2, tv=0.9)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: two terms, of which the first has the target's own head, frozen.

    Attributes:
      labels: whether the text's tokens are known; otherwise the target's best ids are the labels.
      whole: whether the target's ids that the drafter has not count too.
      count: K of a selector; 0 for none.
      softcap: of the first term.
    """

    mix: Mix
    labels: bool = True
    whole: bool = False
    count: int = 0
    trained_head: bool = False
    softcap: float | None = None


CASES = {
    "Markov head": Case(Mix(ce=0.1, tv=0.9), whole=True),
    "selector": Case(Mix(kl=1), labels=False, count=6),
    "everything": Case(EVERYTHING, whole=True, count=3, trained_head=True),
    "softcap": Case(Mix(ce=0.1, kl=0.2, tv=0.9), count=3, trained_head=True, softcap=2.0),
}


@functools.cache
def arrays(dtype=jnp.float32):
    """Parameters and features by name, and what is not differentiated."""
    rng = np.random.default_rng(0)
    shapes = {"hidden": (B, R, D), "head": (V, D), "step": (B, R, RANK), "w2": (V, RANK), "query": (B, R, RANK),
              "successor": (V, RANK), "target": (B, R, D), "whole": (V + OTHERS, D)}  # fmt: skip
    trained = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    fixed = {name: trained.pop(name) for name in ("target", "whole")}
    weights = np.where(rng.random((B, R)) < 0.4, rng.uniform(0.1, 3, (B, R)), 0).astype(np.float32)
    weights[0] = 0  # a shard without rows
    tokens = jnp.asarray(rng.integers(0, V + OTHERS, (B, R)), jnp.int32)
    # Rows of a selector that are none of the mix's, and the other way round.
    choice = np.where(rng.random((B, R)) < 0.2, 0.7 - weights, 0.5 * weights).astype(np.float32)
    choice[0] = 0
    return trained, fixed | {"weights": jnp.asarray(weights), "tokens": tokens, "choice_weights": jnp.asarray(choice)}


def parts(case: Case, x, fixed):
    """The arguments of `weighted_loss` without the mix."""
    terms = [Term(x["hidden"], x["head"], case.trained_head, case.softcap), Term(x["step"], x["w2"])]
    soft = SoftLabels(fixed["target"], fixed["whole"][IDS], whole=fixed["whole"] if case.whole else None)
    selector = Selector(Term(x["query"], x["successor"]), fixed["choice_weights"], case.count) if case.count else None
    labels = draft_labels(fixed["tokens"], jnp.asarray(IDS)) if case.labels else None
    return terms, labels, fixed["weights"], soft, selector


def loss_of(case: Case, x, fixed):
    terms, labels, weights, soft, selector = parts(case, x, fixed)
    return weighted_loss(terms, labels, weights, case.mix, soft, selector)


def naive_loss_of(case: Case, x, fixed):
    """The loss by materialised scores, for autodiff; and rows for comparison."""
    x, fixed = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, (x, fixed))
    head = x["head"] if case.trained_head else jax.lax.stop_gradient(x["head"])
    scores = x["hidden"] @ head.T
    if case.softcap is not None:
        scores = case.softcap * jnp.tanh(scores / case.softcap)
    scores = scores + x["step"] @ x["w2"].T
    everything = fixed["target"] @ fixed["whole"].T
    theirs, rest = everything[..., IDS], everything[..., np.setdiff1d(np.arange(V + OTHERS), IDS)]
    rest = rest if case.whole else rest[..., :0]
    known = fixed["tokens"][..., None] == IDS[None, None]
    label = jnp.where(jnp.any(known, axis=-1), jnp.argmax(known, axis=-1), -1)
    if not case.labels:
        label = jnp.argmax(theirs, axis=-1)
    by_name = naive_losses(scores, label, theirs, rest)
    row = sum((weight * by_name[name] for name, weight in dataclasses.asdict(case.mix).items()), jnp.zeros((B, R)))
    real = (fixed["weights"] != 0) | ((fixed["choice_weights"] != 0) & bool(case.count))
    q, p = jax.nn.softmax(scores), jax.nn.softmax(jnp.concatenate([theirs, rest], axis=-1))
    best = jnp.take_along_axis(p, jnp.argmax(q, axis=-1)[..., None], axis=-1)[..., 0]
    rows = {
        "loss": row, "likelihood": jnp.where(label >= 0, jnp.exp(-by_name["ce"]), 0.0),
        "acceptance": 1 - by_name["tv"], "agrees": (best == jnp.max(p, axis=-1)).astype(jnp.float32),
    }  # fmt: skip
    if case.count:
        extra = x["query"] @ x["successor"].T
        rows["choice_loss"] = naive_choice(scores, label, extra, case.count)
        order = jnp.argsort(-scores, axis=-1)[..., : case.count]
        rows["recall"] = jnp.any(order == label[..., None], axis=-1).astype(jnp.float32)
    loss = jnp.sum(fixed["weights"] * row)
    if case.count:
        loss = loss + jnp.sum(fixed["choice_weights"] * rows["choice_loss"])
    return loss, {name: jnp.where(real, value, 0.0) for name, value in rows.items()}


def both(function, case: Case, dtype=jnp.float32):
    """((loss, rows), gradients)"""
    trained, fixed = arrays(dtype)
    # A function of its own, so that nothing compiled for another chunk is found.
    return jax.jit(jax.value_and_grad(lambda x: function(case, x, fixed), has_aux=True))(trained)


@functools.cache
def expected_of(name: str):
    return both(naive_loss_of, CASES[name])


@pytest.mark.parametrize("shape", [{}, {"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}])
@pytest.mark.parametrize("name", CASES)
def test_loss_rows_and_gradients(monkeypatch, name, shape):
    """On shards of four ids too, of which a selector wants six."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 3)
    (expected, rows), gradients = expected_of(name)
    with on_mesh(make_mesh(**shape) if shape else None):
        (loss, found), ours = both(loss_of, CASES[name])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for what, value in rows.items():
        np.testing.assert_allclose(getattr(found, what), value, rtol=1e-4, atol=1e-6, err_msg=what)
    for what, value in gradients.items():
        np.testing.assert_allclose(ours[what], value, rtol=1e-4, atol=1e-5, err_msg=what)
    assert not ours["step"][0].any()
    assert bool(ours["head"].any()) == CASES[name].trained_head


@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16(name):
    (loss, _), ours = both(loss_of, CASES[name], jnp.bfloat16)
    (expected, _), gradients = both(naive_loss_of, CASES[name], jnp.bfloat16)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    for what, value in gradients.items():
        assert ours[what].dtype == jnp.bfloat16
        value = np.asarray(value, np.float32)
        atol = 0.01 * float(np.abs(value).max())
        np.testing.assert_allclose(ours[what].astype(np.float32), value, rtol=0.02, atol=atol, err_msg=what)


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_table_has_no_room_for_a_gradient(trained):
    """In bfloat16 only the sum of a table's gradients is a float32 array of its shape."""
    case = Case(Mix(ce=1), trained_head=trained)
    program = str(jax.make_jaxpr(lambda: both(loss_of, case, jnp.bfloat16))())
    assert (f"f32[{V},{D}]" in program) == trained


def test_measured_rows_are_those_of_the_loss_and_teach_nothing():
    case = CASES["everything"]
    (_, rows), _ = both(loss_of, case)
    trained, fixed = arrays()

    def apart(x):
        terms, labels, weights, soft, selector = parts(case, x, fixed)
        found = measured(terms, labels, weights, soft, selector)
        return jnp.sum(found.likelihood), found

    (_, found), gradients = jax.jit(jax.value_and_grad(apart, has_aux=True))(trained)
    for what in set(rows._fields) - {"loss"}:
        np.testing.assert_allclose(getattr(found, what), getattr(rows, what), rtol=1e-5, atol=1e-6, err_msg=what)
    assert not any(gradient.any() for gradient in jax.tree.leaves(gradients))
    # Without soft labels acceptance and agreement are those of the text's own token.
    best = np.argmax(np.asarray(trained["hidden"] @ trained["head"].T), axis=-1).astype(np.int32)
    half = np.arange(R) % 2 == 0
    labels = jnp.asarray(np.where(half, best, (best + 1) % V))
    plain = measured([Term(trained["hidden"], trained["head"])], labels, fixed["weights"])
    np.testing.assert_array_equal(plain.acceptance, plain.likelihood)
    np.testing.assert_array_equal(plain.agrees, half & (np.asarray(fixed["weights"]) != 0))


def test_only_numbers_of_rows_cross_between_shards_of_the_vocabulary(monkeypatch):
    """No collective inside the loop over chunks is as large as a chunk's scores on one shard."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 8)
    ids, ways = 1024, 4
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 32, D), (ids, D)))

    def loss(hidden, table):
        soft, selector = SoftLabels(hidden, table), Selector(Term(hidden, table), jnp.ones((1, 32)), 4)
        return weighted_loss([Term(hidden, table)], None, jnp.ones((1, 32)), EVERYTHING, soft, selector)[0]

    with on_mesh(make_mesh(tensor=ways)):
        program = Program(jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile().as_text())
    inside = [one.bytes for step in program.whole().steps if step.loops for one in step.collectives]
    assert inside
    assert max(inside) < 8 * ids / ways * 4 / 4


def test_labels_of_a_reduced_vocabulary():
    ids = jnp.asarray([2, 5, 9], jnp.int32)
    tokens = jnp.asarray([[0, 2, 3], [5, 9, 10]], jnp.int32)
    assert draft_labels(tokens, ids).tolist() == [[-1, 0, -1], [1, 2, -1]]


@pytest.mark.parametrize(("case", "message"), [(Case(Mix(tv=1)), "soft labels"), (Case(Mix(ce=1), count=V + 1), "21")])
def test_what_cannot_be_is_refused(case, message):
    trained, fixed = arrays()
    terms, labels, weights, soft, selector = parts(case, trained, fixed)
    with pytest.raises(InputError, match=message):
        weighted_loss(terms, labels, weights, case.mix, soft if case.count else None, selector)
