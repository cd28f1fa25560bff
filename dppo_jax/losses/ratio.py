"""Losses that judge a token by its ratio to the behavior policy (r = pi/mu) or to the proximal one (q = pi/pi')."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dppo_jax.divergences import LOG_MIN
from dppo_jax.losses.core import bounded_exp, from_keep, log_ratio, output, require, two_sided, zero_outside_mask
from dppo_jax.types import LossInputs, LossOutput


def reinforce(inputs: LossInputs) -> LossOutput:
    """c = A: the score-function gradient of data taken as on-policy (Williams, 1992)."""
    inputs = zero_outside_mask(inputs)
    return output(inputs, jnp.ones_like(inputs.logp))


def truncated_is(inputs: LossInputs, *, ratio_cap: float) -> LossOutput:
    """M = 1, no trust region: PG-IS with ratio_cap = inf, CISPO (PG-TIS) with a finite one (2602.04879, section 5).

    CISPO: MiniMax-M1, 2506.13585, equations 4 and 5; ScaleRL, 2510.13786, section 3.
    """
    inputs = zero_outside_mask(inputs)
    return from_keep(inputs, jnp.ones_like(inputs.mask), ratio_cap=ratio_cap)


def clipped(ratio: Array, advantages: Array, eps_low: float, eps_high: float) -> Array:
    """PPO's mask: dropped when A>0 and ratio > 1+eps_high, or A<0 and ratio < 1-eps_low."""
    return two_sided(advantages, ratio > 1 + eps_high, ratio < 1 - eps_low)


def ratio_clip(inputs: LossInputs, *, eps_low: float, eps_high: float, ratio_cap: float) -> LossOutput:
    """Masked when A>0 and r > 1+eps_high, or A<0 and r < 1-eps_low.

    PPO (1707.06347, equation 7) and GRPO with equal eps; Clip-Higher (DAPO, 2503.14476, equation 10) with eps_high
    larger. The anchor is the rollout's own log-probability ("bypass": no pass of the trainer at the old parameters).
    """
    inputs = zero_outside_mask(inputs)
    ratio = jnp.exp(log_ratio(inputs.logp, inputs.behavior_logp))
    return from_keep(inputs, clipped(ratio, inputs.advantages, eps_low, eps_high), ratio_cap=ratio_cap)


def dual_clip(
    inputs: LossInputs, *, eps_low: float, eps_high: float, dual_cap: float, ratio_cap: float
) -> LossOutput:
    """`ratio_clip`, also masked when A<0 and r > dual_cap (1912.09729, equation 5)."""
    inputs = zero_outside_mask(inputs)
    ratio = jnp.exp(log_ratio(inputs.logp, inputs.behavior_logp))
    keep = clipped(ratio, inputs.advantages, eps_low, eps_high) & ~((inputs.advantages < 0) & (ratio > dual_cap))
    return from_keep(inputs, keep, ratio_cap=ratio_cap)


def minirl(inputs: LossInputs, *, eps_low: float, eps_high: float, ratio_cap: float) -> LossOutput:
    """`ratio_clip` with the ratio to the proximal policy in the mask; the weight stays pi/mu (section 5)."""
    inputs = zero_outside_mask(inputs)
    ratio = jnp.exp(log_ratio(inputs.logp, require(inputs, "proximal_logp")))
    return from_keep(inputs, clipped(ratio, inputs.advantages, eps_low, eps_high), ratio_cap=ratio_cap)


def ratio_clip_recomputed(inputs: LossInputs, *, eps_low: float, eps_high: float, ratio_cap: float) -> LossOutput:
    """`ratio_clip` with q = pi/pi' in mask and weight: c = M min(q, C) A. The mismatch pi'/mu is left uncorrected."""
    inputs = zero_outside_mask(inputs)
    logs = log_ratio(inputs.logp, require(inputs, "proximal_logp"))
    keep = clipped(jnp.exp(logs), inputs.advantages, eps_low, eps_high)
    return output(inputs, jnp.minimum(bounded_exp(logs), ratio_cap), keep)


def relaxed_clip(
    inputs: LossInputs, *, eps_low: float, eps_high: float, alpha: float, ratio_cap: float, low: bool, high: bool
) -> LossOutput:
    """`ratio_clip` with its lower (`low`) or upper (`high`) bound lifted where mu < alpha (2602.04879, section 6)."""
    inputs = zero_outside_mask(inputs)
    ratio = jnp.exp(log_ratio(inputs.logp, inputs.behavior_logp))
    rare = jnp.exp(inputs.behavior_logp) < alpha
    above = (ratio > 1 + eps_high) & ~(rare & high)
    below = (ratio < 1 - eps_low) & ~(rare & low)
    return from_keep(inputs, two_sided(inputs.advantages, above, below), ratio_cap=ratio_cap)


