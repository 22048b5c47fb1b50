"""How a drafter begins that a recipe asks for: a conditioned one, EAGLE-3, and the head of a block drafter."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from deer_jax.config import check_choice, check_flag
from deer_jax.drafters.conditioned import ConditionedReading, conditioned_drafter, default_taps
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.eagle3 import default_taps as eagle3_taps
from deer_jax.drafters.eagle3 import eagle3_drafter
from deer_jax.drafters.heads import HEAD, HEADS, INDEPENDENT, Head, initial
from deer_jax.drafters.standalone import StandaloneMethod
from deer_jax.drafters.tapped import TappedReading
from deer_jax.errors import InputError, named
from deer_jax.models.target import Target

MOST_TAPS = 5  # by default
FROM_TARGET, RANDOM = "from-target", "random"  # where a drafter is named: an untrained one


def listed_layers(name: str) -> tuple[int, ...] | None:
    """(0, 2) for from-target:0,2; None for from-target."""
    listed = name.partition(":")[2]
    if not listed:
        return None
    try:
        return tuple(int(layer) for layer in listed.split(","))
    except ValueError:
        raise InputError(f"{named(name)}: expected layer numbers, as in {FROM_TARGET}:0,2,4") from None


def started_layers(source: str) -> int | tuple[int, ...]:
    """How many random layers, or which ones of the target, a conditioned drafter begins with: 2 for random:2, (0, 2)
    for from-target:0,2. InputError for anything else."""
    kind, _, number = source.partition(":")
    layers = listed_layers(source) if kind == FROM_TARGET else None
    if kind == RANDOM and re.fullmatch("[1-9][0-9]{0,2}", number):
        layers = int(number)
    if layers is None:
        raise InputError(
            f"drafter {source}: a conditioned drafter begins with layers of its target, as in {FROM_TARGET}:0,2, or "
            f"with {RANDOM}:2 layers, EAGLE-3 with {RANDOM}:1; leave out `conditioned` or `eagle3` for one in a folder"
        )
    return layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadStart:
    """An untrained head.

    Attributes:
      kind: `none`: all tokens of a draft at once; `selector` (DFlash 2): among the best candidates of each place, one
        after the other; `markov` (DSpark): each token's scores have a term of the token before it.
      rank: of what a selector or a Markov head adds to the scores. candidates: of a selector, for each place.
      form: how a Markov head makes its term. None: as `heads` has them.
      confidence: whether it also learns how likely a token is to be accepted.
    """

    kind: Literal["none", "selector", "markov"]
    rank: int | None = None
    candidates: int | None = None
    form: Literal["vanilla", "gated", "rnn"] | None = None
    confidence: bool = False

    def __post_init__(self):
        check_choice("kind", self.kind, HEADS)
        self.make()

    def make(self) -> Head:
        """The head; InputError for values that it cannot have."""
        kind, values = HEADS[self.kind], dataclasses.asdict(self)
        given: dict[str, Any] = {
            name: values[name] for name in ("rank", "candidates", "form") if values[name] is not None
        }
        for name in given:
            if name not in (field.name for field in dataclasses.fields(kind)):
                raise InputError(f"a head of kind {self.kind} has no {name}; leave it out")
        return kind(has_confidence=self.confidence, **given)

    def begin(self, drafter: Drafter, seed: int) -> Drafter:
        """A standalone drafter with this head; InputError for one that cannot have it, or has one already."""
        method = drafter.method
        if not isinstance(method, StandaloneMethod):
            raise InputError(f"{drafter.name}: is no standalone drafter, whose head draft_head begins; leave it out")
        if method.head != INDEPENDENT:
            raise InputError(f"{drafter.name}: has a head already, which is trained on; leave draft_head out")
        method, params = dataclasses.replace(method, head=self.make()), drafter.params
        if weights := method.head_weights():
            params = params | {HEAD: initial(weights, seed, params["special"].dtype)}
        return dataclasses.replace(drafter, method=method, params=params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionedStart:
    """An untrained conditioned drafter.

    Attributes:
      taps: layers of the target that it reads, from 0; None: up to five, from its second to its third last.
      mask: an id of the target that texts do not contain, whose embedding is the mask. mask_token: its text instead.
      draft_length: k, tokens per draft.
      layout: `fill_in`: a token is predicted at its own place, from a mask (DFlash); `next_token`: at the place before
        it, the first at the anchor (DSpark).
      draft_vocab: proposes only so many ids, those most frequent in the answers and the stop ids; None: all.
      head: its kind.
      rank, candidates, form, confidence: of it, see `HeadStart`.
      window: how far its layers see; 0: everything. causal: rows of a block see only those before them.
      conv_kernel, conv_group: convolutions around attention and MLP (DFlash 2); conv_kernel 0 has none.
      mlp_width, heads, kv_heads, head_width: of its layers; None: the target's.
      warm: whether one that starts from layers of the target also begins to read it as they do, and a Markov head with
        the target's embedding; see `conditioned_drafter`.
    """

    taps: tuple[int, ...] | None = None
    mask: int | None = None
    mask_token: str | None = None
    draft_length: int = 8
    layout: Literal["fill_in", "next_token"] = "fill_in"
    draft_vocab: int | None = None
    head: Literal["none", "selector", "markov"] = "none"
    rank: int | None = None
    candidates: int | None = None
    form: Literal["vanilla", "gated", "rnn"] | None = None
    confidence: bool = False
    window: int = 0
    causal: bool = False
    conv_kernel: int = 0
    conv_group: int = 16
    mlp_width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_width: int | None = None
    warm: bool = True

    def __post_init__(self):
        check_choice("head", self.head, HEADS)
        check_flag("warm", self.warm)
        self.make_head()
        if (self.mask is None) == (self.mask_token is None):
            raise InputError(
                "give mask or mask_token: an id of the target that its texts do not contain, or such a token's text"
            )

    def make_head(self) -> Head:
        start = HeadStart(
            kind=self.head, rank=self.rank, candidates=self.candidates, form=self.form, confidence=self.confidence
        )
        return start.make()

    def check(self, target: Target, layers: int | Sequence[int]) -> None:
        """InputError for what this target, or these layers, cannot begin."""
        self.mask_of(target)

    def mask_of(self, target: Target) -> int:
        """The mask's id."""
        if self.mask is not None:
            return self.mask
        vocabulary = getattr(target.tokenizer, "vocabulary", dict)()
        if self.mask_token not in vocabulary:
            raise InputError(f"mask_token {self.mask_token!r:.60} is no token of {target.name}; give another, or mask")
        return vocabulary[self.mask_token]

    def begin(self, target: Target, layers: int | Sequence[int], counts: np.ndarray | None, seed: int) -> Drafter:
        """The drafter, of so many random layers or of these of the target.

        counts: int [V], how often each id occurs in the answers; needed for draft_vocab.
        """
        count, own = target.config.layers, dataclasses.asdict(self)
        taps = default_taps(count, min(MOST_TAPS, max(count - 4, 1))) if self.taps is None else self.taps
        mask = self.mask_of(target)
        reading = ConditionedReading(
            taps=taps, mask=mask, draft_length=self.draft_length, layout=self.layout, draft_vocab=self.draft_vocab
        )
        number = layers if isinstance(layers, int) else len(layers)
        sizes = {name: own[name] for name in ("mlp_width", "heads", "kv_heads", "head_width") if own[name] is not None}
        shape: dict[str, Any] = sizes | {
            "windows": (self.window,) * number, "causal": (self.causal,) * number, "conv_kernel": self.conv_kernel,
            "conv_group": self.conv_group,
        }  # fmt: skip
        ids = None if self.draft_vocab is None else most_frequent(counts, self.draft_vocab, mask, target.stop_ids)
        return conditioned_drafter(
            target, reading, layers=layers, warm=self.warm, head=self.make_head(), ids=ids, seed=seed,
            dtype=jnp.float32, **shape,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3Start:
    """An untrained EAGLE-3 drafter: one layer of random weights, on the target's embedding and head.

    Attributes:
      taps: layers of the target that it reads, from 0; None: three, before its third, its middle and its third last.
      draft_length: k, tokens per draft, and steps of the training-time test.
      draft_vocab: proposes only so many ids, those most frequent in the answers and the stop ids; None: all.
      mlp_width: of its layer; None: the target's.
    """

    taps: tuple[int, ...] | None = None
    draft_length: int = 8
    draft_vocab: int | None = None
    mlp_width: int | None = None

    def check(self, target: Target, layers: int | Sequence[int]) -> None:
        """InputError for what this target, or these layers, cannot begin."""
        if layers != 1:
            raise InputError(f"EAGLE-3 has one layer, which begins with random weights: say drafter: {RANDOM}:1")
        if self.taps is None and target.config.layers < 6:
            raise InputError(
                f"{target.name} has {target.config.layers} layers, too few for the usual taps: name them (eagle3.taps)"
            )

    def begin(self, target: Target, layers: int | Sequence[int], counts: np.ndarray | None, seed: int) -> Drafter:
        """The drafter; arguments as for `ConditionedStart.begin`."""
        taps = eagle3_taps(target.config.layers) if self.taps is None else self.taps
        reading = TappedReading(taps=taps, draft_length=self.draft_length, draft_vocab=self.draft_vocab)
        ids = None if self.draft_vocab is None else most_frequent(counts, self.draft_vocab, None, target.stop_ids)
        sizes: dict[str, Any] = {} if self.mlp_width is None else {"mlp_width": self.mlp_width}
        return eagle3_drafter(target, reading, ids=ids, seed=seed, dtype=jnp.float32, **sizes)


def most_frequent(counts: np.ndarray | None, number: int, mask: int | None, always: Sequence[int]) -> list[int]:
    """The `number` most frequent ids, ascending: `always` among them, the mask never; of equal counts the lower ids."""
    assert counts is not None
    if number >= len(counts):
        raise InputError(f"draft_vocab {number} must be less than the target's {len(counts)} ids; leave it out for all")
    order = np.argsort(-counts.astype(np.int64), kind="stable").tolist()
    chosen = dict.fromkeys(token for token in (*always, *order) if token != mask and token < len(counts))
    return sorted(list(chosen)[:number])
