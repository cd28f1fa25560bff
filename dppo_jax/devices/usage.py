"""What a run uses of its machines' memory, in GiB."""

import os
import resource
import sys
from pathlib import Path

import jax

from dppo_jax.devices import hosts
from dppo_jax.devices.chips import GIB

STATS = {"memory/peak_gib": "peak_bytes_in_use", "memory/limit_gib": "bytes_limit"}  # of Device.memory_stats


def memory() -> dict[str, float]:
    """By the log's tag, the most of any device and any host; all processes must call this.

    `memory/peak_gib`: of a device, since the process began; `memory/limit_gib`: what a process may use of it; both are
    absent where the platform does not tell (a CPU). `memory/host_gib`: of a process on its host, now.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    found = {tag: max((of[name] for of in stats if name in of), default=0) for tag, name in STATS.items()}
    of_hosts = hosts.everyones(found | {"memory/host_gib": _resident()})
    most = {tag: max(of_host[tag] for of_host in of_hosts) / GIB for tag in of_hosts[0]}
    return {tag: value for tag, value in most.items() if value}


def _resident() -> int:
    """Bytes of this process in the host's memory, now; at most so far where /proc is missing."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
