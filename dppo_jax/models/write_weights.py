"""The weights of a model as a stream of tensors, into files of at most 5 GB.

Of parameters on devices one layer is cast at a time, and a block of it gathered: no host holds a model whole.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dppo_jax.errors import UserError
from dppo_jax.models.layout import LAYERS, Leaf
from dppo_jax.models.read_weights import INDEX, WEIGHTS
from dppo_jax.models.tensor_files import Entry, StreamWriter, tensor_bytes

LARGEST_FILE = 5 * 10**9  # bytes of tensors, unless one tensor alone has more
BLOCK = 2**26  # bytes that are gathered at one time, over all devices of a process
SHARDS = "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors"

# (the parameters of all layers by name, the number of a layer) -> those of that layer
OfLayer = Callable[[dict[str, Any], Any], dict[str, Any]]


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
        stacked = {leaf.path.removeprefix(LAYERS): leaf for leaf in self._stacked}
        layers = {path.removeprefix(LAYERS): x for path, x in self._leaves.items() if path.startswith(LAYERS)}
        on_devices = any(isinstance(x, jax.Array) for x in layers.values())
        take = self._compiled(layers) if on_devices else _of_layer
        for number in range(self._stacked[0].shape[0]):
            of_layer = take(layers, np.int32(number))
            for name, leaf in stacked.items():
                x = of_layer.pop(name)
                yield from _rows(leaf, x, self._dtype) if leaf.leading < 2 else _experts(leaf, x, self._dtype)

    def _compiled(self, layers: dict[str, Any]) -> OfLayer:
        """One layer's parameters as they are written, where they are."""

        def take(layers: dict[str, Any], number: Array) -> dict[str, Array]:
            found = (self._of_layer or _of_layer)(layers, number)
            return {name: x.astype(self._dtype) for name, x in found.items()}

        places = {}
        for leaf in self._stacked:
            name = leaf.path.removeprefix(LAYERS)
            sharding = _sharding(layers[name])
            places[name] = sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return jax.jit(take, out_shardings=places)


def _of_layer(layers: dict[str, Any], number: Any) -> dict[str, Any]:
    return {name: x[number] for name, x in layers.items()}


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
    for block in _blocks(x, axis, dtype, in_order=True):
        yield block.T if leaf.transposed else block


def _experts(leaf: Leaf, x: Any, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensors of all experts, ours x [experts, ...]."""
    for block in _blocks(x, 0, dtype, in_order=False):
        for tensor in block:
            yield tensor.T if leaf.transposed else tensor


def _blocks(x: Any, axis: int, dtype: np.dtype, *, in_order: bool) -> Iterator[np.ndarray]:
    """Parts of x along an axis, cast, one after another; not in order: the first of every shard, then the second."""
    sharding, size = _sharding(x), x.shape[axis]
    shards = _shards(sharding, axis)
    elsewhere = isinstance(x, jax.Array) and not x.is_fully_addressable
    here = max(1, jax.local_device_count()) if elsewhere else 1
    per_index = math.prod(x.shape) // size * dtype.itemsize * here
    own = size // shards
    count = min(own, max(1, BLOCK // (per_index * shards)))
    for shard in range(shards if in_order and count < own else 1):
        for first in range(0, own, count):
            start = min(first, own - count)  # the last one may begin in the one before it
            if isinstance(x, jax.Array):
                found = _cut(x, np.int32(start), count, axis, dtype, sharding, elsewhere)
                if jax.process_index() != 0:
                    found.block_until_ready()  # one at a time here as well
                    yield np.empty(0, dtype)
                    continue
                block = np.asarray(found)
            else:
                block = np.moveaxis(np.moveaxis(x, axis, 0)[start : start + count], 0, axis).astype(dtype)
            by_shard = np.moveaxis(block, axis, 0).reshape(shards, count, *_without(block.shape, axis))
            by_shard = by_shard[:, first - start :]
            if not in_order:
                by_shard = by_shard.swapaxes(0, 1)
            elif count < own:
                by_shard = by_shard[shard : shard + 1]
            yield np.moveaxis(by_shard.reshape(-1, *by_shard.shape[2:]), 0, axis)


def _without(sizes: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return sizes[:axis] + sizes[axis + 1 :]


@functools.partial(jax.jit, static_argnames=("count", "axis", "dtype", "sharding", "elsewhere"))
def _cut(
    x: Array, start: Array, count: int, axis: int, dtype: np.dtype, sharding: NamedSharding | None, elsewhere: bool
) -> Array:
    """Of every shard of x the part [start, start + count) along an axis, cast; everywhere, if it is `elsewhere` too."""

    def cut(x: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, count, axis).astype(dtype)

    if sharding is None:
        return cut(x, start)
    mesh, spec = sharding.mesh, sharding.spec
    found = jax.shard_map(cut, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False)(x, start)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(found, whole) if elsewhere else found


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
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
