"""Losses that judge a token by its whole response, or by what came before it there."""

import jax.numpy as jnp

from dppo_jax.divergences import binary_kl, prob_diff
from dppo_jax.losses.core import Sequences, bounded_exp, from_keep, log_ratio, output, two_sided, zero_outside_mask
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


def geometric_mask(inputs: LossInputs, *, eps_low: float, eps_high: float, ratio_cap: float) -> LossOutput:
    """The whole response masked where exp(mean log r) is outside [1-eps_low, 1+eps_high], whatever the sign of A.

    Geometric rejection (Liu, Li et al., 2025), with truncated weights as in verl's preset bypass_pg_geo_rs_token_tis,
    whose bounds are 0.999 and 1.001; others keep 0.99 to 1.01.
    """
    inputs = zero_outside_mask(inputs)
    ratio = jnp.exp(Sequences(inputs).mean(log_ratio(inputs.logp, inputs.behavior_logp)))
    return from_keep(inputs, (ratio >= 1 - eps_low) & (ratio <= 1 + eps_high), ratio_cap=ratio_cap)


def flash_reinforce(inputs: LossInputs, *, delta: float, ratio_cap: float) -> LossOutput:
    """The whole response masked where its mean KL(Bern mu || Bern pi) > delta. FlashREINFORCE (Molt, 2607.21653).

    What is rejected stays in the denominators: aggregation weights are made before any mask. Molt holds the
    probabilities of this KL inside [1e-6, 1 - 1e-6]; here they are exact.
    """
    inputs = zero_outside_mask(inputs)
    divergence = binary_kl(inputs.logp, inputs.behavior_logp)
    keep = Sequences(inputs).mean(divergence) <= delta
    return from_keep(inputs, keep, ratio_cap=ratio_cap, metrics={"divergence": (divergence, inputs.mask)})


def vespo(inputs: LossInputs, *, k_low: float, k_high: float, lambda_low: float, lambda_high: float) -> LossOutput:
    """c = W^k exp(lambda (1-W)) A with W = prod r of the response, 1 at W = 1; `*_high` where A >= 0, else `*_low`.

    No mask: the weight falls on both sides of its peak at W = k/lambda. VESPO, 2602.10693, equation 20, where k and
    lambda are c_1 and c_2.
    """
    inputs = zero_outside_mask(inputs)
    logs = Sequences(inputs).sum(log_ratio(inputs.logp, inputs.behavior_logp))
    k, scale = (jnp.where(inputs.advantages >= 0, *sides) for sides in ((k_high, k_low), (lambda_high, lambda_low)))
    return output(inputs, bounded_exp(k * logs + scale * (1 - bounded_exp(logs))))


def gmpo(inputs: LossInputs, *, eps_low: float, eps_high: float) -> LossOutput:
    """c = M s A with s = exp(mean of log r, clipped at eps_high where A>0 and at -eps_low where A<0).

    M drops the clipped tokens, of which the objective s A has no gradient; they count in s at the bound. That gradient
    has a factor 1/T, which is the aggregation's. GMPO, 2507.20673; A is that of the whole response.
    """
    inputs = zero_outside_mask(inputs)
    logs, sign = log_ratio(inputs.logp, inputs.behavior_logp), jnp.sign(inputs.advantages)
    held = sign * jnp.minimum(sign * logs, sign * jnp.clip(logs, -eps_low, eps_high))
    keep = two_sided(inputs.advantages, logs > eps_high, logs < -eps_low)
    return output(inputs, bounded_exp(Sequences(inputs).mean(held)), keep)


def minpro(inputs: LossInputs, *, eps_low: float, eps_high: float) -> LossOutput:
    """c = clip(r_t min_{i<t} r_i, 1-eps_low, 1+eps_high) A: the product of the prefix's ratios replaced by their least.

    No mask, as in CISPO; the first token of a response has r_1 alone. MinPRO, 2601.22718.
    """
    inputs = zero_outside_mask(inputs)
    logs = log_ratio(inputs.logp, inputs.behavior_logp)
    before = Sequences(inputs).least_before(logs)
    weight = bounded_exp(logs + jnp.where(jnp.isfinite(before), before, 0.0))
    return output(inputs, jnp.clip(weight, 1 - eps_low, 1 + eps_high))


def m2po(inputs: LossInputs, *, delta: float, ratio_cap: float) -> LossOutput:
    """Of the tokens that move away, A (r-1) > 0, those of the largest log(r)^2 are masked until its mean over the
    others is at most delta.

    M2PO, 2510.01161, does so over a batch; a loss sees no batch, so here each response keeps its own second moment. In
    the authors' code, unlike here, what is masked counts in the mean at the bound, and 0.7 <= r <= 1.5 is never masked.
    """
    inputs = zero_outside_mask(inputs)
    logs = log_ratio(inputs.logp, inputs.behavior_logp)
    away = inputs.advantages * logs > 0
    moment = Sequences(inputs).mean_up_to(logs**2, away)
    return from_keep(inputs, ~(away & (moment > delta)), ratio_cap=ratio_cap)
