"""Advantages of whole responses, relative to the group that answers the same prompt.

Each function is ADVANTAGES[name](rewards f32[B], group i32[B], num_groups=int) -> f32[B]; rows of a group may stand
anywhere. `gae` is per token and needs a critic.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from dppo_jax.errors import UserError

EPSILON = 1e-6  # beside a standard deviation, in units of reward


def _group_mean(values: Array, group: Array, num_groups: int) -> Array:
    """The mean of each row's group, [B]; exact where the group's values are equal, so that they differ from it by 0."""
    least = jax.ops.segment_min(values, group, num_groups)[group]
    total = jax.ops.segment_sum(values - least, group, num_groups)
    count = jax.ops.segment_sum(jnp.ones_like(values), group, num_groups)
    return least + (total / jnp.maximum(count, 1.0))[group]


def group_mean(rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int) -> Float32[Array, "B"]:
    """R - mean. The paper's choice: no standard deviation (2602.04879, section 5; Dr. GRPO, 2503.20783)."""
    return rewards - _group_mean(rewards, group, num_groups)


def group_mean_std(rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int) -> Float32[Array, "B"]:
    """(R - mean) / (std + 1e-6), with the group's population standard deviation (GRPO, 2402.03300, section 4.1)."""
    centred = group_mean(rewards, group, num_groups=num_groups)
    return centred / (jnp.sqrt(_group_mean(centred**2, group, num_groups)) + EPSILON)


def leave_one_out(rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int) -> Float32[Array, "B"]:
    """R - mean of the group's other rewards (RLOO, 2402.14740, equation 6). UserError for groups of one."""
    if rewards.shape[0] < 2 * num_groups:
        raise UserError(
            f"leave_one_out needs at least 2 responses per prompt, but {rewards.shape[0]} rows form {num_groups}; "
            "raise rollout.group_size, or use group_mean"
        )
    count = jax.ops.segment_sum(jnp.ones_like(rewards), group, num_groups)[group]
    return group_mean(rewards, group, num_groups=num_groups) * count / (count - 1.0)


def max_rl(rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int) -> Float32[Array, "B"]:
    """(R - mean) / mean, and 0 where the mean is 0: maximum-likelihood RL, for rewards of 0 and 1."""
    mean = _group_mean(rewards, group, num_groups)
    return jnp.where(mean == 0, 0.0, (rewards - mean) / jnp.where(mean == 0, 1.0, mean))


def batch_norm(rewards: Float32[Array, "B"], group: Int32[Array, "B"], *, num_groups: int) -> Float32[Array, "B"]:
    """(R - group mean) / (std of that over the batch + 1e-6) (ScaleRL, 2510.13786)."""
    centred = group_mean(rewards, group, num_groups=num_groups)
    return centred / (jnp.std(centred) + EPSILON)


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
}


def gae(
    rewards: Float32[Array, "B T"],
    values: Float32[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    discount: float,
    lam: float,
) -> Float32[Array, "B T"]:
    """Generalised advantage estimation (1506.02438, equation 16); the value after a row's last position is 0."""
    rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)

    def backwards(carry, column):
        advantage, next_value = carry
        reward, value, valid = column
        advantage = jnp.where(valid, reward + discount * next_value - value + discount * lam * advantage, 0.0)
        return (advantage, value), advantage

    start = (jnp.zeros_like(rewards[:, 0]), jnp.zeros_like(rewards[:, 0]))
    _, advantages = jax.lax.scan(backwards, start, (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T
