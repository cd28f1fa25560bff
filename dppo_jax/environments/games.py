"""Two small games, for models that know little. No jax here."""

import random
from typing import Any

from dppo_jax.rewards.extract import NUMBER, extract_answer, plain_commas
from dppo_jax.rewards.verifiers import as_number, last_number

Step = tuple[str, float, bool, bool, dict[str, Any]]
ASK = "State the final answer to the following arithmetic problem: {} ="  # the words of reasoning-gym's chain_sum


class GuessTheNumber:
    """A number from `low` to `high`, to be found in `max_turns` guesses by hints: 1 for finding it."""

    def __init__(self, *, max_turns: int, low: int = 1, high: int = 9):
        if low > high:
            raise ValueError(f"low = {low} is above high = {high}")
        self._low, self._high, self._max_turns = low, high, max_turns

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Another number with another seed."""
        self._secret, self._turns = random.Random(seed).randint(self._low, self._high), 0
        return f"Guess a number from {self._low} to {self._high}: ", {}

    def step(self, action: str) -> Step:
        """The last number of the text is the guess."""
        self._turns += 1
        found = NUMBER.findall(plain_commas(extract_answer(action)))
        guess = as_number(found[-1]) if found else None
        if guess == self._secret:
            return "right", 1.0, True, False, {}
        hint = "a number" if guess is None else "higher" if guess < self._secret else "lower"
        return f" {hint}: ", 0.0, self._turns >= self._max_turns, False, {}


class TwoSums:
    """A sum of `min_terms` to `max_terms` one-digit numbers, in words, and then one of two, in figures, that is
    not negative; each right answer is worth 1/2."""

    def __init__(self, *, max_turns: int, min_terms: int = 2, max_terms: int = 2):
        if max_turns < 2:
            raise ValueError(f"two sums take two turns, but data.max_turns = {max_turns}")
        if not 1 <= min_terms <= max_terms:
            raise ValueError(f"min_terms = {min_terms} must be at least 1, and at most max_terms = {max_terms}")
        self._terms = min_terms, max_terms

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Other sums with another seed."""
        rng = random.Random(seed)
        self._sums = [_sum(rng, rng.randint(*self._terms)), _sum(rng, 2)]
        while self._sums[1][1] < 0:  # tokenizers join "=" and "-", and here "=" stands at the end
            self._sums[1] = _sum(rng, 2)
        return ASK.format(self._sums[0][0]), {}

    def step(self, action: str) -> Step:
        """The last number of the text is the answer."""
        (_, value), *rest = self._sums
        self._sums = rest
        right = last_number(action, str(value)) == 1.0
        if not rest:
            return "", right / 2, True, False, {}
        return f"{'ok' if right else 'no'}, {rest[0][0].replace(' ', '')}=", right / 2, False, False, {}


def _sum(rng: random.Random, terms: int) -> tuple[str, int]:
    """Its text, such as 3 + 4 - 1, and its value."""
    text, value = "", 0
    for number in range(terms):
        term, sign = rng.randint(0, 9), rng.choice((1, -1)) if number else 1
        text += f" {'+' if sign > 0 else '-'} {term}" if number else str(term)
        value += sign * term
    return text, value
