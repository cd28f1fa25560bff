"""Verifiers: pure functions (reply, answer) -> 1.0 or 0.0. Imported by worker processes, so no jax here."""

import logging
import re
from collections.abc import Callable
from decimal import Decimal

_MINUS = "-\u2212\u2013"  # hyphen, minus sign, en dash
_GROUP = ",\u2009\u202f"  # comma, thin space, narrow no-break space between groups of three digits
# A sign counts unless it follows a digit, a letter or a closing bracket: "7-3" holds 7 and 3.
_NUMBER = re.compile(
    rf"""(?: (?<![\w)\]}}]) [{_MINUS}+] \\?\$? )?                                # -5, -$5
         (?: (?: [0-9]{{1,3}} (?:[{_GROUP}][0-9]{{3}})+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
           | \.[0-9]+ )
         (?: [eE][+-]?[0-9]{{1,4}} (?![0-9]) )?""",
    re.VERBOSE,
)
_TO_PLAIN = str.maketrans({**dict.fromkeys(_MINUS, "-"), **dict.fromkeys(_GROUP + "\\$", None)})


def extract_answer(reply: str) -> str:
    """The text of the last <answer>...</answer>, or else the whole reply; stripped."""
    end = reply.rfind("</answer>")
    start = reply.rfind("<answer>", 0, max(end, 0))
    return (reply if start < 0 else reply[start + len("<answer>") : end]).strip()


def exact_match(reply: str, answer: str) -> float:
    """1.0 where the extracted answer is the expected text, outer white space aside."""
    return float(extract_answer(reply) == answer.strip())


def last_number(reply: str, answer: str) -> float:
    """1.0 where the last number in the reply equals the answer exactly, as decimals: 0.50 is .5, 1,000 is 1e3.

    Raises: ValueError where the answer is not one number.
    """
    expected = as_number(answer)
    if expected is None:
        raise ValueError(f"the answer {answer!r} is not a number")
    found = _NUMBER.findall(_plain(reply))
    return float(bool(found) and Decimal(found[-1].translate(_TO_PLAIN)) == expected)


def as_number(text: str) -> Decimal | None:
    """The number that the whole text is, dollar signs around it aside, or None."""
    text = _plain(text).strip(" \n\t\\$")
    return Decimal(text.translate(_TO_PLAIN)) if _NUMBER.fullmatch(text) else None


def _plain(text: str) -> str:
    return text.replace("{,}", ",")  # LaTeX's comma between groups of digits


def math_verify(reply: str, answer: str) -> float:
    """1.0 where the mathematics in the reply equals the answer's, by the library math-verify.

    The answer is LaTeX with or without its dollar signs, or a plain number or expression. The library's own time
    limits need the main thread's signals and are off: call this where something else can stop it (`scorer.Scorer`).
    Raises: ValueError where no mathematics is found in the answer.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    expected = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=None)
    if not expected:
        raise ValueError(f"math-verify finds no mathematics in the answer {answer!r}")
    return float(verify(expected, parse(reply, parsing_timeout=None), timeout_seconds=None))


VERIFIERS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "last_number": last_number,
    "math_verify": math_verify,
}


def answer_fault(verifier: str, answer: str) -> str | None:
    """Why the verifier could never accept this answer, as the end of a sentence; None where it could."""
    if not answer.strip():
        return "is empty"
    if verifier == "last_number" and as_number(answer) is None:
        return "is not one number, which the verifier 'last_number' needs"
    return None
