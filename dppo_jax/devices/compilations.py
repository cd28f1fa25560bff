"""What was compiled, how long it took, and where it is kept for the next run."""

import os
import sys
from types import FrameType
from typing import NamedTuple

import jax

from dppo_jax.errors import UserError
from dppo_jax.files import is_bucket, make_folder, user_path

BACKEND = "/jax/core/compile/backend_compile_duration"
CACHED = "/jax/compilation_cache/cache_hits"
# What saves, and what processes tell each other by: it compiles small functions of its own when it first needs them.
APART = ("orbax.", "jax.experimental.multihost_utils")


def keep_compiled(folder: str) -> None:
    """Keeps what is compiled in this folder ("": nowhere), unless JAX_COMPILATION_CACHE_DIR has named another.

    Where the folder cannot be made or written, a sentence on stderr says so: it saves time, and no run needs it.
    """
    if not folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir:
        return
    try:
        path = user_path(folder, "compile_cache")
        make_folder(path)
        if not (is_bucket(path) or os.access(path, os.W_OK | os.X_OK)):
            raise UserError(f"the folder {str(path)!r} cannot be written")
    except UserError as error:
        reason = str(error).removeprefix("compile_cache = ")
        print(f"compile_cache: {reason}; what is compiled is not kept for later runs", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class Found(NamedTuple):
    """Compilations: how many, the seconds of all, how many came from the cache, and their functions; but for the
    seconds without those of APART."""

    functions: int
    seconds: float
    cached: int
    names: str


class Compilations:
    """Counts XLA's compilations in this process while its `with` is open."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._seconds, self._cached = 0.0, 0

    def _duration(self, event: str, seconds: float, **about) -> None:
        if event == BACKEND:
            self._seconds += seconds
            if not _apart():
                self._names.append(str(about.get("fun_name", "?")))

    def _event(self, event: str, **_) -> None:
        self._cached += event == CACHED and not _apart()

    def take(self) -> Found:
        """What was found since the last time."""
        found = Found(len(self._names), self._seconds, self._cached, ", ".join(sorted(set(self._names))))
        self._names, self._seconds, self._cached = [], 0.0, 0
        return found

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._duration)
        jax.monitoring.unregister_event_listener(self._event)


def _apart() -> bool:
    """Whether APART asked for what is compiled here."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(APART):
            return True
        frame = frame.f_back
    return False
