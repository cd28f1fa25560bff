"""What judges share: the limit on a case's time and memory, a sentence's form, and the error that a judge raises."""

import contextlib
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class TooLong(BaseException):
    """A case that took longer than it may. No `except Exception` catches it."""


class Wrong(Exception):
    """A case that came out as it must not."""


class Judged(NamedTuple):
    """refused: by a sentence; else it was taken, and rightly."""

    refused: bool
    what: str  # was changed


Judge = Callable[[random.Random, Path], Judged]  # changes something in an empty folder; Wrong, or whatever escaped
Prepare = Callable[[Path], Judge]  # makes what is changed, in an empty folder


@contextlib.contextmanager
def limited(seconds: float, gigabytes: float | None = None) -> Iterator[None]:
    """At most this long (TooLong), and this much more memory (MemoryError), on Linux."""

    def stop(*_: Any) -> None:
        raise TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if gigabytes is not None:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 2**30), hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_sentence(said: str, most: int = 700) -> None:
    """Wrong where it is not one line of text that can be printed."""
    if "\n" in said or len(said) > most or "Traceback" in said or not said.strip():
        raise Wrong(f"no sentence: {said[:1000]!r}")
    try:
        said.encode("utf-8")
    except UnicodeEncodeError:
        raise Wrong(f"a sentence that cannot be printed: {said[:1000]!r}") from None
