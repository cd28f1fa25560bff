"""Whether a verifier can accept a label at all: asked of every label when a task is loaded."""

import os
import re
from collections.abc import Iterator, Sequence

from dppo_jax.data.examples import Example, Task
from dppo_jax.errors import UserError
from dppo_jax.rewards import maths
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.rewards.verifiers import as_number, text_fault
from dppo_jax.rewards.worker import Outcome

TIME_LIMIT_S = 10.0  # for one label
MAX_WORKERS = 8
_GROWS = re.compile(r"[\^!]|\*\*|\\(?:d?binom|sum|prod|int|exp)")  # what may be short to write and long to work out
_LONG = re.compile(r"\d{16}")
_SUM = re.compile(r"[\w)}]\s*[-+\u2212]")
_DIGIT = re.compile("[1-9]")
_ANOTHER = 987654321


def check_labels(verifier: str, labels: Sequence[tuple[str, str]]) -> None:
    """labels: where each label stands, such as file and row, and the label. UserError with the place of a bad one."""
    first_place: dict[str, str] = {}
    for where, label in labels:
        first_place.setdefault(label, where)
    for label, fault in _faults(verifier, list(first_place)):
        if fault:
            raise UserError(f"{first_place[label]}: the answer {label!r:.200} {fault}")


def answer_faults(verifier: str, answers: Sequence[str]) -> list[str | None]:
    """Why the verifier could never accept each answer, as the end of a sentence; None where it could.

    math_verify reads them in worker processes, with limits: one label may hang, or eat the memory. Of labels that
    differ in digits only, it reads the first, unless their values may make a difference; see `_shape`.
    """
    faults = dict(_faults(verifier, list(dict.fromkeys(answers))))
    return [faults[answer] for answer in answers]


def reads_itself(reply: str, example: Example) -> float:
    """1.0 where math-verify reads the label, finds it equal to itself, and can compare it with another value."""
    from math_verify import verify
    from sympy import Integer

    expected = maths.read(example.answer)
    if not expected:
        raise ValueError("no mathematics")
    if _GROWS.search(example.answer):
        verify(expected, [Integer(_ANOTHER)], timeout_seconds=None)
    return float(verify(expected, expected, timeout_seconds=None))


def _faults(verifier: str, answers: list[str]) -> Iterator[tuple[str, str | None]]:
    """Each of the answers, which differ, with its fault."""
    shapes: dict[str, list[str]] = {}
    for answer in answers:
        fault = text_fault(verifier, answer)
        if fault is None and verifier == "math_verify" and not _is_plain(answer):
            shapes.setdefault(_shape(answer), []).append(answer)
        else:
            yield answer, fault
    unread = [alike[0] for alike in shapes.values()]
    if unread:
        task = Task("labels", (), reads_itself, isolated=True, worker_imports=("math_verify", __name__))
        workers = max(1, min(MAX_WORKERS, os.cpu_count() or 1, len(unread)))
        with Scorer(task, workers=workers, time_limit_s=TIME_LIMIT_S) as scorer:
            pending = scorer.submit([""] * len(unread), [Example("", answer) for answer in unread])
            for alike, outcome in zip(shapes.values(), pending.outcomes(), strict=True):
                yield from ((answer, _fault(outcome)) for answer in alike)


def _shape(answer: str) -> str:
    """The label with every digit but 0 made a 1, or as it is where digits decide whether it can be read or compared:
    powers and their like, long numbers, sums under a fraction, which may be 0."""
    divides = "frac" in answer or "/" in answer or "\\div" in answer
    if _GROWS.search(answer) or _LONG.search(answer) or (divides and _SUM.search(answer)):
        return answer
    return _DIGIT.sub("1", answer)


def _is_plain(answer: str) -> bool:
    """Digits, a point and a minus, or what is compared as text: what needs no reading."""
    if maths.is_text(answer) or maths.base_of(answer):
        return True
    answer = answer.strip()
    return as_number(answer) is not None and answer.lstrip("-").replace(".", "", 1).isdigit() and len(answer) < 1000


def _fault(outcome: Outcome) -> str | None:
    if outcome.kind == "killed":
        return f"takes math-verify more than {TIME_LIMIT_S:g} seconds, or all its memory; write its value"
    if outcome.kind != "scored":
        return "holds no mathematics that math-verify can read; write it as LaTeX or a number, or set another verifier"
    if outcome.score < 1.0:
        return "is not equal to itself as math-verify reads it; write it another way, or set another verifier"
    return None
