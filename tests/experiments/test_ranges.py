"""The table of ranges: every numeric key of base.py is in it, and its ends are where they should be."""

import math
from typing import Literal

import jax
import numpy as np
import pytest

from configs import base
from dppo_jax.errors import UserError
from dppo_jax.losses import LOSSES, from_keep, hyperparameters, words
from experiments.run import checks
from experiments.run.ranges import HYPERPARAMETERS, NUMBERS, Range, check_values, is_own, numeric_keys
from experiments.run.remarks import remarks
from experiments.run.setup import Setup

OF_LOSSES = ("loss.", "loss_defaults.")


@pytest.fixture
def config():
    return base.get_config()


def test_every_numeric_key_has_a_range_and_every_range_a_key(config):
    found = set(numeric_keys(config))
    assert {"seed", "optimizer.b1", "data.size", "policy.temperature", "mesh.fsdp", "loss.tau"} <= found
    assert {key for key in found if not key.startswith(OF_LOSSES)} == set(NUMBERS)


def test_every_hyperparameter_has_a_range_and_every_range_a_hyperparameter(config):
    wanted = {name: hyperparameters(LOSSES[name]) - set(words(LOSSES[name])) for name in LOSSES if is_own(name)}
    assert set(LOSSES) == set(wanted)
    for entry in HYPERPARAMETERS:
        loss, _, name = entry.rpartition(".")
        assert name in (wanted[loss] if loss else set.union(*map(set, wanted.values()))), entry
    assert set.union(*map(set, wanted.values())) <= set(HYPERPARAMETERS)
    keys = {key.split(".")[-1] for key in numeric_keys(config) if key.startswith(OF_LOSSES)}
    assert keys <= set(HYPERPARAMETERS)


def test_evaluation_sets_have_the_ranges_of_the_data(config):
    config.eval.sets.one = base.data_section(seed=2**32)
    with pytest.raises(UserError, match="^eval.sets.one.seed must be at most 4294967295, not 4294967296$"):
        check_values(config)


@pytest.mark.parametrize("key", sorted(NUMBERS))
def test_no_key_takes_nan_or_less_than_its_least(config, key):
    *path, last = key.split(".")
    section = config
    for name in path:
        section = section[name]
    for value in (math.nan, -math.inf, -2):
        with config.ignore_type():
            section[last] = value
        with pytest.raises(UserError, match=f"^{key} must be "):
            check_values(config)


def test_ends_that_are_open_closed_rounded_and_alone():
    half = Range(0, 1, open_most=True)
    assert half.fault(0.0) is None and half.fault(0.999999) is None
    assert half.fault(1.0) == half.fault(math.nan) == "must be at least 0 and below 1"
    assert half.fault(1 - 1e-12) == "must be at least 0 and below 1 in float32, too"
    assert np.float32(1 - 1e-12) == 1
    above = Range(open_least=True, inf=True)
    assert above.fault(math.inf) is above.fault(1e300) is above.fault(1e-30) is None
    assert above.fault(0.0) == "must be above 0" and above.fault(1e-50).startswith("must be at least 1.2e-38, what")
    assert Range().fault(math.inf) == "must be finite" and Range().fault(1e300).startswith("must be at most 3.4e+38")
    assert Range().fault(1e-50).startswith("must be 0 or at least 1.2e-38")
    assert Range(1, 8, also=-1).fault(-1) is None and Range(1, 8, also=-1).fault(0) == "must be -1, or at least 1"


def test_two_seeds_of_the_range_have_two_keys():
    """jax takes 32 bits of a seed: the next one is 0 again."""
    most = int(NUMBERS["seed"].most)
    keys = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in (0, 1, 2**31, most)}
    assert len(keys) == 4
    assert tuple(jax.random.key_data(jax.random.key(most + 1)).tolist()) == (0, 0)


@pytest.fixture
def own_loss(monkeypatch):
    """A loss of a config file: its hyperparameters have names of its own, and some of ours."""

    def mine(inputs, *, floor, delta):
        return from_keep(inputs, inputs.logp - inputs.behavior_logp > min(floor, delta), ratio_cap=5.0)

    monkeypatch.setitem(LOSSES, "mine", mine)
    config = base.get_config()
    config.loss.name, config.loss.floor, config.loss.delta = "mine", -1e300, -7.0
    return config


