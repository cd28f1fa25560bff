"""Plain numbers, compared exactly and at once where that decides what math-verify would: most answers are such.

Reward workers import this, so no jax here.
"""

import functools
import re
from fractions import Fraction

from dppo_jax.rewards import maths
from dppo_jax.rewards.extract import last_box

_INTEGER = r"(?:0|[1-9]\d{0,2}(?:,\d{3}){1,5}|[1-9]\d{0,29})"
_PLAIN = re.compile(
    rf"(-?)(?:({_INTEGER})|({_INTEGER}?\.\d{{1,20}})|\\[dt]?frac\s?\{{(-?{_INTEGER})\}}\s?\{{({_INTEGER})\}}"
    rf"|({_INTEGER})\s?/\s?({_INTEGER}))",
    re.ASCII,
)
_MATHS = re.compile(r"(?<!\\)\$([^$\n]+)\$")
# In prose around one number, what might make another number of it.
_MORE = re.compile(
    r"[\d%\\^_*/=+{}()\[\]<>|~\u00b0-\uffff]|percent|hundred|thousand|[mbtr]illion|dozen|per\b|pi\b", re.IGNORECASE
)
_LONGEST = 300  # characters of such a reply
_CLOSE = Fraction(1, 10**5)  # math-verify rounds decimals to 6 places: what is nearer than this, it decides
_LARGE = 10**9  # and decimals beyond this


def compare(reply: str, answer: str) -> float | None:
    """1.0 or 0.0 where both the label and what the reply says are plain numbers, equal or clearly not: what
    `verifiers.math_verify` finds by the library. None where that must be asked."""
    expected = _of_label(answer)
    said = None if expected is None else _said(reply)
    if expected is None or said is None:
        return None
    value, decisive = said
    if value == expected:
        return 1.0 if decisive else None
    far = abs(value - expected) >= _CLOSE and max(abs(value), abs(expected)) < _LARGE
    whole = value.denominator == expected.denominator == 1
    return 0.0 if far or whole else None


def plain_value(text: str) -> Fraction | None:
    """The number that the text is, its delimiters aside: 7, -1,234, .5, 3/4, \\frac{3}{4}."""
    if len(text) > _LONGEST:
        return None
    match = _PLAIN.fullmatch(maths.bare(text))
    if not match:
        return None
    sign, integer, decimal, over, under, left, right = match.groups()
    if integer or decimal:
        value = Fraction((integer or decimal).replace(",", ""))
    else:
        above, below = (int(part.replace(",", "")) for part in (over or left, under or right))
        if below == 0:
            return None
        value = Fraction(above, below)
    return -value if sign else value


_of_label = functools.lru_cache(maxsize=4096)(plain_value)


def _said(reply: str) -> tuple[Fraction, bool] | None:
    """What a reply says, and whether an equal label is then certain to be accepted."""
    box = last_box(reply)
    if box is not None:
        value = plain_value(box)
        return None if value is None else (value, True)
    if len(reply) > _LONGEST:
        return None
    value = plain_value(reply)
    if value is not None:
        return value, True
    if "$" not in reply:
        said = maths.said_last(reply)
        value = plain_value(said) if said else None
        return None if value is None else (value, True)
    match = _MATHS.search(reply)
    if not match or _MORE.search(reply[: match.start()]) or _MORE.search(reply[match.end() :]):
        return None
    value = plain_value(match[1]) if reply.count("$") == 2 else None
    return None if value is None else (value, False)
