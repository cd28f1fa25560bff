"""Configs with a few keys changed: what no key may hold, what each may hold, and what it may or may not.

Values come by attribute, as a config file sets them, and by override, as the command line does.
"""

import math
import random
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dppo_jax.errors import UserError
from experiments.run import checks
from experiments.run.cli import keys, load_config
from experiments.run.remarks import remarks
from experiments.run.setup import Setup
from experiments.trace import trace

BASES = ["configs/quickstart.py", "configs/reuse.py", *(f"configs/methods.py:{m}" for m in ("ppo", "dapo", "max_rl"))]
NAN, INF = math.nan, math.inf

# What no key of this kind may hold: by attribute, and as the text of an override.
NEVER: dict[type, tuple[list[Any], list[str]]] = {
    int: (
        [NAN, -INF, INF, -5, 10**20, 10**5000, 1.5, True, None, "many", "7", [3], (1, 2), {}, b"1", 1j],
        ["nan", "-5", "99999999999999999999", "9" * 5000, "1.5", "1e3", "many", "", "()", "None", "True", "a\nb"],
    ),
    float: (
        [NAN, -INF, -5.0, -5, None, "many", [0.5], {}, 1j, np.zeros(2)],
        ["nan", "-nan", "-inf", "-5", "many", "", "(0.5,)", "None", "True", "0x1", "1e"],
    ),
    bool: ([None, 1, 0, "True", "yes", 1.0, [True], NAN], ["maybe", "", "2", "None", "()", "nan"]),
    str: ([None, 7, 1.5, True, ["a"], b"a", "\ud800", NAN, {}], ["\ud800", "a\udfffb"]),
    tuple: ([None, 7, True, "q", (7,), ("q", "q"), ("nope",), (None,), ("",), {}], ["7", "('q','q')", "nope", "(1,2)"]),
}
# And what else these may not: from the definition of each.
OUTSIDE: dict[str, list[float]] = {
    "seed": [2**32],
    "data.seed": [2**32],
    "steps": [0],
    "rollout.group_size": [0],
    "rollout.temperature": [0.0, INF],
    "rollout.top_p": [0.9, 1.1, 0.0],
    "eval.top_p": [0.0, 1.5],
    "eval.temperature": [INF, 1e300, 1e-30],
    "reward.time_limit_s": [0.0, 1e-9, 3e9, 1e300, INF],
    "reward.overlong_buffer": [10_000],
    "reward.workers": [0, 10**6],
    "aggregation.constant": [0.0, INF, 1e38],
    "critic.discount": [1.01, INF],
    "critic.lam": [5.0],
    "critic.learning_rate": [INF],
    "critic.lam_alpha": [0.0, INF],
    "critic.max_prompt_len": [0],
    "optimizer.learning_rate": [INF, 1e300],
    "optimizer.b1": [1.0, 2.0, 1 - 1e-12],
    "optimizer.b2": [1.0, 1.5],
    "optimizer.eps": [0.0, 1e-50],
    "optimizer.clip_norm": [0.0],
    "optimizer.weight_decay": [INF],
    "reference.coef": [INF],
    "alp.sigma": [INF],
    "lora.alpha": [0.0, INF],
    "mesh.data": [0],
    "train.staleness": [2],
    "train.minibatches": [0, 7],
    "loss.delta_low": [-1.0],
    "loss.eps_high": [-0.1],
    "loss.ratio_cap": [-5.0],
    "loss_defaults.cispo.ratio_cap": [-5.0],
    "loss_defaults.icepop.correction_high": [0.0],
    "loss_defaults.drpo.delta": [0.0],
    "loss_defaults.cppo.w_min": [1.5],
    "loss_defaults.dual_clip.dual_cap": [0.5],
    "loss_defaults.kimi_k25.tau": [INF],
}
# Right by themselves in each of the bases.
GOOD: dict[str, list[Any]] = {
    "seed": [0, 2**32 - 1],
    "steps": [1, 10_000],
    "policy.temperature": [0.5],
    "policy.dtype": ["bfloat16"],
    "lora.targets": [("q", "v"), ["k"]],
    "data.seed": [2**32 - 1],
    "rollout.slots": [0, 8],
    "rollout.lag": [2],
    "reward.time_limit_s": [1.0, 3600.0],
    "critic.lam": [0.0, 1.0],
    "critic.lam_alpha": [0.4],
    "critic.bounds": [(), (-1, 1.5)],
    "critic.targets": ["monte_carlo"],
    "critic.value_clip": [INF],
    "train.micro_rows": [1, 10**6],
    "train.pack": [False],
    "optimizer.learning_rate": [0.0, 1, 1e30],
    "optimizer.b1": [0, 0.5],
    "optimizer.clip_norm": [INF],
    "eval.temperature": [0.0, 2.0],
    "log.regions": [("cispo",), ("kpop", "gspo")],
    "loss_defaults.cispo.ratio_cap": [INF],
    "loss_defaults.dppo_binary_tv.delta_low": [INF, 0.0],
    "mesh.fsdp": [1, -1],
    "compile_cache": ["", "~/somewhere", "/dev/null/x"],
    "label_cache": ["", "~/somewhere", "/dev/null/x"],
}
# Values that a key may or may not take.
ODD_PATHS = ["hdfs://x", "gs:/x/y", "~nobody_at_all/x", "~", "\0"]
ODD_TEXT = ["", " ", "x" * 5000, "a\nb", *ODD_PATHS, "cispoo", "ppo_clip", "-1"]
ODD_NUMBERS = [0, 1, -1, 2, 3, 1e-45, 1e38, 2**31, 2**20, INF, NAN]
ODD = [*ODD_TEXT, *ODD_NUMBERS, None, True, (), ("cispo",), ("q", "up"), {"a": 1}, "{}"]


