"""Verifiers: pure functions (reply, answer) -> 1.0 or 0.0. Imported by worker processes, so no jax here."""

import functools
from collections.abc import Callable
from decimal import Decimal

from dppo_jax.rewards import maths, numbers
from dppo_jax.rewards.extract import NUMBER, TO_PLAIN, Boxed, plain_commas
from dppo_jax.rewards.extract import extract_answer as extract_answer


class Refused(float):
    """A score of a reply that was not read, because it is not in the grammar of the answers."""


REFUSED = Refused(0.0)
REMEMBERED = 300  # characters of an answer whose comparison a worker remembers


def exact_match(reply: str, answer: str) -> float:
    """1.0 where the extracted answer is the expected text, outer white space aside."""
    return float(extract_answer(reply) == answer.strip())


def last_number(reply: str, answer: str) -> float:
    """1.0 where the extracted answer's last number equals the label exactly, as decimals: 0.50 is .5, 1,000 is 1e3.

    Raises: ValueError where the answer is not one number.
    """
    expected = as_number(answer)
    if expected is None:
        raise ValueError(f"the answer {answer!r} is not a number")
    found = NUMBER.findall(plain_commas(extract_answer(reply)))
    return float(bool(found) and Decimal(found[-1].translate(TO_PLAIN)) == expected)


def as_number(text: str) -> Decimal | None:
    """The number that the whole text is, dollar signs around it aside, or None."""
    text = plain_commas(text).strip(" \n\t\\$")
    return Decimal(text.translate(TO_PLAIN)) if NUMBER.fullmatch(text) else None


def math_verify(reply: str, answer: str) -> float:
    """1.0 where the mathematics in the extracted answer equals the label's, by the library math-verify.

    The label is LaTeX with or without its delimiters, or a plain number or expression. Of the reply's \\boxed the last
    one counts, and of an equation the last side: 6=5 says 5. A label of letters that are words or choices (CAT, or
    "C, A, B") is compared as text, in its order; one in a base (1010_2) by its digits, and a reply may leave the base
    out but not name another. Units are not compared. Numbers are equal where math-verify rounds them so: 3.14159265 is
    \\pi, and 1000\\% is 10. The library's own time limits need the main thread's signals and are off: call this where
    something else can stop it (`scorer.Scorer`).
    Raises: ValueError where no mathematics is found in the label.
    """
    text = extract_answer(reply)
    if isinstance(text, Boxed):
        text = f"\\boxed{{{text}}}" if text else ""
    score = numbers.compare(text, answer)
    if score is not None:
        return score
    box = maths.last_box(text)
    text = text if box is None else f"\\boxed{{{box}}}"  # of a reply with a box nothing else is read
    return _remembered(text, answer) if len(text) <= REMEMBERED else by_library(text, answer)


def by_library(text: str, answer: str) -> float:
    """`math_verify` of an extracted answer, whatever it is."""
    from math_verify import verify

    if maths.is_text(answer):
        return float(maths.same_text(text, answer))
    in_base = maths.base_of(answer)
    if in_base:
        return float(maths.same_in_base(text, *in_base))
    expected = _read_label(answer)
    if not expected:
        raise ValueError(f"math-verify finds no mathematics in the answer {answer!r:.80}")
    if maths.same_text(text, answer):
        return 1.0
    return float(verify(expected, maths.read_reply(text), timeout_seconds=None))


_remembered = functools.lru_cache(maxsize=1024)(by_library)  # replies of a group often say the same
_read_label = functools.lru_cache(maxsize=256)(maths.read)  # the replies of a group share their label

VERIFIERS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "last_number": last_number,
    "math_verify": math_verify,
}


def text_fault(verifier: str, answer: str) -> str | None:
    """Why the verifier could never accept this answer, as the end of a sentence; None where it could. Mathematics is
    not read for it, as `labels.answer_faults` does."""
    if not answer.strip():
        return "is empty"
    if verifier == "last_number" and as_number(answer) is None:
        return "is not one number, which the verifier 'last_number' needs"
    if verifier in VERIFIERS and extract_answer(answer) != answer.strip():
        return "holds a tag such as <answer> or <think>, which no verifier sees of a reply; write it without"
    return maths.label_fault(answer) if verifier == "math_verify" else None
