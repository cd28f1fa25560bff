"""What runs in a reward worker, one reply at a time. No jax here."""

import importlib
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dppo_jax.data.examples import Example, Verify
from dppo_jax.errors import UserError, first_line
from dppo_jax.rewards import sandbox
from dppo_jax.rewards.verifiers import Refused

LOAD_LIMIT_S = 60.0  # of a file of the user's that a worker loads
OUT_OF_MEMORY = 77  # exit status of a worker that hit its limit


class Outcome(NamedTuple):
    """What became of one reply.

    kind: "scored", "refused" (not read: not in the grammar of the answers), "failed" (the verifier raised, or returned
    no finite number), "killed" (over its time or memory), or "broken" (the worker could not start). All but the first
    score 0.
    """

    kind: str
    score: float = 0.0
    message: str = ""  # why, of "failed" and "broken"
    parts: tuple[tuple[str, float], ...] = ()  # of "scored" by a function that names them
    said: Any = None  # of "scored" by an environment: its answer (environments.play)


_trouble = ""  # why this worker could not start
_retiring = False  # whether this worker ends after the reply at hand
_scored = 0  # replies that this worker has scored


class Replies(int):
    """How many replies a worker scores before it is replaced; once one failed, no more.

    pebble asks a worker `done < limit` before it takes another task, which may be several replies.
    """

    def __gt__(self, done: int) -> bool:
        return not _retiring and int(self) > max(done, _scored)


def start(imports: Sequence[str], load: Callable[[], None] | None, memory_limit: int) -> None:
    """Runs once in every worker: loads what verifying needs, then closes it in. memory_limit: bytes it may add."""
    global _trouble
    try:
        sandbox.end_with_program()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a verifier inside a long C call hears no Python handler
        for module in imports:
            importlib.import_module(module)
        if load:
            _load(load)
        sandbox.close_in(memory_limit)
    except BaseException as error:
        own = isinstance(error, UserError)
        _trouble = str(error) if own else f"the reward workers cannot start: {_described(error)}"


def _load(load: Callable[[], None]) -> None:
    """UserError where it takes longer than LOAD_LIMIT_S."""

    def stop(*_: Any) -> None:
        named = getattr(getattr(load, "__self__", None), "title", "what verifies")
        raise UserError(f"a reward worker could not load {named} within {LOAD_LIMIT_S:g} s: does something in it wait?")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LOAD_LIMIT_S)
    try:
        load()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ready() -> Outcome:
    """Whether this worker could start: "scored" or "broken"."""
    return Outcome("broken", message=_trouble) if _trouble else Outcome("scored")


def score(time_limit_s: float, most: int, verify: Verify, pairs: Sequence[tuple[str, Example]]) -> list[Outcome]:
    """Of the first pair, and of those after it as long as none fails, half a time limit is left, and the worker has
    scored fewer than `most`: what is over its limits takes the whole task with it."""
    global _retiring, _scored
    if _trouble:
        return [Outcome("broken", message=_trouble)] * len(pairs)
    outcomes: list[Outcome] = []
    began = time.monotonic()
    signal.alarm(math.ceil(time_limit_s) + 10)  # the same, where the system knows no such thing
    try:
        for pair in pairs:
            outcomes.append(attempt(verify, *pair))
            _scored += 1
            _retiring = outcomes[-1].kind == "failed"  # whatever it left behind goes with the worker
            if _retiring or _scored >= most or time.monotonic() - began > time_limit_s / 2:
                break
    except MemoryError:
        time.sleep(0.3)  # pebble must have noted which task this worker had before it finds the worker gone
        os._exit(OUT_OF_MEMORY)
    finally:
        signal.alarm(0)
    return outcomes


def attempt(verify: Verify, reply: str, example: Example) -> Outcome:
    """Scores one reply. Whatever escapes the verifier, an exit too, is a failure of this reply; MemoryError passes."""
    try:
        score = verify(reply, example)
        if isinstance(score, Refused):
            return Outcome("refused")
        number = float(score)
    except MemoryError:
        raise
    except BaseException as error:
        return Outcome("failed", message=_described(error))
    if not math.isfinite(number):
        return Outcome("failed", message=f"returned {number}")
    return Outcome("scored", number, parts=getattr(score, "parts", ()), said=getattr(score, "said", None))


def attempt_here(verify: Verify, reply: str, example: Example) -> Outcome:
    """The same in the program's own process."""
    try:
        return attempt(verify, reply, example)
    except MemoryError as error:
        return Outcome("failed", message=_described(error))


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {first_line(error)}"
    except BaseException:  # an error that cannot be printed
        return type(error).__name__
