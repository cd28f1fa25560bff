"""A tool: arithmetic that is worked out for the policy. No jax here."""

import random
import re
from fractions import Fraction
from typing import Any

from dppo_jax.data.arithmetic import exact_value
from dppo_jax.rewards.extract import extract_answer
from dppo_jax.rewards.verifiers import last_number

MOST_CHARACTERS = 200  # of an expression
_TOOL = re.compile(r"<tool>(.*?)</tool>", re.DOTALL)
_ARITHMETIC = re.compile(r"[0-9+\-*/(). ]+")
_OPERATORS = "+-*"


class Calculator:
    """A problem of `terms` numbers of up to `digits` digits. A turn that calls, as in <tool>3*4</tool>, is answered by
    the value of its last call; any other turn is the answer to the problem: 1 where its last number is right."""

    def __init__(self, *, max_turns: int, terms: int = 3, digits: int = 3):
        if terms < 2 or digits < 1:
            raise ValueError(f"terms = {terms} must be at least 2, and digits = {digits} at least 1")
        self._terms, self._digits, self._max_turns = terms, digits, max_turns

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Another problem with another seed."""
        rng = random.Random(seed)
        numbers = [str(rng.randint(1, 10**self._digits - 1)) for _ in range(self._terms)]
        text = "".join(f" {rng.choice(_OPERATORS)} {number}" for number in numbers)[3:]
        self._answer, self._turns = written(exact_value(text)), 0
        words = (
            f"What is {text}? To have arithmetic worked out, write it as <tool>3*4</tool> and end your turn. "
            "When you know it, answer with the number alone."
        )
        return words, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Works out a call, or checks the answer."""
        self._turns += 1
        calls = _TOOL.findall(extract_answer(action))
        if not calls:
            return "", last_number(action, self._answer), True, False, {}
        return worked_out(calls[-1]), 0.0, self._turns >= self._max_turns, False, {"use_tool": True}


def worked_out(expression: str) -> str:
    """The value of numbers, + - * / and parentheses, or why there is none. Nothing is run, and nothing can grow."""
    text = expression.strip()
    if not text or len(text) > MOST_CHARACTERS or not _ARITHMETIC.fullmatch(text) or "**" in text or "//" in text:
        return f"error: write at most {MOST_CHARACTERS} characters of numbers, + - * / and parentheses"
    try:
        return written(exact_value(text))
    except ZeroDivisionError:
        return "error: division by zero"
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return "error: that is no arithmetic"


def written(value: Fraction) -> str:
    """A whole number or a short decimal as such, any other as a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10**6
    if scaled.denominator == 1:
        sign, (whole, rest) = "-" if value < 0 else "", divmod(abs(scaled.numerator), 10**6)
        return f"{sign}{whole}.{rest:06d}".rstrip("0")
    return f"{value.numerator}/{value.denominator}"
