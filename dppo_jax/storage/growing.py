"""A file that grows step by step, on a disk or in a bucket.

What is in a bucket cannot grow: each file there is written whole, again with every flush, until it is PART bytes, and
the next one goes on. So a flush sends at most so much, however long the run, and a kill leaves every flush before it.
"""

import os
from collections.abc import Callable

from dppo_jax.files import Path, is_bucket

PART = 2**18  # bytes


class GrowingFile:
    """`name(n)` is the path of part n; on a disk there is part `first` alone. It is made when it is first flushed, or
    closed. OSError, or a bucket's error, by all but `write`."""

    def __init__(self, name: Callable[[int], Path], first: int = 0):
        self._name, self._number = name, first
        self._in_bucket = is_bucket(name(first))
        self._unsaved = bytearray()  # on a disk: since the last flush; in a bucket: of the part

    def write(self, data: bytes) -> None:
        self._unsaved += data

    def flush(self) -> None:
        """Until all that was written is safe."""
        path = self._name(self._number)
        if self._in_bucket:
            path.write_bytes(bytes(self._unsaved))
            if len(self._unsaved) >= PART:
                self._number, self._unsaved = self._number + 1, bytearray()
            return
        with path.open("ab") as file:
            file.write(self._unsaved)
            file.flush()
            os.fsync(file.fileno())
        self._unsaved.clear()

    def close(self) -> None:
        if self._unsaved:
            self.flush()
