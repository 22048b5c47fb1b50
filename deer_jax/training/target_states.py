"""What the target says of the training texts, kept in memory: the same texts come again in every epoch."""

import functools
import warnings
from collections.abc import Mapping

import jax
import numpy as np
from jax import lax

from deer_jax import processes
from deer_jax.config import ModelConfig
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params
from deer_jax.sharding import on_mesh
from deer_jax.training.objectives import read_text

GIB = 2**30


class TargetStates:
    """Adds what the target says of a batch's texts, by a program of its own: of a text that is kept it says it once.

    Each process keeps those of its own rows, the first that it meets for as long as there is room. A batch with any
    other text is read anew, by the same program: nothing depends on what was kept, nor on where a run went on.

    Attributes:
      target: whose states they are.
    """

    def __init__(self, target: Target, taps: tuple[int, ...], hidden: bool, gib: float):
        """taps: the layers to keep; hidden: whether the final states as well; gib: the room, of this process."""
        self.target = target
        self._taps, self._hidden = taps, hidden
        self._room, self._full = int(gib * GIB), False
        self._kept: dict[bytes, dict[str, np.ndarray]] = {}

    def add(self, batch: Mapping[str, np.ndarray], share: processes.Share, hidden: bool) -> dict[str, np.ndarray]:
        """The batch, with `tapped` [rows, T, n*D], if layers are kept, and, where asked for, `hidden` [rows, T, D]."""
        keys = [row.tobytes() for row in batch["tokens"]]
        if processes.agree(any(key not in self._kept for key in keys)):
            states = self._read(batch["tokens"], keys, share)
        else:
            kept = [self._kept[key] for key in keys]
            states = {name: np.stack([each[name] for each in kept]) for name in kept[0]}
        return dict(batch) | {name: value for name, value in states.items() if hidden or name != "hidden"}

    def _read(self, tokens: np.ndarray, keys: list[bytes], share: processes.Share) -> dict[str, np.ndarray]:
        with on_mesh(self.target.mesh):
            read = _read(
                self.target.params, share.place({"tokens": tokens})["tokens"], config=self.target.config,
                taps=self._taps, hidden=self._hidden, where=share.placement,
            )  # fmt: skip
        states: dict[str, np.ndarray] = {name: share.local(value) for name, value in read.items()}
        for i, key in enumerate(keys):
            self._keep(key, {name: value[i] for name, value in states.items()})
        return states

    def _keep(self, key: bytes, states: dict[str, np.ndarray]) -> None:
        size = sum(value.nbytes for value in states.values())
        if key in self._kept:
            return
        if size <= self._room:
            self._room -= size
            self._kept[key] = {name: value.copy() for name, value in states.items()}
        elif not self._full:
            self._full = True
            warnings.warn(
                f"keep_states has room for the states of {len(self._kept):,} texts, of {size / 2**20:,.1f} MiB each; "
                "batches with others are read anew in every epoch, which is slower than without keep_states",
                stacklevel=2,
            )


@functools.partial(jax.jit, static_argnames=("config", "taps", "hidden", "where"))
def _read(params: Params, tokens, *, config: ModelConfig, taps: tuple[int, ...], hidden: bool, where):
    """tokens int32 [parts, rows, T] -> what is kept of each, so placed."""

    def part(tokens):
        view = read_text(config, params, tokens, taps)
        found = {"hidden": view.hidden if hidden else None, "tapped": view.tapped}
        return {name: value for name, value in found.items() if value is not None}

    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, where), lax.map(part, tokens))
