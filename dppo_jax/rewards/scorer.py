"""Scores replies on the host, while the device works: cheap verifiers in a thread, the others in worker processes."""

import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import spawn
from multiprocessing.context import ForkServerContext, ForkServerProcess

import numpy as np
from pebble import ProcessExpired, ProcessPool

from dppo_jax.data.examples import Example, Task
from dppo_jax.errors import UserError, first_line
from dppo_jax.rewards import worker
from dppo_jax.rewards.worker import Outcome

MAX_TIME_LIMIT_S = 3600.0  # for one reply: beyond it nobody waits, and timers overflow
MIN_MEMORY_LIMIT_MIB = 64  # below it a worker cannot even read its task
REPLIES_PER_WORKER = 500  # then it is replaced, and with it what its libraries remember
TOGETHER = 16  # replies that travel to a worker in one task, at most: a task costs more than an ordinary reply
SHARES = 4  # tasks that every worker gets of a batch, at least, where it has as many replies

_COUNTED = ("killed", "failed", "refused")
_LOOK_S = 1.0  # how often a wait asks whether the workers are still there
_START_LOOKS = 300  # looks without any reply scored, beyond a reply's time limit, after which none will be
_FORK_SERVER_GONE = 255  # the exit status of every worker whose fork server ended

_preload: set[str] = set()  # one fork server serves all scorers of a program


class Pending:
    """Scores that may still be in the making."""

    def __init__(self, futures: Sequence[Future], check: Callable[[int], None], scored: Callable[[], int]):
        """check: raises where no more scores will come, given how often a wait has looked since the last one came.
        scored: how many scores there are so far."""
        self._futures, self._check, self._scored = futures, check, scored
        self.scored: list[Outcome] = []  # what became of the replies, once `result` was asked for

    def result(self) -> tuple[np.ndarray, dict[str, int]]:
        """Waits; returns (rewards f32[B], counts).

        counts: "killed" verifiers that ran over their time or memory, "failed" ones that raised anything or returned
        no finite number, "refused" replies that were not read, not being in the grammar of the answers. All score 0.
        Raises: UserError where the workers themselves cannot do their work.
        """
        self.scored = outcomes = list(self.outcomes())
        counts = {kind: sum(outcome.kind == kind for outcome in outcomes) for kind in _COUNTED}
        return np.array([outcome.score for outcome in outcomes], np.float32), counts

    def outcomes(self) -> Iterator[Outcome]:
        """What became of each reply, in order; waits for each. UserError as of `result`."""
        return map(self._outcome, self._futures)

    def _outcome(self, future: Future) -> Outcome:
        quiet, before = 0, self._scored()
        while not wait([future], timeout=_LOOK_S).done:
            quiet = quiet + 1 if self._scored() == before else 0
            before = self._scored()
            self._check(quiet)
        error = future.exception()
        if _of_a_reply(error):
            return Outcome("killed")
        if error is not None:
            raise _broken(error)
        outcome: Outcome = future.result()
        if outcome.kind == "broken":
            raise UserError(outcome.message)
        return outcome


