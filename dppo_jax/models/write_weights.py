"""The weights of a model as a stream of tensors, into files of at most 5 GB.

Of parameters on devices one layer's is cast at a time, and a block of it gathered: no host holds a model whole.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from dppo_jax.errors import UserError
from dppo_jax.files import Path, write_text
from dppo_jax.models.layout import LAYERS, Leaf
from dppo_jax.models.read_weights import INDEX, WEIGHTS
from dppo_jax.models.tensor_files import Entry, StreamWriter, tensor_bytes

LARGEST_FILE = 5 * 10**9  # bytes of tensors, unless one tensor alone has more
BLOCK = 2**24  # bytes that are gathered at one time
SHARDS = "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors"

# (the parameters of all layers by name, the name of one, the number of a layer) -> that one of that layer
OfLayer = Callable[[dict[str, Any], str, Any], Array]


def check_leaves(layout: Sequence[Leaf], leaves: Mapping[str, Any]) -> None:
    """UserError unless the parameters, by path, are those of the layout."""
    shapes = {leaf.path: leaf.shape for leaf in layout}
    for path in sorted(shapes.keys() ^ leaves.keys()):
        raise UserError(f"parameter {path!r} is {'missing' if path in shapes else 'not in this model'}")
    for path, shape in shapes.items():
        if leaves[path].shape != shape:
            raise UserError(f"parameter {path!r} has shape {list(leaves[path].shape)}; the config says {list(shape)}")


class Outgoing:
    """The tensors of parameters, one by one. All processes go through `blocks`, and the first has the values."""

    def __init__(
        self, layout: Sequence[Leaf], leaves: Mapping[str, Any], dtype: np.dtype, of_layer: OfLayer | None = None
    ):
        """leaves: arrays by path, of NumPy or on devices. of_layer: what is written of a layer, where that is not what
        `leaves` have of it: it is compiled. Its results have the names and the layout of `layout`."""
        self._single = [leaf for leaf in layout if not leaf.path.startswith(LAYERS)]
        self._stacked = [leaf for leaf in layout if leaf.path.startswith(LAYERS)]
        self._leaves, self._dtype, self._of_layer = leaves, dtype, of_layer

    def entries(self) -> Iterator[Entry]:
        """Names and shapes, in the order of their values."""
        for leaf in self._single:
            yield Entry(leaf.name(()), leaf.tensor_shape)
        for layer in range(self._stacked[0].shape[0]):
            for leaf in self._stacked:
                for expert in self._experts(leaf):
                    yield Entry(leaf.name((layer, *expert)), leaf.tensor_shape)

    def _experts(self, leaf: Leaf) -> Iterator[tuple[int, ...]]:
        """Of one layer, in the order in which they are gathered: the first of every shard, then the second."""
        if leaf.leading < 2:
            yield ()
            return
        count, shards = leaf.shape[1], _shards(_sharding(self._leaves[leaf.path]), 1)
        for own in range(count // shards):
            for shard in range(shards):
                yield (shard * (count // shards) + own,)

    def blocks(self) -> Iterator[np.ndarray]:
        """All values, in pieces, in the tensors' own orientation and dtype; empty ones on processes but the first."""
        for leaf in self._single:
            yield from _rows(leaf, self._leaves[leaf.path], self._dtype)
        layers = {path.removeprefix(LAYERS): x for path, x in self._leaves.items() if path.startswith(LAYERS)}
        for number in range(self._stacked[0].shape[0]):
            for leaf in self._stacked:
                x = self._of_layer_at(layers, leaf.path.removeprefix(LAYERS), number)
                yield from _rows(leaf, x, self._dtype) if leaf.leading < 2 else _experts(leaf, x, self._dtype)

    def _of_layer_at(self, layers: dict[str, Any], name: str, number: int) -> Any:
        """A parameter of one layer: on devices, cast, and laid out as that of all layers."""
        stacked = layers[name]
        if not isinstance(stacked, jax.Array):
            if self._of_layer is None:
                return stacked[number]
            layers, number = {key: x[number : number + 1] for key, x in layers.items()}, 0  # one layer goes to a device
        sharding = _sharding(stacked)
        take = _take(sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])))
        if self._of_layer is None:
            layers, name = {"": stacked}, ""  # compiled once for all of a shape
        return take(layers, name, np.int32(number), self._of_layer, self._dtype)


