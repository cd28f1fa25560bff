"""What every key of a config may hold: its kind, as in configs/base.py, and its range, in one table."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from configs import base
from dppo_jax.errors import UserError, lookup, nearest
from dppo_jax.files import check_text
from dppo_jax.losses import LOSSES, check_word, hyperparameters, words
from dppo_jax.rewards.scorer import MAX_TIME_LIMIT_S
from dppo_jax.rewards.shaping import TERMS

INF = float("inf")
INT32 = 2**31 - 1  # jax counts steps and updates in int32
SEEDS = 2**32 - 1  # a key takes 32 bits of a seed; the next seed would draw what seed 0 draws
ROWS = 2**20  # most rows of a batch, and most tokens of a row
TINY, LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


class Range(NamedTuple):
    """The numbers that a key may hold. A float must stay inside when it is rounded to float32, too."""

    least: float = 0
    most: float = INF
    open_least: bool = False  # `least` itself is refused
    open_most: bool = False
    inf: bool = False  # whether infinity is a value
    also: float | None = None  # one value outside that has a meaning of its own

    def fault(self, value: float) -> str | None:
        """What is wrong with a number, for the end of a sentence; None of a good one. Python's own float or int."""
        if value == self.also or (value == INF and self.inf):
            return None
        if value in (INF, -INF):
            return "must be finite"
        below, above = self._outside(value)
        rounded = ""
        if not (below or above) and isinstance(value, float):
            if value and abs(value) < TINY:
                return f"must be {'' if self.open_least else '0 or '}at least {TINY:.2g}, what float32 can hold"
            if value > LARGEST:
                return None if self.inf else f"must be at most {LARGEST:.2g}, what float32 can hold"
            below, above = self._outside(float(np.float32(value)))
            rounded = " in float32, too"
        if not (below or above):
            return None
        floor = f"{'above' if self.open_least else 'at least'} {self.least:g}"
        ceiling = f"{'below' if self.open_most else 'at most'} {self.most:.10g}"
        ends = f"{floor} and {ceiling}"
        if isinstance(value, int) or self.most in (INF, INT32):
            ends = floor if below else ceiling
        return f"must be {'' if self.also is None else f'{self.also:g}, or '}{ends}{rounded}"

    def _outside(self, value: float) -> tuple[bool, bool]:
        """Whether it is not above the lower end, and not below the upper one. NaN is neither."""
        below = not (value > self.least if self.open_least else value >= self.least)
        return below, not (value < self.most if self.open_most else value <= self.most)


COUNT = Range(0, INT32)  # steps, updates, tokens; 0: never, or none
NATURAL = Range(1, INT32)
SIZE = Range(1, ROWS)  # the size of an array's axis
SEED = Range(0, SEEDS)
REAL = Range()  # at least 0, finite
THRESHOLD = Range(inf=True)  # inf: never
SHARE = Range(0, 1)
WEIGHT = REAL  # of a term of the reward
AXIS = Range(1, 2**15, also=-1)
# Logits are divided by a temperature; below this their float32 differences overflow.
TEMPERATURE = Range(1e-6, 1000)  # beyond it every token is as likely as any other

