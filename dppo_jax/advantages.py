"""Advantages of whole responses, relative to the group that answers the same prompt.

Each function is ADVANTAGES[name](rewards f32[B], group i32[B], num_groups=int) -> f32[B]; rows of a group may stand
anywhere. Those with a group's mean raise UserError for groups of one response. `gae` is per token and needs a critic.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from dppo_jax.errors import UserError

EPSILON = 1e-6  # beside a standard deviation, in units of reward


def _check_groups(name: str, rewards: Array, num_groups: int) -> None:
    """Raises: UserError for groups of one: a response that is compared with itself has the advantage 0."""
    if rewards.shape[0] < 2 * num_groups:
        raise UserError(
            f"{name} needs at least 2 responses per prompt, but {rewards.shape[0]} rows form {num_groups} groups, so "
            "there is nothing to learn; raise rollout.group_size, or use 'reward', which has no baseline"
        )


def _group_mean(values: Array, group: Array, num_groups: int) -> Array:
    """The mean of each row's group, [B]; exact where the group's values are equal, so that they differ from it by 0."""
    least = jax.ops.segment_min(values, group, num_groups)[group]
    total = jax.ops.segment_sum(values - least, group, num_groups)
    count = jax.ops.segment_sum(jnp.ones_like(values), group, num_groups)
    return least + (total / jnp.maximum(count, 1.0))[group]


def group_mean(rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int) -> Float32[Array, "B"]:
    """R - mean. The paper's choice: no standard deviation (2602.04879, section 5; Dr. GRPO, 2503.20783)."""
    _check_groups("group_mean", rewards, num_groups)
    return rewards - _group_mean(rewards, group, num_groups)


def group_mean_std(
    rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int, ddof: int = 0
) -> Float32[Array, "B"]:
    """(R - mean) / (std + 1e-6), with the standard deviation of the group (GRPO, 2402.03300, section 4.1).

    The variance is the sum of squares over n - `ddof`, of the group's n: 0, of the population; 1, as torch.std has it,
    and verl and TRL with it.
    """
    _check_groups("group_mean_std", rewards, num_groups)
    centred = group_mean(rewards, group, num_groups=num_groups)
    count = jax.ops.segment_sum(jnp.ones_like(rewards), group, num_groups)[group]
    variance = _group_mean(centred**2, group, num_groups) * count / jnp.maximum(count - ddof, 1.0)
    return centred / (jnp.sqrt(variance) + EPSILON)


def leave_one_out(rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int) -> Float32[Array, "B"]:
    """R - mean of the group's other rewards (RLOO, 2402.14740, equation 6)."""
    _check_groups("leave_one_out", rewards, num_groups)
    count = jax.ops.segment_sum(jnp.ones_like(rewards), group, num_groups)[group]
    return group_mean(rewards, group, num_groups=num_groups) * count / jnp.maximum(count - 1.0, 1.0)


def max_rl(rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int) -> Float32[Array, "B"]:
    """(R - mean) / mean, and 0 where the mean is not above 0: maximum-likelihood RL, for rewards of 0 and 1.

    A mean that is 0 but for rounding, below 1e-6 of the largest difference from it, counts as 0.
    """
    _check_groups("max_rl", rewards, num_groups)
    mean = _group_mean(rewards, group, num_groups)
    centred = rewards - mean
    positive = mean > EPSILON * jax.ops.segment_max(jnp.abs(centred), group, num_groups)[group]
    return jnp.where(positive, centred / jnp.where(positive, mean, 1.0), 0.0)


def batch_norm(
    rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int, ddof: int = 0
) -> Float32[Array, "B"]:
    """(R - group mean) / (std of that over the batch + 1e-6) (ScaleRL, 2510.13786); `ddof` as of `group_mean_std`, with
    n = B."""
    _check_groups("batch_norm", rewards, num_groups)
    centred = group_mean(rewards, group, num_groups=num_groups)
    return centred / (jnp.std(centred, ddof=ddof) + EPSILON)


def batch_mean(rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int) -> Float32[Array, "B"]:
    """R - mean of the batch, of all prompts together: for one response to a prompt too (FlashREINFORCE, 2026).

    Raises: UserError for a batch of one response.
    """
    if rewards.shape[0] < 2:
        raise UserError(
            "batch_mean needs at least 2 responses in a batch, and there is 1, so there is nothing to learn; raise "
            "rollout.prompts or rollout.group_size, or use 'reward', which has no baseline"
        )
    return rewards - _group_mean(rewards, jnp.zeros_like(group), 1)


def reward(rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int) -> Float32[Array, "B"]:
    """R itself, without a baseline (REINFORCE; Williams, 1992)."""
    return rewards


ADVANTAGES: dict[str, Callable[..., Array]] = {
    "reward": reward,
    "group_mean": group_mean,
    "group_mean_std": group_mean_std,
    "leave_one_out": leave_one_out,
    "max_rl": max_rl,
    "batch_norm": batch_norm,
    "batch_mean": batch_mean,
}


def gae(
    rewards: Float32[Array, "B T"],
    values: Float32[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    discount: float,
    lam: float | Float32[Array, "B"],
) -> Float32[Array, "B T"]:
    """Generalised advantage estimation (1506.02438, equation 16); the value after a row's last position is 0. `lam`:
    lambda of all rows, or of each.

    What is outside the mask is skipped: the position after a hole, such as an environment's words, follows the one
    before it, without a discount for the hole (verl's `compute_gae_advantage_return`; SAO, 2607.07508, equations 4
    and 5). 0 outside the mask.
    """
    rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)

    def backwards(carry, column):
        advantage, next_value = carry
        reward, value, valid = column
        here = reward + discount * next_value - value + discount * lam * advantage
        carry = jnp.where(valid, here, advantage), jnp.where(valid, value, next_value)
        return carry, jnp.where(valid, here, 0.0)

    start = (jnp.zeros_like(rewards[:, 0]), jnp.zeros_like(rewards[:, 0]))
    _, advantages = jax.lax.scan(backwards, start, (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T
