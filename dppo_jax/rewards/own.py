"""A reward of one's own: FILE.py:FUNCTION, loaded and called in reward workers alone. No jax here."""

import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from dppo_jax.data.examples import Example
from dppo_jax.errors import UserError, first_line, nearest
from dppo_jax.files import disk_path

KEY = "reward.function"
LARGEST = 3e38  # of a reward: what float32 can hold


class Scored(float):
    """A reward that is the sum of its named parts."""

    parts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class OwnReward:
    """The function `name` of a file: (reply, example) -> a number, or named numbers, whose sum is the reward."""

    path: str
    name: str

    @property
    def title(self) -> str:
        """The config's key and what it says, for sentences."""
        return f"{KEY} = {self.path}:{self.name}"

    def load(self) -> None:
        """Runs the file once in this process; UserError where it fails, or has no such function of two arguments."""
        _function(self.path, self.name)

    def __call__(self, reply: str, example: Example) -> float:
        return as_score(_function(self.path, self.name)(reply, example))


def own_reward(text: str) -> OwnReward:
    """Of FILE.py:FUNCTION; UserError where it has another form, or there is no such file. Nothing is run."""
    path, name = split(text)
    return OwnReward(own_file(path, KEY), name)


def own_file(path: str, key: str) -> str:
    """The file's whole path; UserError where there is none. `key` is the config's."""
    file = disk_path(path, key)
    try:
        exists = file.is_file()
    except OSError:  # a name that is too long
        exists = False
    if not exists:
        raise UserError(f"{key}: there is no file {path!r:.200}")
    return str(file.resolve())


def split(text: str) -> tuple[str, str]:
    """File and function of FILE.py:FUNCTION; UserError of another form."""
    path, _, name = text.rpartition(":")
    if not path or not name.isidentifier():
        raise UserError(f"{KEY} must be FILE.py:FUNCTION, such as my_rewards.py:score, not {text!r:.200}")
    return path, name


def as_score(result: Any) -> float:
    """What a function returned, as a reward; ValueError unless it is a finite number, or a dict of names and those."""
    if not isinstance(result, Mapping):
        return _number(result, "it")
    score = Scored(math.fsum(_number(value, f"part {name!r:.60}") for name, value in result.items()))
    score.parts = tuple((_named(name), float(value)) for name, value in result.items())
    return score


def _number(value: Any, what: str) -> float:
    """numpy's numbers too; text that Python reads as a number is none."""
    if isinstance(value, str | bytes):
        raise ValueError(f"{what} returned is text, not a number")
    number = float(value)
    if not abs(number) <= LARGEST:
        raise ValueError(f"{what} returned is {number}, no finite number that float32 can hold")
    return number


def _named(name: Any) -> str:
    if not isinstance(name, str) or not name or len(name) > 80 or "/" in name or not name.isprintable():
        raise ValueError(f"a part is named {name!r:.80}: take a short text without slashes")
    return name


@functools.lru_cache
def _function(path: str, name: str) -> Callable[[str, Example], Any]:
    module = load_file(path, KEY)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        hint = nearest(name, known) if known else "; it has none"
        raise UserError(f"{KEY}: {path} has no function {name!r}{hint}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some that are written in C
        return function
    try:
        signature.bind("", None)
    except TypeError:
        raise UserError(f"{KEY}: {name}{signature} of {path} must take two arguments, (reply, example)") from None
    return function


def load_file(path: str, key: str) -> Any:
    """The file as a module, which may import what lies beside it. UserError that begins with the config's `key`."""
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    loader = SourceFileLoader(f"{key.replace('.', '_')}_{Path(path).stem}", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    sys.dont_write_bytecode = True
    try:
        loader.exec_module(module)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | MemoryError):
            raise
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = f"{type(error).__name__}: {first_line(error):.200}"
        raise UserError(f"{key}: {path}{line} does not load: {reason}") from None
    return module
