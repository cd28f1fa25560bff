"""TensorBoard events, in DIR/tb: `tensorboard --logdir DIR` shows the run "tb", `--logdir PARENT` shows "DIR/tb" for
each folder, and every run is one row of the HParams tab.

(TensorBoard finds no metrics for the row of a run named ".", as it would be with events in DIR itself.) The Custom
Scalars tab shows the panels of the figures, grouped.
"""

import os
import re
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c, register_writer_factory

from dppo_jax.errors import writing
from dppo_jax.files import BUCKETS, Path, is_bucket, make_folder, to_path
from dppo_jax.storage import panels
from dppo_jax.storage.growing import GrowingFile
from dppo_jax.storage.run_config import flatten

EVENTS = "tb"  # the folder of event files inside a run's folder


class TensorBoard:
    """Events are written in the calling thread, and `scalars` syncs all of them to disk: a kill leaves no gap, and a
    full disk is an error, not a hang. What an earlier process wrote at `resume_step` or later is hidden from every
    reader. After `file_bytes` of a file (0: never) a further one goes on with the next step.
    """

    def __init__(self, workdir: Path, *, hparams: Mapping[str, Any], resume_step: int, file_bytes: float = 0.0):
        self._workdir, self._folder, self._resume_step = workdir, workdir / EVENTS, resume_step
        self._file_bytes = 0.0 if is_bucket(self._folder) else file_bytes  # a bucket has parts of a file: `_InBucket`
        make_folder(self._folder)
        self._begin_file()
        # Readers drop what came before at this step or later. A new run needs it too: TensorBoard's own loader takes
        # the first start in a run for its beginning, and drops nothing there.
        self._write(Event(step=resume_step, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))
        # No experiment summary: TensorBoard would take its columns from the first run alone, and runs with other
        # losses have other hyperparameters. Without one it takes the union over the runs, and every scalar as a metric.
        _, session_start, self._session_end = summary.hparams(_sortable(hparams), {})
        self._add(resume_step, session_start)
        if resume_step == 0:
            self._add(0, summary.custom_scalars(panels.layout()))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()]))
        with writing(self._workdir):
            self._events.flush()
            if not is_bucket(self._folder):
                os.stat(self._folder)  # a folder that was removed takes what is written, and keeps nothing
            if 0 < self._file_bytes <= self._written:
                self._events.close()
                self._begin_file()

    def histogram(self, step: int, tag: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """The stored sum and sum of squares take every count at the middle of its bin."""
        nonempty = np.flatnonzero(counts)
        middle = (edges[:-1] + edges[1:]) / 2
        low, high = float(edges[nonempty[0]]), float(edges[nonempty[-1] + 1])
        moments = float(counts.sum()), float(counts @ middle), float(counts @ middle**2)
        self._add(step, summary.histogram_raw(tag, low, high, *moments, edges[1:].tolist(), counts.tolist()))

    def text(self, step: int, tag: str, markdown: str) -> None:
        """It appears in the Text tab as `<tag>/text_summary`."""
        self._add(step, summary.text(tag, markdown))

    def close(self, finished: bool) -> None:
        """`finished` marks the run as a success in the HParams tab."""
        with writing(self._workdir):
            if finished:
                self._add(self._resume_step, self._session_end)
            self._events.close()

    def _begin_file(self) -> None:
        """Readers take files in the order of their names. A number of our own leads, since a clock may have been set
        back since the last start; r puts it after the names of runs that were begun without numbers."""
        with writing(self._folder):
            self._events = EventsWriter(str(self._folder / f"events.r{_next_number(self._folder):06d}"))
        self._written = 0  # bytes

    def _add(self, step: int, contents: Summary) -> None:
        self._write(Event(step=int(step), wall_time=time.time(), summary=contents))

    def _write(self, event: Event) -> None:
        with writing(self._workdir):
            self._events.write_event(event)
        self._written += event.ByteSize()


def _sortable(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Flat hyperparameters that the HParams tab can show and sort: it takes no infinity, and no column of mixed types.

    Infinity becomes the largest float64; NaN is left out, as TensorBoard leaves out None.
    """
    flat = {k: v for k, v in flatten(hparams).items() if v == v}
    largest = sys.float_info.max
    return {k: min(max(v, -largest), largest) if isinstance(v, float) else v for k, v in flat.items()}


def event_files(run_dir: str | os.PathLike[str]) -> list[Path]:
    """The event files of a run's folder, or of its tb folder, in the order they were begun."""
    folder = to_path(run_dir)
    return sorted([*folder.glob(f"{EVENTS}/events*tfevents.*"), *folder.glob("events*tfevents.*")])


def unread(file: os.PathLike[str], records: int) -> int:
    """Bytes that a reader who found so many records in a file left, since the next one is damaged; 0 where nothing is
    left, or a record that was cut short, as by a kill. OSError."""
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        for _ in range(records):
            opened.seek(struct.unpack("<Q", opened.read(8))[0] + 8, os.SEEK_CUR)
        left, head = size - opened.tell(), opened.read(12)
    if len(head) < 12:
        return 0
    length, checksum = struct.unpack("<QI", head)
    is_cut = checksum == masked_crc32c(head[:8]) and left < length + 16
    return 0 if is_cut else left


class _InBucket:
    """How tensorboardX writes to addresses: parts of a file, whose names follow the first one's in order."""

    def open(self, path: str) -> GrowingFile:
        return GrowingFile(lambda number: to_path(f"{path}.{number:04d}" if number else path))

    def directory_check(self, path: str) -> None:
        """A bucket has no folders to make."""


for scheme in BUCKETS:
    register_writer_factory(scheme, _InBucket())


def _next_number(folder: Path) -> int:
    """Larger than that of every event file in the folder."""
    matches = (re.match(r"events\.r([0-9]+)\.", file.name) for file in event_files(folder))
    return max((int(match[1]) + 1 for match in matches if match), default=0)
