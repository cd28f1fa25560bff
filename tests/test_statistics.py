"""avg@n, pass@k, maj@n and best@k against their definitions, and how often the intervals hold the truth."""

import itertools
from math import comb

import numpy as np
import pytest

from dppo_jax.evaluate import OUTCOMES, Samples, summary
from dppo_jax.rewards.votes import vote
from dppo_jax.statistics import best_at_k, binomial_interval, interval, majority, pass_at_k

N = 6


@pytest.mark.parametrize("k", range(1, N + 1))
def test_pass_and_best_are_means_over_all_choices_of_k(k):
    correct = np.arange(N + 1)
    zero_one = (np.arange(N) < correct[:, None]).astype(np.float32)
    rewards = np.random.default_rng(0).normal(size=(5, N))
    rewards[0] = rewards[0, 0]  # ties
    for found, of in ((pass_at_k(correct, N, k), zero_one), (best_at_k(zero_one, k), zero_one),
                      (best_at_k(rewards, k), rewards)):  # fmt: skip
        choices = [of[:, list(chosen)].max(axis=1) for chosen in itertools.combinations(range(N), k)]
        np.testing.assert_allclose(found, np.mean(choices, axis=0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4, 7])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_a_majority_of_two_answers_is_binomial(n, rate):
    """Over all 2^n outcomes: more than half are right, or half of them and then half the time."""
    right = np.array(list(itertools.product([False, True], repeat=n)))
    count = right.sum(axis=1)
    weight = rate**count * (1 - rate) ** (n - count)
    found = (majority(right, np.where(right, 1, 2)) * weight).sum()
    chance = [comb(n, c) * rate**c * (1 - rate) ** (n - c) for c in range(n + 1)]
    assert found == pytest.approx(sum(x * (1 if 2 * c > n else 0.5 * (2 * c == n)) for c, x in enumerate(chance)))


def test_ties_are_shared_and_silence_has_no_vote():
    right, wrong, other, none = 1, 2, 3, 0
    votes = np.array([
        [right, wrong, other, right, wrong, other],  # three of two votes each
        [none, none, none, none, wrong, right],
        [none] * 6,
        [none, none, none, none, none, right],
        [wrong, wrong, right, none, none, none],
    ])  # fmt: skip
    np.testing.assert_allclose(majority(votes == right, votes), [1 / 3, 1 / 2, 0, 1, 0])
    one_of_them = np.array([[False, True, False]])  # the verifier says yes of one reply that gives the answer
    assert majority(one_of_them, np.array([[right, right, wrong]])) == [1]


RATES = [(1, 1), (0.5, 0.5), (2, 5), (0.5, 2), (0.3, 3), (8, 2), (0.2, 0.2), (0.1, 1)]


@pytest.mark.parametrize("questions", [30, 200])
@pytest.mark.parametrize(("a", "b"), RATES)
def test_intervals_hold_the_truth_as_often_as_they_say(questions, a, b):
    """2,500 evaluations of questions whose rates are Beta(a, b), 8 samples each."""
    draw = np.random.default_rng([questions, int(10 * a), int(10 * b)])
    values = draw.binomial(8, draw.beta(a, b, size=(questions, 2500))) / 8
    low, high = interval(values, seed=1)
    assert ((low <= a / (a + b)) & (a / (a + b) <= high)).mean() == pytest.approx(0.95, abs=0.02)


def test_an_interval_is_a_function_of_values_and_seed():
    values = np.random.default_rng(0).random((40, 3))
    first, again, other = (np.stack(interval(values, seed=seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and np.abs(first - other).max() < 0.02
    alone = np.stack(interval(values[:, :1], seed=3))  # not of what else is measured
    np.testing.assert_allclose(alone[:, 0], first[:, 0], rtol=1e-12)


def test_intervals_of_equal_questions_and_of_one_are_their_mean():
    same = np.full((30, 1), 0.1)
    for values in (same, same * 0, same * 10, np.array([[0.25, 0.5]])):
        low, high = interval(values, seed=0)
        np.testing.assert_array_equal(low, values.mean(axis=0))
        np.testing.assert_array_equal(high, values.mean(axis=0))


def samples(rewards: list[list[float]], answers: list[list[str]]) -> Samples:
    rows = np.array(rewards, np.float32).reshape(-1)
    votes = np.array([vote(answer) for row in answers for answer in row], np.int64).view(np.int32).reshape(-1, 2)
    lengths = np.arange(len(rows), dtype=np.int32)
    return Samples(rows, lengths, lengths > 0, lengths % len(OUTCOMES), votes)


def test_a_summary_has_best_only_where_it_is_not_pass():
    answers = [["7", "7.0", "8", ""], ["1/2", "0.5", ".50", "2"]]
    found = summary(samples([[1, 1, 0, 0], [0, 0, 0, 1]], answers), 4, seed=0)
    assert (found["avg"], found["maj"], found["pass@2"], found["pass@4"]) == (3 / 8, 1 / 2, (5 / 6 + 1 / 2) / 2, 1)
    assert (found["length_mean"], found["killed"], found["failed"], found["refused"]) == (3.5, 2, 2, 2)
    assert not any(name.startswith("best") for name in found)
    assert all(found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] for name in ("avg", "maj", "pass@2"))
    partial = summary(samples([[0.5, 1, 0], [0, 0, 0.25]], [["", "", ""]] * 2), 3, seed=0)
    assert (partial["best@2"], partial["best@3"], partial["maj"]) == pytest.approx(((5 / 6 + 1 / 6) / 2, 0.625, 0))
    assert {"maj", "best@1", "pass@2"}.isdisjoint(summary(samples([[0.5], [1]], [["1"], ["2"]]), 1, seed=0))


@pytest.mark.parametrize("trials", [1, 6, 12])
def test_a_binomial_interval_holds_the_truth_at_least_as_often_as_it_says(trials):
    """By its definition: over all counts that a chance can give, weighted by how likely each is."""
    spans = [binomial_interval(k, trials) for k in range(trials + 1)]
    assert spans[0][0] == 0 and spans[-1][1] == 1
    for chance in np.linspace(0.005, 0.995, 199):
        weights = [comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(trials + 1)]
        held = sum(weight for weight, (low, high) in zip(weights, spans, strict=True) if low <= chance <= high)
        assert held >= 0.95 - 1e-9
    for k, (low, high) in enumerate(spans):  # its ends are the chances at which a tail is 2.5%
        tails = [sum(comb(trials, j) * p**j * (1 - p) ** (trials - j) for j in js)
                 for p, js in ((low, range(k, trials + 1)), (high, range(k + 1)))]  # fmt: skip
        assert tails[0] == pytest.approx(0.025 if k else 1) and tails[1] == pytest.approx(0.025 if k < trials else 1)