class Scorer:
    """Runs a task's verifier on many replies at once.

    An isolated task is scored by worker processes, each reply within time_limit_s (seconds) and memory_limit_mib
    (MiB beyond what a worker starts with; enforced on Linux), closed in as `sandbox` says. They travel there together,
    up to TOGETHER of them. A worker over a limit is killed and replaced, and the replies that came with the one at
    fault are scored again, alone; one whose verifier failed is replaced too, and every one after replies_per_worker,
    REPLIES_PER_WORKER where nothing is given.
    Other tasks are scored in one thread of this process, without limits. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        task: Task,
        *,
        workers: int,
        time_limit_s: float,
        memory_limit_mib: int = 1024,
        replies_per_worker: int | None = None,
    ):
        if workers < 1:
            raise UserError(f"reward.workers must be at least 1, not {workers}")
        if not 0 < time_limit_s <= MAX_TIME_LIMIT_S:
            raise UserError(
                f"reward.time_limit_s must be positive and at most {MAX_TIME_LIMIT_S:g} seconds, not {time_limit_s}"
            )
        if memory_limit_mib < MIN_MEMORY_LIMIT_MIB:
            raise UserError(
                f"memory_limit_mib of reward workers must be at least {MIN_MEMORY_LIMIT_MIB}, not {memory_limit_mib}"
            )
        self._verify, self._time_limit_s, self._scored = task.verify, time_limit_s, 0
        self._thread = None if task.isolated else ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._imports, self._workers, self._memory = (worker.__name__, *task.worker_imports), workers, memory_limit_mib
        self._replies_per_worker = REPLIES_PER_WORKER if replies_per_worker is None else replies_per_worker
        self._pool: ProcessPool | None = None
        if task.isolated:
            pickle.dumps(task.verify)  # what cannot travel to a worker fails here
            self._pool = self._start()

    def _start(self) -> ProcessPool:
        context = _Context()
        _preload.update(self._imports)  # into the fork server, so that a replaced worker starts at once
        context.set_forkserver_preload(sorted(_preload))
        pool = ProcessPool(
            max_workers=self._workers,
            max_tasks=worker.Replies(self._replies_per_worker),
            initializer=worker.start,
            initargs=(self._imports, getattr(self._verify, "load", None), self._memory * 2**20),
            context=context,
        )
        try:
            pool.schedule(os.getpid)  # starts the workers now, while the device compiles
        except (OSError, RuntimeError) as error:
            raise _broken(error) from error
        return pool

    def ready(self) -> None:
        """Waits until a worker has loaded what verifying needs. UserError where it cannot."""
        if self._pool is not None:
            list(Pending([self._pool.schedule(worker.ready)], self._check, lambda: self._scored).outcomes())

    def submit(self, replies: Sequence[str], examples: Sequence[Example]) -> Pending:
        """Starts scoring replies[i] against examples[i] and returns at once. UserError as of `Pending.result`."""
        if len(replies) != len(examples):
            raise ValueError(f"{len(replies)} replies for {len(examples)} examples")
        pairs = list(zip(replies, examples, strict=True))
        if self._thread is not None:
            futures = [self._thread.submit(worker.attempt_here, self._verify, *pair) for pair in pairs]
        else:
            assert self._pool is not None
            if not self._pool.active:  # a worker was killed while it had nothing to do
                self._pool.join()
                self._pool = self._start()
            futures = [Future() for _ in pairs]
            together = max(1, min(TOGETHER, len(pairs) // (SHARES * self._workers)))
            work = list(zip(futures, pairs, strict=True))
            try:
                for start in range(0, len(work), together):
                    self._schedule(work[start : start + together])
            except (OSError, RuntimeError) as error:
                raise _broken(error) from error
        for future in futures:
            future.add_done_callback(self._count)
        return Pending(futures, self._check, lambda: self._scored)

    def _schedule(self, work: list[tuple[Future, tuple[str, Example]]]) -> None:
        """Sends replies to one worker, as one task, whose results fill in their futures."""
        assert self._pool is not None
        limit, pairs = self._time_limit_s, [pair for _, pair in work]
        task = self._pool.schedule(worker.score, (limit, self._replies_per_worker, self._verify, pairs), timeout=limit)
        task.add_done_callback(lambda done: self._fill_in(work, done))

    def _fill_in(self, work: list[tuple[Future, tuple[str, Example]]], done: Future) -> None:
        """The results of a task; what it left undone is sent again, and what it ended over, one by one."""
        error = CancelledError() if done.cancelled() else done.exception()
        outcomes = [] if error else done.result()
        for (future, _), outcome in zip(work, outcomes, strict=False):
            future.set_result(outcome)
        rest = work[len(outcomes) :]
        try:
            if not error and rest:
                self._schedule(rest)
            elif error and len(work) > 1 and _of_a_reply(error):
                for one in work:
                    self._schedule([one])
            elif error:
                for future, _ in work:
                    future.set_exception(error)
        except (OSError, RuntimeError) as closed:
            for future, _ in rest:
                if not future.done():
                    future.set_exception(closed)

    def _count(self, _: Future) -> None:
        self._scored += 1

    def _check(self, quiet: int) -> None:
        """UserError where a pending score will never come. quiet: looks in which none came."""
        if self._pool is None:
            return
        if not self._pool.active:
            raise _broken(RuntimeError("they have stopped"))
        if quiet > _START_LOOKS + self._time_limit_s / _LOOK_S:
            raise _broken(RuntimeError("none answers"))

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


def _of_a_reply(error: BaseException | None) -> bool:
    """Whether a worker's end is a reply's fault: over its time, or its memory."""
    if isinstance(error, ProcessExpired):
        return error.exitcode != _FORK_SERVER_GONE
    return isinstance(error, TimeoutError)


def _broken(error: BaseException) -> UserError:
    """An error of the machinery: no reply's fault, and no reply's 0."""
    if isinstance(error, ProcessExpired):
        reason = "the process that starts them ended"
    elif isinstance(error, BrokenProcessPool):
        reason = f"one ended, or could not be started ({first_line(error.__cause__ or error)})"
    else:
        reason = f"{type(error).__name__}: {first_line(error)}"
    return UserError(f"the reward workers failed: {reason}; start again, and the run goes on from its last checkpoint")


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
