"""A small state and its checkpoints, and a limit on what may hang: for tests/test_*checkpoint*.py, and run by them.

    python -m tests.helpers.checkpoints HOW WORKDIR

saves step 2, breaks what HOW says, and saves on until told.
"""

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dppo_jax.errors import run_main
from dppo_jax.storage.checkpoint import Checkpoints
from experiments.chaos.inputs.states import state

NOBODY = 65534


def write(workdir: Path, steps: tuple[int, ...]) -> Path:
    """A run's folder with these checkpoints."""
    with Checkpoints(workdir, keep=len(steps)) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"step": step})
    return workdir


def equal(found: Any, wanted: Any) -> None:
    """To the bit, dtypes too."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, two = np.asarray(one), np.asarray(two)
        assert one.dtype == two.dtype and one.tobytes() == two.tobytes()


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so long: a hang is a failure."""

    def end(*_: object) -> None:
        raise TimeoutError(f"still not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def save_on(checkpoints: Checkpoints) -> None:
    """Two more saves, with the checks that a training loop makes. UserError, if the first fails."""
    for step in (4, 6):
        checkpoints.save(step, state(step))
        for _ in range(5):
            time.sleep(0.05)
            checkpoints.check()


def main() -> None:
    how, workdir = sys.argv[1], Path(sys.argv[2])
    folder = workdir / "checkpoints"
    if os.getuid() == 0 and how != "small_files":
        os.setuid(NOBODY)
    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(2, state(2))
        checkpoints.wait()
        if how == "small_files":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        elif how == "read_only":
            folder.chmod(0o555)
        save_on(checkpoints)


if __name__ == "__main__":
    run_main(main)
