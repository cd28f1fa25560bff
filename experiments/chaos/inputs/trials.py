"""The inputs of a trial, each in a folder of its own, in processes that end where one of them hangs."""

import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from dppo_jax.errors import UserError
from experiments.chaos.inputs import checkpoints, configs, environments, models, rows, runs
from experiments.chaos.inputs.judge import Judge, Prepare, TooLong, Wrong, limited

KINDS: dict[str, Prepare] = {
    "configs": configs.prepare,
    "rows": rows.prepare,
    "models": models.prepare,
    "checkpoints": checkpoints.prepare,
    "environments": environments.prepare,
    "runs": runs.prepare,
}
LIMIT_S = 30.0  # of one input, on a busy machine
GONE_S = 120.0  # without a word from a process, until it is killed: a hang that hears no signal; also of preparing
SHOWN_EVERY_S = 30.0


class Result(NamedTuple):
    """Of one input. outcome: refused | taken | failed."""

    number: int
    kind: str
    outcome: str
    what: str


def kind_of(number: int, kinds: Sequence[str]) -> str:
    """Kinds in turn."""
    return kinds[number % len(kinds)]


def results(kinds: Sequence[str], numbers: range, seed: int, jobs: int, out: Any) -> list[Result]:
    """Every input of these numbers, judged by `jobs` processes; what they say is in OUT/process_N.log."""
    parts = [numbers[len(numbers) * job // jobs : len(numbers) * (job + 1) // jobs] for job in range(jobs)]
    workers = [Worker(kinds, part, seed, Path(out) / f"process_{job}.log") for job, part in enumerate(parts) if part]
    found: list[Result] = []
    begun = shown = time.monotonic()
    while open_workers := [worker for worker in workers if worker.left]:
        ready = wait([worker.connection for worker in open_workers], timeout=1.0)
        for worker in open_workers:
            found += worker.look(worker.connection in ready)
        if time.monotonic() - shown > SHOWN_EVERY_S:
            shown = time.monotonic()
            print(f"{len(found)} of {len(numbers)} inputs, {shown - begun:.0f} s", file=sys.stderr, flush=True)
    for worker in workers:
        worker.process.join()
    return sorted(found)


class Worker:
    """A process that judges inputs one after another; another takes its place where it hangs or ends."""

    def __init__(self, kinds: Sequence[str], numbers: range, seed: int, log: Path):
        self._kinds, self._seed, self._log = kinds, seed, log
        self.left, self._prepared = numbers, False
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # this process has imported everything, and touched no device
        self.connection, theirs = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(
            target=_work, args=(self._kinds, self.left, self._seed, self._log, theirs)
        )
        self.process.start()
        theirs.close()
        self._heard = time.monotonic()

    def look(self, ready: bool) -> list[Result]:
        """What it has judged since the last look."""
        found: list[Result] = []
        try:
            while ready and self.left and self.connection.poll():
                message = self.connection.recv()
                self._heard = time.monotonic()
                self._prepared = True
                if message is not None:
                    found.append(Result(*message))
                    self.left = self.left[1:]
        except EOFError:
            self.process.join()
            if not self._prepared:
                raise UserError(f"the inputs cannot be prepared: {self._log} says why") from None
            return [*found, *self._fail(f"ended its process with {self.process.exitcode}")]
        if self.left and time.monotonic() - self._heard > GONE_S:
            self.process.kill()
            self.process.join()
            found += self._fail(f"hangs, and heard no signal for {GONE_S:g} s")
        return found

    def _fail(self, what: str) -> list[Result]:
        """The input at hand failed, and another process goes on after it."""
        if not self.left:
            return []
        number, self.left = self.left[0], self.left[1:]
        if self.left:
            self._start()
        return [Result(number, kind_of(number, self._kinds), "failed", what)]


def _work(kinds: Sequence[str], numbers: range, seed: int, log: Path, to: Connection) -> None:
    """Sends None when all is prepared, and then the fields of each Result."""
    file = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    with tempfile.TemporaryDirectory(prefix="inputs-") as name:
        folder = Path(name)
        judges = {}
        for kind in {kind_of(number, kinds) for number in numbers[: len(kinds)]}:
            (folder / kind).mkdir()
            judges[kind] = KINDS[kind](folder / kind)
        to.send(None)
        for number in numbers:
            kind = kind_of(number, kinds)
            said = os.fstat(file).st_size
            outcome, what = _judged(judges[kind], random.Random(f"{seed} {kind} {number}"), folder / "case")
            sys.stdout.flush()
            sys.stderr.flush()
            if outcome != "failed" and b"Traceback" in os.pread(file, 10**7, said):
                outcome, what = "failed", f"{what}: a traceback is in {log}"
            to.send((number, kind, outcome, what[:3000].encode("utf-8", "backslashreplace").decode()))
    to.close()


def _judged(judge: Judge, draw: random.Random, folder: Path) -> tuple[str, str]:
    folder.mkdir()
    try:
        with limited(LIMIT_S):
            refused, what = judge(draw, folder)
        return "refused" if refused else "taken", what
    except TooLong:
        return "failed", f"hangs: not done after {LIMIT_S:g} s"
    except Wrong as error:
        return "failed", str(error)
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
