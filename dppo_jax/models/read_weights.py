"""The weights of a model directory: found, checked before anything is allocated, and read.

On devices a parameter is built in place, block by block: of every tensor a process reads what its own devices hold, in
the stored dtype, and the devices cast it. Beside the parameters themselves there is a block at a time.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dppo_jax.errors import UserError, nearest
from dppo_jax.files import Path, has_file, is_file, read_json_object, shown
from dppo_jax.models.companions import CONFIG
from dppo_jax.models.layout import Leaf
from dppo_jax.models.tensor_files import READABLE, Stored, Tensors, open_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK = 2**26  # bytes of a block, over all devices of a process


# --- found and checked ---


def open_directory(directory: Path, stack: ExitStack) -> Tensors:
    """The tensors of a model directory, not read yet. A single file goes before an index, as in transformers.

    UserError for weights that are missing, damaged, or not where the index says.
    """
    if is_file(directory / WEIGHTS):
        return open_tensors(directory / WEIGHTS, stack)
    index = directory / INDEX
    if not is_file(index):
        if pickles := sorted(path.name for path in directory.glob("*.bin")):
            raise UserError(
                f"{directory} holds its weights as a pickle ({pickles[0]}), which is never opened; "
                f"save them as {WEIGHTS}"
            )
        raise UserError(f"model directory {directory} has neither {WEIGHTS} nor {INDEX}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensor names to shards")
    tensors: Tensors = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if path.name != shard or not has_file(path):
            raise UserError(f"shard {shown(shard)}, listed in {index}, does not exist in {directory}")
        in_shard = open_tensors(path, stack)
        for name in sorted(in_shard.keys() & tensors.keys()):
            raise UserError(f"tensor {shown(name)} is in {tensors[name].path} and in {path}")
        tensors |= in_shard
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise UserError(f"tensor {shown(name)} is not in {shown(shard)}, where {index} puts it")
    return tensors


def check_tensors(tensors: Tensors, layout: Sequence[Leaf], directory: Path) -> set[str]:
    """UserError unless all tensors of the layout are there, in their shapes. The names of the others."""
    expected = set()
    for leaf in layout:
        for index in leaf.indices():
            name = leaf.name(index)
            if name not in tensors:
                raise UserError(f"tensor {name!r} is missing from {directory}; its {CONFIG} asks for it")
            check_tensor(tensors[name], leaf.tensor_shape)
            expected.add(name)
    return tensors.keys() - expected


def refuse(tensors: Tensors, unexpected: Iterable[str]) -> None:
    """UserError for the first tensor that a config has no place for."""
    unexpected = sorted(unexpected)
    for name in unexpected:
        hint = nearest(name, tensors.keys() - set(unexpected))  # or, where none is near, a list of all
        raise UserError(f"unexpected tensor {shown(name)} in {tensors[name].path}{hint if len(hint) < 200 else ''}")


def check_tensor(tensor: Stored, shape: tuple[int, ...]) -> None:
    """UserError for a tensor that is not of this shape, as it is there, or of a type that is not read."""
    name, path = tensor.name, tensor.path
    if tensor.shape != shape:
        raise UserError(
            f"tensor {name!r} in {path} has shape {shown(list(tensor.shape))}; {CONFIG} says {list(shape)}"
        )
    if tensor.dtype not in READABLE:
        raise UserError(f"tensor {name!r} in {path} has dtype {tensor.dtype}; supported: {', '.join(sorted(READABLE))}")


def same_values(one: Stored, other: Stored) -> bool:
    """Whether two tensors of one shape hold the same numbers, compared rows by rows; NaN is NaN."""
    rows = _rows_of(one.shape, 4, BLOCK)
    for row in range(0, one.shape[0], rows):
        index = [slice(row, row + rows), *[slice(None)] * (len(one.shape) - 1)]
        left: np.ndarray = one.read(index).astype(np.float32)
        if not np.array_equal(left, other.read(index).astype(np.float32), equal_nan=True):
            return False
    return True


def _rows_of(shape: tuple[int, ...], itemsize: int, size: int) -> int:
    """How many rows of a tensor of this shape fit into so many bytes, at least one."""
    return min(shape[0], max(1, size // (itemsize * math.prod(shape[1:]))))


# --- read ---


def read_leaf(leaf: Leaf, tensors: Tensors, dtype: Any) -> np.ndarray:
    """A parameter in NumPy, cast to `dtype`."""
    found: np.ndarray = np.empty(leaf.shape, dtype)
    for index in leaf.indices():
        tensor = tensors[leaf.name(index)].read()
        found[index] = tensor.T if leaf.transposed else tensor
    return found


def place_leaf(leaf: Leaf, tensors: Tensors, dtype: Any, sharding: NamedSharding | None) -> jax.Array:
    """A parameter on the devices, cast to `dtype`: those of `sharding` (all processes call this), or the default one.

    Nothing is sent between processes.
    """
    cut, several = _Cut.of(leaf, sharding), leaf.leading
    if math.prod(end - first for first, end in cut.held) * np.dtype(dtype).itemsize <= BLOCK:
        return _place_small(leaf, tensors, dtype, cut)
    axis = len(leaf.shape) - 1 if leaf.transposed else several  # of ours, which the rows of the tensors are
    own = cut.piece[axis]
    itemsize = READABLE[tensors[leaf.name((0,) * several)].dtype].itemsize
    rows = _rows_of((own, math.prod(cut.piece[several:]) // own), itemsize, BLOCK // cut.devices_here)
    buffer = _zeros(leaf.shape, dtype, sharding)()
    for lead in np.ndindex(*cut.piece[:several]):
        for row in range(0, own, rows):
            row = min(row, own - rows)  # the last block may lie over the one before it
            block = _read_block(leaf, tensors, cut, lead, axis, row, rows)
            buffer.block_until_ready()  # so that there are two blocks at most
            start: np.ndarray = np.zeros(len(leaf.shape), np.int32)
            start[:several], start[axis] = lead, row
            buffer = _put(buffer, block, start, sharding)
    return buffer


@functools.lru_cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None) -> Callable[[], Array]:
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


def _place_small(leaf: Leaf, tensors: Tensors, dtype: Any, cut: "_Cut") -> jax.Array:
    """The same of a parameter that is no larger than a block: cast here, so that nothing is compiled for it."""
    held: np.ndarray = np.empty([end - first for first, end in cut.held], dtype)
    own = cut.held[leaf.leading :]
    index = [slice(*bound) for bound in (own[::-1] if leaf.transposed else own)]
    for at in np.ndindex(*held.shape[: leaf.leading]):
        name = leaf.name([number + first for number, (first, _) in zip(at, cut.held, strict=False)])
        tensor = tensors[name].read(index)
        held[at] = tensor.T if leaf.transposed else tensor
    if cut.sharding is None:
        return jnp.asarray(held)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [piece.indices(size)[:2] for piece, size in zip(index, leaf.shape, strict=True)]
        own = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(bounds, cut.held, strict=True))
        return held[own].copy()  # a device may take the memory itself, and write there one day

    return jax.make_array_from_callback(leaf.shape, cut.sharding, part)


class _Cut(NamedTuple):
    """How a parameter lies over devices."""

    sharding: NamedSharding | None
    piece: tuple[int, ...]  # the shape on one device
    held: tuple[tuple[int, int], ...]  # of every axis, from where to where devices of this process hold something
    devices_here: int  # of a process

    @classmethod
    def of(cls, leaf: Leaf, sharding: NamedSharding | None) -> "_Cut":
        if sharding is None:
            return cls(None, leaf.shape, tuple((0, size) for size in leaf.shape), 1)
        indices = list(sharding.addressable_devices_indices_map(leaf.shape).values())
        bounds = [[index[axis].indices(size)[:2] for index in indices] for axis, size in enumerate(leaf.shape)]
        held = tuple((min(a for a, _ in of_axis), max(b for _, b in of_axis)) for of_axis in bounds)
        processes = [device.process_index for device in sharding.device_set]
        here = max(map(processes.count, set(processes)))
        return cls(sharding, sharding.shard_shape(leaf.shape), held, here)


def _read_block(
    leaf: Leaf, tensors: Tensors, cut: _Cut, lead: tuple[int, ...], axis: int, row: int, rows: int
) -> jax.Array:
    """Of every device's piece the part at `lead` on the leading axes and at [row, row + rows) on `axis`, which the
    tensors' rows are; in the stored dtype, our orientation."""
    several = leaf.leading
    read = functools.cache(lambda name, bounds: tensors[name].read([slice(*bound) for bound in bounds]))
    sizes = [1] * several + list(cut.piece[several:])
    sizes[axis] = rows

    def part(index: tuple[slice, ...]) -> np.ndarray:
        """Of the device whose part of the block is `index`: all devices' parts, put together, are the block."""
        at = [(piece.start or 0) // size for piece, size in zip(index, sizes, strict=True)]
        name = leaf.name([number * size + own for number, size, own in zip(at, cut.piece, lead, strict=False)])
        wanted = [(number * size, (number + 1) * size) for number, size in zip(at, cut.piece, strict=True)]
        first = at[axis] * cut.piece[axis] + row
        wanted[axis] = first, first + rows
        held = [wanted[n] if n == axis else cut.held[n] for n in range(several, len(sizes))]
        tensor = read(name, tuple(held[::-1] if leaf.transposed else held))  # once for all devices of the process
        tensor = tensor.T if leaf.transposed else tensor
        offsets = [low for low, _ in held]
        own = tuple(slice(a - low, b - low) for (a, b), low in zip(wanted[several:], offsets, strict=True))
        return tensor[own].reshape(sizes)

    if cut.sharding is None:
        return jnp.asarray(part(tuple(slice(0, size) for size in sizes)))
    counts = [size // piece for size, piece in zip(leaf.shape, cut.piece, strict=True)]
    shape = tuple(count * size for count, size in zip(counts, sizes, strict=True))
    return jax.make_array_from_callback(shape, cut.sharding, part)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnums=0)
def _put(buffer: Array, block: Array, start: Array, sharding: NamedSharding | None) -> Array:
    """The buffer with every device's part of the block in its place, cast."""

    def put(buffer: Array, block: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice(buffer, block.astype(buffer.dtype), tuple(start))

    if sharding is None:
        return put(buffer, block, start)
    spec = sharding.spec
    return jax.shard_map(
        put, mesh=sharding.mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec, check_vma=False
    )(buffer, block, start)
