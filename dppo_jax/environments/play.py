"""What a reward worker does with an environment: it is made, begun, and played up to the turn at hand. No jax here.

Nothing is kept between turns: whichever worker answers, and however often it is asked, the answer is the same.
"""

import functools
import inspect
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dppo_jax.data.examples import Example, Verify
from dppo_jax.environments import ENVIRONMENTS, Environment
from dppo_jax.environments.gym import GymTurns
from dppo_jax.errors import UserError, first_line, nearest
from dppo_jax.rewards.own import LARGEST, load_file

KEY = "data.name"
MOST_CHARACTERS = 2**20  # of an observation


class Said(NamedTuple):
    """An environment's answer to a turn."""

    text: str
    terminated: bool = False
    truncated: bool = False
    role: str = "user"  # or "tool": whose turn it is in a chat


class Played(float):
    """The sum of an environment's rewards so far, and what it `said` last."""

    said: Said


@dataclass(frozen=True)
class Player:
    """(the policy's turns so far, example) -> `Played`, of an environment that `name` names; see `data.environments`.

    `settings` is JSON: what it is made from. `verify` is the scorer of a reasoning-gym set. Text in the place of turns
    is one turn.
    """

    name: str
    settings: str
    max_turns: int
    verify: Verify | None = None

    @property
    def title(self) -> str:
        """The config's key and what it says, for sentences."""
        return f"{KEY} = {self.name}"

    def load(self) -> None:
        """UserError where there is no such environment, or it cannot be made."""
        if self.verify is None:
            _check_settings(self.name, _maker(self.name), json.loads(self.settings))
            try:
                self._make(Example("", ""))
            except Exception as error:
                made = f"made from data.settings = {self.settings:.200}"
                reason = f"{type(error).__name__}: {first_line(error):.200}"
                raise UserError(f"{KEY} = {self.name!r} cannot be {made}: {reason}") from None

    def _make(self, example: Example) -> Environment:
        if self.verify is not None:
            return GymTurns(self.verify, example, self.max_turns)
        own = {"max_turns": self.max_turns} if self.name in ENVIRONMENTS else {}
        return _maker(self.name)(**own, **json.loads(self.settings))

    def __call__(self, reply: str | Sequence[str], example: Example) -> float:
        seed = example.meta["seed"]
        random.seed(seed)  # for environments that draw from what all share
        np.random.seed(seed % 2**32)
        environment = self._make(example)
        said, total = _begun(environment.reset(seed=seed)), 0.0
        if reply and said.text != example.prompt:
            raise ValueError("reset(seed) gives another observation than before: it must be a function of its seed")
        for action in [reply] if isinstance(reply, str) else reply:
            if said.terminated or said.truncated:
                raise ValueError("the same turns end it earlier than before: it must be a function of seed and actions")
            said, reward = _answered(environment.step(action))
            total += reward
        played = Played(total)
        played.said = said
        return played


def _check_settings(name: str, maker: Callable[..., Environment], settings: dict[str, Any]) -> None:
    """UserError for a setting that the environment does not take, where its signature says."""
    try:
        parameters = inspect.signature(maker).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in settings:
        if key not in parameters:
            known = set(parameters) - {"max_turns"}
            raise UserError(f"data.settings: {name} has no setting {key!r}{nearest(key, known) if known else ''}")


def _begun(result: Any) -> Said:
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError("reset must return (observation, info)")
    return Said(_text(*result))


def _answered(result: Any) -> tuple[Said, float]:
    if not isinstance(result, tuple) or len(result) != 5:
        raise ValueError("step must return (observation, reward, terminated, truncated, info)")
    observation, reward, terminated, truncated, info = result
    if isinstance(reward, str | bytes) or not (math.isfinite(number := float(reward)) and abs(number) <= LARGEST):
        raise ValueError(f"the reward {reward!r:.60} is no finite number that float32 can hold")
    for ends in (terminated, truncated):
        if not isinstance(ends, bool | np.bool_):
            raise ValueError(f"step gave {ends!r:.60} where it says whether the conversation ends: True or False")
    role = "tool" if isinstance(info, dict) and info.get("use_tool") else "user"
    return Said(_text(observation, info), bool(terminated), bool(truncated), role), number


def _text(observation: Any, info: Any) -> str:
    """The observation, and what GEM's environments put around it."""
    if not isinstance(observation, str):
        raise ValueError(f"the observation is {type(observation).__name__}, not text")
    around = info if isinstance(info, dict) else {}
    text = f"{around.get('prefix', '')}{observation}"
    if suffix := around.get("suffix"):
        text = f"{text.rstrip(chr(10))}\n{suffix}"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the observation has a lone surrogate, which is no character")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the observation has {len(text):,} characters, more than {MOST_CHARACTERS:,}")
    return text


@functools.lru_cache
def _maker(name: str) -> Callable[..., Environment]:
    """What makes the environment, from keyword arguments."""
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    path, _, class_name = name.rpartition(":")
    if path.endswith(".py"):
        return _own(path, class_name)
    try:
        import gem
    except ImportError as error:
        raise UserError(f"{KEY} = {name!r}: gem cannot be imported ({first_line(error):.100})") from None
    return functools.partial(gem.make, name)


def _own(path: str, name: str) -> Callable[..., Environment]:
    """The class `name` of a file."""
    module = load_file(path, KEY)
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if inspect.isclass(value) and not key.startswith("_")]
        hint = nearest(name, known) if known else "; it has none"
        raise UserError(f"{KEY}: {path} has no class {name!r}{hint}")
    for method, arguments in (("reset", "seed"), ("step", "action")):
        if inspect.isclass(found) and not callable(getattr(found, method, None)):
            raise UserError(f"{KEY}: {name} of {path} has no method {method}({arguments})")
    return found
