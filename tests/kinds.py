"""A drafter of every kind, with random weights, for one small target: what the tests of all kinds share."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from deer_jax import DrafterConfig, Target, drafter_from_target
from deer_jax.config import ConditionedConfig, ModelConfig
from deer_jax.drafters.conditioned import ConditionedMethod, ConditionedReading
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.eagle3 import Eagle3Method, eagle3_drafter
from deer_jax.drafters.heads import HEAD, INDEPENDENT, Head, Markov, PathSelector
from deer_jax.drafters.standalone import MASK as MASK_ENTRY
from deer_jax.drafters.standalone import StandaloneMethod
from deer_jax.drafters.tapped import TappedReading, shared_of
from deer_jax.models.transformer import Params, unstack_layers
from tests.tiny import random_params, tiny

V, K, MASK = 12, 4, 11
SHAPE = {"vocab_size": V, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 24}
WEAK = 0.3  # of what layers write
IDS = (0, 2, 3, 5, 6, 8, 9, MASK)  # of a reduced vocabulary


@dataclasses.dataclass(frozen=True)
class Kind:
    """A conditioned drafter: its head, layout, whether its vocabulary is reduced, and its backbone's shape."""

    head: Head = INDEPENDENT
    layout: Any = "fill_in"
    reduced: bool = False
    shape: tuple[tuple[str, Any], ...] = ()
    taps: tuple[int, ...] = (1, 0)
    reading: tuple[tuple[str, Any], ...] = ()


HALF = (("output_scale", 0.5),)
CONVOLVED = (("conv_kernel", 2), ("conv_group", 8))
# Every head, with both layouts, a whole and a reduced vocabulary, windows of both kinds, convolutions, and a softcap.
CONDITIONED = {
    "independent": Kind(reading=(("input_scale", 0.1),)),  # else its masks outweigh what it reads
    "independent reduced": Kind(INDEPENDENT, "next_token", True, (("windows", (3,)), ("window_from", "anchor"))),
    "selector": Kind(PathSelector(rank=8, candidates=6), shape=CONVOLVED, reading=HALF),
    "selector reduced": Kind(
        PathSelector(rank=8, candidates=4), "next_token", True, (("windows", (3,)), ("causal", (True,)))
    ),
    "vanilla": Kind(Markov(rank=8), "next_token", True, (("causal", (True,)),)),
    "gated": Kind(
        Markov(rank=8, form="gated", has_confidence=True), "fill_in", True, (("windows", (5,)),),
        reading=(*HALF, ("softcap", 2.0)),
    ),
    "rnn": Kind(Markov(rank=8, form="rnn"), reading=(("input_scale", 2.0), *HALF)),
    "rnn reduced": Kind(
        Markov(rank=8, form="rnn", has_confidence=True, confidence_reads_row=False), "next_token", True, CONVOLVED, (0,)
    ),
}  # fmt: skip
STANDALONE = {
    "block_causal": DrafterConfig(draft_length=K),
    "bidirectional": DrafterConfig(draft_length=K, attention="bidirectional"),
}
# Block-causal drafters with a head: how they read, and which.
HEADED: dict[str, tuple[DrafterConfig, Head]] = {
    "standalone selector": (DrafterConfig(draft_length=K), PathSelector(rank=8, candidates=6, has_confidence=True)),
    "standalone vanilla": (DrafterConfig(draft_length=K, head="in_place"), Markov(rank=8)),
    "standalone rnn": (DrafterConfig(draft_length=K, separator=False), Markov(rank=8, form="rnn")),
}
# EAGLE-3: whether its vocabulary is reduced, and its shape.
EAGLE: dict[str, tuple[bool, dict[str, Any]]] = {
    "eagle3": (False, {"norm_residual": True}),
    "eagle3 reduced": (True, {"norm_tapped": True, "norm_output": True, "family": "qwen3", "qk_norm": True}),
}
KINDS = (*STANDALONE, *HEADED, *CONDITIONED, *EAGLE)


def follows(V: int) -> np.ndarray:
    """[V - 1] what follows each token in most texts; the last id is the mask."""
    order = np.random.default_rng(2).permutation(V - 1)
    return np.roll(order, 1)[np.argsort(order)]  # all in one circle


@functools.cache
def target_of(scan: bool = False) -> Target:
    """A target that mostly says what follows its last token, and never the mask."""
    config = tiny("qwen3", **SHAPE)
    params = random_params(config, 8)
    params["layers"] |= {name: WEAK * params["layers"][name] for name in ("o", "down")}
    params["head"] = jnp.zeros((V, config.width)).at[follows(V)].set(params["embed"][:MASK])
    return Target(config=config, params=params if scan else unstack_layers(params, config.layers))


def backbone_of(config: ModelConfig, taps: int, **changes) -> ConditionedConfig:
    """One layer of a target's sizes."""
    own = {"family": "qwen3", "qk_norm": True, "layers": 1, "windows": (0,), "causal": (False,),
           "tapped_width": taps * config.width, "experts": 0, "experts_per_token": 0, "expert_width": 0}  # fmt: skip
    return ConditionedConfig(**(vars(config) | own | changes))


