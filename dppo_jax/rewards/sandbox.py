"""What a reward worker may not do, set by itself once it has loaded what it needs.

Where the system knows the means (Linux): no memory beyond a limit, no core file, no byte written to a file, no network,
no program started, no signal to another process, no variable of the parent's environment, no home. Each is tried for
itself, and none is fatal but the limit on memory: no reply is run as code (`data.grammar`), so this is a second wall.
The number of processes is left alone: it counts by user, and libraries start threads.
"""

import ctypes
import os
import signal
import struct
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

NO_HOME = "/nonexistent"
_KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ")

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # the same on every architecture
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # since this version of landlock, so many rights to files are known
_TCP = 0b11  # bind, connect: since version 4
_SCOPES = 0b11  # abstract sockets, signals: since version 6


def end_with_program() -> None:
    """Has the system kill this process when the program ends, however that does.

    The parent is the fork server. That ends when nobody holds the other end of a pipe any more, which it gives to every
    worker, too: without theirs, it ends with the program.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        server: Any = forkserver._forkserver  # type: ignore[attr-defined]
        held, server._forkserver_alive_fd = server._forkserver_alive_fd, None
        if held is not None:
            os.close(held)


def close_in(memory_limit: int) -> None:
    """memory_limit: bytes beyond what the process has now. Raises where that cannot be set."""
    _silence()
    _limit(memory_limit)
    _forget_environment()
    _leave_network()
    _landlock()


def _silence() -> None:
    """Scorers print, and a file that cannot be written would make that an error."""
    sys.dont_write_bytecode = True
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    os.close(null)


def _limit(memory_limit: int) -> None:
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return
    import resource

    in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
    limits = {resource.RLIMIT_AS: in_use + memory_limit, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    for name, limit in limits.items():
        hard = resource.getrlimit(name)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(name, (limit, limit))


def _forget_environment() -> None:
    for key in os.environ.keys() - set(_KEPT):
        del os.environ[key]
    os.environ["HOME"] = NO_HOME


def _leave_network() -> None:
    """Into an empty network namespace; without the right to one, into one of a user namespace."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if libc.unshare(_CLONE_NEWNET) != 0:
            libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _landlock() -> None:
    """Reading files stays allowed: modules are loaded late."""
    if sys.platform != "linux":
        return
    syscall = ctypes.CDLL(None).syscall
    version = syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:  # the kernel has none
        return
    rights = (1 << max(count for since, count in _RIGHTS.items() if since <= version)) - 1
    fields = [rights & ~(_READ_FILE | _READ_DIR)] + [_TCP] * (version >= 4) + [_SCOPES] * (version >= 6)
    rules = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = syscall(_LANDLOCK_CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
    if ruleset >= 0:
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)
