"""A run that hangs ends with all stacks and one sentence, in place of saying nothing for ever."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading

import jax

from dppo_jax.files import Path, written_whole
from experiments.run.phases import Phases

STUCK = 4  # exit status
FIRST = 3  # a phase may take so many times as long where a process has it for the first time, since it compiles
WRITING_S = 10.0  # for stuck.txt


class Watch:
    """Ends the process where the loop stays in one phase for more than `limit_s` seconds (0: never).

    A thread looks ten times within that time. Where it cannot, since another holds the interpreter's lock,
    faulthandler's own thread dumps the stacks to stderr, and ends the process with status 1, once nobody has looked for
    FIRST times the limit.
    """

    def __init__(self, limit_s: float, workdir: Path):
        self._limit_s = limit_s
        self._file = workdir / (f"stuck_{number}.txt" if (number := jax.process_index()) else "stuck.txt")
        self._step, self._phases = 0, Phases()
        self._before: set[str] = set()  # phases that an earlier step had
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, step: int, phases: Phases) -> None:
        """Before a step, whose phases are watched from here on."""
        self._before = set(phases.entered)
        self._step, self._phases = step, phases
        if self._limit_s and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="stuck", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Nothing is watched any more."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        stderr = _stderr()
        while not self._over.wait(self._limit_s / 10):
            faulthandler.dump_traceback_later(FIRST * self._limit_s, exit=True, file=stderr)
            name, seconds = self._phases.current()
            first = name not in self._before
            if seconds > self._limit_s * (FIRST if first else 1):
                self._end(name, seconds, first, stderr)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, name: str, seconds: float, first: bool, stderr: int) -> None:
        sentence = (
            f"error: step {self._step}: the phase {name!r} is stuck: it has taken {seconds:.0f} s, more than "
            f"{f'{FIRST} times ' if first else ''}log.stuck_s = {self._limit_s:g}; the stacks of all threads are "
            f"above, and in {self._file}; started again, the run goes on from its last checkpoint"
        )
        faulthandler.dump_traceback(file=stderr, all_threads=True)
        os.write(stderr, f"\n{sentence}\n".encode())
        writer = threading.Thread(target=self._write, args=(sentence,), daemon=True)  # the disk may be what is stuck
        writer.start()
        writer.join(WRITING_S)
        _kill_descendants()
        os._exit(STUCK)

    def _write(self, sentence: str) -> None:
        with contextlib.suppress(Exception), written_whole(self._file) as path, open(path, "w") as file:
            file.write(f"{sentence}\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)


def _kill_descendants() -> None:
    """Reward workers may be what is stuck: they would outlive this process, and hold its stderr. Does nothing where the
    system has no /proc."""
    parents = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{int(name)}/stat") as file:
            parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    family = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for process in family - {os.getpid()}:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


def _stderr() -> int:
    """Where stderr goes."""
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError):  # it is no file
        return 2
