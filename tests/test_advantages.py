"""Advantages against float64, whatever the order of the rows, and on groups where there is nothing to learn."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax.advantages import ADVANTAGES, gae
from dppo_jax.errors import UserError
from tests.helpers.places import GOLDEN

with np.load(GOLDEN / "losses" / "losses.npz") as _file:
    STORED = {name: x for name, x in _file.items() if name.split("/")[0] in ("advantages", "gae", "gae_holes", "json")}
GAE = json.loads(str(STORED["json/gae"]))
NAMES = ("group_mean", "group_mean_std", "leave_one_out", "max_rl", "batch_norm", "batch_mean")
GROUPED = tuple(name for name in NAMES if name != "batch_mean")  # those that compare a response with its group
RUN = {"eager": lambda f: f, "jit": jax.jit}
GROUPS = 6


WITH_DDOF = ("group_mean_std", "batch_norm")


def call(name, rewards, group, num_groups=GROUPS, run="eager", **settings):
    f = RUN[run](partial(ADVANTAGES[name], num_groups=num_groups, **settings))
    return f(jnp.asarray(rewards, jnp.float32), jnp.asarray(group, jnp.int32))


def test_the_table_is_complete():
    assert set(ADVANTAGES) == {*NAMES, "reward"}  # that one: test_methods


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("name", [*NAMES, *(f"{name}_ddof1" for name in WITH_DDOF)])
def test_advantages_equal_the_float64_definition(name, run):
    group = STORED["advantages/group"]
    assert (np.diff(group) < 0).any()  # interleaved
    rewards, wanted = STORED["advantages/rewards"], STORED[f"advantages/{name}"]
    settings = {"ddof": 1} if name.endswith("_ddof1") else {}
    for i in range(len(rewards)):
        got = call(name.removesuffix("_ddof1"), rewards[i], group, run=run, **settings)
        assert got.shape == (len(group),) and got.dtype == jnp.float32
        want = wanted[i]
        error = np.abs(np.asarray(got, np.float64) - want) / np.maximum(1, np.abs(want))
        assert error.max() <= 2e-5, i


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_rows_does_not_matter(name):
    group, rewards = STORED["advantages/group"], STORED["advantages/rewards"][1]
    order = np.random.RandomState(0).permutation(len(group))
    got, want = call(name, rewards[order], group[order]), np.asarray(call(name, rewards, group))[order]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.7, 1e3])
@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_give_nothing_to_learn(name, reward):
    """A group mean that misses by a rounding error must not be blown up by a division by 1e-6."""
    for size in (2, 3, 7, 8):
        got = call(name, np.full(2 * size, reward), np.arange(2 * size) % 2, num_groups=2)
        assert np.abs(got).max() <= 2e-5 * max(1.0, reward), size


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_one_are_refused(name, run):
    """Their advantage would always be 0: a run of them learns nothing, to the end and without a word."""
    sentence = f"^{name} needs at least 2 responses per prompt, but . rows form . groups"
    with pytest.raises(UserError, match=sentence):
        call(name, np.zeros(4), np.arange(4), num_groups=4, run=run)
    with pytest.raises(UserError, match=sentence):
        call(name, np.zeros(5), np.array([0, 0, 1, 1, 2]), num_groups=3, run=run)


@pytest.mark.parametrize("run", RUN)
def test_the_mean_of_a_batch_is_for_groups_of_one_and_not_for_a_batch_of_one(run):
    assert call("batch_mean", [1.0, 0.0, 0.0, 1.0], np.arange(4), 4, run).tolist() == [0.5, -0.5, -0.5, 0.5]
    with pytest.raises(UserError, match="^batch_mean needs at least 2 responses in a batch, and there is 1"):
        call("batch_mean", [1.0], [0], num_groups=1, run=run)


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_of_one_among_others_has_no_advantage(name):
    got = call(name, [0.3, 1.0, 0.0, 1.0], [0, 1, 1, 1], num_groups=2)
    assert got[0] == pytest.approx(0, abs=1e-6) and np.isfinite(got).all()


def test_max_rl_learns_nothing_from_a_group_whose_mean_is_not_above_0():
    """A negative mean turned the sign of every advantage, and the run learned the wrong way round."""
    assert call("max_rl", [0.0, -1.0], [0, 0], num_groups=1).tolist() == [0.0, 0.0]
    assert call("max_rl", [1.0, -1.0, 0.0, 0.0], [0, 0, 1, 1], num_groups=2).tolist() == [0.0] * 4
    assert call("max_rl", [0.3, -0.1, -0.2], [0, 0, 0], num_groups=1).tolist() == [0.0] * 3  # 0 but for rounding
    assert call("max_rl", [1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0], num_groups=1).tolist() == [3.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("name", GROUPED)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-5, 5, width=16), min_size=2, max_size=8), min_size=4, max_size=4).map(
        lambda groups: [group + [group[-1]] * (8 - len(group)) for group in groups]
    )
)
def test_what_is_better_than_its_group_has_a_positive_advantage(name, groups):
    """The sign of every advantage is that of R - mean, for rewards of any sign; or it is 0, of max_rl alone."""
    rewards = np.array(groups, np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    got = np.asarray(call(name, rewards.reshape(-1), np.repeat(np.arange(4), 8), num_groups=4)).reshape(4, 8)
    assert np.isfinite(got).all()
    clear = np.abs(centred) > 1e-4
    if name == "max_rl":
        mean = rewards.mean(axis=1, keepdims=True)
        assert not got[(mean <= 0).repeat(8, axis=1)].any()
        clear &= mean > 1e-3
    np.testing.assert_array_equal(np.sign(got[clear]), np.sign(centred[clear]))


@pytest.mark.parametrize("name", WITH_DDOF)
def test_a_sample_deviation_of_one_is_refused_and_of_one_among_others_is_0(name):
    with pytest.raises(UserError, match=f"^{name} needs at least 2 responses per prompt, but 1 rows form 1 groups"):
        call(name, [1.0], [0], num_groups=1, ddof=1)
    assert np.isfinite(got := call(name, [0.3, 1.0, 0.0, 1.0], [0, 1, 1, 1], num_groups=2, ddof=1)).all()
    assert got[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("case", ["gae", "gae_holes"])
@pytest.mark.parametrize("i", range(len(GAE)))
def test_gae_equals_the_float64_definition(i, case, run):
    rewards, values, mask = (STORED[f"{case}/{name}"] for name in ("rewards", "values", "mask"))
    f = RUN[run](partial(gae, **GAE[i]))
    got = f(rewards, values, mask)
    assert got.shape == rewards.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, STORED[f"{case}/advantages"][i], rtol=2e-5, atol=2e-5)
    assert (np.asarray(got)[~mask] == 0).all()
    for spoiled in (np.nan, np.inf):
        again = f(np.where(mask, rewards, spoiled), np.where(mask, values, spoiled), mask)
        np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("run", RUN)
def test_gae_gradients_are_finite_and_stay_inside_the_mask(run):
    rewards, values, mask = (STORED[f"gae/{name}"] for name in ("rewards", "values", "mask"))
    f = lambda r, v: gae(r, v, mask, discount=0.9, lam=0.8).sum()  # noqa: E731
    spoiled = np.where(mask, rewards, np.nan), np.where(mask, values, np.nan)
    for grad in RUN[run](jax.grad(f, argnums=(0, 1)))(*spoiled):
        assert np.isfinite(grad).all() and (np.asarray(grad)[~mask] == 0).all()


def test_gae_does_not_see_where_the_holes_are():
    """The chain was cut at a hole: what came before it never saw the reward after it."""
    rewards, values, mask = (STORED[f"gae_holes/{name}"] for name in ("rewards", "values", "mask"))
    got = np.asarray(gae(rewards, values, mask, discount=0.9, lam=0.8))
    for row, inside in enumerate(mask):
        alone = gae(*(x[row, inside][None] for x in (rewards, values, mask)), discount=0.9, lam=0.8)
        np.testing.assert_allclose(got[row, inside], alone[0], rtol=1e-5, atol=1e-6)


def test_gae_with_lambda_one_is_return_minus_value():
    rng = np.random.RandomState(0)
    rewards, values = rng.standard_normal((2, 3, 5)).astype(np.float32)
    got = gae(rewards, values, np.ones((3, 5), bool), discount=1.0, lam=1.0)
    np.testing.assert_allclose(got, np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1] - values, atol=1e-5)
