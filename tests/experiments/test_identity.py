"""A run that began before a key of the data was there goes on where the key has its default."""

import pytest

from configs import base
from dppo_jax.errors import UserError
from dppo_jax.storage.run_config import plain
from experiments.run.identity import Identity, compare


def config(**changes):
    c = base.get_config()
    c.eval.sets.held_out = base.data_section(**changes)
    return plain(c.to_dict())


def identity(of):
    return Identity(of, "w", "m", {"data": "p", "eval.sets.held_out": "q"}, {"data": 3, "eval.sets.held_out": 3})


def test_keys_of_the_data_that_are_new(tmp_path):
    saved = identity(config()).saved()
    for data in (saved["config"]["data"], saved["config"]["eval"]["sets"]["held_out"]):
        for key in ("columns", "answer_from", "bad_label"):
            del data[key]
    del saved["config"]["label_cache"]
    assert compare(saved, identity(config()), tmp_path) == []
    for changes in ({"columns": {"answer": "a"}}, {"answer_from": "####"}, {"bad_label": "drop"}):
        with pytest.raises(UserError, match=rf"eval\.sets\.held_out\.{next(iter(changes))}"):
            compare(saved, identity(config(**changes)), tmp_path)


def test_a_changed_reward_function_is_told(tmp_path):
    now = identity(config())
    before = now._replace(reward="another").saved()
    assert compare(before, now._replace(reward="one"), tmp_path) == [
        "the file of reward.function was changed: rewards before and after do not compare"
    ]
    assert compare({name: value for name, value in before.items() if name != "reward"}, now, tmp_path) == []
