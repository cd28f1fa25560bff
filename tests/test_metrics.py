"""Every logged number against float64 NumPy on the same arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.losses import LOSSES, LossInputs, LossOutput
from dppo_jax.metrics import (
    PROB_DIFF_EDGES,
    RATIO_EDGES,
    Metrics,
    group_metrics,
    merge,
    mismatch,
    summary,
    trust_region_metrics,
)

ROWS, LENGTH = 12, 9
HYPERPARAMETERS = dict(delta_low=0.1, delta_high=0.05, ratio_cap=2.0)


@pytest.fixture(scope="module")
def arrays():
    """Ragged rows; some advantages are 0; NaN wherever the mask is False."""
    numbers = np.random.default_rng(1)
    mask = np.arange(LENGTH) < numbers.integers(1, LENGTH + 1, size=(ROWS, 1))
    p, q = numbers.uniform(0.02, 0.98, size=(2, ROWS, LENGTH))
    p[3, 0], q[3, 0] = 0.01, 0.9  # a bad update where A < 0
    advantages = np.repeat(numbers.choice([-1.0, -0.25, 0.0, 0.5, 1.0], size=(ROWS, 1)), LENGTH, axis=1)
    advantages[3] = -1.0
    entropy, weights = numbers.uniform(size=(2, ROWS, LENGTH))
    values = dict(logp=np.log(p), behavior_logp=np.log(q), advantages=advantages, entropy=entropy, weights=weights)
    return {"mask": mask, **{name: np.where(mask, x, np.nan).astype(np.float32) for name, x in values.items()}}


@functools.partial(jax.jit, static_argnums=0)
def run(loss, a):
    inputs = LossInputs(a["logp"], a["behavior_logp"], a["advantages"], a["mask"])
    return trust_region_metrics(inputs, loss(inputs), a["entropy"], a["weights"])


BINARY_TV = functools.partial(LOSSES["dppo_binary_tv"], **HYPERPARAMETERS)


def measure(arrays, rows=slice(None), loss=BINARY_TV):
    return jax.device_get(run(loss, {name: x[rows] for name, x in arrays.items()}))


@pytest.fixture(scope="module")
def measured(arrays) -> Metrics:
    return measure(arrays)


@pytest.fixture(scope="module")
def tokens(arrays):
    """The tokens inside the mask, float64, flat."""
    return {name: x[arrays["mask"]].astype(np.float64) for name, x in arrays.items()}


def expected(t):
    p, q, a = np.exp(t["logp"]), np.exp(t["behavior_logp"]), t["advantages"]
    ratio, diff, moved = p / q, p - q, a != 0
    up = (a > 0) & (diff > HYPERPARAMETERS["delta_high"])
    down = (a < 0) & (-diff > HYPERPARAMETERS["delta_low"])
    coef = np.where(up | down, 0.0, np.minimum(ratio, HYPERPARAMETERS["ratio_cap"]) * a)
    return {
        "loss/surrogate": np.sum(t["weights"] * coef),
        "loss/divergence": np.mean(np.abs(diff)),
        "policy/entropy": np.mean(t["entropy"]),
        "policy/abs_prob_diff_mean": np.mean(np.abs(diff)),
        "policy/abs_prob_diff_max": np.max(np.abs(diff)),
        "policy/prob_diff_max": np.max(diff),
        "policy/prob_diff_min": np.min(diff),
        "ratio/mean": np.mean(ratio),
        "ratio/max": np.max(ratio),
        "ratio/ess": np.sum(ratio) ** 2 / (ratio.size * np.sum(ratio**2)),
        "trust_region/masked": np.mean((up | down)[moved]),
        "trust_region/masked_positive": np.mean(up[moved]),
        "trust_region/masked_negative": np.mean(down[moved]),
        "trust_region/bad_updates": np.mean(((a < 0) & (-diff >= 0.5))[moved]),
    }


def test_numbers_equal_numpy(measured, tokens):
    one_minibatch = measured.sums | {"loss/surrogate": (measured.sums["loss/surrogate"][0], np.float32(1.0))}
    got, want = summary(measured.replace(sums=one_minibatch)), expected(tokens)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=2e-5), name
    for name in ("trust_region/masked_positive", "trust_region/masked_negative", "trust_region/bad_updates"):
        assert 0 < got[name] < 1  # each is put to the test


def test_fractions_are_of_the_tokens_with_an_advantage(measured, tokens):
    moved = np.sum(tokens["advantages"] != 0)
    assert 0 < moved < tokens["advantages"].size
    for name, (_, count) in measured.sums.items():
        if name.startswith("trust_region/"):
            assert count == moved, name


def test_histograms_count_every_token_once(measured, tokens):
    p, q = np.exp(tokens["logp"]), np.exp(tokens["behavior_logp"])
    for name, edges, values in (("ratio", RATIO_EDGES, p / q), ("prob_diff", PROB_DIFF_EDGES, p - q)):
        assert measured.histograms[name].sum() == values.size
        np.testing.assert_array_equal(measured.histograms[name], np.histogram(values, edges)[0])


def test_histogram_of_extremes_stays_inside_the_outer_bins():
    logp, behavior_logp = np.array([[0.0, -200.0, 0.0]], np.float32), np.array([[-200.0, 0.0, 0.0]], np.float32)
    ones = np.ones((1, 3), np.float32)
    extremes = dict(logp=logp, behavior_logp=behavior_logp, advantages=ones, entropy=ones, weights=ones)
    histograms = measure(extremes | {"mask": np.ones((1, 3), bool)}).histograms
    assert (histograms["ratio"][-1], histograms["ratio"][0], histograms["ratio"].sum()) == (1, 1, 3)
    assert (histograms["prob_diff"][-1], histograms["prob_diff"][0], histograms["prob_diff"].sum()) == (1, 1, 3)


def test_pieces_merge_to_the_whole(arrays, measured):
    parts = merge(*[measure(arrays, slice(i, i + 4)) for i in range(0, ROWS, 4)])
    for name, (total, count) in measured.sums.items():
        np.testing.assert_allclose(parts.sums[name], (total, count), rtol=1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, parts.maxima, measured.maxima)
    jax.tree.map(np.testing.assert_array_equal, parts.minima, measured.minima)
    jax.tree.map(np.testing.assert_array_equal, parts.histograms, measured.histograms)


def test_a_metric_over_no_token_is_0(arrays):
    none = summary(measure(arrays | {"advantages": np.zeros_like(arrays["advantages"])}))
    fractions = {name: value for name, value in none.items() if name.startswith("trust_region/")}
    assert len(fractions) == 4 and set(fractions.values()) == {0.0}
    assert none["ratio/mean"] > 0
    empty = summary(measure(arrays | {"mask": np.zeros_like(arrays["mask"])}))
    assert len(empty) == len(none) and all(value == 0 for value in empty.values())  # no NaN


def test_the_extremes_of_pi_minus_mu_lie_on_either_side_of_0(arrays):
    fell = measure(arrays | {"logp": arrays["behavior_logp"] - 1.0})
    assert float(fell.maxima["policy/prob_diff_max"]) == 0.0 > float(fell.minima["policy/prob_diff_min"])


def test_a_bad_update_begins_at_one_half():
    def bad(pi, mu, advantage):
        one = np.ones((1, 1), np.float32)
        a = dict(logp=np.log(pi * one), behavior_logp=np.log(mu * one), entropy=one, weights=one)
        return summary(measure(a | {"advantages": advantage * one, "mask": one > 0}))["trust_region/bad_updates"]

    assert bad(0.25, 0.76, -1.0) == 1.0
    assert bad(0.25, 0.74, -1.0) == 0.0
    assert bad(0.25, 0.76, 1.0) == 0.0
    assert bad(0.76, 0.25, -1.0) == 0.0


def test_metrics_of_a_loss_of_ones_own_are_logged(arrays, tokens):
    def mine(inputs: LossInputs, *, shift: float = 3.0) -> LossOutput:
        rare = jnp.exp(inputs.behavior_logp) < 0.5
        metrics = {"shifted": (inputs.advantages + shift, rare), "anywhere": (jnp.full_like(inputs.logp, shift), True)}
        return LossOutput(coef=jnp.zeros_like(inputs.logp), keep=inputs.mask, metrics=metrics)

    got = summary(measure(arrays, loss=mine))
    rare = tokens["behavior_logp"] < np.log(0.5)
    assert got["loss/shifted"] == pytest.approx(np.mean(tokens["advantages"][rare]) + 3.0, rel=1e-5)
    assert got["loss/anywhere"] == 3.0


def test_mismatch_is_of_the_first_minibatch(arrays, tokens):
    first = measure(arrays, slice(0, 4))
    few = arrays["mask"][:4].sum()
    diff = np.abs(np.exp(tokens["logp"][:few]) - np.exp(tokens["behavior_logp"][:few]))
    got = mismatch(first)
    assert got == {
        "mismatch/abs_prob_diff_mean": pytest.approx(diff.mean(), rel=1e-5),
        "mismatch/abs_prob_diff_max": pytest.approx(diff.max(), rel=1e-5),
    }


def test_group_metrics():
    rewards = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5], np.float32)
    assert group_metrics(rewards, 3) == {
        "reward/mean": pytest.approx(5 / 12),
        "reward/solved_groups": 0.25,
        "reward/failed_groups": 0.25,
        "reward/zero_variance_groups": 0.75,
    }
