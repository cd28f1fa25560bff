"""What a run uses of its machines: memory in GiB, handles and threads."""

import os
import resource
import sys
from pathlib import Path

import jax

from dppo_jax.devices import hosts
from dppo_jax.devices.chips import GIB

STATS = {"memory/peak_gib": "peak_bytes_in_use", "memory/limit_gib": "bytes_limit"}  # of Device.memory_stats
OF_WORKERS = ("memory/workers_gib", "memory/workers_started")
COUNTS = ("memory/workers_started", "memory/handles", "memory/threads")


class Usage:
    """What this process uses, from one question to the next."""

    def __init__(self) -> None:
        self._started: set[int] = set()

    def memory(self) -> dict[str, float]:
        """By the log's tag, the most of any device and any host; all processes must call this.

        `memory/peak_gib`: of a device, since the process began; `memory/limit_gib`: what a process may use of it; both
        are absent where the platform does not tell (a CPU). `memory/host_gib`: of a process on its host, now;
        `memory/workers_gib`: of all processes that it started; `memory/workers_started`: how many of these were there
        when this was called, so far. `memory/handles` and `memory/threads`: how many a process has, now. All but the
        first three are absent where the system has no /proc.
        """
        stats, workers = [device.memory_stats() or {} for device in jax.local_devices()], started()
        self._started.update(workers)
        found = {tag: max((of[name] for of in stats if name in of), default=0) for tag, name in STATS.items()}
        found["memory/host_gib"] = _resident() or _most_resident()
        found["memory/workers_gib"] = sum(map(_resident, workers))
        counts = len(self._started), _count("/proc/self/fd"), _count("/proc/self/task")
        found |= dict(zip(COUNTS, counts, strict=True))
        of_hosts = hosts.everyones(found)
        most = {tag: max(of_host[tag] for of_host in of_hosts) / (1 if tag in COUNTS else GIB) for tag in of_hosts[0]}
        told = most["memory/handles"] > 0
        return {tag: value for tag, value in most.items() if value or (told and tag in OF_WORKERS)}


def started(process: int | str = "self") -> list[int]:
    """The processes that a process started, and those that these started."""
    found: list[int] = []
    try:
        for thread in Path(f"/proc/{process}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    except OSError:  # it ended meanwhile, or the system does not tell
        pass
    return found + [inner for child in found for inner in started(child)]


def _resident(process: int | str = "self") -> int:
    """Bytes of a process in the host's memory, now; 0 where it is gone, or /proc is missing."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _most_resident() -> int:
    """Bytes of this process in the host's memory, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _count(folder: str) -> int:
    """How many are in a folder; 0 where it is missing."""
    try:
        return len(os.listdir(folder))
    except OSError:
        return 0
