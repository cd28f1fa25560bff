"""Where the wall time of the loop's thread goes."""

import contextlib
import time
from collections.abc import Iterator

PHASES = ("rollout", "reward", "train", "evaluation", "checkpoint", "log", "idle")


class Phases:
    """The thread is in one phase at any time: the innermost `with phases(NAME)`, or else idle.

    A phase has the time that the thread works for it or waits for it. What devices and verifiers do meanwhile for
    another one (train.staleness, rollout.in_flight) has no share of its own.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._now = "idle", time.perf_counter()  # the phase, and since when
        self.entered: set[str] = set()  # all phases there were

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer = self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def shares(self) -> dict[str, float]:
        """{"time_share/rollout": ...} of the time since the last call; they add up to 1."""
        self._enter(self._now[0])
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        whole = sum(seconds.values())
        return {f"time_share/{name}": of_phase / whole for name, of_phase in seconds.items()}

    def current(self) -> tuple[str, float]:
        """The phase that the thread is in, and for how many seconds; for another thread."""
        phase, since = self._now
        return phase, time.perf_counter() - since

    def _enter(self, name: str) -> str:
        """The phase that ends."""
        (before, since), now = self._now, time.perf_counter()
        self._seconds[before] += now - since
        self._now = name, now
        self.entered.add(name)
        return before
