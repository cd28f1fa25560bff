"""Metrics on the device: sums with their counts, maxima and histograms, merged freely, divided once when written."""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32

from dppo_jax.divergences import prob_diff
from dppo_jax.losses.core import bounded_exp, log_ratio
from dppo_jax.types import LossInputs, LossOutput, Routing

RATIO_EDGES = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 61), [np.inf]])  # bin edges of the histogram of pi / mu
PROB_DIFF_EDGES = np.linspace(-1.0, 1.0, 81)  # bin edges of the histogram of pi - mu


@struct.dataclass
class Metrics:
    """What one or more micro-batches measured."""

    sums: dict[str, tuple[Array, Array]]  # name -> (sum, count)
    maxima: dict[str, Array]
    histograms: dict[str, Array]  # name -> counts: between its edges, of pairs, of tokens
    minima: dict[str, Array] = struct.field(default_factory=dict)

    def __or__(self, other: "Metrics") -> "Metrics":
        """The metrics of both, which measure the same tokens under different names."""
        return Metrics(
            sums=self.sums | other.sums,
            maxima=self.maxima | other.maxima,
            histograms=self.histograms | other.histograms,
            minima=self.minima | other.minima,
        )


def mean(value: Array, where: Array) -> tuple[Array, Array]:
    """A (sum, count) pair over the positions where `where` holds."""
    return jnp.sum(jnp.where(where, value, 0.0), dtype=jnp.float32), jnp.sum(where, dtype=jnp.float32)


def merge(first: Metrics, *others: Metrics) -> Metrics:
    """The metrics of several microbatches as one. All must hold the same names."""
    for other in others:
        first = Metrics(
            sums={name: (s + other.sums[name][0], n + other.sums[name][1]) for name, (s, n) in first.sums.items()},
            maxima={name: jnp.maximum(value, other.maxima[name]) for name, value in first.maxima.items()},
            histograms={name: counts + other.histograms[name] for name, counts in first.histograms.items()},
            minima={name: jnp.minimum(value, other.minima[name]) for name, value in first.minima.items()},
        )
    return first


def _histogram(value: Array, where: Array, edges: np.ndarray) -> Float32[Array, "bins"]:
    """Counts per bin, right-open; values beyond the outer edges go to the outer bins."""
    inner = jnp.searchsorted(jnp.asarray(edges[1:-1], jnp.float32), value, side="right", method="compare_all")
    return jnp.zeros(len(edges) - 1, jnp.float32).at[inner.ravel()].add(where.ravel().astype(jnp.float32))


def trust_region_metrics(
    inputs: LossInputs, output: LossOutput, entropy: Float32[Array, "M Q"], weights: Float32[Array, "M Q"]
) -> Metrics:
    """Everything logged of one micro-batch of tokens; names are TensorBoard tags.

    Fractions of `trust_region/*` are of the tokens with A != 0. `loss/surrogate` counts minibatches: its count is
    added by whoever knows where one ends. `policy/prob_diff_max` and `_min` are those of pi - mu and 0.
    """
    mask = inputs.mask
    advantage = jnp.where(mask, inputs.advantages, 0.0)
    logp, behavior_logp = (jnp.where(mask, x, 0.0) for x in (inputs.logp, inputs.behavior_logp))
    diff = prob_diff(logp, behavior_logp)
    ratio = jnp.exp(log_ratio(logp, behavior_logp))
    has_advantage = mask & (advantage != 0)
    masked = has_advantage & ~output.keep

    def fraction(selected: Bool[Array, "M Q"]) -> tuple[Array, Array]:
        return mean(selected.astype(jnp.float32), has_advantage)

    sums = {
        "loss/surrogate": (jnp.sum(jnp.where(mask, weights * output.coef, 0.0)), jnp.float32(0.0)),
        "policy/entropy": mean(entropy, mask),
        "policy/abs_prob_diff_mean": mean(jnp.abs(diff), mask),
        "ratio/mean": mean(ratio, mask),
        "ratio/square": mean(ratio**2, mask),
        "trust_region/masked": fraction(masked),
        "trust_region/masked_positive": fraction(masked & (advantage > 0)),
        "trust_region/masked_negative": fraction(masked & (advantage < 0)),
        "trust_region/bad_updates": fraction((advantage < 0) & (-diff >= 0.5)),
    }
    for name, (value, where) in output.metrics.items():
        sums[name if "/" in name else f"loss/{name}"] = mean(value, where & mask)
    return Metrics(
        sums=sums,
        maxima={
            "policy/abs_prob_diff_max": jnp.max(jnp.abs(jnp.where(mask, diff, 0.0))),
            "policy/prob_diff_max": jnp.max(jnp.where(mask, diff, 0.0), initial=0.0),
            "ratio/max": jnp.max(jnp.where(mask, ratio, 0.0)),
        },
        histograms={
            "ratio": _histogram(ratio, mask, RATIO_EDGES),
            "prob_diff": _histogram(diff, mask, PROB_DIFF_EDGES),
        },
        minima={"policy/prob_diff_min": jnp.min(jnp.where(mask, diff, 0.0), initial=0.0)},
    )


