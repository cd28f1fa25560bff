"""Where arrays live: one table from logical axis names to mesh axes.

Model code names logical axes only. A mesh has the axes data, fsdp and tensor; sizes come from the config.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from dppo_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "residual": None,
    # weights: over fsdp by their residual side, over tensor by the other
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": None,
    "norm": None,
    "rank": None,
}


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; a size of -1 takes what the others leave. UserError if it does not fit."""
    devices = jax.devices() if devices is None else devices
    shape = {axis: int(sizes[axis]) for axis in MESH_AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if len(free) > 1 or any(size < 1 for size in shape.values() if size != -1):
        raise UserError(f"mesh sizes must be positive, at most one of them -1, not {shape}")
    if free and len(devices) % fixed == 0:
        shape[free[0]] = len(devices) // fixed
    if np.prod(list(shape.values())) != len(devices):
        raise UserError(f"mesh {shape} does not use exactly the {len(devices)} devices there are")
    grid = np.asarray(devices).reshape(tuple(shape.values()))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(*axes: str | None) -> P:
    """The PartitionSpec of an array whose dimensions have these logical names."""
    mapped = [None if axis is None else RULES[axis] for axis in axes]
    flat = [m for part in mapped for m in (part if isinstance(part, tuple) else (part,)) if m is not None]
    if len(flat) != len(set(flat)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {mapped}")
    return P(*mapped)


def constrain(x: Array, *axes: str | None) -> Array:
    """Asks XLA to lay x out by the logical names of its dimensions; nothing outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def named(mesh: Mesh, axes_tree):
    """NamedShardings for a tree whose leaves are tuples of logical names."""
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda axes: NamedSharding(mesh, spec(*axes)), axes_tree, is_leaf=is_axes)


def batch_shards(mesh: Mesh) -> int:
    """How many pieces the batch dimension is cut into."""
    axes = RULES["batch"]
    return int(np.prod([mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,))]))


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of an array [B, ...] by rows."""
    return NamedSharding(mesh, spec("batch"))


def to_host(tree):
    """The arrays of a tree in NumPy, whole, on every host, which must all call this."""

    def gather(x):
        return multihost_utils.process_allgather(x, tiled=True)

    elsewhere = lambda x: isinstance(x, jax.Array) and not x.is_fully_addressable  # noqa: E731
    return jax.device_get(jax.tree.map(lambda x: gather(x) if elsewhere(x) else x, tree))


def from_first_host(x):
    """The first host's array, on every host: what a clock may have touched, such as rewards with a time limit."""
    return x if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(x)


def check_divisible(mesh: Mesh, rows_by_name: Mapping[str, int], shapes, axes_tree) -> None:
    """UserError unless every named row count and every parameter divides over the mesh."""
    shards = batch_shards(mesh)
    for name, count in rows_by_name.items():
        if count % shards:
            raise UserError(
                f"{name} is {count} rows, which mesh.data x mesh.fsdp = {shards} does not divide; "
                f"the nearest that fits is {max(1, round(count / shards)) * shards}"
            )

    def check(path, shape, axes):
        for size, axis in zip(shape.shape, axes, strict=True):
            mapped = RULES[axis]
            if mapped is not None and size % (parts := mesh.shape[mapped]):
                where = "/".join(str(getattr(key, "key", key)) for key in path)
                raise UserError(f"parameter {where} has {axis} = {size}, which mesh.{mapped} = {parts} does not divide")

    jax.tree_util.tree_map_with_path(check, shapes, axes_tree)
