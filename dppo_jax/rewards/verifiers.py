"""Verifiers: pure functions (reply, answer) -> 1.0 or 0.0. Imported by worker processes, so no jax here."""

import re
from collections.abc import Callable
from decimal import Decimal

from dppo_jax.rewards import maths

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
_TAG = re.IGNORECASE | re.ASCII
_THINK = re.compile("<(/?)(?:think|thinking|thought)>", _TAG)
_ANSWER = re.compile("<(/?)answer>", _TAG)
_CUT = "\udcff"  # stands where a thought stood; no text that is UTF-8 holds it
_TO_PLAIN = str.maketrans({**dict.fromkeys(_MINUS, "-"), **dict.fromkeys(_GROUP + "\\$", None)})


class Refused(float):
    """A score of a reply that was not read, because it is not in the grammar of the answers."""


REFUSED = Refused(0.0)


def extract_answer(reply: str) -> str:
    """The text of the last <answer>...</answer> outside the thoughts, or else all that is outside them; stripped.

    A thought stands in <think>...</think>; <thinking> and <thought> are the same tag, and upper case does not matter.
    One that is never closed runs to the end; a </think> that nothing opened ends a thought that the prompt began. Where
    a thought stands inside the text, only what follows the last one counts, unless that is blank: "5<think>6</think>7"
    answers 7, not 57. An <answer> that is never closed is text like any other. Linear time.
    """
    text = _without_thought(reply)
    start: int | None = None
    inside = text
    for tag in _ANSWER.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            inside, start = text[start : tag.start()], None
    return next((part.strip() for part in reversed(inside.split(_CUT)) if part.strip()), "")


def _without_thought(reply: str) -> str:
    """The reply with `_CUT` in the place of every thought."""
    answer_parts: list[str] = []
    start, thinking = 0, False
    for tag in _THINK.finditer(reply):
        if not tag[1] and not thinking:
            answer_parts.append(reply[start : tag.start()])
            thinking = True
        elif tag[1]:
            answer_parts = answer_parts if thinking else []
            start, thinking = tag.end(), False
    return _CUT.join(answer_parts if thinking else [*answer_parts, reply[start:]])


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
    numbers = _NUMBER.findall(_plain(extract_answer(reply)))
    return float(bool(numbers) and Decimal(numbers[-1].translate(_TO_PLAIN)) == expected)


def as_number(text: str) -> Decimal | None:
    """The number that the whole text is, dollar signs around it aside, or None."""
    text = _plain(text).strip(" \n\t\\$")
    return Decimal(text.translate(_TO_PLAIN)) if _NUMBER.fullmatch(text) else None


def _plain(text: str) -> str:
    return text.replace("{,}", ",")  # LaTeX's comma between groups of digits


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
    from math_verify import verify

    text = extract_answer(reply)
    if maths.is_text(answer):
        return float(maths.same_text(text, answer))
    in_base = maths.base_of(answer)
    if in_base:
        return float(maths.same_in_base(text, *in_base))
    expected = maths.read(answer)
    if not expected:
        raise ValueError(f"math-verify finds no mathematics in the answer {answer!r:.80}")
    if maths.same_text(text, answer):
        return 1.0
    return float(verify(expected, maths.read_reply(text), timeout_seconds=None))


VERIFIERS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "last_number": last_number,
    "math_verify": math_verify,
}


def answer_fault(verifier: str, answer: str) -> str | None:
    """Why the verifier could never accept this answer, as the end of a sentence; None where it could.

    For math_verify this starts a worker; `labels.answer_faults` takes many answers at once.
    """
    from dppo_jax.rewards.labels import answer_faults  # which imports this module

    return answer_faults(verifier, [answer])[0]


def text_fault(verifier: str, answer: str) -> str | None:
    """The same, as far as it can be told without reading mathematics."""
    if not answer.strip():
        return "is empty"
    if verifier == "last_number" and as_number(answer) is None:
        return "is not one number, which the verifier 'last_number' needs"
    if verifier in VERIFIERS and extract_answer(answer) != answer.strip():
        return "holds a tag such as <answer> or <think>, which no verifier sees of a reply; write it without"
    return maths.label_fault(answer) if verifier == "math_verify" else None
