"""One run at a time in a folder.

The lock is a file with host, process and start time, held by the operating system (flock) as long as the process lives:
whatever ends it frees the lock. Where another machine wrote it last, its lock may not be visible here, so the holder
also writes the file anew every few seconds, and whoever wants it watches whether that goes on. No clock is compared.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from dppo_jax.errors import UserError, writing

NAME = "run.lock"
BEAT_S = 5.0  # seconds between two writings
STARTED = time.strftime("%Y-%m-%d %H:%M:%S %Z")  # this process
WATCH_S = 45.0  # how long another machine's lock is watched; attributes may be cached so long on a network's disk


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder, which must exist, while the `with` is open. UserError where another process has it."""
    path = folder / NAME
    stop = threading.Event()
    file = _hold(path)
    try:
        _write(file, 0)
        beats = threading.Thread(target=_beat, args=(file, stop), daemon=True)
        beats.start()
        try:
            yield
        finally:
            stop.set()
            beats.join()
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _hold(path: Path) -> TextIO:
    """The lock file, opened and locked."""
    while True:
        with writing(path):
            file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{path.parent} is in use by another run, {_holder(_read(path))}; take another") from None
        except OSError:  # a file system without locks: the beats alone must tell
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()  # its holder took it away between our opening and locking it
    try:
        _watch(path)
    except BaseException:
        file.close()
        raise
    return file


def _watch(path: Path) -> None:
    """Returns where no other machine's run is alive behind the file. UserError where one is."""
    before = _read(path)
    if before.get("host", socket.gethostname()) == socket.gethostname():
        return  # nobody's, or of a process of this machine that is gone
    holder = _holder(before)
    print(f"{path} was left by a run {holder}; looking for {WATCH_S:.0f} s whether it goes on", file=sys.stderr)
    end = time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_S / 3))
        if (current := _read(path)) != before and current:
            holder = _holder(current)
            raise UserError(f"{path.parent} is in use by another run, {holder}; take another folder, or end it")


def _beat(file: TextIO, stop: threading.Event) -> None:
    """Writes the file anew every few seconds."""
    count = 0
    while not stop.wait(BEAT_S):
        count += 1
        _write(file, count)


def _write(file: TextIO, beat: int) -> None:
    """Who holds the lock. A disk that is full is for the run's other files to report."""
    about = {"host": socket.gethostname(), "process": os.getpid(), "started": STARTED, "beat": beat}
    text = json.dumps(about)
    with contextlib.suppress(OSError):
        file.seek(0)
        file.write(text)
        file.truncate(len(text))
        file.flush()


def _read(path: Path) -> dict:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _holder(about: dict) -> str:
    """The process that holds the lock, for a sentence."""
    """The process that holds the lock, for a sentence."""
    return f"process {about.get('process', '?')} on {about.get('host', '?')}, begun {about.get('started', '?')}"
