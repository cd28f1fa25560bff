"""Environments: what the policy talks with. They run in reward workers alone, so no jax here.

An environment has the interface of GEM (2510.01051): `reset(seed) -> (observation, info)` begins it anew, and
`step(action) -> (observation, reward, terminated, truncated, info)` answers a turn of the policy. Observations and
actions are text. It must be a function of its seed and the actions: it is made anew and played again for every turn.
"""

from collections.abc import Callable
from typing import Any, Protocol

from dppo_jax.environments.calculator import Calculator
from dppo_jax.environments.games import GuessTheNumber, TwoSums

Info = dict[str, Any]


class Environment(Protocol):
    """What `data.name` names, in a file of one's own too."""

    def reset(self, seed: int) -> tuple[str, Info]: ...

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]: ...


# By name; each is made from `max_turns` and data.settings.
ENVIRONMENTS: dict[str, Callable[..., Environment]] = {
    "guess_the_number": GuessTheNumber,
    "two_sums": TwoSums,
    "calculator": Calculator,
}
