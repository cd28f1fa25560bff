"""Whether a verifier can accept a label at all: asked of every label when a task is loaded."""

import os
import re
from collections.abc import Iterator, Sequence

from dppo_jax.data.examples import Example, Task
from dppo_jax.errors import UserError
from dppo_jax.rewards import maths
from dppo_jax.rewards.label_cache import LabelCache, key
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.rewards.verifiers import as_number, text_fault
from dppo_jax.rewards.worker import Outcome

TIME_LIMIT_S = 10.0  # for one label
MAX_WORKERS = 8
LABELS_PER_WORKER = 2000  # math-verify's parser is the faster the more it has read
FINDINGS = {
    "good": None,
    "killed": "takes math-verify more than {limit:g} seconds, or all its memory; write its value",
    "unread": "holds no mathematics that math-verify can read; write it as LaTeX or a number, or set another verifier",
    "unequal": "is not equal to itself as math-verify reads it; write it another way, or set another verifier",
}
_GROWS = re.compile(r"[\^!]|\*\*|\\(?:d?binom|sum|prod|int|exp)")  # what may be short to write and long to work out
# A power of a letter or a small number, and a fraction over what is no sum: their digits make no difference.
_TAME = re.compile(r"(?<![\w.)}\^])((?:\d{1,3})?[a-zA-Z]|\d{1,3})\^(?:\{-?\d{1,2}\}|\d(?!\d))(?!\s*\^)")
_FRACTION = re.compile(r"\\[dtc]?frac\{((?:[^{}]|\{[^{}]*\})*)\}\{[^{}+\-\u2212]*\}")  # over what is no sum
_LONG = re.compile(r"\d{16}")
_SUM = re.compile(r"[\w)}]\s*[-+\u2212]")
_DIGIT = re.compile("[1-9]")
_ANOTHER = 987654321
_INSIDE = 3  # fractions inside one another that are looked through


def check_labels(verifier: str, labels: Sequence[tuple[str, str]], *, cache: str = "") -> None:
    """UserError with the place of a bad label. labels: where each stands, such as file and row, and the label.

    cache: a folder in which what was found is kept for later; "": nowhere.
    """
    first_place: dict[str, str] = {}
    for where, label in labels:
        first_place.setdefault(label, where)
    for label, fault in _faults(verifier, list(first_place), cache):
        if fault:
            raise UserError(f"{first_place[label]}: the answer {label!r:.200} {fault}")


def answer_faults(verifier: str, answers: Sequence[str], *, cache: str = "") -> list[str | None]:
    """Why the verifier could never accept each answer, as the end of a sentence; None where it could. `cache` as above.

    math_verify reads them in worker processes, with limits: one label may hang, or eat the memory. Of labels that
    differ in digits only, it reads the first, unless their values may make a difference; see `_shape`.
    """
    faults = dict(_faults(verifier, list(dict.fromkeys(answers)), cache))
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


def _faults(verifier: str, answers: list[str], cache: str) -> Iterator[tuple[str, str | None]]:
    """Each of the answers, which differ, with its fault."""
    to_read = []
    for answer in answers:
        fault = text_fault(verifier, answer)
        if fault is None and verifier == "math_verify" and not _is_plain(answer):
            to_read.append(answer)
        else:
            yield answer, fault
    if not to_read:
        return
    kept = LabelCache(cache, verifier)
    known = kept.read()
    found: dict[str, str] = {}
    shapes: dict[str, list[str]] = {}
    for answer in to_read:
        finding = known.get(key(answer)) if known else None
        if finding in FINDINGS:
            yield answer, _fault(finding)
        else:
            shapes.setdefault(_shape(answer), []).append(answer)
    try:
        for alike, outcome in _read(list(shapes.values())):
            finding = _finding(outcome)
            if finding != "killed":  # which another day may not happen
                found |= {key(answer): finding for answer in alike}
            yield from ((answer, _fault(finding)) for answer in alike)
    finally:
        kept.add(found)


def _read(shapes: list[list[str]]) -> Iterator[tuple[list[str], Outcome]]:
    """What became of the first of each of these labels."""
    if not shapes:
        return
    task = Task("labels", (), reads_itself, isolated=True, worker_imports=("math_verify", __name__))
    workers = max(1, min(MAX_WORKERS, os.cpu_count() or 1, len(shapes)))
    scorer = Scorer(task, workers=workers, time_limit_s=TIME_LIMIT_S, replies_per_worker=LABELS_PER_WORKER)
    with scorer:
        pending = scorer.submit([""] * len(shapes), [Example("", alike[0]) for alike in shapes])
        yield from zip(shapes, pending.outcomes(), strict=True)


def _shape(answer: str) -> str:
    """The label with every digit but 0 made a 1, or as it is where digits decide whether it can be read or compared:
    towers of powers and their like, long numbers, sums under a fraction, which may be 0."""
    rest = answer
    for _ in range(_INSIDE):
        rest = _FRACTION.sub(r"(\1)", rest)
    divides = "frac" in rest or "/" in rest or "\\div" in rest
    grows = _GROWS.search(_TAME.sub(r"\1", answer))
    if grows or _LONG.search(answer) or (divides and _SUM.search(answer)):
        return answer
    return _DIGIT.sub("1", answer)


def _is_plain(answer: str) -> bool:
    """Digits, a point and a minus, or what is compared as text: what needs no reading."""
    if maths.is_text(answer) or maths.base_of(answer):
        return True
    answer = answer.strip()
    return as_number(answer) is not None and answer.lstrip("-").replace(".", "", 1).isdigit() and len(answer) < 1000


def _finding(outcome: Outcome) -> str:
    """A key of FINDINGS."""
    if outcome.kind == "killed":
        return "killed"
    if outcome.kind != "scored":
        return "unread"
    return "good" if outcome.score >= 1.0 else "unequal"


def _fault(finding: str) -> str | None:
    fault = FINDINGS[finding]
    return fault.format(limit=TIME_LIMIT_S) if fault else None
