"""Kills a run again and again at random instants, and starts it again until it finishes; kills an evaluation once.

    python -m tests.helpers.kills CONFIG WORKDIR KILLS SEED BYTES

Each start is a fork of this process, which has imported everything and touched no device: that is what makes many of
them affordable. BYTES is how much one step adds to the event file. It prints the step that each start began from.
"""

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from experiments.run.cli import load_config
from experiments.train import train
from tests.helpers.places import ROOT


def start(config_path: str, workdir: Path) -> int:
    """The process number of a run that has begun."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(workdir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train(load_config(config_path, []), workdir)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def newest(workdir: Path) -> Path | None:
    files = list(workdir.glob("tb/*tfevents*"))
    return max(files, key=lambda file: file.stat().st_ctime_ns) if files else None


def newest_step(workdir: Path) -> int:
    """Of the checkpoints; 0 where there is none."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def ended(child: int) -> int | None:
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


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


def main() -> None:
    config_path, workdir, kills, seed, size = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    draw = random.Random(seed)
    for number in range(kills):
        before, at, child = newest(workdir), newest_step(workdir), start(config_path, workdir)
        steps, jitter_s = draw.uniform(0.0, 7.0), draw.uniform(0.0, 0.08)
        first = 0  # bytes when this start had written its first step
        while True:
            file, status = newest(workdir), ended(child)
            if status is not None:
                raise SystemExit(f"the run ended by itself, with {status}")
            written = 0 if file in (None, before) else file.stat().st_size
            first = first or written
            saved = number % 2 == 0 or newest_step(workdir) > at  # every second kill comes after a checkpoint
            if saved and written and written - first >= (steps - 1) * size:
                break
            time.sleep(0.002)
        time.sleep(jitter_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(newest_step(workdir), flush=True)
    _, status = os.waitpid(start(config_path, workdir), 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
