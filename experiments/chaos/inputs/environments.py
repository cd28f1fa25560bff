"""Judges the replies of environments: each is what its rules say, or a failure of that reply in a sentence."""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dppo_jax.data.examples import Example
from dppo_jax.environments.play import MOST_CHARACTERS, Player
from dppo_jax.rewards.worker import attempt
from experiments.chaos.inputs.judge import Judge, Judged, Wrong, check_sentence

BAD = object()  # what is no reply


class Said(NamedTuple):
    """A part of an environment's code, and what it stands for; BAD: nothing that may be."""

    code: str
    value: Any = BAD


OBSERVATIONS = (
    Said("'right'", "right"), Said("''", ""), Said("'a\\nb\\n'", "a\nb\n"), Said("'\\u00e9\\U0001f600'", "é😀"),
    Said("np.str_('a')", "a"), Said(f"'x' * {MOST_CHARACTERS}", "x" * MOST_CHARACTERS), Said("'\\0'", "\0"),
    Said(f"'x' * {MOST_CHARACTERS + 1}"), Said("b'x'"), Said("None"), Said("7"), Said("['a']"), Said("'\\ud800'"),
    Said("'a\\udfff'"), Said("{'text': 'a'}"), Said("object()"),
)  # fmt: skip
REWARDS = (
    Said("0", 0.0), Said("1.0", 1.0), Said("-2", -2.0), Said("True", 1.0), Said("np.float32(0.5)", 0.5),
    Said("np.int64(3)", 3.0), Said("np.array(0.25)", 0.25), Said("1e38", 1e38), Said("float('nan')"),
    Said("float('inf')"), Said("-np.inf"), Said("1e39"), Said("10**400"), Said("'1'"), Said("b'1'"), Said("None"),
    Said("[1]"), Said("1j"), Said("{}"), Said("np.zeros(2)"),
)  # fmt: skip
ENDS = (
    Said("True", True), Said("False", False), Said("np.True_", True), Said("np.bool_(False)", False), Said("0"),
    Said("1"), Said("None"), Said("'no'"), Said("[]"), Said("np.array([True])"),
)  # fmt: skip
INFOS = (
    Said("{}", {}), Said("None", {}), Said("7", {}), Said("{'use_tool': True}", {"use_tool": True}),
    Said("{'prefix': 'a: '}", {"prefix": "a: "}), Said("{'suffix': 'b'}", {"suffix": "b"}),
    Said("{'prefix': 7, 'suffix': ''}", {"prefix": 7}), Said("{'prefix': '\\ud800'}", {"prefix": "\ud800"}),
)  # fmt: skip
WHOLE = (
    "return 'a', 0.0, True, False", "return 'a', 0.0, True, False, {}, 1", "return ['a', 0.0, True, False, {}]",
    "return None", "return 'a'", "return {'observation': 'a'}", "yield 'a'", "raise ValueError('a\\nb')",
    "raise KeyError", "raise SystemExit(0)", "raise KeyboardInterrupt", "raise Odd", "return self.step(action)",
    "return (1 / 0, 0.0, True, False, {})",
)  # fmt: skip
BEGINNINGS = (
    Said("('begin', {})", "begin"), Said("('begin', None)", "begin"), Said("('other', {})"), Said("'begin'"),
    Said("('begin', {}, 1)"), Said("['begin', {}]"), Said("(7, {})"), Said("None"),
)  # fmt: skip
GOOD = 0.75  # of the parts, each
ODD = "class Odd(Exception):\n    def __str__(self):\n        raise RuntimeError\n\n\n"
_number = itertools.count()


def prepare(_: Path) -> Judge:
    """Needs no files."""
    return judge


def judge(draw: random.Random, case: Path) -> Judged:
    """One answer to the policy's only turn, of a class in a file of its own."""
    beginning, parts = part(draw, BEGINNINGS), [part(draw, of) for of in (OBSERVATIONS, REWARDS, ENDS, ENDS, INFOS)]
    whole = draw.choice(WHOLE) if draw.random() < 1 - GOOD else None
    body = whole or f"return {', '.join(said.code for said in parts)}"
    file = case / f"game_{next(_number)}.py"  # modules are kept by name
    file.write_text(
        f"import numpy as np\n\n\n{ODD}class Game:\n    def reset(self, seed):\n        return {beginning.code}\n\n"
        f"    def step(self, action):\n        {body}\n"
    )
    what = f"reset gives {beginning.code}, step: {body}"
    player = Player(f"{file}:Game", json.dumps({}), 3)
    player.load()
    outcome = attempt(player, ["turn"], Example("begin", "", {"seed": 3}))  # type: ignore[arg-type]
    wanted = None if whole or beginning.value is BAD else reply(parts)
    if wanted is None:
        if outcome.kind != "failed":
            raise Wrong(f"{what}: {outcome.kind} with {outcome.score}")
        check_sentence(outcome.message, 1000)
        return Judged(True, what)
    if outcome.kind != "scored":
        raise Wrong(f"{what}: {outcome.kind}: {outcome.message:.300}")
    said = outcome.said
    found = outcome.score, said.text, said.terminated, said.truncated, said.role
    if found != wanted:
        raise Wrong(f"{what}: taken as {found!r:.300}, and is {wanted!r:.300}")
    return Judged(False, what)


def part(draw: random.Random, of: Sequence[Said]) -> Said:
    """Mostly a good one."""
    good = [said for said in of if said.value is not BAD]
    return draw.choice(good if draw.random() < GOOD else of)


def reply(parts: Sequence[Said]) -> tuple[float, str, bool, bool, str] | None:
    """Reward, text, the two ends and whose turn it is, by GEM's rules; None where a part is bad."""
    observation, reward, terminated, truncated, info = (said.value for said in parts)
    if any(said.value is BAD for said in parts):
        return None
    text = f"{info.get('prefix', '')}{observation}"
    if info.get("suffix"):
        text = text.rstrip("\n") + "\n" + info["suffix"]
    if len(text) > MOST_CHARACTERS or any(0xD800 <= ord(character) < 0xE000 for character in text):
        return None
    return reward, text, terminated, truncated, "tool" if info.get("use_tool") else "user"
