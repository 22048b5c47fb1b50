"""The device mesh and the one table from logical axes to mesh axes. Nothing else names a mesh axis."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deer_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")

# Which mesh axes an array axis is split over. Anything not listed here is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("tensor",),
    "width": ("fsdp",),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh over the first data * fsdp * tensor devices, axes automatic."""
    devices = list(jax.devices() if devices is None else devices)
    count = data * fsdp * tensor
    if min(data, fsdp, tensor) < 1 or count > len(devices):
        remedy = f"set JAX_NUM_CPU_DEVICES={count}" if devices[0].platform == "cpu" else "choose a smaller one"
        raise InputError(f"a {data}x{fsdp}x{tensor} mesh needs {count} devices, {len(devices)} are there; {remedy}")
    grid = np.array(devices[:count]).reshape(data, fsdp, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices each mesh axis has: copies of everything, slices of the parameters, slices of each product."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name in AXES:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def batch_ways(self) -> int:
        """Into how many parts a batch is split."""
        return self.data * self.fsdp


def spec(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> P:
    """Partition of an array with these logical axes; an axis that does not divide evenly is replicated."""
    parts = []
    for size, axis in zip(shape, axes, strict=True):
        names = RULES.get(axis, ()) if axis else ()
        ways = int(np.prod([mesh.shape[name] for name in names])) if names else 1
        parts.append(names if ways > 1 and size % ways == 0 else None)
    return P(*parts)


def placement(mesh: Mesh | None, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding | None:
    """`spec` as a sharding; None without a mesh: the default device."""
    return None if mesh is None else NamedSharding(mesh, spec(mesh, shape, axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device of the mesh."""
    return NamedSharding(mesh, P())


def batch_placement(mesh: Mesh) -> NamedSharding:
    """Micro-batches [parts, batch, ...]: the second axis split, the first a loop."""
    return NamedSharding(mesh, P(None, RULES["batch"]))
