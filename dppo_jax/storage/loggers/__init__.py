"""Where a run's log goes: TensorBoard, lines of JSON, Weights & Biases, each a `Sink` behind `run_log.RunLog`."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Sink(Protocol):
    """One place that takes a run's log. Steps count from 0 and never fall within a process.

    `scalars` comes once a step, after whatever else the step has, and what was written by then is safe when it returns.
    Raises WriteError where a folder can no longer be written.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """{tag: value}."""

    def histogram(self, step: int, tag: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """counts f64[n], not all zero, over edges f64[n+1], finite and increasing."""

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Markdown that can be encoded."""

    def close(self, finished: bool) -> None:
        """`finished`: the run came to its end. It is called once."""
