"""A drafter as users hold it: a method, its arrays, and where it came from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from deer_jax.build import Build
from deer_jax.config import ModelConfig
from deer_jax.drafters.protocol import Draft, Method, Row, Seen
from deer_jax.errors import InputError
from deer_jax.models.layers import TwoWays
from deer_jax.models.target import Target, Tokenizer, check_target, check_tokens
from deer_jax.models.transformer import Params, bind, in_two_ways
from deer_jax.sharding import batch_ways, on_mesh


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Drafter:
    """What proposes the blocks that a target verifies.

    Attributes:
      method: shapes, conventions and functions, see `protocol.Method`.
      params: its own arrays, as the method names them.
      shared: arrays of the target that it reads, not copies; they are neither trained nor saved.
    """

    method: Method
    params: Params
    shared: Params = dataclasses.field(default_factory=dict)
    name: str = "drafter"
    tokenizer: Tokenizer | None = None

    def __repr__(self) -> str:
        arrays = jax.tree.leaves(self.params)
        return f"Drafter({self.name}: {self.method}{', ' + arrays[0].dtype.name if arrays else ''})"

    @property
    def draft_length(self) -> int:
        """k it was trained for."""
        return self.method.draft_length

    @functools.cached_property
    def two_ways(self) -> tuple[Params, Params]:
        """Both kinds of arrays for passes over a few rows on a CPU, see `layers.TwoWays`."""
        params, shared = self.params, self.shared
        if "layers" in params:
            names = ("fc", "head" if "head" in params else "embed")  # a tied embedding is the head
            params = in_two_ways(params, *(name for name in names if name in params))
        if "ids" in shared:  # its head is not the target's own
            shared = shared | {"head": TwoWays(shared["head"], shared["head"].T)}
        return params, shared

    def draft_logits(self, target: Target, tokens, anchor, draft_length: int | None = None) -> jax.Array:
        """float32 [B, k, V]: one draft after prefix tokens int [B, T] (T may be 0) and anchor int [B].

        -inf where nothing may be proposed. Of a drafter whose tokens depend on each other these are the scores along
        its own greedy path. Raises InputError for one that proposes tokens without scores.
        """
        check_target(target)
        anchor = check_tokens(np.asarray(anchor)[:, None], self.method.target_vocab)
        prefix = np.asarray(tokens).reshape(anchor.shape[0], -1)
        text = np.concatenate([prefix, anchor], axis=1)
        text = check_tokens(text.astype(np.int64), self.method.target_vocab)
        k = self.draft_length if draft_length is None else draft_length
        if k < 1:
            raise InputError(f"draft_length must be at least 1, got {k}")
        rows = len(text)
        reads = (target.config, target.params) if self.method.taps else (None, {})
        arrays = (reads[1], self.params, self.shared)
        with on_mesh(target.mesh):
            text = np.pad(text, ((0, -rows % batch_ways(target.mesh)), (0, 0)))
            found = _draft_logits(reads[0], self.method, arrays, text, k, target.build)
        if found is None:
            raise InputError(f"{self.name} proposes tokens without scores")
        return found[:rows]


@functools.partial(jax.jit, static_argnames=("config", "method", "k", "build"))
def _draft_logits(config: ModelConfig | None, method: Method, arrays, tokens, k: int, build: Build):
    """What `pick` is given in one draft after texts int32 [B, T], over all ids; None if it is given nothing."""
    (B, T), (target, params, shared) = tokens.shape, arrays
    prefix = jnp.pad(tokens[:, :-1], ((0, 0), (0, 0 if T > 1 else 1)))  # at least one, which need not count
    tapped = None
    if config is not None:
        model = bind(config, target)
        positions = jnp.broadcast_to(jnp.arange(prefix.shape[1])[None], prefix.shape)
        tapped = model(model.lookup(prefix), positions, taps=method.taps).tapped
    start, rows = jnp.zeros((B,), jnp.int32), jnp.arange(B)
    state = method.state(params, shared, B, T + k + 1, build)
    seen = Seen(prefix, tapped, start, start + (T - 1), first=True)
    state = method.observe(params, shared, state, seen, rows)
    row = Row(jnp.pad(tokens, ((0, 0), (0, k + 1))), start + T, rows)
    return draft_scores(method, params, shared, state, row, k)[0]


def draft_scores(method: Method, params: Params, shared: Params, state, row: Row, k: int):
    """What `pick` is given in one greedy draft, float32 [B, k, V] over all ids, and the next state; None for a drafter
    that does not call it."""
    found = []

    def pick(logits, first: int, ids=None) -> Draft:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if ids is not None:
            dense = jnp.full((*logits.shape[:2], method.target_vocab), -jnp.inf, jnp.float32)
            ids = jnp.broadcast_to(ids, logits.shape)
            logits = jax.vmap(jax.vmap(lambda row, at, x: row.at[at].set(x)))(dense, ids, logits)
            tokens = jnp.take_along_axis(ids, tokens[..., None], axis=-1)[..., 0]
        found.append(logits)
        return Draft(tokens, None)

    _, state = method.propose(params, shared, state, row, k, pick)
    return jnp.concatenate(found, axis=1) if found else None, state