def random_head(method: ConditionedMethod | StandaloneMethod, ids, state) -> Params:
    """Weights that all matter, unlike fresh ones, of a head that has an idea of what follows a token.

    ids: those it proposes; state: a final state [D] like those where it predicts.
    """
    rng = np.random.default_rng(6)
    head = {
        name: rng.normal(size=w.shape) * (0.3 if name.endswith("bias") else w.shape[-1] ** -0.5)
        for name, w in method.head_weights().items()
    }
    V = method.target_vocab
    before = np.zeros(V, int)
    before[follows(V)] = np.arange(V - 1)
    if isinstance(method.head, PathSelector):
        head["projection"] *= 0.3
        head["projection"] += state / (state @ state)
        head["successor"] += 4 * head["predecessor"][before][np.array(ids)]
    if isinstance(method.head, Markov):
        r = method.head.rank
        head["w2"] += 4 * head["w1"][before][np.array(ids)]
        if method.head.form == "rnn":
            head["joint"][2 * r :, r : 2 * r] += 2 * np.eye(r)
    return {name: jnp.asarray(w, jnp.float32) for name, w in head.items()}


def conditioned(target: Target, kind: Kind, *, ids=IDS, k: int = K, scan: bool = False) -> Drafter:
    """The drafter of a kind for a target, whose last id is the mask. ids: those of a reduced vocabulary."""
    mask = target.config.vocab_size - 1
    reading = ConditionedReading(
        taps=kind.taps, mask=mask, draft_length=k, layout=kind.layout,
        draft_vocab=len(ids) if kind.reduced else None, **dict(kind.reading),
    )  # fmt: skip
    method = ConditionedMethod(backbone_of(target.config, len(kind.taps), **dict(kind.shape)), reading, kind.head)
    params = random_params(method.shape, 4)
    params["layers"] |= {name: WEAK * params["layers"][name] for name in ("o", "down")}
    params["norm"] = jnp.ones_like(params["norm"])
    state = np.asarray(target.params["embed"][mask])
    state = state / np.sqrt(np.mean(state**2))
    every = ids if kind.reduced else range(target.config.vocab_size)
    if head := random_head(method, every, state):
        params[HEAD] = head
    shared = shared_of(method, target, ids if kind.reduced else None)
    return Drafter(
        method=method, params=params if scan else unstack_layers(params, method.shape.layers), shared=shared,
        name="conditioned",
    )  # fmt: skip


def standalone(target: Target, reading: DrafterConfig, head: Head) -> Drafter:
    """A standalone drafter of the target's first layer, with a head."""
    drafter = drafter_from_target(target, reading, layers=(0,))
    method = drafter.method
    assert isinstance(method, StandaloneMethod)
    method, state = dataclasses.replace(method, head=head), np.asarray(drafter.params["special"][MASK_ENTRY])
    state = state / np.sqrt(np.mean(state**2))
    head_params = random_head(method, range(target.config.vocab_size), state)
    return dataclasses.replace(drafter, method=method, params=drafter.params | {HEAD: head_params})


def eagle3(target: Target, kind: str, *, ids=IDS, k: int = K, scan: bool = False) -> Drafter:
    """The EAGLE-3 drafter of a kind, which has an idea of what follows the token that it reads."""
    reduced, shape = EAGLE[kind]
    reading = TappedReading(taps=(1, 0), draft_length=k, draft_vocab=len(ids) if reduced else None)
    drafter = eagle3_drafter(target, reading, ids=ids if reduced else None, **shape)
    method = drafter.method
    assert isinstance(method, Eagle3Method)
    params = random_params(method.shape, 4)
    params["norm"] = jnp.ones_like(params["norm"])
    # What the rows give is mostly the embeddings that they read.
    layer = {name: np.array(x[0]) for name, x in params["layers"].items()}
    layer["v"] = np.eye(*layer["v"].shape) + 0.1 * layer["v"]
    params["layers"] = {name: jnp.asarray(x, jnp.float32)[None] for name, x in layer.items()}
    params = params if scan else unstack_layers(params, 1)
    return dataclasses.replace(drafter, params=params)


def drafter_of(kind: str, target: Target | None = None) -> Drafter:
    """The drafter of a kind, by its name in KINDS."""
    target = target_of() if target is None else target
    if kind in CONDITIONED:
        return conditioned(target, CONDITIONED[kind])
    if kind in HEADED:
        return standalone(target, *HEADED[kind])
    if kind in EAGLE:
        return eagle3(target, kind)
    return drafter_from_target(target, STANDALONE[kind], layers=(0,))


def with_head(drafter: Drafter, head: Head) -> Drafter:
    """The same backbone and vocabulary under a head without weights."""
    params = {name: value for name, value in drafter.params.items() if name != HEAD}
    method = dataclasses.replace(drafter.method, head=head)  # pyrefly: ignore
    return dataclasses.replace(drafter, method=method, params=params)
