"""Scalars as lines of JSON, WORKDIR/scalars.jsonl, one object a step: {"step": 0, "reward/mean": 0.5, ...}.

In a bucket, where no file grows, scalars.0001.jsonl and so on go on with them.
"""

import json
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from dppo_jax.errors import writing
from dppo_jax.files import Path, is_bucket, names_in, write_text
from dppo_jax.storage.growing import GrowingFile

SCALARS = "scalars.jsonl"
_PART = re.compile(r"scalars(\.[0-9]{4})?\.jsonl")


class JsonLines:
    """A number that is not finite is null. A process that begins at `resume_step` takes out the lines of that step and
    later ones, which it writes again, and a line that a kill cut short; `tell` hears of any other broken line."""

    def __init__(self, workdir: Path, *, resume_step: int, tell: Callable[[str], None]):
        self._workdir = workdir
        with writing(workdir):
            parts = [name for name in names_in(workdir) if _PART.fullmatch(name)]  # sorted: scalars.jsonl is the last
            paths = [workdir / name for name in (*parts[-1:], *parts[:-1])]
            found = b"".join(path.read_bytes() for path in paths)
            kept, broken = _before(found, resume_step)
            if kept != found:
                write_text(workdir / SCALARS, kept.decode())
                for path in paths[1:]:
                    path.unlink()
        last = len(parts) if kept == found else 1
        self._file = GrowingFile(self._part, last if is_bucket(workdir) and found else 0)
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
        self._file.write(line.encode())
        with writing(self._workdir):
            self._file.flush()

    def _part(self, number: int) -> Path:
        return self._workdir / (f"scalars.{number:04d}.jsonl" if number else SCALARS)


def _before(found: bytes, step: int) -> tuple[bytes, int]:
    """The lines of earlier steps, each step's last, and how many others are broken, beside the end that a kill cut
    short."""
    *lines, _ = found.split(b"\n")
    kept, broken = dict[int, bytes](), 0
    for line in lines:
        try:
            own = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            broken += 1
            continue
        if own < step:
            kept[own] = line + b"\n"
    return b"".join(kept.values()), broken
