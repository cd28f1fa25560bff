"""Statistics of an evaluation: n samples of each of Q questions. Every metric is a mean over questions.

What these functions return has one number a question; `interval` says how sure its mean is.
"""

from math import comb
from statistics import NormalDist

import numpy as np
from scipy import stats

NORMAL = NormalDist()
RESAMPLES = 2000
_BLOCK = 2**22  # numbers that a block of resamples takes at a time


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> np.ndarray:
    """The chance that one of k of a question's samples is right, f64[Q]: 1 - C(n-c, k) / C(n, k) (2107.03374).

    correct: i[Q], right answers among n = `samples` of each; k of 1 to n.
    """
    return np.array([1.0 - comb(samples - int(c), k) / comb(samples, k) for c in correct])


def best_at_k(rewards: np.ndarray, k: int) -> np.ndarray:
    """The expected best reward of k of a question's n samples, f64[Q]: the i-th smallest of them is the best of
    C(i-1, k-1) choices in C(n, k).

    rewards: f[Q, n]; k of 1 to n. Of rewards of 0 and 1 this is pass@k, and of k = 1 the mean.
    """
    n = rewards.shape[1]
    weights = np.array([comb(i, k - 1) / comb(n, k) for i in range(n)])
    return np.sort(rewards.astype(np.float64), axis=1) @ weights


def majority(correct: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """Whether the answer that most of a question's n samples give is right (2203.11171), f64[Q]; answers with equally
    many votes share equally, and a question without a vote is 0.

    correct: bool[Q, n]; an answer is right where any sample that gives it is. votes: i[Q, n], equal numbers for equal
    answers, 0 of a sample without one.
    """
    found = np.zeros(len(votes))
    for number, (right, given) in enumerate(zip(correct, votes, strict=True)):
        answers, which, counts = np.unique(given[given != 0], return_inverse=True, return_counts=True)
        if len(answers):
            is_right: np.ndarray = np.zeros(len(answers), bool)
            np.logical_or.at(is_right, which, right[given != 0])
            found[number] = is_right[counts == counts.max()].mean()
    return found


def interval(
    values: np.ndarray, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of a bootstrap interval of each column's mean, f64[M] each, a function of values and seed.

    values: f[Q, M], metrics by question. Questions are drawn with replacement, the same for all metrics. The interval
    is bias-corrected and accelerated (BCa, Efron 1987), its levels those at which a normal interval of Q numbers would
    be Student's (1411.5279, section 3.3). Where all questions are equal, or there is one, both ends are the mean.
    """
    values = np.asarray(values, np.float64)
    count, mean = len(values), values.mean(axis=0)
    if count == 1:
        return mean, mean
    means = np.sort(_resampled(values, seed, resamples), axis=0)
    away = values - mean
    squares = (away**2).sum(axis=0)
    acceleration = np.where(squares > 0, (away**3).sum(axis=0) / (6 * np.maximum(squares, 1e-100) ** 1.5), 0.0)
    tolerance = 1e-12 * np.maximum(1.0, np.abs(mean))  # sums of equal numbers in another order
    below = (means < mean - tolerance).mean(axis=0) + 0.5 * (np.abs(means - mean) <= tolerance).mean(axis=0)
    bias = np.array([NORMAL.inv_cdf(min(max(share, 1 / resamples), 1 - 1 / resamples)) for share in below])
    reach = np.sqrt(count / (count - 1)) * stats.t.ppf(0.5 + level / 2, count - 1)
    ends = []
    for z in (bias - reach, bias + reach):
        share = np.array([NORMAL.cdf(x) for x in bias + z / np.maximum(1 - acceleration * z, 1e-9)])
        ends.append(np.where(squares > tolerance**2, _quantile(means, share), mean))
    return ends[0], ends[1]


def _resampled(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of the columns over questions drawn with replacement, [resamples, M]."""
    draw, count = np.random.default_rng(seed), len(values)
    rows, found = max(1, _BLOCK // count), []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = draw.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.reshape(-1), minlength=size * count).reshape(size, count)
        found.append(times @ values / count)
    return np.concatenate(found)


def _quantile(ordered: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Of each column of [B, M], in order, the quantile at its own share f[M], between two numbers where need be."""
    most, columns = len(ordered) - 1, np.arange(ordered.shape[1])
    at = np.clip(share * (most + 2) - 1, 0, most)
    low = np.floor(at).astype(int)
    part = at - low
    return ordered[low, columns] * (1 - part) + ordered[np.minimum(low + 1, most), columns] * part


def binomial_interval(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Both ends of the exact interval of a chance, of which so many of so many trials came out (Clopper and Pearson,
    1934). It holds the truth at least as often as `level` says, however few the trials."""
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)