def routing_metrics(routing: Routing) -> Metrics:
    """`moe/routing_entropy`: the router's, in nats, over tokens and layers.

    The histogram `expert_load` counts the tokens of each layer's experts; `summary` makes of it `moe/load_max`, what
    the busiest expert of any layer took over an equal share, and `moe/unused`, the fraction of experts without a token.
    """
    return Metrics(
        sums={"moe/routing_entropy": (jnp.mean(routing.entropy), routing.tokens)},
        maxima={},
        histograms={"expert_load": routing.load},
    )


def shadow_loss_metrics(
    inputs: LossInputs, shadow_losses: Mapping[str, functools.partial], weights: Float32[Array, "M Q"]
) -> Metrics:
    """What each shadow loss would have masked of these tokens, had it been the one that trains.

    Of shadow loss NAME: `region/NAME/masked`, `_positive`, `_negative`: fractions of the tokens with A != 0;
    `region/NAME/removed`: its share of the gradient, sum |w min(r, C) A| over what it masks, C its own `ratio_cap`.
    The histogram `region_agreement` counts, for every pair of them, the tokens that both keep or both mask.
    """
    mask = inputs.mask
    advantage = jnp.where(mask, inputs.advantages, 0.0)
    has_advantage = mask & (advantage != 0)
    logs = jnp.where(mask, log_ratio(inputs.logp, inputs.behavior_logp), 0.0)
    sums, keeps = {}, []
    for name, shadow_loss in shadow_losses.items():
        keep = shadow_loss(inputs).keep
        masked = has_advantage & ~keep
        cap = shadow_loss.keywords.get("ratio_cap", jnp.inf)
        size = jnp.where(has_advantage, jnp.abs(weights * jnp.minimum(bounded_exp(logs), cap) * advantage), 0.0)
        by_sign = {"": masked, "_positive": masked & (advantage > 0), "_negative": masked & (advantage < 0)}
        for suffix, selected in by_sign.items():
            sums[f"region/{name}/masked{suffix}"] = mean(selected.astype(jnp.float32), has_advantage)
        sums[f"region/{name}/removed"] = jnp.sum(jnp.where(masked, size, 0.0)), jnp.sum(size)
        keeps.append(keep)
    stacked = jnp.stack(keeps).reshape(len(keeps), -1)
    agree = (stacked[:, None] == stacked[None]) & has_advantage.reshape(-1)
    return Metrics(sums, {}, {"region_agreement": jnp.sum(agree, axis=-1, dtype=jnp.float32)})


def token_counts(inputs: LossInputs, output: LossOutput, tokens: Int32[Array, "M Q"], vocabulary: int) -> Metrics:
    """How often each token of the vocabulary has A != 0, and how often it is masked, by the sign of A: f32[3, V]."""
    has_advantage = inputs.mask & (jnp.where(inputs.mask, inputs.advantages, 0.0) != 0)
    masked = has_advantage & ~output.keep
    selections = [has_advantage, masked & (inputs.advantages > 0), masked & (inputs.advantages < 0)]

    def count(where: Array) -> Array:
        return jnp.zeros(vocabulary, jnp.float32).at[tokens.ravel()].add(where.ravel().astype(jnp.float32))

    return Metrics({}, {}, {"token_counts": jnp.stack([count(where) for where in selections])})


def summary(metrics: Metrics) -> dict[str, float]:
    """Plain numbers for the log; a mean over nothing is 0 (no token had A != 0: none was masked).

    `ratio/ess` is the effective share of the samples, (mean r)^2 / mean r^2, in (0, 1].
    """
    means = {name: float(total) / max(float(count), 1.0) for name, (total, count) in metrics.sums.items()}
    if "ratio/square" in means:
        square = means.pop("ratio/square")
        means["ratio/ess"] = means["ratio/mean"] ** 2 / square if square else 0.0
    if "expert_load" in metrics.histograms:
        load = np.asarray(metrics.histograms["expert_load"])
        share = np.maximum(load.mean(axis=-1, keepdims=True), 1e-9)
        means |= {"moe/load_max": float((load / share).max()), "moe/unused": float((load == 0).mean())}
    return means | {name: float(value) for name, value in (metrics.maxima | metrics.minima).items()}


def mismatch(first: Metrics, *, equal_params: bool = True) -> dict[str, float]:
    """|pi - mu| over the first minibatch after a rollout: training against rollout at equal parameters.

    Where these were not equal, since the rollout was drawn early or lags, it is `first_minibatch/`, not `mismatch/`.
    """
    total, count = first.sums["policy/abs_prob_diff_mean"]
    name = "mismatch" if equal_params else "first_minibatch"
    return {
        f"{name}/abs_prob_diff_mean": float(total) / max(float(count), 1.0),
        f"{name}/abs_prob_diff_max": float(first.maxima["policy/abs_prob_diff_max"]),
    }


def unequal_groups(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """Which rows [B] are of a group with unequal rewards: the others have advantage 0. Groups are contiguous."""
    groups = rewards.reshape(-1, group_size)
    return np.repeat(groups.max(axis=1) != groups.min(axis=1), group_size)


def group_metrics(rewards: np.ndarray, group_size: int) -> dict[str, float]:
    """Rewards [B], groups contiguous. `solved_groups` are right throughout, `failed_groups` wrong throughout."""
    groups = rewards.reshape(-1, group_size)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/solved_groups": float((groups.min(axis=1) >= 1.0).mean()),
        "reward/failed_groups": float((groups.max(axis=1) <= 0.0).mean()),
        "reward/zero_variance_groups": float((groups.max(axis=1) == groups.min(axis=1)).mean()),
    }
