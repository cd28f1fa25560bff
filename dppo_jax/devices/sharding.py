"""Where arrays live: tables from logical axis names to mesh axes, one for training and one for the rollout.

Model code names logical axes only. A mesh has the axes data, fsdp, tensor and expert; sizes come from the config.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from dppo_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "expert")

Rules = Mapping[str, tuple[str, ...]]

# Weights lie over fsdp by their residual side, over tensor by the other; the residual stream between
# layers lies over tensor by its length. A layer gathers each as it needs it.
TRAINING: Rules = MappingProxyType(
    {
        # activations
        "batch": ("data", "fsdp", "expert"),
        "length": (),
        "stream": ("tensor",),  # the length, between layers
        "residual": (),
        # weights
        "layers": (),
        "vocab": ("tensor",),
        "embed": ("fsdp",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "norm": (),
        "rank": (),  # the inner dimension of an adapter
        # of a mixture: whole experts, gathered over fsdp by the devices that run them
        "expert": ("expert", "tensor", "fsdp"),
        "holder": ("expert", "tensor"),
        "expert_embed": (),
        "expert_mlp": (),
    }
)
# Few tokens a step, and every weight read in each: nothing is gathered over fsdp but once, before the first step.
ROLLOUT: Rules = MappingProxyType({**TRAINING, "embed": (), "expert": TRAINING["holder"]})

_RULES: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=TRAINING)


@contextlib.contextmanager
def using(rules: Rules) -> Iterator[None]:
    """This table instead of TRAINING for what is traced inside."""
    token = _RULES.set(rules)
    try:
        yield
    finally:
        _RULES.reset(token)


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes of a logical one, by the table in force."""
    return _RULES.get()[name]


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices: an axis not named has size 1, -1 takes what the others leave. UserError unless it fits.

    On TPUs, axes follow the links between chips.
    """
    devices = jax.devices() if devices is None else devices
    shape = {axis: int(sizes.get(axis, 1)) for axis in MESH_AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if len(free) > 1 or any(size < 1 for size in shape.values() if size != -1):
        raise UserError(f"mesh sizes must be positive, at most one of them -1, not {shape}")
    if free and len(devices) % fixed == 0:
        shape[free[0]] = len(devices) // fixed
    if np.prod(list(shape.values())) != len(devices):
        raise UserError(f"mesh {shape} does not use exactly the {len(devices)} devices there are")
    if devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(tuple(shape.values()))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(*axes: str | None, rules: Rules | None = None) -> P:
    """The PartitionSpec of an array whose dimensions have these logical names, by the table in force unless given."""
    rules = _RULES.get() if rules is None else rules
    mapped = [() if axis is None else rules[axis] for axis in axes]
    used_axes = [axis for axes_of in mapped for axis in axes_of]
    if len(used_axes) != len(set(used_axes)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {mapped}")
    return P(*(axes_of[0] if len(axes_of) == 1 else axes_of or None for axes_of in mapped))


def num_shards(mesh: Mesh | jax.sharding.AbstractMesh, *mesh_axes: str) -> int:
    """The product of the sizes of these mesh axes."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes)


def dividing(mesh: jax.sharding.AbstractMesh, x: Array, *axes: str | None) -> tuple[str | None, ...]:
    """The logical names without those that do not divide their dimension of x."""
    fits = lambda size, axis: axis is not None and size % num_shards(mesh, *mesh_axes(axis)) == 0  # noqa: E731
    return tuple(axis if fits(size, axis) else None for size, axis in zip(x.shape, axes, strict=True))


def constrain(x: Array, *axes: str | None) -> Array:
    """Asks XLA to lay x out by the logical names of its dimensions; nothing outside a mesh.

    A dimension that its mesh axes do not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*dividing(mesh, x, *axes)))


def cuts_evenly(size: int, name: str) -> bool:
    """Whether the mesh in force cuts a dimension of this size and logical name into equal shards."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or size % num_shards(mesh, *mesh_axes(name)) == 0


