"""Hundreds of configs with one to three keys changed: each is taken, or refused in one sentence that names a key.

Values come by attribute, as a config file sets them, and by override, as the command line does. A value that can never
be right must be refused; nothing may raise another exception, or take longer than LIMIT_S.
"""

import contextlib
import math
import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from dppo_jax.errors import UserError
from experiments.run import checks
from experiments.run.cli import keys, load_config
from experiments.run.remarks import remarks
from experiments.run.setup import Setup
from experiments.trace import trace
from tests.helpers.places import ROOT

LIMIT_S = 20.0  # of one case, on a busy machine
CASES, SHARDS = 320, 8
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


class TooLong(BaseException):
    """A case that took longer than LIMIT_S. No `except Exception` catches it."""


@contextlib.contextmanager
def limit() -> Iterator[None]:
    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
    if value is None and may_be_unset(config, key):
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


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_mutated_config_is_taken_or_refused_in_a_sentence(shard):
    draw, counts = random.Random(shard), {"refused": 0, "taken": 0}
    for number in range(CASES // SHARDS):
        path, by_text = draw.choice(BASES), draw.random() < 0.5
        config = load_config(path, [])
        found = {}
        for _ in range(draw.choice([1, 1, 2, 3])):
            key, value, verdict = mutation(draw, config, by_text)
            found[key] = value, verdict
        values = {key: value for key, (value, _) in found.items()}
        listed = ", ".join(f"{key} = {checks.shown(value)}" for key, value in values.items())
        case = f"{path}, {'by text' if by_text else 'by attribute'}: {listed}"
        overrides = [f"--config.{key}={value}" for key, value in values.items()] if by_text else []
        try:
            with limit():
                said = refusal(path, overrides, {} if by_text else values, traced=number == 0)
        except BaseException as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}"[:1000]) from error
        counts["taken" if said is None else "refused"] += 1
        verdicts = {verdict for _, verdict in found.values()}
        if "refused" in verdicts:
            assert said is not None, f"{case}: taken"
        if verdicts == {"taken"} and len(found) == 1:
            assert said is None, f"{case}: refused: {said}"
        if said is not None:
            assert "\n" not in said and len(said) < 600, f"{case}: {said!r}"
            assert any(part in said for key in found for part in key.split(".")), f"{case}: {said}"
    assert min(counts.values()) > 0, counts


STRUCTURES = {
    "unknown config key 'optimizer.momentum'": ("optimizer.momentum", 0.9),
    "unknown config key 'stepz'; the nearest is 'steps'": ("stepz", 3),
    "config key 'optimizer' must be a section, not 7": ("optimizer", 7),
    "the config has no key 'log.histograms'": ("log", {"samples": 1}),
    "the config has no key 'eval.sets.more.": ("eval.sets.more", {}),
    "config key 'eval.sets.more' must be a section, not 3": ("eval.sets.more", 3),
    "unknown config key 'eval.sets.more.pth'; the nearest is 'path'": ("eval.sets.more", {"pth": "x"}),
    "unknown loss in loss_defaults 'cispoo'; the nearest is 'cispo'": ("loss_defaults.cispoo", {"ratio_cap": 5.0}),
    "loss 'cispo' has no hyperparameter 'ratio_capp'; the nearest is 'ratio_cap'": (
        "loss_defaults.cispo",
        {"ratio_capp": 5.0},
    ),
    "loss_defaults.cispo.ratio_cap must be a number, not None": ("loss_defaults.cispo", {"ratio_cap": None}),
    "data.settings has a setting 1, which is no name": ("data.settings", {1: 2}),
    "data.chat_kwargs has an argument 1, which is no name": ("data.chat_kwargs", {1: 2}),
    "data.chat_kwargs.a must be text, a number, True, False, None, or a list or a dict of these by name, not ": (
        "data.chat_kwargs",
        {"a": [{"b": {1: 2}}]},
    ),
    "the config has no key 'data.columns.answer'": ("data.columns", {"prompt": "q"}),
    "data.columns.prompt must be text, not 3": ("data.columns", {"prompt": 3, "answer": ""}),
    "data.kind = 'reasoning_gym' has no rows for data.columns.prompt = 'q'; clear it: --config.data.columns.prompt=": (
        "data.columns",
        {"prompt": "q", "answer": "", "verifier": ""},
    ),
    "data.kind = 'reasoning_gym' has no rows for data.answer_from = '####'": ("data.answer_from", "####"),
}


@pytest.mark.parametrize(("sentence", "change"), STRUCTURES.items(), ids=STRUCTURES)
def test_a_config_of_another_structure(sentence, change):
    said = refusal("configs/quickstart.py", [], {change[0]: change[1]})
    assert said is not None and said.startswith(sentence), said
