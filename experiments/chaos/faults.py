"""Faults other than kills: each disturbs a run of its own, which then goes on to its end as the undisturbed one."""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from dppo_jax.devices import peers
from dppo_jax.files import Path, make_folder
from experiments.chaos.compare import bytes_of, steps_of
from experiments.chaos.instants import Instant
from experiments.chaos.processes import PEER_S, start, wait
from experiments.chaos.trials import Ended, Trial, damage

ROOM = 0.6  # of the bytes that the undisturbed run left, on the disk that gets full
SKEW_S = 3600.0
NOTICED_S = PEER_S + 20.0  # after which a host has noticed that another is stopped


@dataclass
class Fault:
    """What was done, what the run said of it, and as sentences what it should have done and did not."""

    name: str
    kind: str
    how: str = ""
    said: str = ""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def full_disk(trial: Trial, fault: Fault, folder: Path) -> None:
    """The disk is full in the middle of the run, and later it is larger."""
    sizes = bytes_of(trial.whole)
    with _small_disk(folder, int(ROOM * sum(sizes))) as enlarge:
        if enlarge:
            fault.how, reason = f"a disk of {int(ROOM * sum(sizes)):,} bytes", "No space left on device"
            ended = trial.run(folder)
            enlarge(4 * sum(sizes))
        else:
            most, reason = int(ROOM * max(sizes)), "File too large"
            fault.how = f"no file above {most:,} bytes (RLIMIT_FSIZE), since no disk may be mounted here"
            ended = trial.run(folder, None, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
        _expect_sentence(fault, ended, reason, "checkpoint")
        fault.failures += trial.finish(folder)


def damaged(trial: Trial, fault: Fault, folder: Path) -> None:
    """A bit of the newest checkpoint is flipped while nobody runs: it is named, and the run goes on from the other."""
    trial.run(folder, _stopped_after(2 * trial.every))
    *_, before, newest = [0, 0, *steps_of(folder)]
    if not before:
        fault.failures.append(f"{folder}: stopped after {2 * trial.every} steps it has not two checkpoints")
        return
    name = damage(trial.draw.random(), folder, newest)
    fault.how = f"a flipped bit in {name} of checkpoint {newest}"
    ended = trial.run(folder)
    fault.said = next((line for line in ended.said.splitlines() if f"checkpoint {newest} is damaged" in line), "")
    if ended.statuses != [0] or f"going on from the checkpoint at step {before}\n" not in ended.said or not fault.said:
        fault.failures.append(f"{folder}: ended with {ended.statuses}, and did not tell of the damage")
    fault.failures += trial.compared(folder)


def clock(trial: Trial, fault: Fault, folder: Path) -> None:
    """A resumed run's clock is an hour behind, and in the next start an hour ahead."""
    fault.how = "time.time and time.time_ns an hour behind, then an hour ahead"
    trial.run(folder, _stopped_after(trial.every))
    for skew_s, instant in ((-SKEW_S, Instant("save", trial.every)), (SKEW_S, None)):
        newest = max(steps_of(folder), default=0)
        ended = trial.run(folder, instant, partial(_skew, skew_s))
        fault.said = f"going on from the checkpoint at step {newest}"
        if not newest or f"{fault.said}\n" not in ended.said:
            fault.failures.append(f"{folder}: {skew_s:+g} s: it did not go on from its newest checkpoint, {newest}")
        if ended.statuses != [-instant.signal if instant else 0]:
            fault.failures.append(f"{folder}: {skew_s:+g} s: it ended with {ended.statuses}")
    fault.failures += trial.compared(folder)


def stopped_peer(trial: Trial, fault: Fault, folder: Path) -> None:
    """One host of two is stopped (SIGSTOP): the other ends, and once it runs again, so does that one."""
    number, had = trial.draw.randrange(2), os.path.getsize(trial.log)
    instants = {number: Instant("anywhere", trial.every + 1, 0.0, signal.SIGSTOP)}
    processes = start(trial.config, folder, trial.log, 2, instants)
    stopped, other = processes[number], processes[1 - number]
    os.waitid(os.P_PID, stopped, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    begun = time.monotonic()
    [status] = wait([other], NOTICED_S)
    fault.how = f"host {number} of 2 stopped; the other ended after {time.monotonic() - begun:.0f} s"
    os.kill(stopped, signal.SIGCONT)
    statuses = [status, *wait([stopped], NOTICED_S)]
    said = trial.said_since(had)
    fault.said = next((line for line in said.splitlines() if line.startswith("error: ")), "")
    if statuses != [peers.LOST] * 2 or "Traceback" in said:
        fault.failures.append(f"{folder}: the other ended with {statuses[0]}, it itself with {statuses[1]}, not with 3")
    fault.failures += trial.finish(folder)


# Of each, the kind of run that it disturbs.
FAULTS: dict[str, tuple[str, Callable[[Trial, Fault, Path], None]]] = {
    "full_disk": ("plain", full_disk),
    "damaged": ("plain", damaged),
    "clock": ("plain", clock),
    "stopped_peer": ("two_hosts", stopped_peer),
}


def disturb(trial: Trial, name: str) -> Fault:
    """One fault, of a kind whose undisturbed run is there."""
    fault, begun = Fault(name, trial.kind), time.monotonic()
    FAULTS[name][1](trial, fault, trial.folder / name)
    fault.seconds = round(time.monotonic() - begun, 1)
    return fault


def _stopped_after(steps: int) -> Instant:
    """By SIGTERM, so that the last step is saved."""
    return Instant("anywhere", steps, 0.0, signal.SIGTERM)


def _expect_sentence(fault: Fault, ended: Ended, *words: str) -> None:
    """A run that ends by itself says why in one sentence, and has status 2."""
    lines = ended.said.strip().splitlines()
    fault.said = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    if ended.statuses != [2] or "Traceback" in ended.said or any(word not in fault.said for word in words):
        last = " ".join(lines[-1:])
        fault.failures.append(f"it ended with {ended.statuses} and {last!r}, not with one sentence of {words}")


def _skew(seconds: float) -> None:
    """Sets this process's clock forward by so much."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None] | None]:
    """A disk of so many bytes at `folder`, which this process and its children see, and the call that gives it another
    size; None where this system lets nobody mount one."""
    make_folder(folder)

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not _private_mounts() or not mount(f"size={size}"):
        yield None
        return
    try:
        yield lambda size: _done(mount(f"remount,size={size}"))
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def _done(was: bool) -> None:
    if not was:
        raise RuntimeError("the disk could not be made larger")


def _private_mounts() -> bool:
    """Whether what is mounted here from now on is seen by this process and its children alone."""
    new_namespace, private, recursive = 0x20000, 1 << 18, 1 << 14  # CLONE_NEWNS, MS_PRIVATE, MS_REC
    library = ctypes.CDLL(None)
    try:
        return not library.unshare(new_namespace) and not library.mount(b"none", b"/", None, private | recursive, None)
    except AttributeError:  # it is no Linux
        return False
