"""The rows of `run.py`: what begins each drafter and what trains it, by plan.

`stories260k`: EAGLE-3, the standalone drafter and those that read the target, on the same answers. `I`, `I+II`: DEER's
continuation and then its refinement; `published`: every block masked whole, with the loss of the kind's authors; `III`
and `more` go on from another row's drafter, with the third stage and with as many steps of what that row had last.
`kinds`: those that read the target, as their authors train them, and the steps from one of them to `combined`.
`ablations`: one thing at a time of two of these, in 1,500 steps. `smollm2`: five rows on a real target, each with the
same 300,000 answer tokens in the same order.

Two things have no switch in a recipe and are put in the place of the library's function here: `suffix` masks in stage I
(the last t of a block, not scattered ones), and `raw` weights in stage II (divided by the number of masked tokens, not
by the sum of their weights).
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from deer_jax.data import examples
from deer_jax.diffusion import corruption
from deer_jax.drafters.heads import Markov, PathSelector
from deer_jax.training import align
from deer_jax.training.target_states import TargetStates

K = 8
Stages = tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """A drafter: what begins it, keys of a recipe; its `drafter`; its stages; or the row it goes on from."""

    begin: dict[str, Any]
    source: str
    stages: Stages = ()
    after: str = ""
    patch: str = ""  # "suffix" or "raw"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of one target, and how they are measured.

    answers: files of --data. common: what all recipes have. rules: temperature and verification; as a block, at the
    lengths of `block_lengths` alone. prompts: how many of those in held_out.jsonl; timed: of how many the speed is
    measured. batch: prompts at once.
    """

    rows: dict[str, Row]
    answers: tuple[str, ...]
    common: dict[str, Any]
    rules: tuple[tuple[float, str], ...]
    lengths: tuple[int, ...]
    block_lengths: tuple[int, ...] = (4, K, 16)
    prompts: int = 104
    timed: int = 16
    batch: int = 128
    in_order: bool = False  # stages go on in the texts where the one before ended, and rows share the target's states


def untrained(row: Row) -> bool:
    return not row.stages


# stories260k

STEPS, THIRD, BLOCKS = 4000, 1000, 24
TAPS = {"taps": [0, 2, 4]}
COLD = {"mask": 0, "draft_length": K, "warm": False}
MARKOV = {"head": "markov", "rank": 16, "layout": "next_token"}
SELECTOR = {"head": "selector", "rank": 32, "candidates": 16}
FEW = MARKOV | {"rank": 64, "draft_vocab": 256, "taps": [0, 1, 2, 3, 4]}
CONVOLVED = {"conv_kernel": 2, "conv_group": 16}
DFLASH, DSPARK = {"kl": 1, "decay": 4}, {"ce": 0.1, "tv": 0.9, "decay": 4}  # their losses
DFLASH2 = DFLASH | {"selector": 1}
COMBINED = FEW | CONVOLVED | {"rank": 96, "causal": True}
RNN = {"form": "rnn", "rank": 128}
LOSS = {"ce": 0.1, "tv": 0.9}
LAST_TWO = "from-target:3,4"


def stage(kind: str, steps: int, loss: dict[str, Any] | None = None, **more) -> dict[str, Any]:
    own = {"loss": loss} if loss else {}
    return {"stage": kind, "steps": steps, "learning_rate": 2e-3, "blocks": BLOCKS} | own | more


def published(loss: dict[str, Any], steps: int = STEPS, **more) -> Stages:
    return (stage("continuation", steps, loss, least_rate=1.0, **more),)


