"""The device mesh, and the one table from logical axes to mesh axes. Nothing else names a mesh axis.

A mesh has the axes `data` (copies of everything), `fsdp` (slices of the parameters) and `tensor` (slices of every
product). Inside, the tensor axis is taken apart into its prime factors, 8 = 2 x 2 x 2, so that two key heads can be
split over one of them and eight over all three. Arrays say their logical axes; `spec` turns them into a partition, and
what does not divide evenly is an error, but for two declared fallbacks: key heads that are fewer than the devices are
repeated in groups, and query heads follow them.

Code that computes asks the mesh it runs in (`on_mesh`), so without one every function here does nothing.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deer_jax.errors import InputError, shown

AXES = ("data", "fsdp", "tensor")

# Which mesh axes an array axis is split over.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "kv_heads": ("tensor",),
    "groups": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("tensor",),
    "width": ("fsdp",),
}


class Heads(NamedTuple):
    """The logical axis of a weight that has whole heads: `kv_heads` of them, each with `groups` query heads.

    Heads are never cut. Query heads are split as their key heads are, and further only where a device has one of these:
    a device then has all that it needs of both.
    """

    kv_heads: int
    groups: int = 1


Axis = str | Heads | None


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh over the first data * fsdp * tensor devices, for `load_target(..., mesh=)`.

    Args:
      data: copies of the parameters, each with its share of the rows.
      fsdp: slices of the parameters, put together layer by layer; the rows are split over it too.
      tensor: slices of every product: heads, columns and rows of the weights, vocabulary, experts.

    Raises InputError if there are not so many devices.
    """
    shape = MeshShape(data=data, fsdp=fsdp, tensor=tensor)
    devices = list(jax.devices() if devices is None else devices)
    count = data * fsdp * tensor
    if not devices:
        raise InputError("devices is empty: leave it out for all devices")
    if count > len(devices):
        remedy = f"set JAX_NUM_CPU_DEVICES={count}" if devices[0].platform == "cpu" else "choose a smaller one"
        raise InputError(f"a {data}x{fsdp}x{tensor} mesh needs {count} devices, {len(devices)} are there; {remedy}")
    if count == len(devices) and count > 1:  # neighbours in the network become neighbours in the mesh
        grid = mesh_utils.create_device_mesh(dataclasses.astuple(shape), devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices[:count]).reshape(dataclasses.astuple(shape))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices each mesh axis has.

    Attributes:
      data: copies of everything. fsdp: slices of the parameters. tensor: slices of each product.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name in AXES:
            value = getattr(self, name)
            if type(value) is not int:
                raise InputError(f"{name} must be a whole number of at least 1, got {shown(value)}")
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Of text such as "data=2,tensor=4"; axes that are not named have one device. InputError for anything else."""
        found: dict[str, int] = {}
        for part in text.split(","):
            name, equals, count = (each.strip() for each in part.partition("="))
            if name not in AXES or not equals:
                raise InputError(
                    f"a mesh is written as data=2,fsdp=4,tensor=8, with some of these axes, not as {shown(text)}"
                )
            if not re.fullmatch("[0-9]{1,6}", count):
                raise InputError(f"{name} of a mesh must be a whole number of at least 1, got {shown(count)}")
            if name in found:
                raise InputError(f"{name} stands twice in the mesh {shown(text)}")
            found[name] = int(count)
        return cls(**found)

    @property
    def batch_ways(self) -> int:
        """Into how many parts a batch is split."""
        return self.data * self.fsdp


def check_mesh(mesh: Mesh | None) -> None:
    """InputError for what is no mesh, or one with other axes."""
    if not isinstance(mesh, Mesh | None):
        raise InputError(f"mesh must be what make_mesh returns, as in make_mesh(fsdp=8), got {shown(mesh)}")
    if mesh is not None and tuple(mesh.axis_names) != AXES:
        found = ", ".join(map(str, mesh.axis_names))
        raise InputError(f"a mesh needs the axes {', '.join(AXES)}, this one has {found}: make it with make_mesh")


@functools.lru_cache
def factored(mesh: Mesh) -> Mesh:
    """The same devices with the tensor axis in its prime factors; every array is placed by this one."""
    check_mesh(mesh)
    data, fsdp, tensor = mesh.devices.shape
    factors = _prime_factors(tensor)
    names = (*AXES[:2], *(f"{AXES[2]}{i}" for i in range(len(factors))))
    return Mesh(mesh.devices.reshape(data, fsdp, *factors), names, axis_types=(AxisType.Auto,) * len(names))


def _prime_factors(n: int) -> list[int]:
    factors, divisor = [], 2
    while n > 1:
        if n % divisor:
            divisor += 1
        else:
            factors.append(divisor)
            n //= divisor
    return factors


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Where a program is traced and called, for `constrain` and `on_shards` inside it."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(factored(mesh))


def batch_ways(mesh: Mesh | None) -> int:
    """Into how many parts rows are split."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def spec(mesh: Mesh | AbstractMesh, shape: Sequence[int], axes: Sequence[Axis], what: str = "an array") -> P:
    """Partition over a factored mesh of an array of this shape with these logical axes.

    Raises InputError, with `what` it is, for a dimension that does not divide evenly.
    """
    parts, taken, key_heads_left = [], set(), 1
    for dimension, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        names = [] if axis is None else [name for name in _mesh_axes(mesh, axis) if name not in taken]
        if isinstance(axis, Heads):
            split = fitting(mesh, names, axis.kv_heads)
            if math.prod(mesh.shape[name] for name in split) == axis.kv_heads:
                split += fitting(mesh, [name for name in names if name not in split], axis.groups)
            _check_heads(mesh, names, split, axis, what)
        elif axis == "kv_heads":
            split = fitting(mesh, names, size)
            key_heads_left = size // math.prod(mesh.shape[name] for name in split)
        elif axis == "groups":
            split = fitting(mesh, names, size) if key_heads_left == 1 else []
        else:
            split, ways = names, math.prod(mesh.shape[name] for name in names)
            if size % ways:
                rule = " x ".join(RULES[axis]) if axis else ""
                fits = ", ".join(str(n) for n in range(1, ways + 1) if size % n == 0)
                raise InputError(
                    f"{what}: dimension {dimension} ({axis}) has {size} entries, which do not divide by the {ways} of "
                    f"{rule}; a mesh may have {fits} there"
                )
        split = [name for name in split if mesh.shape[name] > 1]
        taken |= set(split)
        parts.append(tuple(split) or None)
    while parts and parts[-1] is None:  # as programs say where their results are
        parts.pop()
    return P(*parts)


