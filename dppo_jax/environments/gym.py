"""A reasoning-gym data set in turns: after a wrong answer the policy is told so, and asked again. No jax here."""

from typing import Any

from dppo_jax.data.examples import Example, Verify

AGAIN = "That is not right. Try again."


class GymTurns:
    """A question, of which the data set's own scorer `verify` knows what is right: 1 for that in `max_turns` turns."""

    def __init__(self, verify: Verify, example: Example, max_turns: int):
        self._verify, self._example, self._max_turns = verify, example, max_turns

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """The question, whatever the seed."""
        self._turns = 0
        return str(self._example.prompt), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Right, or told that it is not."""
        self._turns += 1
        right = self._verify(action, self._example) == 1.0
        return "" if right else AGAIN, float(right), right or self._turns >= self._max_turns, False, {}