def both(loss: dict[str, Any] | None = None, steps: int = STEPS, alpha: float = 1.01, **more) -> Stages:
    first = stage("continuation", steps // 4, loss, **more)
    return first, stage("refinement", steps - steps // 4, loss, alpha=alpha, **more)


def conditioned(start: dict[str, Any], source: str, stages: Stages, **more) -> Row:
    return Row({"conditioned": TAPS | COLD | start}, source, stages, **more)


def eagle3(stages: Stages, **sizes) -> Row:
    return Row({"eagle3": TAPS | {"draft_length": K} | sizes}, "random:1", stages)


def standalone(stages: Stages, rank: int = 0, form: str = "vanilla", patch: str = "", **reading) -> Row:
    head = {"draft_head": {"kind": "markov", "rank": rank, "form": form}} if rank else {}
    return Row({"reading": {"draft_length": K} | reading} | head, "from-target", stages, patch=patch)


def third(after: str, more: dict[str, Any]) -> dict[str, Row]:
    """The third stage after a row, and as many more steps of what it had last."""
    own = {"stage": "acceptance", "steps": THIRD, "learning_rate": 5e-4, "blocks": BLOCKS}
    more = more | {"steps": THIRD, "learning_rate": 5e-4}
    return {f"{after}, III": Row({}, "", (own,), after), f"{after}, more": Row({}, "", (more,), after)}


STORIES = {
    "prompt-lookup": Row({}, "prompt-lookup"),
    "untrained": Row({}, "from-target"),
    "EAGLE-3": eagle3(published({"kl": 1}), mlp_width=172),
    "EAGLE-3, wide": eagle3(published({"kl": 1}), mlp_width=820),  # as many parameters as combined
    "EAGLE-3, wider": eagle3(published({"kl": 1}), mlp_width=1717),  # as many as best
    "standalone I": standalone((stage("continuation", STEPS),)),
    "standalone I+II": standalone(both()),
    "DFlash I+II": conditioned({}, "random:2", both(DFLASH)),
    "DFlash 2 I+II": conditioned(SELECTOR | CONVOLVED, "random:2", both(DFLASH2)),
    "DSpark I+II": conditioned(MARKOV, "random:2", both(DSPARK)),
    "combined": conditioned(COMBINED, LAST_TWO, published(DSPARK)),
    "combined, rnn": conditioned(COMBINED | RNN, LAST_TWO, published(DSPARK)),
    "best": standalone(published(LOSS), 64, "rnn"),
    **third("best", *published(LOSS)),
}

# Kinds of drafters that read the target, and what leads from DSpark to `combined`

KINDS = {
    "standalone markov": standalone(both(), rank=16),
    "DFlash published": conditioned({}, "random:2", published(DFLASH)),
    "DFlash 2 published": conditioned(SELECTOR | CONVOLVED, "random:2", published(DFLASH2)),
    "DSpark published": conditioned(MARKOV, "random:2", published(DSPARK)),
    "DSpark kl": conditioned(MARKOV, "random:2", published(DFLASH)),
    "started": conditioned(MARKOV, LAST_TWO, published(DSPARK)),
    "few ids": conditioned(FEW, LAST_TWO, published(DSPARK)),
    "few ids causal": conditioned(FEW | {"causal": True}, LAST_TWO, published(DSPARK)),
    "convolved": conditioned(FEW | CONVOLVED | {"rank": 32}, LAST_TWO, published(DSPARK | {"decay": 6})),
    "combined stages": conditioned(COMBINED, LAST_TWO, both(DSPARK)),
    "combined refined": conditioned(
        COMBINED, LAST_TWO, (*published(DSPARK, STEPS - 1000), stage("refinement", 1000, DSPARK, learning_rate=5e-4))
    ),
    "combined half": conditioned(COMBINED, LAST_TWO, published(DSPARK, STEPS // 2)),
}

# Ablations

FEWER = 1500


def refined(alpha: float, patch: str = "") -> Row:
    return standalone(both(steps=FEWER, alpha=alpha), patch=patch)


def ours(loss: dict[str, Any] = DSPARK, start: dict[str, Any] | None = None, **more) -> Row:
    return conditioned(COMBINED | RNN | (start or {}), LAST_TWO, published(loss, FEWER, **more))


ABLATIONS = {
    "standalone": standalone(both(steps=FEWER)),
    "alpha 1.00": refined(1.0),
    "alpha 1.02": refined(1.02),
    "alpha 1.05": refined(1.05),
    "alpha 1.01, raw": refined(1.01, "raw"),
    "alpha 1.02, raw": refined(1.02, "raw"),
    "alpha 1.05, raw": refined(1.05, "raw"),
    "suffix masks": standalone(both(steps=FEWER), patch="suffix"),
    "no separator": standalone(both(steps=FEWER), separator=False),
    "standalone, rnn": standalone(both(steps=FEWER), 64, "rnn"),
    "standalone, rnn, tv": standalone(both(LOSS, FEWER), 64, "rnn"),
    "standalone, rnn, tv, published": standalone(published(LOSS, FEWER), 64, "rnn"),
    "combined, rnn": ours(),
    "vanilla head of 96": ours(start={"form": "vanilla", "rank": 96}),
    "gated head of 128": ours(start={"form": "gated"}),
    "rnn head of 64": ours(start={"rank": 64}),
    "one layer": Row({"conditioned": COLD | COMBINED | RNN}, "from-target:4", published(DSPARK, FEWER)),
    "taps 0, 2, 4": ours(start=TAPS),
    "taps 1, 3": ours(start={"taps": [1, 3]}),
    "tap 4": ours(start={"taps": [4]}),
    "6 anchors": ours(blocks=6),
    "12 anchors": ours(blocks=12),
    "48 anchors": ours(blocks=48),
    "no decay": ours(LOSS),
    "decay 2": ours(LOSS | {"decay": 2}),
    "decay 8": ours(LOSS | {"decay": 8}),
    "ce": ours({"ce": 1, "decay": 4}),
    "kl": ours({"kl": 1, "decay": 4}),
    "tv": ours({"tv": 1, "decay": 4}),
    "warm": ours(start={"warm": True}),
    "scattered masks": conditioned(COMBINED | RNN, LAST_TWO, (stage("continuation", FEWER, DSPARK),)),
}

# SmolLM2-135M-Instruct: 3,032 texts of its answers, read once, have 300,863 answer tokens

SMOL_STEPS, SMOL_BLOCKS = 379, 16
SMOL_TAPS = [1, 14, 26]


def smol(start: dict[str, Any], source: str, loss: dict[str, Any], *, refine: bool, kind: str = "conditioned") -> Row:
    reads = {} if kind == "reading" else {"taps": SMOL_TAPS}
    kept = {} if kind == "reading" else {"keep_states": 8}
    mask = {"mask_token": "<reponame>"} if kind == "conditioned" else {}
    common: dict[str, Any] = {"learning_rate": 1e-3, "warmup": 30, "blocks": SMOL_BLOCKS}
    stages = both(loss, SMOL_STEPS, **common) if refine else published(loss, SMOL_STEPS, **common)
    return Row({kind: reads | mask | {"draft_length": K} | start} | kept, source, stages)


FEW_IDS = {"draft_vocab": 8192}
SMOL_MARKOV = {"head": "markov", "rank": 48, "layout": "next_token"} | FEW_IDS
CAUSAL = {"conv_kernel": 2, "causal": True} | RNN
SMOLLM2 = {
    "prompt-lookup": Row({}, "prompt-lookup"),
    "EAGLE-3": smol(FEW_IDS, "random:1", {"kl": 1}, refine=False, kind="eagle3"),
    "standalone I+II": smol({}, "from-target:0,10,19,29", {}, refine=True, kind="reading"),
    "DFlash I+II": smol(FEW_IDS, "random:2", DFLASH, refine=True),
    "DSpark I+II": smol(SMOL_MARKOV, "random:2", DSPARK, refine=True),
    "combined, rnn": smol(SMOL_MARKOV | CAUSAL | {"warm": False}, "from-target:28,29", DSPARK, refine=False),
    "combined, rnn, warm": smol(SMOL_MARKOV | CAUSAL, "from-target:28,29", DSPARK, refine=False),
}

# The compiled rounds of tpu_programs.py that a row's drafter would have at real size.
ROUNDS = {
    "prompt-lookup": "fixed", "EAGLE-3": "eagle3", "EAGLE-3, wide": "eagle3", "EAGLE-3, wider": "eagle3",
    "standalone I": "drafter", "standalone I+II": "drafter", "best": "drafter",
    "DFlash I+II": "dflash", "DFlash 2 I+II": "dflash2", "DSpark I+II": "dspark", "combined": "dspark32k",
    "combined, rnn": "rnn32k", "combined, rnn, warm": "rnn32k",
}  # fmt: skip

TOKENS = {"length": 176, "batch": 4, "checkpoint_every": 1000}
STORIES_ANSWERS = ("sampled.jsonl", "continued.jsonl")
PLANS = {
    "stories260k": Plan(
        STORIES, STORIES_ANSWERS, TOKENS, ((0.0, "token"), (1.0, "token"), (1.0, "block")), (4, K, 16)
    ),
    "kinds": Plan(KINDS, STORIES_ANSWERS, TOKENS, ((0.0, "token"), (1.0, "token")), (4, K, 16)),
    "ablations": Plan(ABLATIONS, STORIES_ANSWERS, TOKENS, ((0.0, "token"), (1.0, "token")), (K,)),
    "smollm2": Plan(
        SMOLLM2, ("answers.jsonl",), {"length": 256, "batch": 8, "checkpoint_every": 100},
        ((0.0, "token"), (1.0, "token"), (1.0, "block")), (4, K, 16), (K,), prompts=24, timed=6, batch=24,
        in_order=True,
    ),
}  # fmt: skip


def multiplied(method) -> int:
    """Weights that a drafted row is multiplied with."""
    shapes = method.shapes()
    count = sum(x.size for x in jax.tree.leaves(shapes["layers"]))
    vocabulary = getattr(method, "draft_vocab", method.target_vocab)
    count += vocabulary * method.shape.width
    head = getattr(method, "head", None)
    if isinstance(head, PathSelector):
        count += head.rank * method.shape.width + head.rank * head.candidates
    if isinstance(head, Markov):
        count += sum(x.size for name, x in shapes["draft_head"].items() if name != "w1")
    return count


# What a recipe has no switch for


class StateFiles(dict[bytes, dict[str, np.ndarray]]):
    """What a target says of texts, a file each."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, key) -> Path:
        return self.folder / f"{hashlib.sha256(key).hexdigest()}.npz"

    def __contains__(self, key: object) -> bool:
        return self.path(key).is_file()

    def __getitem__(self, key: bytes) -> dict[str, np.ndarray]:
        with np.load(self.path(key)) as states:
            return dict(states)

    def __setitem__(self, key: bytes, states: dict[str, np.ndarray]) -> None:
        part = self.path(key).with_suffix(".part.npz")
        np.savez(part, **states)
        part.replace(self.path(key))


class SharedStates(TargetStates):
    """All rows have read the target's texts once, the first of them."""

    folder: ClassVar[Path]

    def __init__(self, *args):
        super().__init__(*args)
        self._kept = StateFiles(SharedStates.folder)


def suffix(size: int, rate: float, settings: corruption.Corruption, rng: np.random.Generator):
    """Of a block's `size` tokens the last are masked, as many as scattered masks of this rate have on average."""
    if settings.stage != "continuation":
        return SCATTERED(size, rate, settings, rng)
    t = max(float(rate), settings.least_rate)
    masked = np.arange(size) >= size - int(np.floor(t * size + rng.random()))
    return masked, np.where(masked, np.float32(1 / t), np.float32(0))


def raw(prompt: int, length: int, settings: corruption.Corruption, rng: np.random.Generator) -> corruption.Blocks:
    """Weights as they are: the loss is divided by how many tokens are masked, and the text's own weighs as before."""
    blocks = BLOCKS_OF(prompt, length, settings, rng)
    if settings.stage != "refinement":
        return blocks
    count = np.float32(blocks.masked.sum())
    return blocks._replace(total=count, text_weight=blocks.text_weight * count / blocks.total)


SCATTERED, BLOCKS_OF, BATCHES = corruption._mask, examples.corrupt_blocks, align.example_batches


@contextmanager
def patched(plan: Plan, row: Row) -> Iterator[None]:
    """The library with what a row wants and a recipe cannot say."""
    before = sum(each["steps"] for each in row.stages[:1])

    def in_order(records, settings, *, seed: int, first: int = 0, **options):
        first += before if settings.stage == "refinement" else 0
        return BATCHES(records, settings, seed=0, first=first, **options)

    own_states = align.TargetStates
    try:
        if row.patch == "suffix":
            corruption._mask = suffix
        if row.patch == "raw":
            examples.corrupt_blocks = raw
        if plan.in_order:
            align.example_batches, align.TargetStates = in_order, SharedStates
        yield
    finally:
        corruption._mask, examples.corrupt_blocks = SCATTERED, BLOCKS_OF
        align.example_batches, align.TargetStates = BATCHES, own_states
