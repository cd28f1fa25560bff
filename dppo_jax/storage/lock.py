"""One run at a time in a folder.

The lock is a file with host, process and start time, held by the operating system (flock) as long as the process lives:
whatever ends it frees the lock. Where another machine wrote it last, its lock may not be visible here, so the holder
also writes the file anew every few seconds, and whoever wants it watches whether that goes on. No clock is compared.

A bucket has no locks. There the file is made only where there is none, and what was left by a run that is gone is
watched in the same way, unless it is of a process of this machine that is gone.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, TextIO

from dppo_jax.errors import UserError, of_files, writing
from dppo_jax.files import Path, filesystem, is_bucket

NAME = "run.lock"
BEAT_S = 5.0  # seconds between two writings
SETTLED_S = 2.0  # by then whoever takes over what a run left in a bucket has done it
BUCKET_BEAT_S = 15.0  # the same in a bucket, which counts requests
STARTED = time.strftime("%Y-%m-%d %H:%M:%S %Z")  # this process
WATCH_S = 45.0  # how long another machine's lock is watched; attributes may be cached so long on a network's disk


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder, which must exist, while the `with` is open. UserError where another process has it."""
    if is_bucket(folder):
        with _locked_in_bucket(folder / NAME):
            yield
        return
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


@contextlib.contextmanager
def _locked_in_bucket(path: Path) -> Iterator[None]:
    token, stop = uuid.uuid4().hex, threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(BUCKET_BEAT_S):
            count += 1
            with contextlib.suppress(Exception):  # a bucket that fails is for the run's other files to report
                path.write_text(_about(count, token))

    _make_in_bucket(path, _about(0, token))
    beats = threading.Thread(target=beat, daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join()
        with contextlib.suppress(Exception):
            path.unlink()


def _make_in_bucket(path: Path, text: str) -> None:
    """Returns when the file is there and is ours."""
    taken_over = False
    while True:
        try:
            with writing(path.parent):
                filesystem(path).pipe_file(str(path), text.encode(), mode="create")
            if taken_over:  # who read the old one with us may have deleted it after us
                time.sleep(SETTLED_S)
            if not taken_over or _read(path) == json.loads(text):
                return
            continue
        except UserError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
        holder = _read(path)
        if not (holder.get("host") == socket.gethostname() and _is_gone(holder.get("process"))):
            _watch(path)
        if _read(path) != holder:  # another one was faster
            continue
        with contextlib.suppress(FileNotFoundError), writing(path.parent):
            path.unlink(missing_ok=True)
        taken_over = True


def _is_gone(process: Any) -> bool:
    """Whether no process of this machine has this number, or we have it ourselves, after another one that had it."""
    if not isinstance(process, int) or process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


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
    if not is_bucket(path) and before.get("host", socket.gethostname()) == socket.gethostname():
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
    text = _about(beat)
    with contextlib.suppress(OSError):
        file.seek(0)
        file.write(text)
        file.truncate(len(text))
        file.flush()


def _about(beat: int, token: str = "") -> str:
    """What the file says."""
    about = {"host": socket.gethostname(), "process": os.getpid(), "started": STARTED, "beat": beat}
    return json.dumps(about | ({"token": token} if token else {}))


def _read(path: Path) -> dict:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:
        if not (isinstance(error, ValueError) or of_files(error)):
            raise
        return {}
    return holder if isinstance(holder, dict) else {}


def _holder(about: dict) -> str:
    """The process that holds the lock, for a sentence."""
    return f"process {about.get('process', '?')} on {about.get('host', '?')}, begun {about.get('started', '?')}"