NUMBERS: Mapping[str, Range] = {
    "seed": SEED,
    "steps": NATURAL,
    "policy.temperature": TEMPERATURE,
    "policy.head_pieces": Range(0, ROWS),
    "lora.rank": Range(0, ROWS),
    "lora.alpha": Range(open_least=True),
    "data.size": NATURAL,
    "data.seed": SEED,
    "data.max_turns": SIZE,
    "data.max_prompt_len": SIZE,
    "rollout.prompts": SIZE,
    "rollout.group_size": SIZE,
    "rollout.max_new_tokens": SIZE,
    "rollout.turn_tokens": SIZE,
    "rollout.temperature": TEMPERATURE,
    "rollout.top_p": Range(0, 1, open_least=True),  # 1, as `checks` says
    "rollout.lag": Range(0, 10_000),  # as many copies of the parameters
    "rollout.resample": Range(0, 1000),  # step + 1000 * resample.AWAY has 32 bits
    "rollout.slots": Range(0, ROWS),
    "rollout.chunk": COUNT,
    "rollout.pages": Range(0, INT32 // 128),
    "rollout.in_flight": Range(0, 1000),
    "rollout.max_age": NATURAL,
    "rollout.tracked": Range(0, ROWS),
    "reward.workers": Range(1, 1024),
    "reward.time_limit_s": Range(0.01, MAX_TIME_LIMIT_S),  # a timer counts no 10^9 s, and no verifier ends at once
    "reward.replies_per_worker": NATURAL,
    "reward.overlong_buffer": Range(0, ROWS),
    **{f"reward.terms.{name}": WEIGHT for name in ("correct", "format", "length", "repetition", "model")},
    "reward.ngram": SIZE,
    "reward.model.max_len": SIZE,
    "reward.model.rows": SIZE,
    "reward.kl_coef": Range(0, 1e6),
    "advantage.ddof": Range(0, 1),
    "critic.learning_rate": REAL,
    "critic.discount": SHARE,
    "critic.lam": SHARE,
    "critic.lam_alpha": Range(open_least=True),
    "critic.value_clip": THRESHOLD,
    "critic.max_prompt_len": SIZE,
    "reference.coef": Range(0, 1e6),
    "alp.sigma": Range(0, 1000),
    "alp.learning_rate": REAL,
    "aggregation.constant": Range(0, INT32, open_least=True),
    "train.minibatches": SIZE,
    "train.epochs": NATURAL,
    "train.micro_rows": NATURAL,
    "train.max_skipped": NATURAL,
    "train.staleness": Range(0, 1),
    "optimizer.learning_rate": REAL,
    "optimizer.warmup": COUNT,
    "optimizer.b1": Range(0, 1, open_most=True),
    "optimizer.b2": Range(0, 1, open_most=True),
    "optimizer.eps": Range(0, 1, open_least=True),
    "optimizer.weight_decay": Range(0, 1000),
    "optimizer.clip_norm": THRESHOLD,
    "sft.epochs": NATURAL,
    "sft.batch": SIZE,
    "eval.every": COUNT,
    "eval.samples": SIZE,
    "eval.prompts": SIZE,
    "eval.max_new_tokens": SIZE,
    "eval.temperature": Range(1e-6, 1000, also=0),  # 0: greedy
    "eval.top_p": Range(0, 1, open_least=True),
    "checkpoint.every": COUNT,
    "checkpoint.every_s": REAL,
    "checkpoint.grace_s": REAL,
    "checkpoint.keep": NATURAL,
    "checkpoint.keep_every": COUNT,
    "log.histograms": COUNT,
    "log.samples": COUNT,
    "log.events_mb": Range(1, also=0),
    "log.transcripts": COUNT,
    "log.tokens": COUNT,
    "log.stuck_s": Range(1, 1e9, also=0),  # a thread looks ten times as often
    "log.profile_step": Range(0, INT32, also=-1),
    "mesh.data": AXIS,
    "mesh.fsdp": AXIS,
    "mesh.tensor": AXIS,
    "mesh.expert": AXIS,
}

# Of loss.<name> and loss_defaults.<loss>.<name>, for the losses of this package; "<loss>.<name>" where one differs.
HYPERPARAMETERS: Mapping[str, Range] = {
    "alpha": SHARE,  # a probability
    "correction_cap": Range(open_least=True, inf=True),
    "correction_high": Range(open_least=True, inf=True),
    "correction_low": REAL,
    "budget": THRESHOLD,
    "dis.eps_high": Range(open_least=True, inf=True),  # its bounds are outside: none is kept between 1 and 1
    "dis.eps_low": Range(open_least=True, inf=True),
    "ratio_high": Range(1, inf=True),
    "ratio_low": SHARE,
    "delta": THRESHOLD,
    "drpo.delta": Range(open_least=True, inf=True),  # a divisor
    "delta_budget": REAL,
    "delta_high": THRESHOLD,
    "delta_low": THRESHOLD,
    "dual_cap": Range(1, inf=True),
    "entropy_floor": REAL,
    "eps_high": THRESHOLD,
    "eps_low": THRESHOLD,
    "k_high": Range(0, 1000),  # exponents
    "k_low": Range(0, 1000),
    "lambda_high": Range(0, 1000),
    "lambda_low": Range(0, 1000),
    "ratio_cap": THRESHOLD,
    "tau": REAL,
    "tau_high": REAL,
    "tau_low": REAL,
    "w_min": SHARE,
}

BOUNDS = ("critic.bounds",)  # two numbers, or none; other tuples hold names
UNSET = ("data.size",)  # keys that may be None, beside the placeholders of base.py
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a tuple of names"}
DATA = "eval.sets."  # NAME.KEY: as data.KEY


def check_values(config: ConfigDict) -> None:
    """UserError for a key that is unknown or missing, holds another kind of value, or a number out of its range."""
    _check_section(config, base.get_config(), "")


def _check_section(section: Any, defaults: ConfigDict, prefix: str) -> None:
    if not isinstance(section, ConfigDict):
        raise UserError(f"config key {prefix[:-1]!r} must be a section, not {shown(section)}")
    if prefix == DATA:
        for name in section:
            if not isinstance(name, str) or not re.fullmatch(r"[^./\s]+", name):
                raise UserError(f"eval.sets names a set {shown(name)}: take a name without dots, slashes and spaces")
            _check_section(section[name], base.data_section(), f"{DATA}{name}.")
        return
    if prefix == "loss_defaults.":
        for name in section:
            _check_loss(name, section[name], f"{prefix}{name}.")
        return
    if prefix == "reward.terms.":
        for name in section:
            lookup(TERMS, str(name), "term in reward.terms")
            _check_value(section[name], float, prefix + str(name), unset=False)
        return
    if prefix.endswith("settings."):  # the data set's own
        for name in section:
            if not isinstance(name, str):
                raise UserError(f"{prefix[:-1]} has a setting {shown(name)}, which is no name")
        check_text(section.to_dict(), prefix[:-1])
        return
    if prefix.endswith("chat_kwargs."):  # the chat template's
        for name, argument in section.to_dict().items():
            if not isinstance(name, str):
                raise UserError(f"{prefix[:-1]} has an argument {shown(name)}, which is no name")
            if not _is_json(argument):
                raise UserError(
                    f"{prefix}{name} must be text, a number, True, False, None, or a list or a dict of these by name, "
                    f"not {shown(argument)}"
                )
        check_text(section.to_dict(), prefix[:-1])
        return
    for name in section:
        if name not in defaults:
            raise UserError(f"unknown config key {prefix + str(name)!r}{nearest(str(name), defaults)}")
    for name, default in defaults.items():
        key = prefix + name
        if name not in section:
            raise UserError(f"the config has no key {key!r}; begin with get_config() of configs/base.py")
        if isinstance(default, ConfigDict):
            _check_section(section[name], default, f"{key}.")
        elif prefix == "loss." and name != "name":
            _check_hyperparameter(section["name"], name, section[name], key)
        else:
            _check_value(section[name], defaults.get_type(name), key, unset=default is None)


def _check_value(value: Any, kind: Any, key: str, *, unset: bool) -> None:
    plain = f"data.{key.rsplit('.', 1)[1]}" if key.startswith(DATA) else key
    if value is None and (unset or plain in UNSET):
        return
    if key in BOUNDS:
        _check_bounds(value, key)
        return
    kinds: Any = (int, float) if kind is float else (list, tuple) if kind is tuple else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{key} must be {KINDS[kind]}, not {shown(value)}")
    if kind is tuple:
        _check_names(value, key)
    check_text(value, key)
    if kind in (int, float):
        range_ = WEIGHT if key.startswith("reward.terms.") else NUMBERS[plain]  # a config file may add terms
        _check_number(value if kind is int else _as_float(value), range_, key)


def _is_json(value: Any) -> bool:
    """Whether a value is one that JSON holds; a tuple counts as a list."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_json(inside) for name, inside in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _check_names(names: Sequence[Any], key: str) -> None:
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise UserError(f"{key} must be {KINDS[tuple]}, but holds {shown(name)}")
        if name in names[:i]:
            raise UserError(f"{key} names {shown(name)} twice")


def _check_bounds(bounds: Any, key: str) -> None:
    """Two numbers, the lower one first; or none."""
    several = isinstance(bounds, list | tuple) and len(bounds) in (0, 2)
    if not several or any(isinstance(x, bool) or not isinstance(x, int | float) for x in bounds):
        raise UserError(f"{key} must be two numbers, as (0.0, 1.0), or (), not {shown(bounds)}")
    for number in bounds:
        _check_number(_as_float(number), Range(-LARGEST, LARGEST), key)
    if bounds and not np.float32(bounds[0]) < np.float32(bounds[1]):
        raise UserError(f"{key} = {shown(tuple(bounds))}: the least reward must be below the greatest")
    if bounds and bounds[1] - bounds[0] > LARGEST:
        raise UserError(f"{key} = {shown(tuple(bounds))}: they are further apart than float32 has numbers")


def _as_float(value: float) -> float:
    return math.copysign(INF, value) if isinstance(value, int) and abs(value) > LARGEST else float(value)


def _check_number(value: float, range_: Range, key: str) -> None:
    fault = range_.fault(value)
    if fault:
        raise UserError(f"{key} {fault}, not {shown(value)}")


def _check_loss(name: str, section: Any, prefix: str) -> None:
    """A section of loss_defaults."""
    names = hyperparameters(lookup(LOSSES, name, "loss in loss_defaults"))
    if not isinstance(section, ConfigDict):
        raise UserError(f"config key {prefix[:-1]!r} must be a section, not {shown(section)}")
    for key in section:
        if key not in names:
            raise UserError(f"loss {name!r} has no hyperparameter {key!r}{nearest(key, names)}; see {prefix}{key}")
        _check_hyperparameter(name, key, section[key], prefix + key)


def _check_hyperparameter(loss: Any, name: str, value: Any, key: str) -> None:
    """Its words, or by the table where the loss is of this package; of another's numbers, NaN alone is refused."""
    if value is None and key.startswith("loss."):
        return
    known = words(LOSSES[loss]).get(name) if loss in LOSSES else None
    if known is not None:
        check_word(value, known, key)
        return
    if loss in LOSSES and name not in hyperparameters(LOSSES[loss]) and isinstance(value, str):
        return  # a word of another loss, which `bind_loss` refuses
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key} must be a number, not {shown(value)}")
    if value != value:
        raise UserError(f"{key} must be a number, not nan")
    if loss in LOSSES and is_own(loss):
        entry = next((entry for entry in (f"{loss}.{name}", name) if entry in HYPERPARAMETERS), None)
        if entry is not None:
            _check_number(_as_float(value), HYPERPARAMETERS[entry], key)


def is_own(loss: str) -> bool:
    """Whether a loss is of this package, and not of a config file."""
    function: Any = LOSSES[loss]
    while hasattr(function, "func"):  # a partial
        function = function.func
    return function.__module__.startswith("dppo_jax.")


def numeric_keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Every key of a config that holds a number, or may."""
    for name in config:
        kind = config.get_type(name)
        if isinstance(config[name], ConfigDict):
            yield from numeric_keys(config[name], f"{prefix}{name}.")
        elif kind in (int, float):
            yield prefix + name


def shown(value: Any) -> str:
    """A value, short enough for a sentence, on one line."""
    if isinstance(value, int) and not isinstance(value, bool) and (value.bit_length() > 100):
        return f"a whole number of {math.floor(value.bit_length() * math.log10(2))} digits or more"
    text = " ".join(repr(value).split())  # the repr of some values has several lines
    return text if len(text) <= 60 else f"{text[:57]}..."
