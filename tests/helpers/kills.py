"""Commands that are killed, and what a run has saved."""

import signal
import subprocess
import time
from pathlib import Path

from tests.helpers.places import ROOT


def newest_step(workdir: Path) -> int:
    """Of the checkpoints; 0 where there is none."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def killed_after(parts: int, command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Runs a command until so many parquet files are in a folder, and kills it; what it said."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while len(list(folder.glob("*.parquet"))) < parts:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.kill()
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said
    return said
