"""Losses that judge a token by its whole response, or by what came before it there."""

import jax.numpy as jnp

from dppo_jax.divergences import prob_diff
from dppo_jax.losses.core import Sequences, bounded_exp, from_keep, log_ratio, output, zero_outside_mask
from dppo_jax.losses.ratio import clipped
from dppo_jax.types import LossInputs, LossOutput


def gspo(inputs: LossInputs, *, eps_low: float, eps_high: float, ratio_cap: float) -> LossOutput:
    """c = M min(s, C) A with s = exp(mean log r) of the response; masked like PPO's ratio, all tokens or none.

    GSPO, 2507.18071, equations 5 to 7.
    """
    inputs = zero_outside_mask(inputs)
    logs = Sequences(inputs).mean(log_ratio(inputs.logp, inputs.behavior_logp))
    keep = clipped(jnp.exp(logs), inputs.advantages, eps_low, eps_high)
    return output(inputs, jnp.minimum(bounded_exp(logs), ratio_cap), keep)


def deepseek_v32(
    inputs: LossInputs, *, eps_low: float, eps_high: float, delta_low: float, ratio_cap: float
) -> LossOutput:
    """`ppo_clip`, and the whole response masked when A<0 and its mean log(mu/pi) > delta_low.

    DeepSeek-V3.2's off-policy sequence masking, 2512.02556, section 3.1; the report gives no threshold.
    """
    inputs = zero_outside_mask(inputs)
    logs = log_ratio(inputs.logp, inputs.behavior_logp)
    drift = -Sequences(inputs).mean(logs)
    keep = clipped(jnp.exp(logs), inputs.advantages, eps_low, eps_high)
    return from_keep(inputs, keep & ~((inputs.advantages < 0) & (drift > delta_low)), ratio_cap=ratio_cap)


def trm_max(inputs: LossInputs, *, delta: float, ratio_cap: float) -> LossOutput:
    """The whole response masked when some token has log(r)^2 / 2 > delta.

    Trust-region masking by the largest divergence, 2512.23075; log(r)^2 / 2 estimates KL(mu || pi) from one sample.
    """
    inputs = zero_outside_mask(inputs)
    logs = log_ratio(inputs.logp, inputs.behavior_logp)
    return from_keep(inputs, Sequences(inputs).max(logs**2 / 2) <= delta, ratio_cap=ratio_cap)


def trm_mean(inputs: LossInputs, *, delta: float, ratio_cap: float) -> LossOutput:
    """The whole response masked when its mean r - 1 - log r > delta: trust-region masking by the mean, 2512.23075."""
    inputs = zero_outside_mask(inputs)
    logs = log_ratio(inputs.logp, inputs.behavior_logp)
    divergence = Sequences(inputs).mean(jnp.expm1(logs) - logs)
    return from_keep(inputs, divergence <= delta, ratio_cap=ratio_cap)


def vaco(inputs: LossInputs, *, delta: float, ratio_cap: float) -> LossOutput:
    """Masked when the response's mean |r-1| / 2 > delta and A (r-1) > 0: of a response that has drifted, the tokens
    whose update would take it further. VACO, 2603.01365, algorithm 1, with a response as the batch of its TV."""
    inputs = zero_outside_mask(inputs)
    gap = jnp.expm1(log_ratio(inputs.logp, inputs.behavior_logp))
    drifted = Sequences(inputs).mean(jnp.abs(gap) / 2) > delta
    return from_keep(inputs, ~(drifted & (inputs.advantages * gap > 0)), ratio_cap=ratio_cap)


def cppo(inputs: LossInputs, *, delta: float, delta_budget: float, w_min: float, ratio_cap: float) -> LossOutput:
    """Binary TV with weights that fall along the response, and a budget for what its prefix has spent.

    With D_t = |pi-mu|, w_t from 1 down to w_min, Z_t = w_t D_t, and b = the response's 0.9-quantile of D held in
    [delta_budget, 2 delta_budget]: masked when A (r-1) > 0 and
    Z_t > min(delta, delta + b sum_{s<t} w_s - sum_{s<t} Z_s). CPPO, 2606.10968, equations 8 to 11.
    """
    inputs = zero_outside_mask(inputs)
    sequences = Sequences(inputs)
    diff = prob_diff(inputs.logp, inputs.behavior_logp)
    divergence = jnp.abs(diff)
    weight = 1 - (1 - w_min) * sequences.position() / jnp.maximum(sequences.length() - 1, 1)
    spent = weight * divergence
    budget = jnp.clip(sequences.quantile(divergence, 0.9), delta_budget, 2 * delta_budget)
    allowed = delta + budget * sequences.before(weight) - sequences.before(spent)
    beyond = spent > jnp.minimum(delta, allowed)
    away = inputs.advantages * jnp.sign(inputs.logp - inputs.behavior_logp) > 0
    metrics = {"divergence": (divergence, inputs.mask)}
    return from_keep(inputs, ~(away & beyond), ratio_cap=ratio_cap, metrics=metrics)
