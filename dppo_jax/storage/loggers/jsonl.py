"""Scalars as lines of JSON, WORKDIR/scalars.jsonl, one object a step: {"step": 0, "reward/mean": 0.5, ...}."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dppo_jax.errors import writing
from dppo_jax.files import write_text

SCALARS = "scalars.jsonl"


class JsonLines:
    """A number that is not finite is null. A process that begins at `resume_step` takes out the lines of that step and
    later ones, which it writes again, and a line that a kill cut short; `tell` hears of any other broken line."""

    def __init__(self, workdir: Path, *, resume_step: int, tell: Callable[[str], None]):
        self._path = workdir / SCALARS
        with writing(workdir):
            if not self._path.exists():
                return
            found = self._path.read_bytes()
            kept, broken = _before(found, resume_step)
            if kept != found:
                write_text(self._path, kept.decode())
        if broken:
            tell(f"{SCALARS}: {broken} lines that are no JSON objects with a step are taken out")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._append(json.dumps({"step": step, **numbers}, ensure_ascii=False) + "\n")

    def histogram(self, step: int, tag: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """Scalars alone are kept."""

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Scalars alone are kept."""

    def close(self, finished: bool) -> None:
        """Every line is in its place already."""

    def _append(self, line: str) -> None:
        """The one way in which a step gets into the file."""
        with writing(self._path.parent), self._path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def _before(found: bytes, step: int) -> tuple[bytes, int]:
    """The lines of earlier steps, and how many others are broken, beside the end that a kill cut short."""
    *lines, _ = found.split(b"\n")
    kept, broken = [], 0
    for line in lines:
        try:
            own = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            broken += 1
            continue
        if own < step:
            kept.append(line + b"\n")
    return b"".join(kept), broken