def put(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key as a careless config file may: whatever its kind, and whether it is there or not."""
    *path, last = key.split(".")
    for name in path:
        config = config[name]
    with config.unlocked(), config.ignore_type():
        if isinstance(value, int) and value.bit_length() > 60 and isinstance(config.get(last), float):
            value = float(10**20)  # ml_collections itself refuses larger ones
        config[last] = value


def refusal(path: str, overrides: list[str], changes: dict[str, Any], *, traced: bool = False) -> str | None:
    """The sentence that refuses a config; None where it is taken, and what it builds can be built."""
    try:
        config = load_config(path, overrides)
        for key, value in changes.items():
            put(config, key, value)
        checks.check(config)
        remarks(config)
        Setup(config).loss  # noqa: B018
        assert math.isfinite(float(Setup(config).learning_rate(0)))
        if traced:
            trace(config)
    except UserError as error:
        return str(error)
    return None


def kinds(config: ConfigDict) -> dict[str, type]:
    """The kind of every key that is no section; of a placeholder, that of its values."""
    found = {}
    for key, value in keys(config):
        *path, last = key.split(".")
        section = config
        for name in path:
            section = section[name]
        if not isinstance(value, ConfigDict) and ".settings." not in key:
            found[key] = section.get_type(last)
    return found


def may_be_unset(config: ConfigDict, key: str) -> bool:
    """A placeholder, whose None says that something else is taken; how many rows there are, too."""
    return checks.value(config, key) is None or key.endswith(".size")


def is_never(config: ConfigDict, key: str, kind: type, value: Any) -> bool:
    """Whether a value of NEVER is wrong for this key."""
    if (value is None or (isinstance(value, str) and value == "None")) and may_be_unset(config, key):
        return False
    if key == "rollout.stop" and value in ("nope", ("nope",)):
        return False
    if key == "critic.bounds" and value in ((1, 2), "(1,2)"):
        return False
    return not (key == "log.regions" and value == "q")  # no name of a loss, but text all the same


def mutation(draw: random.Random, config: ConfigDict, by_text: bool) -> tuple[str, Any, str]:
    """(key, value, whether it must be "refused", may be "either" or, by itself, is "taken")."""
    table, sort = kinds(config), draw.choice(["never", "never", "outside", "odd", "good"])
    if sort == "outside":
        key = draw.choice([key for key in OUTSIDE if key in table])
        value: Any = draw.choice(OUTSIDE[key])
        return key, repr(value) if by_text else value, "refused"
    if sort == "good":
        key = draw.choice([key for key in GOOD if key in table])
        value = draw.choice(GOOD[key])
        return key, str(value) if by_text else value, "taken"
    key = draw.choice(sorted(table))
    if sort == "never":
        value = draw.choice(NEVER[table[key]][by_text])
        return key, value, "refused" if is_never(config, key, table[key], value) else "either"
    return key, str(draw.choice(ODD)) if by_text else draw.choice(ODD), "either"
