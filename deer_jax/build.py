"""The platform as a value: what of a machine decides how programs are made for it.

Decided once, at the edge (`Build.here`, or `Build.of` for a machine that is not this one), and carried from there, so
that a program for a TPU can be traced on a host that has none.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deer_jax.errors import InputError, shown

DTYPES = ("bfloat16", "float32")

# What a gradient computes again instead of keeping it from the forward pass: nothing; what of each layer is no product
# with weights; or all of each layer but for its attention, so that little
# more than what lies between layers is kept.
Remat = Literal["none", "cheap", "layers"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build:
    """How programs are made.

    Attributes:
      kind: of the devices: "cpu", "gpu" or "tpu".
      dtype: of the computation, and of the parameters when decoding.
      scan: layers are stacked and run by a scan; otherwise one after the other, over arrays of their own.
      remat: what the gradients of training compute again unless a recipe says otherwise, see `Remat`.
      cache_block: attention reads the cache in pieces of so many slots, up to the longest row.
      whole_cache: a cache of up to so many slots is read at once instead.
      auto_layouts: the compiled decode loop chooses the order in which the arrays of its state lie in memory, and all
        programs follow; otherwise they lie as arrays do by default.
    """

    kind: str
    dtype: jnp.dtype
    scan: bool
    remat: Remat
    cache_block: int
    whole_cache: int
    auto_layouts: bool

    @classmethod
    def of(cls, kind: str, dtype=None) -> "Build":
        """For devices of a kind; dtype by name or value, None is float32 on CPU and bfloat16 elsewhere."""
        dtype = parse_dtype(("float32" if kind == "cpu" else "bfloat16") if dtype is None else dtype)
        if kind == "cpu":
            # Unrolled layers are faster here, and reading only what is there pays from the first hundred slots on.
            return cls(
                kind=kind, dtype=dtype, scan=False, remat="none", cache_block=128, whole_cache=0, auto_layouts=False
            )
        # On accelerators the loop over pieces costs more than the bytes it saves until the cache is long.
        # The default order is not always the loop's: it then copies whole caches in and out (seen on TPU, not on GPU).
        return cls(
            kind=kind, dtype=dtype, scan=True, remat="layers", cache_block=1024, whole_cache=4096,
            auto_layouts=kind == "tpu",
        )  # fmt: skip

    @classmethod
    def here(cls, mesh: Mesh | None = None, dtype=None) -> "Build":
        """For the devices of a mesh, or the default device: the only place that asks what they are."""
        return cls.of(jax.default_backend() if mesh is None else mesh.devices.flat[0].platform, dtype)

    def block_of(self, capacity: int) -> int | None:
        """Slots of a cache of this capacity that attention reads at a time; None reads all at once."""
        return None if capacity <= self.whole_cache else self.cache_block


def described(devices: Sequence[jax.Device]) -> str:
    """Devices as people read them: `1 x cpu`, `8 x TPU v5 lite`."""
    return f"{len(devices)} x {devices[0].device_kind}"


Watcher = Callable[[bool], Any]  # True: a program begins to be compiled; False: that is over
_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("watcher", default=None)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Around what compiles a program, which may take minutes: whoever watches is told."""
    tell = _watcher.get() or (lambda begun: None)
    tell(True)
    try:
        yield
    finally:
        tell(False)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """In the block the watcher is told of compilation, and nobody else."""
    before = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(before)


def parse_dtype(dtype) -> jnp.dtype:
    """The dtype by name or value; InputError for one that nothing computes in."""
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or found.name not in DTYPES:
        raise InputError(f"dtype must be {' or '.join(DTYPES)}, got {shown(dtype)}")
    return found
