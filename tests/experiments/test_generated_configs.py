"""Hundreds of configs with one to three keys changed: each is taken, or refused in one sentence that names a key.

Values come by attribute, as a config file sets them, and by override, as the command line does. A value that can never
be right must be refused; nothing may raise another exception, or take longer than LIMIT_S.
"""

import random

import pytest

from experiments.chaos.inputs.config_keys import kinds, refusal
from experiments.chaos.inputs.configs import judge
from experiments.chaos.inputs.judge import limited
from experiments.run.cli import load_config
from tests.helpers.places import ROOT

LIMIT_S = 20.0  # of one case, on a busy machine
CASES, SHARDS = 320, 8


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_mutated_config_is_taken_or_refused_in_a_sentence(shard, tmp_path):
    counts = {True: 0, False: 0}
    for number in range(CASES // SHARDS):
        with limited(LIMIT_S):
            counts[judge(random.Random(f"{shard} {number}"), tmp_path).refused] += 1
    assert min(counts.values()) > 0, counts


STRUCTURES = {
    "unknown config key 'optimizer.momentum'": ("optimizer.momentum", 0.9),
    "unknown config key 'stepz'; the nearest is 'steps'": ("stepz", 3),
    "config key 'optimizer' must be a section, not 7": ("optimizer", 7),
    "the config has no key 'log.events_mb'": ("log", {"samples": 1}),
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


def test_a_long_text_is_not_repeated_whole():
    """In no key that holds text or names."""
    value, told, known = "a 'b\" " * 300 + "x" * 3000, [], kinds(load_config("configs/quickstart.py", []))
    for key in (key for key, kind in known.items() if kind in (str, tuple)):
        said = refusal("configs/quickstart.py", [f"--config.{key}={value}"], {})
        if said is not None:
            assert len(said) < 600, said
            told.append(key)
    assert len(told) > 40 and {"loss.name", "policy.path", "log.regions", "data.answer_from"} <= set(told)
