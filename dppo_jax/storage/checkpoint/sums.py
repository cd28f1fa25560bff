"""A sum over the bits of every array of a state, the same however the array is laid out over devices.

The checksums of a step's files (`manifest`) say that the disk gives back what was written to it. These say that what is
restored is what the devices held: nothing on the way has changed a bit, or mixed up the places of two entries.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

STRIDE, *MIX = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35  # as MurmurHash3: odd, so that no two values become one
AT_ONCE = 2**16  # entries, in NumPy: what a cache holds


def sums(state: Any) -> dict[str, str]:
    """By leaf, such as params/layers/q: its dtype, and the sum in hexadecimal digits.

    Of several processes all must call this, and all have the same. What was compiled for leaves of the same shapes, by
    `compile_sums` or before, is not compiled again.
    """
    parts = [_named(prefix, tree) for prefix, tree in _parts(state)]
    on_devices = [{name: leaf for name, leaf in part.items() if isinstance(leaf, jax.Array)} for part in parts]
    vectors = [_jitted(_place(part))(list(part.values())) for part in on_devices if part]  # all before any is read
    found = {
        name: value
        for part, vector in zip(filter(None, on_devices), vectors, strict=True)
        for name, value in zip(part, np.asarray(vector), strict=True)
    }
    every = {name: leaf for part in parts for name, leaf in part.items()}
    found |= {name: _of_host(np.asarray(leaf)) for name, leaf in every.items() if name not in found}
    return {name: f"{leaf.dtype.name}:{int(found[name]):08x}" for name, leaf in every.items()}


def changed_leaf(wanted: Mapping[str, str], state: Any) -> str | None:
    """The first leaf that has another sum than `wanted` says. What is not in there, or has another dtype, is not
    compared."""
    if not wanted:
        return None
    for name, now in sums(state).items():
        then = wanted.get(name, now)
        if then != now and then.partition(":")[0] == now.partition(":")[0]:
            return name
    return None


def compile_sums(shapes: Any) -> None:
    """Compiles what `sums` needs of a state of these shapes and shardings."""
    for prefix, tree in _parts(shapes):
        part = _named(prefix, tree)
        _jitted(_place(part)).lower(list(part.values())).compile()


def _parts(state: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a state, and those of its lists, such as ("past/0/", params): equal ones are compiled once, and
    none anew where another comes or goes."""
    if not isinstance(state, dict):
        yield "", state
        return
    for name, tree in state.items():
        if isinstance(tree, list):
            yield from ((f"{name}/{number}/", item) for number, item in enumerate(tree))
        else:
            yield f"{name}/", tree


def _named(prefix: str, tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return {(prefix + name).rstrip("/"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def _place(part: Mapping[str, Any]) -> Sharding:
    """Of the result: on all devices of the mesh that the arrays are laid out over, or on the one that has them."""
    shardings = [leaf.sharding for leaf in part.values() if leaf.sharding is not None]
    meshes = (sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding))
    if mesh := next(meshes, None):
        return NamedSharding(mesh, PartitionSpec())
    return shardings[0] if shardings else SingleDeviceSharding(jax.local_devices()[0])


@functools.cache
def _jitted(place: Sharding) -> Any:
    """[arrays] -> u32[arrays], which every process has."""
    # Of one device: the same program whether arrays are bound to it or only lie there.
    places = {"out_shardings": place} | ({} if isinstance(place, NamedSharding) else {"in_shardings": place})
    return jax.jit(lambda arrays: jnp.stack([_of_device(array) for array in arrays]), **places)


def _of_device(x: jax.Array) -> jax.Array:
    """u32: of every entry its bits and its place are mixed into 32 bits, which are added modulo 2^32."""
    if x.dtype.itemsize == 8:
        halves = jax.lax.bitcast_convert_type(x, jnp.uint32)
        bits = _one(halves[..., 0], halves[..., 1])
    else:
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") if is_float else x
    places, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):  # from the index of each axis: nowhere is there an array of the whole size
        places += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(_mixed(bits.astype(jnp.uint32), places), dtype=jnp.uint32)


def _of_host(x: np.ndarray) -> int:
    """The same in NumPy."""
    flat, total = np.ascontiguousarray(x).reshape(-1), 0
    for start in range(0, len(flat), AT_ONCE):
        piece = flat[start : start + AT_ONCE]
        if x.dtype.itemsize == 8:
            bits = _one(*piece.view(np.uint32).reshape(-1, 2).T)
        else:
            is_float = jnp.issubdtype(x.dtype, jnp.floating)
            bits = piece.view(f"uint{8 * x.dtype.itemsize}") if is_float else piece
        places: np.ndarray = np.arange(start, start + len(piece), dtype=np.uint64).astype(np.uint32)
        total += int(_mixed(bits.astype(np.uint32), places).sum(dtype=np.uint64))
    return total % 2**32


def _one(low: Any, high: Any) -> Any:
    """The halves of 64 bits as 32 bits."""
    return low ^ (high * np.uint32(STRIDE))


def _mixed(bits: Any, places: Any) -> Any:
    mixed = bits + places * np.uint32(STRIDE)
    for factor, shift in zip(MIX, (16, 13), strict=True):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return mixed ^ (mixed >> np.uint32(16))