def is_cut(name: str) -> bool:
    """Whether the mesh in force cuts this logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and num_shards(mesh, *mesh_axes(name)) > 1


def summed_product(left: Array, right: Array, across: str | None, *, dtype: Any = None) -> Array:
    """sum over b, t of left[b, t, :]^T right[b, t, :], laid out over ("embed", across): a weight's gradient.

    `left` is [B, T, embed] and `right` [B, T, across]. `right` may have one more dimension, which is not sharded; the
    result then has it too. `dtype` is the dtype of the products, the sum and the result (None: that of the inputs).

    Each device multiplies its own rows, and a reduce-scatter over the mesh axes of "embed" adds the products up. XLA by
    itself may make the sum slice by slice, in narrow products, or leave all of it on every device.
    """
    batch, embed, unsharded = mesh_axes("batch"), mesh_axes("embed"), (None,) * (right.ndim - 3)
    batch_only = tuple(axis for axis in batch if axis not in embed)

    def local(left: Array, right: Array) -> Array:
        product = jax.lax.dot_general(left, right, (((0, 1), (0, 1)), ((), ())), preferred_element_type=dtype)
        # Scattered along any axis but a leading one, XLA would sum the whole on every device.
        product = product.reshape(jax.lax.axis_size(embed), -1, *product.shape[1:])
        product = jax.lax.psum_scatter(product, embed)
        return jax.lax.psum(product, batch_only) if batch_only else product

    sharded = jax.shard_map(
        local,
        in_specs=(spec("batch", None, None), spec("batch", None, across, *unsharded)),
        out_specs=spec("embed", across, *unsharded),
        check_vma=False,
    )
    return sharded(left, right)


def named_shardings(mesh: Mesh, axes_tree, rules: Rules = TRAINING):
    """NamedShardings for a tree whose leaves are tuples of logical names."""
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda axes: NamedSharding(mesh, spec(*axes, rules=rules)), axes_tree, is_leaf=is_axes)


def laid_out(shapes, shardings):
    """Shapes and dtypes with where the arrays live: a tree of shardings, one for all, or None: on one device."""
    if shardings is None:
        return shapes
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def local_bytes(shapes) -> int:
    """Bytes on each device of arrays of these shapes, as `laid_out` has them."""

    def size(x) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(shapes)))


def reshard(tree, axes_tree):
    """Arrays laid out by the table in force, one collective for each that moves; nothing outside a mesh."""
    leaves, structure = jax.tree.flatten(tree)
    axes = structure.flatten_up_to(axes_tree)
    return jax.tree.unflatten(structure, [constrain(x, *names) for x, names in zip(leaves, axes, strict=True)])


def batch_shards(mesh: Mesh) -> int:
    """The number of shards of the batch dimension."""
    return num_shards(mesh, *TRAINING["batch"])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array [B, ...] by rows."""
    return NamedSharding(mesh, spec("batch"))


def to_host(tree):
    """The arrays of a tree in NumPy, whole, on every host, which must all call this."""

    def gather(x):
        return multihost_utils.process_allgather(x, tiled=True)

    elsewhere = lambda x: isinstance(x, jax.Array) and not x.is_fully_addressable  # noqa: E731
    return jax.device_get(jax.tree.map(lambda x: gather(x) if elsewhere(x) else x, tree))


def check_divisible(mesh: Mesh, rows_by_name: Mapping[str, int], shapes, axes_tree) -> None:
    """UserError unless every named row count and every parameter divides over the mesh."""
    shards = batch_shards(mesh)
    for name, count in rows_by_name.items():
        if count % shards:
            raise UserError(
                f"{name} is {count} rows, which {_written(TRAINING['batch'])} = {shards} does not divide; "
                f"the nearest that fits is {max(1, round(count / shards)) * shards}"
            )

    def check(path, shape, axes):
        for size, axis in zip(shape.shape, axes, strict=True):
            count = num_shards(mesh, *TRAINING[axis])
            if size % count:
                where = "/".join(str(getattr(key, "key", key)) for key in path)
                raise UserError(
                    f"parameter {where} has {axis} = {size}, which {_written(TRAINING[axis])} = {count} does not divide"
                )

    jax.tree_util.tree_map_with_path(check, shapes, axes_tree)


def _written(mesh_axes: tuple[str, ...]) -> str:
    return " x ".join(f"mesh.{axis}" for axis in mesh_axes)