def _mesh_axes(mesh: Mesh | AbstractMesh, axis: str | Heads) -> list[str]:
    """The axes of a factored mesh that a logical axis may be split over."""
    wanted = RULES["kv_heads" if isinstance(axis, Heads) else axis]
    return [name for name in mesh.axis_names if name.rstrip("0123456789") in wanted]


def fitting(mesh: Mesh | AbstractMesh, names: Sequence[str], size: int) -> list[str]:
    """Of the mesh axes those, in order, over which so many heads can be split evenly.

    2 heads over 2 x 2 x 2 devices: the first; 12 heads: the first two
    """
    split = []
    for name in names:
        if size % mesh.shape[name] == 0:
            split.append(name)
            size //= mesh.shape[name]
    return split


def _check_heads(mesh, names, split, heads: Heads, what: str) -> None:
    ways = math.prod(mesh.shape[name] for name in names)
    if ways > 1 and heads.kv_heads > 1 and not split:
        raise InputError(
            f"{what}: {heads.kv_heads} key heads cannot be split over tensor={ways}, nor over a factor of it; choose "
            f"tensor={heads.kv_heads} or a divisor of it"
        )


def placement(
    mesh: Mesh | None, shape: Sequence[int], axes: Sequence[Axis], what: str = "an array"
) -> NamedSharding | None:
    """`spec` as a sharding; None without a mesh: the default device."""
    return None if mesh is None else NamedSharding(factored(mesh), spec(factored(mesh), shape, axes, what))


