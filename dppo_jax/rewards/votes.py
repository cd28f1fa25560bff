"""What a reply votes for in a majority: its answer in a normal form, so that 0.5, .50 and 1/2 are one answer.

Linear time on any text, and nothing is run. No jax here.
"""

import hashlib
from decimal import Decimal
from fractions import Fraction

from dppo_jax.rewards import extract, maths
from dppo_jax.rewards.numbers import plain_value
from dppo_jax.rewards.verifiers import as_number

_LARGEST = 100  # decimal places to either side up to which a number is written out


def answer_of(reply: str, *, part: str, verifier: str) -> str:
    """The answer that a reply gives, as it is written; "" where it gives none.

    part: of EXTRACT, as data.extract. Of what that takes out, `verifier` says what counts: last_number reads the last
    number, and math_verify, of "auto", the last \\boxed or what follows "the answer is", where there is one.
    """
    text = extract.EXTRACT[part](reply)
    if verifier == "last_number":
        return extract.last_number(text)
    if verifier == "math_verify" and part == "auto":
        box = extract.last_box(text)
        return (maths.said_last(text) or text).strip() if box is None else box.strip()
    return text.strip()


def normal(answer: str) -> str:
    """The answer in its normal form: a number as a fraction in lowest terms, white space as single spaces."""
    value = plain_value(answer)
    if value is not None:
        return str(value)
    number = as_number(answer)
    return " ".join(answer.split()) if number is None else _written(number)


def vote(answer: str) -> int:
    """64 bits that are equal for answers of one normal form; 0 of no answer alone."""
    if not answer:
        return 0
    digest = hashlib.blake2b(normal(answer).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def _written(number: Decimal) -> str:
    """Digits without zeros at the end, and a power of ten where it is far from them."""
    sign, digits, exponent = number.as_tuple()
    text = "".join(map(str, digits)).lstrip("0")
    short = text.rstrip("0")
    if not short:
        return "0"
    power = int(exponent) + len(text) - len(short)
    if len(short) <= _LARGEST and abs(power) <= _LARGEST:
        return str(Fraction(("-" if sign else "") + f"{short}e{power}"))
    return f"{'-' if sign else ''}{short}e{power}"
