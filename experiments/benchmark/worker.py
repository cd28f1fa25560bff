"""A side of the benchmark in a process of its own: JSON requests on stdin, one a line, a JSON reply to each on stdout.

{"do": "setup", "workload": W, "metric": M}   build, compile, warm up
    -> {"seconds", "build_seconds", "first_run_seconds", "runs", "compile_seconds", "compilations", ...run's}
{"do": "run", "workload": W, "metric": M}     the work once
    -> {"seconds", "compilations", "tokens", ...}
{"do": "drop", "workload": W, "metric": M}    free it
    -> {}
{"do": "peak"}                   -> {"peak_bytes"}
{"do": "names"}                  -> {"python", "versions", "metrics": [[W, M], ...], "import_seconds"}

`compile_seconds` and `compilations` are those of the warm-up runs, building (random weights, say) left out; null where
nothing is compiled. A failure is replied as {"error": "one line"},
with its traceback on stderr.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from dppo_jax.errors import UserError

Json = dict[str, Any]
Run = Callable[[], Json]  # does the work once, waits for it, and says at least {"tokens": how many}
Table = Mapping[tuple[str, str], Callable[[], Run]]  # (workload, metric) -> what builds the run

WARM_UP_RUNS = 4  # at most: a run that compiled something is followed by another
_COMPILE_EVENTS = frozenset(
    f"/jax/core/compile/{phase}_duration" for phase in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)


class CompileClock:
    """Seconds in which jax was tracing, lowering or compiling, and the number of programs compiled, since its creation.

    Phases nest (a jitted function is traced inside another), so the seconds are those of the union of the intervals.
    """

    def __init__(self) -> None:
        import jax.monitoring

        self.compilations = 0
        self._intervals: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        if event in _COMPILE_EVENTS:
            end = time.perf_counter()
            self._intervals.append((end - duration, end))
            self.compilations += event.endswith("backend_compile_duration")

    def seconds(self) -> float:
        total, reached = 0.0, float("-inf")
        for start, end in sorted(self._intervals):
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total


def peak_bytes() -> int:
    """The largest resident size this process has had. (`ru_maxrss` would count the parent's size at the fork too.)"""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def serve(table: Table, libraries: Mapping[str, str], *, uses_jax: bool) -> None:
    """Answers requests until stdin ends.

    Args:
      table: what can be measured.
      libraries: module -> distribution. They are imported before the first request is answered, so that no set-up is
        charged for it, and after stdout has been set aside, so that what they print goes to stderr.
      uses_jax: whether compilations are counted.
    """
    requests, replies = _take_channel()
    side: _Side | None = None
    for line in requests:
        try:
            if side is None:
                side = _Side(table, libraries, uses_jax)
            reply = side.answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reply = {"error": kind + " ".join(str(error).split())[:500]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _take_channel() -> tuple[TextIO, TextIO]:
    """stdin and stdout, for the protocol alone: whoever else reads finds nothing, and prints to stderr."""
    sys.stdout.flush()
    requests, replies = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


class _Side:
    """The runs that are set up, and the answers to requests."""

    def __init__(self, table: Table, libraries: Mapping[str, str], uses_jax: bool):
        start = time.perf_counter()
        for module in libraries:
            importlib.import_module(module)
        self._import_seconds = time.perf_counter() - start
        self._table, self._libraries = table, libraries
        self._clock = CompileClock() if uses_jax else None
        self._runs: dict[tuple[str, str], Run] = {}

    def answer(self, request: Json) -> Json:
        match request:
            case {"do": "setup", "workload": str(workload), "metric": str(metric)}:
                return self._setup((workload, metric))
            case {"do": "run", "workload": str(workload), "metric": str(metric)}:
                return self._run((workload, metric))
            case {"do": "drop", "workload": str(workload), "metric": str(metric)}:
                self._runs.pop((workload, metric), None)
                gc.collect()
                return {}
            case {"do": "peak"}:
                return {"peak_bytes": peak_bytes()}
            case {"do": "names"}:
                versions = {name: importlib.metadata.version(name) for name in self._libraries.values()}
                return {
                    "python": platform.python_version(),
                    "versions": versions,
                    "metrics": [list(key) for key in self._table],
                    "import_seconds": self._import_seconds,
                }
        raise UserError(f"the request {request} is not one that a worker knows")

    def _setup(self, key: tuple[str, str]) -> Json:
        if key not in self._table:
            raise UserError(f"nothing is measured under {key}; there are {', '.join(map(str, self._table))}")
        self._runs.pop(key, None)
        gc.collect()
        start = time.perf_counter()
        self._runs[key] = self._table[key]()
        build_seconds = time.perf_counter() - start
        before = self._compiled()
        result = first = self._run(key)
        runs = 1
        while result["compilations"] and runs < WARM_UP_RUNS:
            result = self._run(key)
            runs += 1
        seconds = time.perf_counter() - start
        after = self._compiled()
        return {
            **result,
            "seconds": seconds,
            "build_seconds": build_seconds,
            "first_run_seconds": first["seconds"],
            "runs": runs,
            "compile_seconds": None if after is None or before is None else after[0] - before[0],
            "compilations": None if after is None or before is None else after[1] - before[1],
        }

    def _run(self, key: tuple[str, str]) -> Json:
        if key not in self._runs:
            raise UserError(f"{key} is not set up")
        before = self._compiled()
        start = time.perf_counter()
        result = self._runs[key]()
        seconds = time.perf_counter() - start
        after = self._compiled()
        compilations = None if after is None or before is None else after[1] - before[1]
        return {**result, "seconds": seconds, "compilations": compilations}

    def _compiled(self) -> tuple[float, int] | None:
        return None if self._clock is None else (self._clock.seconds(), self._clock.compilations)


class Worker:
    """The parent's end of a worker process; leave the `with` block to end it.

    Args:
      command: what to run.
      env: variables to set on top of this process's own.

    Raises:
      UserError: the command cannot be started.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]):
        self.command = " ".join(command)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **env},
                encoding="utf-8",
            )
        except OSError as error:
            self._log.close()
            raise UserError(f"cannot start the worker {self.command!r}: {error.strerror}") from error

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Json) -> Json:
        """The reply to `request`.

        Raises:
          UserError: the worker has died, replied with an error, or said something that is not JSON.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise UserError(f"the worker {self.command!r} {self._end()} when asked {request}; it said: {self._last()}")
        try:
            reply = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"the worker {self.command!r} said {line.strip()[:200]!r}, which is not JSON") from error
        if "error" in reply:
            raise UserError(f"the worker {self.command!r} failed when asked {request}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert stream is not None
                stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _end(self) -> str:
        status = self._process.wait()
        return f"exited with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"

    def _last(self) -> str:
        """The last line on its stderr."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
