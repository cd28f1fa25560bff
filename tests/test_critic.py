"""The critic: what it starts from, its estimates against a plain loop, and that its updates fit fixed returns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dppo_jax import packing
from dppo_jax.critic import (
    Estimates,
    bounded,
    init_critic,
    last_token,
    length_lam,
    make_critic_update,
    make_estimate,
    make_values,
)
from dppo_jax.train_step import init_state
from dppo_jax.types import TrainBatch
from dppo_jax.weights import token_mean
from tests.helpers.fixtures import TINY, random_params

PROMPTS, RESPONSES = np.array([3, 5, 2, 5]), np.array([4, 1, 6, 3])


@pytest.fixture(scope="module")
def batch() -> TrainBatch:
    draw = np.random.default_rng(0).integers
    rows, width, length = len(PROMPTS), PROMPTS.max(), RESPONSES.max()
    mask = np.arange(length) < RESPONSES[:, None]
    return TrainBatch(
        prompt_tokens=jnp.asarray(draw(2, TINY.vocab_size, (rows, width)), jnp.int32),
        prompt_mask=jnp.asarray(np.arange(width) >= width - PROMPTS[:, None]),
        tokens=jnp.asarray(draw(2, TINY.vocab_size, (rows, length)), jnp.int32),
        mask=jnp.asarray(mask),
        behavior_logp=jnp.zeros(mask.shape),
        advantages=jnp.zeros(rows),
    )


@functools.cache
def plan() -> packing.Plan:
    layout = packing.pack_shape(prompt_length=5, max_new_tokens=6, rows=1, mean_prompt=4.0, multiple=1)
    return packing.plan(np.arange(4), PROMPTS, RESPONSES, layout)


def critic():
    params = init_critic(jax.tree.map(jnp.asarray, random_params()))
    weight = 0.3 * np.random.default_rng(1).standard_normal(params["value"]["weight"].shape)
    return {**params, "value": {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.float32(0.2)}}


VALUES = make_values(TINY, dtype=jnp.float32, remat="none")


def test_every_value_is_zero_at_first(batch):
    estimate = jax.jit(make_estimate(VALUES, discount=1.0, lam=1.0, whiten=False))
    advantages, estimates = estimate(init_critic(random_params()), batch, plan(), jnp.arange(4.0))
    assert (estimates.values == 0).all()
    np.testing.assert_allclose(advantages, np.where(batch.mask, np.arange(4.0)[:, None], 0.0), atol=1e-6)


@pytest.mark.slow
def test_estimates_against_a_plain_loop(batch):
    rewards, discount, lam = np.array([1.0, 0.0, 0.5, -1.0]), 0.9, 0.8
    params = critic()
    estimate = jax.jit(make_estimate(VALUES, discount=discount, lam=lam, whiten=False))
    advantages, estimates = estimate(params, batch, plan(), jnp.asarray(rewards, jnp.float32))
    whitened, _ = jax.jit(make_estimate(VALUES, discount=discount, lam=lam, whiten=True))(
        params, batch, plan(), jnp.asarray(rewards, jnp.float32)
    )
    from dppo_jax.models.decoder import forward

    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        tokens = np.concatenate([batch.prompt_tokens[row, -prompt:], batch.tokens[row, :response]])[None]
        hidden = np.asarray(forward(TINY, params["body"], jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32)))[0]
        value = (hidden @ np.asarray(params["value"]["weight"]) + 0.2)[prompt - 1 : prompt - 1 + response]
        np.testing.assert_allclose(estimates.values[row, :response], value, rtol=2e-4, atol=2e-5)
        following, advantage = 0.0, 0.0
        for t in reversed(range(response)):
            reward = rewards[row] if t == response - 1 else 0.0
            advantage = reward + discount * following - value[t] + discount * lam * advantage
            following = value[t]
            assert abs(float(advantages[row, t]) - advantage) < 1e-4
            assert abs(float(estimates.returns[row, t]) - advantage - value[t]) < 1e-4
    inside = np.asarray(whitened)[np.asarray(batch.mask)]
    assert abs(inside.mean()) < 1e-6 and abs(inside.std() - 1) < 1e-3


def test_the_reward_comes_with_the_last_token(batch):
    found = np.asarray(last_token(jnp.arange(1.0, 5.0), batch.mask))
    assert [found[row, count - 1] for row, count in enumerate(RESPONSES)] == [1, 2, 3, 4]
    assert found.sum() == 10


def test_the_reward_of_a_response_with_holes_comes_with_its_last_own_token():
    mask = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    found = last_token(jnp.array([2.0, 3.0, 5.0]), jnp.asarray(mask))
    np.testing.assert_array_equal(found, [[0, 0, 0, 2, 0], [3, 0, 0, 0, 0], [0] * 5])


# --- what BPCO changes ---

LOW, HIGH = -0.5, 2.0


def test_a_bounded_value_is_the_float64_definition():
    heads = np.concatenate([np.linspace(-8, 8, 33), [-1e30, -1e6, 1e6, 1e30]])
    expected = LOW + (HIGH - LOW) * (0.5 + np.arctan(heads) / np.pi)
    found = np.asarray(bounded(jnp.asarray(heads, jnp.float32), LOW, HIGH))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-7)
    assert found.min() >= LOW and found.max() <= HIGH
    assert float(bounded(jnp.float32(0), LOW, HIGH)) == (LOW + HIGH) / 2


def test_the_gradient_of_a_bounded_value_is_finite_however_large_the_head_is():
    heads = np.array([-3e38, -1e20, -30, -1, 0, 0.5, 100, 1e25, 3e38])
    found = np.asarray(jax.vmap(jax.grad(lambda z: bounded(z, LOW, HIGH)))(jnp.asarray(heads, jnp.float32)))
    expected = (HIGH - LOW) / np.pi / (1 + heads**2)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-37)


def test_lambda_by_length_is_the_float64_definition_and_never_negative():
    lengths = np.array([0, 1, 2, 3, 10, 24, 30_000])
    found = np.asarray(length_lam(jnp.asarray(lengths), 0.4))
    expected = [max(0.0, 1 - 1 / (0.4 * max(n, 1))) for n in lengths]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found[:3] == 0).all() and (found[3:] > 0).all()


def test_a_bounded_critic_begins_in_the_middle(batch):
    values = make_values(TINY, dtype=jnp.float32, remat="none", bounds=(LOW, HIGH))
    packed = packing.pack(batch, jnp.ones(batch.mask.shape), packing.microbatch(plan(), jnp.int32(0)))
    found = np.asarray(jax.jit(values)(init_critic(random_params()), packed))
    assert (found == (LOW + HIGH) / 2).all()


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_estimates_with_lambda_by_length_and_monte_carlo_targets(batch, discount):
    """Against plain loops, with values that are a table of tokens: nothing of the critic's network is in them."""
    table = np.random.default_rng(2).normal(size=TINY.vocab_size)
    rewards, penalties = np.array([1.0, 0.0, 0.5, -1.0]), np.random.default_rng(3).normal(size=batch.mask.shape)

    def look_up(params, packed):
        return params[packed.targets]

    estimate = make_estimate(look_up, discount=discount, lam=0.5, whiten=False, targets="monte_carlo", lam_alpha=0.4)
    given = [jnp.asarray(x, jnp.float32) for x in (table, rewards, penalties)]
    advantages, estimates = jax.jit(estimate)(given[0], batch, plan(), *given[1:])
    for row, length in enumerate(RESPONSES):
        value = table[np.asarray(batch.tokens)[row, :length]]
        lam = max(0.0, 1 - 1 / (0.4 * length))
        following = advantage = earned = 0.0
        for t in reversed(range(length)):
            reward = (rewards[row] if t == length - 1 else 0.0) - penalties[row, t]
            advantage = reward + discount * following - value[t] + discount * lam * advantage
            following, earned = value[t], reward + discount * earned
            assert abs(float(advantages[row, t]) - advantage) < 1e-5
            assert abs(float(estimates.returns[row, t]) - earned) < 1e-5
    outside = ~np.asarray(batch.mask)
    assert (np.asarray(advantages)[outside] == 0).all() and (np.asarray(estimates.returns)[outside] == 0).all()


@pytest.mark.parametrize("clip", [float("inf"), 0.5])
def test_updates_fit_fixed_returns(batch, clip):
    optimizer = optax.adam(0.01)
    weigh = functools.partial(token_mean, constant=1.0)
    update = jax.jit(make_critic_update(VALUES, weigh, optimizer, value_clip=clip))
    state = init_state(critic(), optimizer)
    returns = jnp.where(batch.mask, jnp.arange(4.0)[:, None] / 4, 0.0)
    losses = []
    for _ in range(30):
        state, metrics = update(state, batch, Estimates(returns, returns), plan())
        total, count = metrics.sums["critic/loss"]
        losses.append(float(total / count))
    assert float(count) == RESPONSES.sum()
    assert losses[-1] < 0.05 * losses[0]
