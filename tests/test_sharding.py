"""Where arrays go on a mesh: whole heads, even splits or an error that says which, and the mesh itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import deer_jax
from deer_jax import InputError
from deer_jax.models.transformer import abstract_params, logical_axes
from deer_jax.sharding import Heads, MeshShape, constrain, factored, make_mesh, on_mesh, placement, placements
from tests.tiny import REAL, tiny


def shard_shape(mesh, shape, *axes):
    return placement(mesh, shape, axes).shard_shape(shape)


@pytest.mark.parametrize(
    ("tensor", "kv_heads", "groups", "queries", "keys"),
    [
        (8, 8, 4, 8, 8),  # a key head and its queries for each device
        (8, 2, 8, 8, 2),  # two key heads, each repeated on four devices, which share its queries
        (8, 1, 8, 8, 1),
        (8, 2, 7, 2, 2),  # Qwen2.5-0.5B: seven queries of a key head are not split further
        (4, 6, 2, 2, 2),  # three key heads on a device: their queries stay together
        (6, 3, 4, 6, 3),  # factors 2 and 3, in any order
        (1, 5, 1, 1, 1),
    ],
)
def test_heads_are_split_whole(tensor, kv_heads, groups, queries, keys):
    mesh, H = make_mesh(tensor=tensor), 16
    q, k = (kv_heads * groups * H, 32), (kv_heads * H, 32)
    assert shard_shape(mesh, q, Heads(kv_heads, groups), "width") == (q[0] // queries, 32)
    assert shard_shape(mesh, k, Heads(kv_heads), "width") == (k[0] // keys, 32)
    # Activations follow: of a device's query rows, all key heads are its own.
    rows, cache = (2, kv_heads, groups, 3, H), (4, 2, kv_heads, 9, H)
    split = shard_shape(mesh, rows, None, "kv_heads", "groups", None, None)
    assert split == (2, kv_heads // keys, groups * keys // queries, 3, H)
    assert shard_shape(mesh, cache, None, None, "kv_heads", None, None)[2] == kv_heads // keys


def test_query_rows_of_a_weight_are_those_of_its_activations():
    """The flat weight's rows on each device are the rows of the (key head, group) pairs that lie there."""
    mesh, kv_heads, groups, H = make_mesh(tensor=8), 2, 8, 4
    flat = jnp.arange(kv_heads * groups * H)
    weight = jax.device_put(flat, placement(mesh, flat.shape, (Heads(kv_heads, groups),)))
    pairs = jax.device_put(
        flat.reshape(kv_heads, groups, H), placement(mesh, (kv_heads, groups, H), ("kv_heads", "groups", None))
    )
    for one, other in zip(weight.addressable_shards, pairs.addressable_shards, strict=True):
        np.testing.assert_array_equal(np.asarray(one.data), np.asarray(other.data).ravel())


@pytest.mark.parametrize(
    ("shape", "axes", "mesh", "message"),
    [
        ((10, 32), ("vocab", "width"), {"tensor": 4}, "embed: dimension 0 (vocab) has 10 entries, which do not divide"),
        ((8, 30), ("vocab", "width"), {"fsdp": 4}, "embed: dimension 1 (width) has 30 entries, which do not divide"),
        ((6, 4), ("batch", None), {"data": 2, "fsdp": 2}, "the 4 of data x fsdp; a mesh may have 1, 2, 3 there"),
        ((48, 32), (Heads(3, 1), "width"), {"tensor": 4}, "embed: 3 key heads cannot be split over tensor=4"),
    ],
)
def test_what_does_not_divide_is_named(shape, axes, mesh, message):
    with pytest.raises(InputError) as caught:
        placement(make_mesh(**mesh), shape, axes, "embed")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen2", "llama"])
@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_real_parameters_fall_with_the_mesh(name, shape):
    """Bytes on a device: all parameters divided by fsdp x tensor, but for norms, biases, routers and repeated keys."""
    mesh, params = make_mesh(**shape), abstract_params(REAL[name], jnp.bfloat16)
    placed = placements(mesh, params, logical_axes(REAL[name]))
    held = sum(
        int(np.prod(where.shard_shape(x.shape)))
        for x, where in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True)
    )
    ideal = sum(x.size for x in jax.tree.leaves(params)) / (mesh.size // mesh.shape["data"])
    assert ideal <= held < ideal * (1.05 if name != "qwen2" or mesh.shape["tensor"] < 8 else 1.4)


def test_a_mesh_of_other_axes_is_refused(tmp_path):
    other = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "tensor"))
    with pytest.raises(InputError, match=r"a mesh needs the axes data, fsdp, tensor, this one has x, tensor: make it"):
        deer_jax.load_target(tmp_path, mesh=other)
    with pytest.raises(InputError, match="a 4x4x4 mesh needs 64 devices, 8 are there; set JAX_NUM_CPU_DEVICES=64"):
        make_mesh(4, 4, 4)
    with pytest.raises(InputError, match="fsdp must be at least 1, got 0"):
        make_mesh(fsdp=0)


def test_the_tensor_axis_is_taken_apart_in_place():
    mesh = make_mesh(data=2, tensor=4)
    inner = factored(mesh)
    assert inner.axis_names == ("data", "fsdp", "tensor0", "tensor1")
    assert inner.devices.ravel().tolist() == mesh.devices.ravel().tolist()


@pytest.mark.parametrize(
    ("text", "shape"),
    [("data=2,tensor=4", (2, 1, 4)), ("fsdp=8", (1, 8, 1)), (" tensor = 2 , data=3", (3, 1, 2))],
)
def test_a_mesh_by_its_words(text, shape):
    found = MeshShape.parse(text)
    assert (found.data, found.fsdp, found.tensor) == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "a mesh is written as data=2,fsdp=4,tensor=8, with some of these axes, not as 'model=2'"),
        ("data", "a mesh is written as"),
        ("", "a mesh is written as"),
        ("data=two", "data of a mesh must be a whole number of at least 1, got 'two'"),
        ("data=0", "data must be at least 1, got 0"),
        ("data=2,data=2", "data stands twice in the mesh 'data=2,data=2'"),
    ],
)
def test_a_mesh_that_is_none(text, message):
    with pytest.raises(InputError, match=message):
        MeshShape.parse(text)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((3, 5))
    assert constrain(x, "batch", "vocab") is x
    with on_mesh(None):
        assert constrain(x, "batch", "vocab") is x
    assert tiny("llama").vocab_size == 96