def sapo(inputs: LossInputs, *, tau_low: float, tau_high: float) -> LossOutput:
    """c = 4 g (1-g) r A with g = sigmoid(tau (r-1)): a soft gate, 1 at r = 1; tau_high where A>0, else tau_low.

    SAPO, 2511.20347.
    """
    inputs = zero_outside_mask(inputs)
    logs = log_ratio(inputs.logp, inputs.behavior_logp)
    tau = jnp.where(inputs.advantages > 0, tau_high, tau_low)
    gate = jax.nn.sigmoid(tau * (jnp.exp(logs) - 1))
    complement = jax.nn.sigmoid(-tau * (jnp.exp(logs) - 1))
    return output(inputs, 4 * gate * complement * bounded_exp(logs))


def kimi_k25(inputs: LossInputs, *, eps_low: float, eps_high: float, tau: float) -> LossOutput:
    """c = M r A - 2 tau log r; M drops r > 1+eps_high and r < 1-eps_low whatever the sign of A.

    The second term, of the penalty tau log(r)^2, acts on masked tokens too. Kimi K2.5 technical report (2026).
    """
    inputs = zero_outside_mask(inputs)
    logs = log_ratio(inputs.logp, inputs.behavior_logp)
    ratio = jnp.exp(logs)
    keep = (ratio <= 1 + eps_high) & (ratio >= 1 - eps_low)
    return output(inputs, bounded_exp(logs), keep, extra=-2 * tau * logs)


def estr(
    inputs: LossInputs, *, eps_low: float, eps_high: float, delta: float, entropy_floor: float, ratio_cap: float
) -> LossOutput:
    """`ratio_clip`, also masked when log(r)^2 > delta (H + entropy_floor), with H the entropy of mu at the token, nats.

    ESTR's entropy-scaled trust region, 2607.22186: log(r)^2 of data drawn earlier grows with H.
    """
    inputs = zero_outside_mask(inputs)
    entropy, logs = require(inputs, "behavior_entropy"), log_ratio(inputs.logp, inputs.behavior_logp)
    keep = clipped(jnp.exp(logs), inputs.advantages, eps_low, eps_high)
    beyond = logs**2 > delta * (entropy + entropy_floor)  # inf times 0 masks nothing
    return from_keep(inputs, keep & ~beyond, ratio_cap=ratio_cap)


def dis(inputs: LossInputs, *, eps_low: float, eps_high: float, ratio_cap: float) -> LossOutput:
    """Kept iff 1-eps_low < r < 1+eps_high, whatever the sign of A; a ratio on a bound is masked here.

    DIS, direct double-sided importance sampling: SAO, 2607.07508, equations 1 to 3.
    """
    inputs = zero_outside_mask(inputs)
    ratio = jnp.exp(log_ratio(inputs.logp, inputs.behavior_logp))
    return from_keep(inputs, (ratio > 1 - eps_low) & (ratio < 1 + eps_high), ratio_cap=ratio_cap)


def ripo(inputs: LossInputs, *, budget: float, ratio_low: float, ratio_high: float, ratio_cap: float) -> LossOutput:
    """PPO's mask with eps = sqrt(budget/mu) of the token: A>0 and r > min(1+eps, ratio_high), or A<0 and
    r < max(1-eps, ratio_low).

    mu (r-1)^2 = budget on the bound: twice the token's part of KL(mu || pi), to second order. RIPO, 2607.10169.
    """
    inputs = zero_outside_mask(inputs)
    ratio = jnp.exp(log_ratio(inputs.logp, inputs.behavior_logp))
    eps = jnp.sqrt(budget) * bounded_exp(-jnp.maximum(inputs.behavior_logp, -LOG_MIN) / 2)
    high, low = jnp.minimum(1 + eps, ratio_high), jnp.maximum(1 - eps, ratio_low)
    return from_keep(inputs, two_sided(inputs.advantages, ratio > high, ratio < low), ratio_cap=ratio_cap)


def aspo(inputs: LossInputs, *, eps_low: float, eps_high: float, ratio_cap: float) -> LossOutput:
    """c = M min(w, C) A with w = 1/r where A>0, else r; masked like PPO's ratio.

    The cap is the paper's soft dual clip: beyond it the weight is C, and the gradient flows. ASPO, 2510.06062.
    """
    inputs = zero_outside_mask(inputs)
    logs = log_ratio(inputs.logp, inputs.behavior_logp)
    weight = bounded_exp(jnp.where(inputs.advantages > 0, -logs, logs))
    keep = clipped(jnp.exp(logs), inputs.advantages, eps_low, eps_high)
    return output(inputs, jnp.minimum(weight, ratio_cap), keep)


def up(inputs: LossInputs, *, eps_low: float, ratio_cap: float) -> LossOutput:
    """c = A where A>0, with neither ratio nor clip; else c = M min(r, C) A, masked when r < 1-eps_low.

    UP, unbounded positive asymmetric optimization, 2607.06987, equation 15: where A>0 its ratio is pi over a copy of pi
    without a gradient, which is 1.
    """
    inputs = zero_outside_mask(inputs)
    logs = log_ratio(inputs.logp, inputs.behavior_logp)
    weight = jnp.where(inputs.advantages > 0, 1.0, jnp.minimum(bounded_exp(logs), ratio_cap))
    return output(inputs, weight, ~((inputs.advantages < 0) & (jnp.exp(logs) < 1 - eps_low)))