@functools.lru_cache
def _take(place: NamedSharding | None) -> Callable[..., Array]:
    """A function: a parameter of one layer, cast, on the devices of `place` where there are several."""

    def take(layers: dict[str, Array], name: str, number: Array, of_layer: OfLayer | None, dtype: np.dtype) -> Array:
        found = layers[name][number] if of_layer is None else of_layer(layers, name, number)
        return found.astype(dtype)

    return jax.jit(take, static_argnames=("name", "of_layer", "dtype"), out_shardings=place)


def _sharding(x: Any) -> NamedSharding | None:
    """Of an array on a mesh."""
    return x.sharding if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) else None


def _shards(sharding: NamedSharding | None, axis: int) -> int:
    """Into how many pieces an axis is cut."""
    if sharding is None or axis >= len(sharding.spec) or sharding.spec[axis] is None:
        return 1
    names = sharding.spec[axis]
    return math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))


def _rows(leaf: Leaf, x: Any, dtype: np.dtype) -> Iterator[np.ndarray]:
    """One tensor, ours x [...], in its rows: as many at a time as a block has room for."""
    axis = x.ndim - 1 if leaf.transposed else 0
    shards = _shards(_sharding(x), axis)
    own = x.shape[axis] // shards
    count = min(own, max(1, BLOCK // (math.prod(x.shape) // x.shape[axis] * dtype.itemsize)))
    for shard in range(shards):
        for first in range(0, own, count):
            start = min(first, own - count)  # the last block may begin in the one before it
            block = _block(x, axis, start, count, dtype, shard)
            yield np.moveaxis(block, axis, 0)[first - start :]


def _experts(leaf: Leaf, x: Any, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensors of all experts, ours x [experts, ...]: the first of every shard, then the second."""
    for own in range(x.shape[0] // _shards(_sharding(x), 0)):
        for tensor in _block(x, 0, own, 1, dtype):
            yield tensor.T if leaf.transposed else tensor


def _block(x: Any, axis: int, start: int, count: int, dtype: np.dtype, shard: int | None = None) -> np.ndarray:
    """Of every shard of x, or the one of that number, the part [start, start + count) along an axis, cast and in NumPy;
    empty on processes but the first."""
    if isinstance(x, jax.Array):
        part = None if shard is None else (shard * count, (shard + 1) * count)
        return _on_writer(_cut(x, np.int32(start), count, axis, dtype, _sharding(x)), axis, part)
    return x[(slice(None),) * axis + (slice(start, start + count),)].astype(dtype)


@functools.partial(jax.jit, static_argnames=("count", "axis", "dtype", "sharding"))
def _cut(x: Array, start: Array, count: int, axis: int, dtype: np.dtype, sharding: NamedSharding | None) -> Array:
    """Of every shard of x the part [start, start + count) along an axis, cast."""

    def cut(x: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, count, axis).astype(dtype)

    if sharding is None:
        return cut(x, start)
    mesh, spec = sharding.mesh, sharding.spec
    return jax.shard_map(cut, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False)(x, start)


Bounds = tuple[tuple[int, int], ...]  # of every axis, from where to where


def _on_writer(x: jax.Array, axis: int, part: tuple[int, int] | None) -> np.ndarray:
    """x, or the part of it along an axis that whole shards are, in NumPy on the first process, and nothing on the
    others. All of them must call this. Every piece is sent once, by one of the processes that hold it."""
    first, end = (0, x.shape[axis]) if part is None else part
    shape = (*x.shape[:axis], end - first, *x.shape[axis + 1 :])
    nothing: np.ndarray = np.empty((0,) * x.ndim, x.dtype)
    if x.is_fully_addressable and x.shape == shape:
        return np.asarray(x) if jax.process_index() == 0 else nothing
    senders = _senders(x.sharding, x.shape, axis, part)
    held = {_bounds(shard.index, x.shape): shard.data for shard in x.addressable_shards}
    most, piece_shape = max(map(len, senders)), x.sharding.shard_shape(x.shape)
    pieces: np.ndarray = np.zeros((most, *piece_shape), x.dtype)
    for piece, bounds in zip(pieces, senders[jax.process_index()], strict=False):
        piece[...] = held[bounds]
    x.block_until_ready()  # one at a time on every process
    if any(senders[1:]):
        pieces = _sent(pieces.reshape(-1).view(np.uint8)).view(x.dtype)
    if jax.process_index() != 0:
        return nothing
    found: np.ndarray = np.empty(shape, x.dtype)
    for of_process, sent in zip(senders, pieces.reshape(-1, most, *piece_shape), strict=False):
        for bounds, piece in zip(of_process, sent, strict=False):
            at = [slice(*bound) for bound in bounds]
            at[axis] = slice(bounds[axis][0] - first, bounds[axis][1] - first)
            found[tuple(at)] = piece
    return found


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


@functools.lru_cache
def _senders(
    sharding: Sharding, shape: tuple[int, ...], axis: int, part: tuple[int, int] | None
) -> list[list[Bounds]]:
    """The pieces that each process sends: all from the first, if it holds them all, and else as many from each."""
    holders: dict[Bounds, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        bounds = _bounds(index, shape)
        if part is None or part[0] <= bounds[axis][0] < part[1]:
            holders.setdefault(bounds, set()).add(device.process_index)
    senders: list[list[Bounds]] = [[] for _ in range(jax.process_count())]
    if all(0 in processes for processes in holders.values()):
        senders[0] = sorted(holders)
        return senders
    for bounds, processes in sorted(holders.items()):
        senders[min(processes, key=lambda number: (len(senders[number]), number))].append(bounds)
    return senders


def _sent(data: np.ndarray) -> np.ndarray:
    """The bytes u8[n] of all processes, u8[processes n], on the first; none on the others. All must call this."""
    processes, here = jax.process_count(), jax.local_device_count()
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(processes, here), ("process", "device"))
    rows = np.pad(data, (0, -len(data) % here)).reshape(1, here, -1)  # a device sends a part of them
    apart = NamedSharding(mesh, PartitionSpec("process", "device"))
    own = jax.make_array_from_callback((processes, *rows.shape[1:]), apart, lambda index: rows[:, index[1]])
    everyones = _for_everyone(own, NamedSharding(mesh, PartitionSpec(None, "device")))
    if jax.process_index() != 0:
        everyones.block_until_ready()
        return data[:0]
    found: np.ndarray = np.empty(everyones.shape, np.uint8)
    for shard in everyones.addressable_shards:
        found[shard.index] = shard.data
    return found.reshape(processes, -1)[:, : len(data)].reshape(-1)


@functools.partial(jax.jit, static_argnames="sharding")
def _for_everyone(x: Array, sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, sharding)


def write_weights(folder: Path, outgoing: Outgoing, dtype: np.dtype) -> None:
    """Writes them into an empty folder: one file, or several and their index. OSError."""
    files = _files(list(outgoing.entries()), dtype)
    names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    blocks = outgoing.blocks()
    for name, entries in zip(names if len(files) > 1 else [WEIGHTS], files, strict=True):
        left = sum(tensor_bytes(entry, dtype) for entry in entries)
        with StreamWriter(folder / name, entries, dtype) as file:
            while left:
                block = next(blocks)
                file.write(block)
                left -= block.nbytes
    assert next(blocks, None) is None
    if len(files) > 1:
        weight_map = {entry.name: name for name, entries in zip(names, files, strict=True) for entry in entries}
        size = sum(tensor_bytes(entry, dtype) for entries in files for entry in entries)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _files(entries: Sequence[Entry], dtype: np.dtype) -> list[list[Entry]]:
    """The entries of every file, in order."""
    files: list[list[Entry]] = [[]]
    left = LARGEST_FILE
    for entry in entries:
        size = tensor_bytes(entry, dtype)
        if files[-1] and size > left:
            files.append([])
            left = LARGEST_FILE
        files[-1].append(entry)
        left -= size
    return files
