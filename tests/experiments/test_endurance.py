"""experiments.endurance: what grows in a log that was written by hand; and the arenas of a command's threads."""

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from dppo_jax.errors import run_main
from dppo_jax.storage.run_log import RunLog
from experiments import endurance
from tests.helpers.places import ROOT

STEPS = 400


def log(folder, **series) -> None:
    with RunLog(folder, hparams={}, resume_step=0, total_steps=STEPS) as run:
        for step in range(STEPS):
            run.scalars(step, {f"memory/{tag}": values[step] for tag, values in series.items()})


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path):
    """ask(*flags): status and what is said of the log in the folder."""

    def asked(*flags: str) -> tuple[int | str | None, str]:
        monkeypatch.setattr(sys, "argv", ["endurance", str(tmp_path), *flags])
        status: int | str | None = 0
        try:
            run_main(endurance.main)
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return asked


def test_what_is_flat_and_what_grows(tmp_path, ask):
    """Memory that doubles at first, and then grows by 0.5% of 2 GiB over 200 steps; a handle more every 150 steps,
    under saves that have ten more; threads that come and go, and a pool of six that slept for a while at first."""
    steps = np.arange(STEPS)
    host = np.where(steps < 100, 1.0, 2.0 + 0.01 * (steps - 100) / 200)
    host[::7] += 1.0
    threads = 36 + steps % 3 - 6 * ((steps > 120) & (steps < 160))
    log(tmp_path, host_gib=host, handles=20 + steps // 150 + 10 * (steps % 5 == 0), threads=threads)
    status, said = ask("--since", "100", "--json")
    found = json.loads(said)
    assert status == 1 and {tag for tag, own in found.items() if not own["flat"]} == {"memory/handles"}
    assert found["memory/host_gib"]["per_1000"] == pytest.approx(0.05, rel=0.02)
    assert (found["memory/handles"]["first"], found["memory/handles"]["last"]) == (20, 21)
    assert (found["memory/threads"]["first"], found["memory/threads"]["last"]) == (36, 36)
    status, said = ask("--since", "0")
    assert status == 1 and said.count("grows") == 2 and "memory/workers_gib" not in said  # the doubling counts too


def test_too_few_steps(tmp_path, ask):
    log(tmp_path, handles=np.ones(STEPS))
    status, said = ask()
    assert status == 2 and said.startswith("error: 0 steps from 500 on have memory/handles, and it takes 200")
    assert ask("--since", "200")[0] == 0


# Threads that all hold memory of the C library, which then says how many arenas there are.
HOLDS = """
import ctypes, sys, threading
from dppo_jax.errors import run_main
def main():
    library, threads = ctypes.CDLL(None), int(sys.argv[1])
    together = threading.Barrier(threads)
    def hold():
        library.malloc(5000)
        together.wait()
    running = [threading.Thread(target=hold) for _ in range(threads)]
    for thread in running: thread.start()
    for thread in running: thread.join()
    library.malloc_info(0, ctypes.c_void_p.in_dll(library, "stdout"))
run_main(main)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no arenas")
def test_threads_share_arenas():
    """A run that saves grew by 3% in 1,500 steps, since every thread gave its memory back to an arena of its own."""
    cores = os.cpu_count()
    own = {key: value for key, value in os.environ.items() if key not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}

    def arenas(**environment: str) -> int:
        command = [sys.executable, "-c", HOLDS, str(cores + 8)]
        said = subprocess.run(command, env=own | environment, cwd=ROOT, capture_output=True, check=True).stdout
        return said.count(b"<heap nr=")

    assert arenas() == max(1, cores // 8)
    assert arenas(MALLOC_ARENA_MAX="3") == arenas(GLIBC_TUNABLES="glibc.malloc.arena_max=3") == 3
