"""Rows of a batch over several processes: which of them a process prepares and scores, and how it tells the others.

A process holds the rows that its devices hold. Where several hold a row (a mesh whose batch axes do not cut between
hosts), the first of them owns it: each row is decoded and scored once. With one process nothing is copied or sent.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from dppo_jax.devices.sharding import batch_sharding
from dppo_jax.errors import UserError

T = TypeVar("T")


class Share(NamedTuple):
    """The rows of a global array [size, ...] that one process holds, and those that it owns.

    A process holds the rows that lie on its devices. The first process that holds a row owns it.
    """

    size: int  # rows of the global array
    held: np.ndarray  # i[...], increasing: numbers of the rows that lie on devices of this process
    owned: np.ndarray  # i[...], increasing: those of `held` that no process before this one holds

    def grouped(self, members: int) -> "Share":
        """The share of an array [size * members, ...] that has `members` rows in place of each row of this one."""

        def spread(index: np.ndarray) -> np.ndarray:
            return (index[:, None] * members + np.arange(members)).reshape(-1)

        return Share(self.size * members, spread(self.held), spread(self.owned))

    def of_owned(self, items: Sequence[T]) -> list[T]:
        """The items of the owned rows, where `items` has one for each row held, or for the first of them."""
        owned = set(self.owned.tolist())
        return [item for row, item in zip(self.held.tolist(), items, strict=False) if row in owned]


def share_over(mesh: Mesh | None, count: int) -> Share:
    """This process's share of the rows of a batch over the mesh; all of them where there is none."""
    everything: np.ndarray = np.arange(count)
    return Share(count, everything, everything) if mesh is None else share(batch_sharding(mesh), count)


@functools.lru_cache
def share(sharding: Sharding, count: int) -> Share:
    """This process's share of the rows of an array [count, ...] with this sharding."""
    holders = first_holders(sharding, count)
    me = jax.process_index()
    held: np.ndarray = np.zeros(count, bool)
    for rows, *_ in sharding.addressable_devices_indices_map((count,)).values():
        held[rows] = True
    return Share(count, np.flatnonzero(held), np.flatnonzero(holders == me))


def first_holders(sharding: Sharding, count: int) -> np.ndarray:
    """The owner of every row: the first process that holds it, i[count]."""
    owners: np.ndarray = np.full(count, np.iinfo(np.int32).max)
    for device, (rows, *_) in sharding.devices_indices_map((count,)).items():
        owners[rows] = np.minimum(owners[rows], device.process_index)
    return owners


def to_global(tree: Any, mesh: Mesh | None, share: Share) -> Any:
    """Global arrays, their rows over the mesh, from what each process has: NumPy arrays of the rows it holds."""
    if jax.process_count() == 1:
        return tree
    assert mesh is not None

    def global_array(x: np.ndarray) -> jax.Array:
        def rows_at(index: tuple[slice, ...]) -> np.ndarray:
            first, end, _ = index[0].indices(share.size)
            at = np.searchsorted(share.held, first)
            return x[at : at + end - first]

        return jax.make_array_from_callback((share.size, *x.shape[1:]), batch_sharding(mesh), rows_at)

    return jax.tree.map(global_array, tree)


def owned(tree: Any, share: Share) -> Any:
    """The rows that this process owns of global arrays sharded by rows, in NumPy; nothing is sent."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def owned_rows(x: jax.Array) -> np.ndarray:
        shards = {}
        for shard in x.addressable_shards:
            first, _, _ = shard.index[0].indices(len(x))
            if first in share.owned:
                shards[first] = shard.data
        blocks = [np.asarray(shards[first]) for first in sorted(shards)]
        return np.concatenate(blocks) if blocks else np.zeros((0, *x.shape[1:]), x.dtype)

    return jax.tree.map(owned_rows, tree)


def first_says(value: bool) -> bool:
    """What process 0 says, on every process; all must call this."""
    return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def gather(tree: Any, share: Share) -> Any:
    """Small NumPy arrays [size, ...] on every process, which must all call this, from those of the rows each owns."""
    if jax.process_count() == 1:
        return tree

    def spread_out(x: np.ndarray) -> np.ndarray:
        rows: np.ndarray = np.zeros((share.size, *x.shape[1:]), x.dtype)
        rows[share.owned] = x
        return rows

    by_process = multihost_utils.process_allgather(jax.tree.map(spread_out, tree))
    return jax.tree.map(lambda x: x.sum(axis=0, dtype=x.dtype), by_process)  # every row has one owner: the others add 0


def total(counts: dict[str, int]) -> dict[str, int]:
    """The sum over the processes, which must all call this with the same names."""
    if jax.process_count() == 1:
        return counts
    names = sorted(counts)
    by_process = multihost_utils.process_allgather(np.array([counts[name] for name in names], np.int32)).sum(axis=0)
    return dict(zip(names, by_process.tolist(), strict=True))


def everyones(value: Any) -> list[Any]:
    """What each process has, in their order, as JSON keeps it; all processes must call this."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(lengths.max()) - len(text))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(texts, lengths, strict=True)]


def all_names(names: Iterable[str]) -> list[str]:
    """The names that any process has, in order; all processes must call this."""
    return sorted(set().union(*everyones(sorted(names))))


def gather_texts(texts: Sequence[str], share: Share) -> list[str]:
    """As `gather`, of one text for each row that a process owns, or for the first of them: "" of the others."""
    rows = [""] * share.size
    for numbers, of_process in everyones([share.owned[: len(texts)].tolist(), list(texts)]):
        for number, text in zip(numbers, of_process, strict=True):
            rows[number] = text
    return rows


def agree(kind: str, values: Mapping[str, Any], may_differ: Sequence[str]) -> None:
    """Compares small JSON values by name with those of process 0, except names that match `may_differ` (* for any).

    Raises: UserError that calls the values a `kind`, the same on all processes, which must all call this.
    """
    first, *rest = everyones(dict(values))
    for number, theirs in enumerate(rest, start=1):
        differing = [
            name
            for name in sorted({*first, *theirs})
            if first.get(name) != theirs.get(name) and not any(fnmatchcase(name, pattern) for pattern in may_differ)
        ]
        if differing:
            sentences = [f"{name} is {first.get(name)!r} there and {theirs.get(name)!r} here" for name in differing[:3]]
            more = f", and {len(differing) - 3} more differ" if len(differing) > 3 else ""
            raise UserError(
                f"process {number} has another {kind} than process 0 (there, against process {number}, here): "
                f"{'; '.join(sentences)}{more}; start all hosts with the same"
            )


def is_writer() -> bool:
    """Whether this process writes what a run leaves once: logs, config.json, samples, the exported policy."""
    return jax.process_index() == 0
