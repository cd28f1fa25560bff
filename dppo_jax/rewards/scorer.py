"""Scores replies on the host, while the device works: cheap verifiers in a thread, the others in worker processes."""

import importlib
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import spawn
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import numpy as np
from pebble import ProcessExpired, ProcessPool

from dppo_jax.data.examples import Example, Task, Verify
from dppo_jax.errors import UserError

OUT_OF_MEMORY = 77  # exit status of a worker that hit its limit

_preload: set[str] = set()  # one fork server serves all scorers of a program


class Pending:
    """Scores that may still be in the making."""

    def __init__(self, futures: Sequence[Future]):
        self._futures = futures

    def result(self) -> tuple[np.ndarray, dict[str, int]]:
        """Waits; returns (rewards f32[B], counts).

        counts: "killed" verifiers that ran over their time or memory, "failed" ones that raised an error or returned
        no finite number. Both score 0.
        """
        rewards: np.ndarray = np.zeros(len(self._futures), np.float32)
        counts = {"killed": 0, "failed": 0}
        for i, future in enumerate(self._futures):
            try:
                reward = float(future.result())
            except BrokenProcessPool:
                raise
            except (TimeoutError, ProcessExpired):
                counts["killed"] += 1
            except Exception:
                counts["failed"] += 1
            else:
                if math.isfinite(reward):
                    rewards[i] = reward
                else:
                    counts["failed"] += 1
        return rewards, counts


class Scorer:
    """Runs a task's verifier on many replies at once.

    An isolated task is scored by worker processes, each reply within time_limit_s (seconds) and memory_limit_mib
    (MiB beyond what a worker starts with; enforced on Linux). A worker over a limit is killed and replaced. Other
    tasks are scored in one thread of this process, without limits. Close it, or use it in a `with`.
    """

    def __init__(self, task: Task, *, workers: int, time_limit_s: float, memory_limit_mib: int = 1024):
        if workers < 1:
            raise UserError(f"reward.workers must be at least 1, not {workers}")
        if not time_limit_s > 0:
            raise UserError(f"reward.time_limit_s must be positive, not {time_limit_s}")
        if memory_limit_mib < 1:
            raise UserError(f"the memory limit of reward workers must be at least 1 MiB, not {memory_limit_mib}")
        self._verify, self._time_limit_s = task.verify, time_limit_s
        self._thread = None if task.isolated else ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._pool = None
        if task.isolated:
            pickle.dumps(task.verify)  # what cannot travel to a worker fails here, not in every score
            context = _Context()
            imports = (__name__, *task.worker_imports)
            _preload.update(imports)  # into the fork server, so that a replaced worker starts at once
            context.set_forkserver_preload(sorted(_preload))
            self._pool = ProcessPool(
                max_workers=workers,
                initializer=_start_worker,
                initargs=(imports, memory_limit_mib * 2**20),
                context=context,
            )
            self._pool.schedule(os.getpid)  # starts the workers now, while the device compiles

    def submit(self, replies: Sequence[str], examples: Sequence[Example]) -> Pending:
        """Starts scoring replies[i] against examples[i] and returns at once."""
        if len(replies) != len(examples):
            raise ValueError(f"{len(replies)} replies for {len(examples)} examples")
        if self._thread is not None:
            thread = self._thread
            return Pending([thread.submit(self._verify, *pair) for pair in zip(replies, examples, strict=True)])
        assert self._pool is not None
        limit = self._time_limit_s
        jobs = [(limit, self._verify, reply, example) for reply, example in zip(replies, examples, strict=True)]
        return Pending([self._pool.schedule(_verify_in_worker, job, timeout=limit) for job in jobs])

    def close(self) -> None:
        """Stops the workers; scores still pending are lost."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _start_worker(imports: Sequence[str], memory_limit: int) -> None:
    """Runs once in every worker: loads what verifying needs, then sets the limit (bytes) on what it may add."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a verifier inside a long C call hears no Python handler
    for module in imports:
        importlib.import_module(module)
    statm = Path("/proc/self/statm")
    if statm.is_file():
        import resource

        in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = in_use + memory_limit
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _verify_in_worker(time_limit_s: float, verify: Verify, reply: str, example: Example) -> float:
    signal.alarm(math.ceil(time_limit_s) + 10)  # ends a hanging worker whose program was killed
    try:
        return verify(reply, example)
    except MemoryError:
        time.sleep(0.3)  # pebble must have noted which task this worker had before it finds the worker gone
        os._exit(OUT_OF_MEMORY)
    finally:
        signal.alarm(0)


class _Process(ForkServerProcess):
    """A worker that does not import the program's main module, which is slow, imports jax, and is of no use to it."""

    _starting = threading.Lock()

    @staticmethod
    def _Popen(process_obj):
        with _Process._starting:
            prepare = spawn.get_preparation_data
            spawn.get_preparation_data = lambda name: {
                key: value for key, value in prepare(name).items() if not key.startswith("init_main")
            }
            try:
                return ForkServerProcess._Popen(process_obj)  # type: ignore[attr-defined]
            finally:
                spawn.get_preparation_data = prepare


class _Context(ForkServerContext):
    """Workers come from a fork server: forking a process that runs jax's threads is not safe."""

    Process = _Process  # type: ignore[assignment]