def placements(mesh: Mesh, tree: Any, axes: Any) -> Any:
    """A sharding for every array of a tree; axes: the same tree with the logical axes of each, as tuples."""

    def one(path, x, names):
        return placement(mesh, x.shape, names, jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree_util.tree_map_with_path(one, tree, axes)


def bytes_per_device(tree) -> int:
    """Bytes that each device holds of arrays, or of their shapes."""

    def held(x) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(held(x) for x in jax.tree.leaves(tree))


def spans(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of several processes."""
    return mesh is not None and mesh.is_multi_process


def put(x: Any, where: NamedSharding | None) -> jax.Array:
    """An array of the host, which every process that has devices there holds, on these devices; None: the default."""
    if where is None or where.is_fully_addressable:
        return jax.device_put(x, where)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), where))
    return jax.make_array_from_callback(np.shape(x), where, np.asarray(x).__getitem__)


@functools.lru_cache
def everywhere(mesh: Mesh) -> Callable:
    """A jitted function: the arrays of a tree, whole on every device of the mesh."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device of the mesh."""
    return NamedSharding(factored(mesh), P())


def _ambient() -> AbstractMesh | None:
    """The factored mesh of `on_mesh`; None without one, and where a shard already runs alone."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AXES[0] not in mesh.axis_names or mesh.manual_axes else mesh


def constrain(x, *axes: Axis):
    """x, placed by its logical axes; x as it is without a mesh."""
    mesh = _ambient()
    return x if mesh is None else lax.with_sharding_constraint(x, spec(mesh, x.shape, axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole(weight, axes: tuple[Axis, ...]):
    """A weight with its `width` slices put together, for a product; its gradient is summed into slices again."""
    return constrain(weight, *(None if axis == "width" else axis for axis in axes))


def _whole_forward(weight, axes):
    return whole(weight, axes), None


def _whole_backward(axes, _, gradient):
    return (constrain(gradient, *axes),)


whole.defvjp(_whole_forward, _whole_backward)


def spread(table):
    """A table [V, D] as every shard of the rows has it, [shards, V, D], for training; as it is without a mesh.

    Its width is put together once for all uses, and their gradients, [shards, V, D] too, are added where they are made
    and summed over the shards once: of a tied embedding, what the look-up and the loss say.
    """
    mesh = _ambient()
    if mesh is None:
        return table
    shards = math.prod(mesh.shape[name] for name in _mesh_axes(mesh, "batch"))
    out = here((shards, *table.shape), "batch", "vocab", None)
    return on_shards(lambda x: gathered(x, "width", 1)[None], (here(table.shape, "vocab", "width"),), out)(table)


def constrain_tree(tree: Any, axes: Any) -> Any:
    """`constrain` for every array of a tree; axes: the same tree with the logical axes of each, as tuples."""
    return tree if _ambient() is None else jax.tree.map(lambda x, names: constrain(x, *names), tree, axes)


def here(shape: Sequence[int], *axes: Axis) -> P:
    """`spec` in the mesh of `on_mesh`, for `on_shards`."""
    mesh = _ambient()
    return P() if mesh is None else spec(mesh, shape, axes)


def on_shards(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` run on each device's shard of its arguments; as it is without a mesh.

    Inside it `total`, `largest`, `gathered` and `shard_index` speak of logical axes.
    """
    if _ambient() is None:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _manual(axis: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis inside `on_shards`, without those of one device; none outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in _mesh_axes(mesh, axis) if mesh.shape[name] > 1) if mesh.manual_axes else ()


def total(x, axis: str):
    """The sum over the shards along a logical axis, on each of them."""
    names = _manual(axis)
    return lax.psum(x, names) if names else x


def largest(x, axis: str):
    """The maximum over the shards along a logical axis, on each of them."""
    names = _manual(axis)
    return lax.pmax(x, names) if names else x


def gathered(x, axis: str, dimension: int):
    """The shards along a logical axis, put together."""
    names = _manual(axis)
    return lax.all_gather(x, names, axis=dimension, tiled=True) if names else x


def shard_index(axis: str) -> Any:
    """int32 []: which shard along a logical axis this is; 0 outside."""
    names = _manual(axis)
    return lax.axis_index(names) if names else np.int32(0)


def batch_placement(mesh: Mesh) -> NamedSharding:
    """Micro-batches [parts, batch, ...]: the second axis split, the first a loop."""
    return NamedSharding(factored(mesh), P(None, RULES["batch"]))
