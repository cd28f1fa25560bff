"""Safetensors files: headers checked first, tensors read by slices, files written as a stream.

Nothing maps a file, since the pages of a mapped one count as memory. A path is whatever opens to bytes that can be
sought in.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from dppo_jax.errors import UserError
from dppo_jax.files import Path, open_to_read, parse_json

# The types that are read and written, as a header names them.
READABLE: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
NAMES = {numbers: name for name, numbers in READABLE.items()}

POINTER = b"version https://git-lfs"  # what stands in a file that was not fetched
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
LARGEST_SIZE = 2**63 - 1
PIECE = 2**24  # bytes that are read at one time: rows of which only some columns are wanted


class Stored(NamedTuple):
    """A tensor of a file, not read yet."""

    name: str
    path: Path
    file: BinaryIO
    dtype: str  # as the header names it: "BF16"
    shape: tuple[int, ...]
    start: int  # its first byte in the file

    def read(self, index: Sequence[slice] | None = None) -> np.ndarray:
        """The tensor, or its part [index] (a slice of step 1 for every axis), in its stored dtype, READABLE.

        Of wanted rows (first axis) whole rows are read, `PIECE` bytes at a time. UserError where the file ends early.
        """
        numbers, index = READABLE[self.dtype], [slice(None)] * len(self.shape) if index is None else index
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        found: np.ndarray = np.empty([end - first for first, end in bounds], numbers)
        if not found.size:
            return found
        row_shape = self.shape[1:]
        row_bytes = math.prod(row_shape) * numbers.itemsize
        (first_row, end_row), columns = bounds[0], tuple(slice(*bound) for bound in bounds[1:])
        self.file.seek(self.start + first_row * row_bytes)
        if found.shape[1:] == row_shape:
            self._fill(found)
            return found
        rows = max(1, PIECE // row_bytes)
        buffer: np.ndarray = np.empty((min(rows, len(found)), *row_shape), numbers)
        for row in range(0, end_row - first_row, rows):
            piece = buffer[: min(rows, len(found) - row)]
            self._fill(piece)
            found[row : row + len(piece)] = piece[:, *columns]
        return found

    def _fill(self, array: np.ndarray) -> None:
        """The next bytes of the file, into a contiguous array."""
        view, at = memoryview(array.reshape(-1).view(np.uint8)), 0  # type: ignore[arg-type]
        try:
            while at < len(view):
                count = self.file.readinto(view[at : at + PIECE])  # type: ignore[attr-defined]
                if not count:
                    raise UserError(f"{self.path} ended while tensor {self.name!r} was read")
                at += count
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from None


Tensors = dict[str, Stored]


def open_tensors(path: Path, stack: ExitStack) -> Tensors:
    """The tensors of one file, their values not read yet; `stack` closes it. UserError for a damaged file."""
    try:
        file = stack.enter_context(open_to_read(path))
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path} is a pointer of Git LFS, not the weights; fetch them with git lfs pull")
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise UserError(f"{path} is truncated or damaged: its header does not fit into it")
        header = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return _parsed(header, path, file, size)


def _parsed(header: bytes, path: Path, file: BinaryIO, size: int) -> Tensors:
    """The tensors of a header, which must name every byte of the file once."""
    damaged = f"{path} is truncated or damaged"
    try:
        text = header.decode()
    except UnicodeDecodeError:
        raise UserError(f"{damaged}: its header is not UTF-8 text") from None
    fields = parse_json(text, f"{damaged}: its header", object_pairs_hook=_unique)
    if not isinstance(fields, dict):
        raise UserError(f"{damaged}: its header is no JSON object")
    fields.pop("__metadata__", None)
    first, tensors = 8 + len(header), {}
    for name, entry in fields.items():
        if not _is_entry(entry):
            raise UserError(f"{damaged}: its header does not say where tensor {name[:200]!r} is")
        start = first + entry["data_offsets"][0]
        tensors[name] = Stored(name, path, file, entry["dtype"], tuple(entry["shape"]), start)
    at = 0
    for begin, end, name in sorted((*entry["data_offsets"], name) for name, entry in fields.items()):
        if begin != at:
            raise UserError(f"{damaged}: tensor {name[:200]!r} does not begin where the one before it ends")
        at = end
    if first + at != size:
        raise UserError(f"{damaged}: it has {size} bytes, and its header speaks of {first + at}")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("it has a name twice")
    return fields


def _is_entry(entry: Any) -> bool:
    """Whether an entry of a header has a type, a shape and a place, which agree where the type is one that is read."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(place)):
        return False
    assert shape is not None and place is not None
    if len(place) != 2 or place[0] > place[1]:
        return False
    numbers = READABLE.get(entry["dtype"])
    return numbers is None or math.prod(shape) * numbers.itemsize == place[1] - place[0]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(x) is int and 0 <= x <= LARGEST_SIZE for x in values)


class Entry(NamedTuple):
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]


def tensor_bytes(entry: Entry, dtype: np.dtype) -> int:
    """Of its values."""
    return math.prod(entry.shape) * dtype.itemsize


class StreamWriter:
    """Writes a file of tensors of one dtype, whose values come in the order of `entries`. Use it in a `with`."""

    def __init__(self, path: Path, entries: Iterable[Entry], dtype: np.dtype):
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._left = 0
        for entry in entries:
            end = self._left + tensor_bytes(entry, dtype)
            fields[entry.name] = {"dtype": NAMES[dtype], "shape": entry.shape, "data_offsets": [self._left, end]}
            self._left = end
        header = json.dumps(fields, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # values are aligned
        self._path, self._file = path, path.open("wb")
        self._file.write(len(header).to_bytes(8, "little") + header)

    def __enter__(self) -> "StreamWriter":
        return self

    def write(self, values: np.ndarray) -> None:
        """The next values, in the file's dtype."""
        numbers: np.ndarray = values.view(f"u{values.dtype.itemsize}")  # whose copies are faster
        data = memoryview(np.ascontiguousarray(numbers).reshape(-1).view(np.uint8))
        self._left -= len(data)
        self._file.write(data)

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._file.close()
        assert kind is not None or not self._left, f"{self._path}: {self._left} bytes were not written"
