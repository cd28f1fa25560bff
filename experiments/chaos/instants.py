"""Kills its own process at an instant that the stacks of its threads show."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NamedTuple

WHERE = ("save", "rollout", "anywhere")
JITTER_S = {"save": 0.1, "rollout": 0.2, "anywhere": 0.0, "start": 0.0}
POLL_S = 0.001


class Instant(NamedTuple):
    """When a process ends: `after_s` from the first step on it is armed, and `jitter_s` after it is next inside a save
    or a rollout it gets the signal. "start": `after_s` from its beginning on, wherever it is."""

    where: str  # of WHERE, or start
    after_s: float
    jitter_s: float
    signal: int = signal.SIGKILL


def end_at(instant: Instant) -> None:
    """In the background, sends this process its signal."""
    threading.Thread(target=_end, args=(instant,), daemon=True).start()


def _end(instant: Instant) -> None:
    if instant.where != "start":
        _wait(_in_loop)
    time.sleep(instant.after_s)
    if instant.where in ("save", "rollout"):
        _wait({"save": _in_save, "rollout": _in_rollout}[instant.where])
    time.sleep(instant.jitter_s)
    os.kill(os.getpid(), instant.signal)


def _wait(reached) -> None:
    while not reached():
        time.sleep(POLL_S)


def _in_loop() -> bool:
    return ("train.py", "loop") in _places(_main())


def _in_rollout() -> bool:
    return any(file == "sampler.py" and name in ("start", "collect") for file, name in _places(_main()))


def _in_save() -> bool:
    """Of any thread: a save goes on in the background."""
    saving = {("manager.py", name) for name in ("save", "_seal", "_delete_old")}
    return any(not saving.isdisjoint(_places(frame)) for frame in sys._current_frames().values())


def _main() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _places(frame: FrameType | None) -> list[tuple[str, str]]:
    """(file, function) of a stack, the innermost first."""
    found = []
    while frame is not None:
        found.append((os.path.basename(frame.f_code.co_filename), frame.f_code.co_name))
        frame = frame.f_back
    return found
