"""Smoothing, and the interval of a mean over seeds."""

import numpy as np


def smoothed(values: np.ndarray, amount: float) -> np.ndarray:
    """From 1 on, `amount` is the width of a moving average; below it, the weight of the past in an exponential one."""
    return moving_average(values, int(amount)) if amount >= 1 else exponential_average(values, amount)


def described(amount: float) -> str:
    """What `smoothed` does, in words; nothing where it does nothing."""
    if amount == 1:
        return ""
    return f"centred mean over {amount:g} steps" if amount > 1 else f"exponential mean, weight {amount:g} on the past"


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over the `width` points around each point, over fewer at the ends; NaN points are left out of it."""
    if width <= 1:
        return values
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(values.size)
    low, high = np.maximum(at - (width - 1) // 2, 0), np.minimum(at + width // 2 + 1, values.size)
    number = count[high] - count[low]
    return np.where(number > 0, (total[high] - total[low]) / np.maximum(number, 1), np.nan)


def exponential_average(values: np.ndarray, weight: float) -> np.ndarray:
    """m_t = sum_s weight^(t-s) x_s / sum_s weight^(t-s) over the points s <= t that are not NaN, as TensorBoard's."""
    weighted_sum = weight_sum = 0.0
    result: np.ndarray = np.full(values.shape, np.nan)
    for i, value in enumerate(values.tolist()):
        if np.isfinite(value):
            weighted_sum, weight_sum = weight * weighted_sum + value, weight * weight_sum + 1.0
        if weight_sum:
            result[i] = weighted_sum / weight_sum
    return result


def bootstrap_interval(
    values: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of the mean over seeds. values [S, ...] -> low, high [...].

    Seeds are drawn with replacement, whole curves together. With few seeds it is too narrow (Efron and Tibshirani,
    An Introduction to the Bootstrap, 1993, chapter 13). NaN where any seed is NaN.
    """
    count = len(values)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples) / count
    means = np.tensordot(weights, values, axes=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
