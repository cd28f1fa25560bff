"""Learning rates by hand; AdamW and clipping against float64 NumPy."""

import jax
import numpy as np
import pytest

from dppo_jax.errors import UserError
from dppo_jax.optimizer import SCHEDULES, make_optimizer, make_schedule


def rates(**given):
    schedule = make_schedule(**{"learning_rate": 0.8, "warmup": 0, "schedule": "constant", "updates": 10} | given)
    return np.array([float(schedule(update)) for update in range(11)])


def test_constant():
    np.testing.assert_allclose(rates(), 0.8, rtol=1e-6)


def test_linear_ends_at_zero():
    np.testing.assert_allclose(rates(schedule="linear"), 0.8 * (1 - np.arange(11) / 10), atol=1e-7)


def test_cosine_ends_at_zero():
    expected = 0.8 * 0.5 * (1 + np.cos(np.pi * np.arange(11) / 10))
    np.testing.assert_allclose(rates(schedule="cosine"), expected, atol=1e-7)
    assert rates(schedule="cosine")[10] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_update_of_a_warm_up_moves(schedule):
    np.testing.assert_allclose(rates(schedule=schedule, warmup=4)[:4], [0.2, 0.4, 0.6, 0.8], rtol=1e-6)


def test_after_a_warm_up_the_rest_of_the_updates_decays():
    expected = 0.8 * 0.5 * (1 + np.cos(np.pi * np.arange(7) / 6))
    np.testing.assert_allclose(rates(schedule="cosine", warmup=4)[4:], expected, atol=1e-7)
    np.testing.assert_allclose(rates(schedule="linear", warmup=4)[4:], 0.8 * (1 - np.arange(7) / 6), atol=1e-7)


def test_a_warm_up_of_one_is_none():
    np.testing.assert_allclose(rates(warmup=1), 0.8, rtol=1e-6)


def test_a_warm_up_longer_than_the_run_never_decays():
    np.testing.assert_allclose(rates(schedule="cosine", warmup=20), 0.8 * np.arange(1, 12) / 20, rtol=1e-5)


def test_an_unknown_schedule_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="'cosin' is not one of constant, linear, cosine"):
        make_schedule(learning_rate=1.0, warmup=0, schedule="cosin", updates=1)


def adamw(params, grads, rate, *, b1, b2, eps, weight_decay, clip_norm):
    """1711.05101, algorithm 2, with the learning rate on the decay too, as optax has it; float64."""
    m, v = np.zeros_like(params), np.zeros_like(params)
    for t, g in enumerate(grads, start=1):
        norm = np.sqrt(np.sum(g**2))
        g = g * min(1.0, clip_norm / norm)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * params
        params = params - rate[t - 1] * step
    return params


@pytest.mark.parametrize("clip_norm", [0.5, 100.0, float("inf")])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_equal_adamw_by_hand(clip_norm, weight_decay):
    numbers = np.random.default_rng(0)
    start, grads = numbers.normal(size=7), numbers.normal(size=(3, 7)) * [[1.0], [0.01], [10.0]]
    settings = dict(b1=0.8, b2=0.9, eps=1e-5, weight_decay=weight_decay, clip_norm=clip_norm)
    rate = [0.05, 0.1, 0.1]
    schedule = make_schedule(learning_rate=0.1, warmup=2, schedule="constant", updates=3)
    optimizer = make_optimizer(schedule, **settings)
    params = {"a": start[:3].astype(np.float32), "b": start[3:].astype(np.float32)}
    state = optimizer.init(params)
    for g in grads.astype(np.float32):
        updates, state = jax.jit(optimizer.update)({"a": g[:3], "b": g[3:]}, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    got = np.concatenate([params["a"], params["b"]])
    np.testing.assert_allclose(got, adamw(start, grads, rate, **settings), rtol=1e-5, atol=1e-6)