def test_a_loss_of_ones_own_may_have_any_number_but_nan(own_loss):
    checks.check(own_loss)
    assert Setup(own_loss).loss.keywords == {"floor": -1e300, "delta": -7.0}
    own_loss.loss.floor = math.nan
    with pytest.raises(UserError, match=r"^loss.floor must be a number, not nan$"):
        checks.check(own_loss)
    own_loss.loss.floor = 0.0
    own_loss.loss.name = "trm_max"
    own_loss.loss.floor = None
    with pytest.raises(UserError, match=r"^loss.delta must be at least 0, not -7.0$"):
        checks.check(own_loss)


def test_a_loss_of_ones_own_may_have_words(monkeypatch):
    """A Literal in its signature is enough: the key holds text, and what is none of the words is refused."""

    def mine(inputs, *, side: Literal["left", "right"]):
        return from_keep(inputs, inputs.logp < 0 if side == "left" else inputs.mask, ratio_cap=5.0)

    monkeypatch.setitem(LOSSES, "mine", mine)
    config = base.get_config()
    config.loss.name, config.loss.side = "mine", "left"
    checks.check(config)
    assert Setup(config).loss.keywords == {"side": "left"}
    config.loss.side = "lift"
    with pytest.raises(UserError, match="^unknown loss.side 'lift'; the nearest is 'left'$"):
        checks.check(config)


WORDS = {
    "loss_defaults.pdm_topk_kl.tail": ("unifrom", "unknown KEY 'unifrom'; the nearest is 'uniform'"),
    "loss_defaults.pdm_topk_tv.tail": (0.5, "KEY must be text, not 0.5; known: aggregated, uniform"),
    "loss.tail": ("uniform", "loss 'dppo_binary_tv' has no hyperparameter 'tail'"),
}


@pytest.mark.parametrize("key", WORDS)
def test_a_hyperparameter_that_is_text_is_one_of_its_words(config, key):
    value, said = WORDS[key]
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=said.replace("KEY", key)):
        checks.check(config)


def test_a_learning_rate_of_0_is_told_and_not_refused(config):
    assert remarks(config) == []
    config.optimizer.learning_rate = 0.0
    checks.check(config)
    (said,) = remarks(config)
    assert said == "optimizer.learning_rate = 0: every step is measured, and the policy stays as it is"


def test_a_traced_step_beyond_the_end_is_told(config):
    config.log.profile_step = config.steps - 1
    assert remarks(config) == []
    config.log.profile_step = config.steps
    checks.check(config)
    (said,) = remarks(config)
    assert said == f"log.profile_step = {config.steps}: of {config.steps} steps none is traced"


def test_what_a_critic_is_told_for_nothing_is_said(config):
    config.critic.bounds = (0.5, 2.0)
    assert remarks(config) == ["critic.bounds = (0.5, 2.0): advantage 'group_mean' has no critic"]
    config.advantage.name, config.critic.learning_rate = "gae", 0.0
    config.critic.lam, config.critic.lam_alpha = 0.5, 0.4
    assert remarks(config) == [
        "critic.learning_rate = 0: the critic stays as it is",
        "critic.lam = 0.5: critic.lam_alpha = 0.4 gives each response its own",
        "critic.bounds = (0.5, 2.0): rewards lie between 0 and 1, and values outside the bounds cannot be learned",
    ]
    config.critic.bounds = (-3e38, 3e38)
    with pytest.raises(UserError, match="further apart than float32 has numbers"):
        checks.check(config)


def test_what_a_critic_should_see_is_told_where_there_is_none(config):
    config.critic.privileged = "answer"
    checks.check(config)
    (said,) = remarks(config)
    assert said == "critic.privileged = 'answer': advantage 'group_mean' has no critic"


def test_the_divisor_of_a_deviation_reaches_the_advantage(config):
    config.advantage.name, config.rollout.prompts = "batch_norm", 1
    rewards, group = np.array([1.0, 0.0, 0.0, 1.0], np.float32), np.zeros(4, np.int32)
    population = Setup(config).advantages(rewards, group)
    config.advantage.ddof = 1
    np.testing.assert_allclose(Setup(config).advantages(rewards, group), population * np.sqrt(3 / 4), rtol=1e-5)
