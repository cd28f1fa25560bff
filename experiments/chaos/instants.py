"""Sends its own process a signal at an instant of its run: inside a save, a rollout, or anywhere."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from dppo_jax.storage.checkpoint import Checkpoints
from experiments.run.record import Record
from experiments.run.sampler import Sampler

WHERE = ("save", "rollout", "anywhere")
JITTER_S = {"save": 0.1, "rollout": 0.2, "anywhere": 0.3}
POLL_S = 0.001
SAVING = "async_save"  # the name of orbax's thread, there from the copy of a state until its folder has its name


class Instant(NamedTuple):
    """When a process is sent a signal: `after` steps of this start it is armed, and the signal comes `jitter_s` after
    the process is next inside a save or a rollout, if it still is; else in the next one, after half of that.
    "anywhere": wherever it is in its loop. "start": `after` seconds from its beginning on, wherever it is."""

    where: str  # of WHERE, or start
    after: float
    jitter_s: float = 0.0
    signal: int = signal.SIGKILL


def end_at(instant: Instant) -> None:
    """In the background, sends this process its signal. Its methods are marked first, so it must not have begun."""
    marks = _Marks()
    threading.Thread(target=_end, args=(instant, marks), daemon=True).start()


class _Marks:
    """Where the main thread is."""

    def __init__(self) -> None:
        self.steps = 0  # that this process has begun
        self.inside: list[str] = []
        Record.begin = self._marked(Record.begin, "step")  # type: ignore[method-assign]
        Sampler.start = self._marked(Sampler.start, "rollout")  # type: ignore[method-assign]
        Sampler.collect = self._marked(Sampler.collect, "rollout")  # type: ignore[method-assign]
        Checkpoints.save = self._marked(Checkpoints.save, "save")  # type: ignore[method-assign]

    def _marked(self, function: Callable, where: str) -> Callable:
        @functools.wraps(function)
        def call(*arguments, **options):
            self.steps += where == "step"
            self.inside.append(where)
            try:
                return function(*arguments, **options)
            finally:
                self.inside.pop()

        return call

    def are_in(self, where: str) -> bool:
        if where == "save" and any(thread.name == SAVING for thread in threading.enumerate()):
            return True
        if where == "anywhere":
            return signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # which the loop hears
        return where in self.inside


def _end(instant: Instant, marks: _Marks) -> None:
    if instant.where == "start":
        time.sleep(instant.after)
    else:
        _wait(lambda: marks.steps > instant.after)
        jitter_s = instant.jitter_s
        while True:
            _wait(lambda: marks.are_in(instant.where))
            time.sleep(jitter_s)
            if marks.are_in(instant.where):
                break
            jitter_s /= 2
    os.kill(os.getpid(), instant.signal)


def _wait(reached: Callable[[], bool]) -> None:
    while not reached():
        time.sleep(POLL_S)
