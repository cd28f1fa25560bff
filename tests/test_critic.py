"""The critic: what it starts from, its estimates against a plain loop, and that its updates fit fixed returns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dppo_jax import packing
from dppo_jax.critic import Estimates, init_critic, last_token, make_critic_update, make_estimate, make_values
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
