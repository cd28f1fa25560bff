"""Losses that judge a token by an estimate of the divergence of the policy from its anchor."""

import jax.numpy as jnp
from jaxtyping import Array

from dppo_jax.divergences import binary_kl, prob_diff, topk_kl, topk_tv
from dppo_jax.losses.core import bounded_exp, from_keep, log_ratio, output, require, two_sided, zero_outside_mask
from dppo_jax.types import LossInputs, LossOutput


def _anchor(inputs: LossInputs, proximal: bool) -> Array:
    return require(inputs, "proximal_logp") if proximal else inputs.behavior_logp


def dppo_binary_tv(
    inputs: LossInputs, *, delta_low: float, delta_high: float, ratio_cap: float, proximal: bool = False
) -> LossOutput:
    """Masked when A>0 and pi-mu > delta_high, or A<0 and mu-pi > delta_low (2602.04879, section 4).

    `proximal`: the proximal policy takes mu's place in the mask, not in the weight (section 5.2).
    """
    inputs = zero_outside_mask(inputs)
    diff = prob_diff(inputs.logp, _anchor(inputs, proximal))
    keep = two_sided(inputs.advantages, diff > delta_high, -diff > delta_low)
    metrics = {"divergence": (jnp.abs(diff), inputs.mask)}
    return from_keep(inputs, keep, ratio_cap=ratio_cap, metrics=metrics)


def _divergence_mask(
    inputs: LossInputs, anchor: Array, divergence: Array, delta_low: float, delta_high: float, ratio_cap: float
) -> LossOutput:
    """Masked when the update moves pi away from the anchor and the divergence exceeds its threshold."""
    away_up, away_down = inputs.logp > anchor, inputs.logp < anchor
    high, low = away_up & (divergence > delta_high), away_down & (divergence > delta_low)
    keep = two_sided(inputs.advantages, high, low)
    return from_keep(inputs, keep, ratio_cap=ratio_cap, metrics={"divergence": (divergence, inputs.mask)})


def dppo_binary_kl(
    inputs: LossInputs, *, delta_low: float, delta_high: float, ratio_cap: float, proximal: bool = False
) -> LossOutput:
    """Masked when moving away and KL(Bern mu || Bern pi) > delta, in nats (2602.04879, section 4)."""
    inputs = zero_outside_mask(inputs)
    anchor = _anchor(inputs, proximal)
    return _divergence_mask(inputs, anchor, binary_kl(inputs.logp, anchor), delta_low, delta_high, ratio_cap)


def _dppo_topk(estimate, inputs: LossInputs, delta_low, delta_high, ratio_cap, proximal: bool) -> LossOutput:
    inputs = zero_outside_mask(inputs)
    anchor = _anchor(inputs, proximal)
    topk = require(inputs, "topk")
    topk_anchor = require(inputs, "topk.proximal_logp" if proximal else "topk.behavior_logp")
    divergence = estimate(inputs.logp, anchor, topk, topk_anchor)
    return _divergence_mask(inputs, anchor, divergence, delta_low, delta_high, ratio_cap)


def dppo_topk_tv(
    inputs: LossInputs, *, delta_low: float, delta_high: float, ratio_cap: float, proximal: bool = False
) -> LossOutput:
    """Masked when moving away and TV over TopK(mu, K) ∪ {sampled} ∪ {rest} > delta (2602.04879, section 4)."""
    return _dppo_topk(topk_tv, inputs, delta_low, delta_high, ratio_cap, proximal)


def dppo_topk_kl(
    inputs: LossInputs, *, delta_low: float, delta_high: float, ratio_cap: float, proximal: bool = False
) -> LossOutput:
    """Masked when moving away and KL over TopK(mu, K) ∪ {sampled} ∪ {rest} > delta, in nats (2602.04879, section 4)."""
    return _dppo_topk(topk_kl, inputs, delta_low, delta_high, ratio_cap, proximal)


def dppo_exact(
    inputs: LossInputs, *, delta_low: float, delta_high: float, ratio_cap: float, kind: str
) -> LossOutput:
    """Masked when moving away and the divergence over the whole vocabulary > delta: what binary and top-K estimate.

    `kind`: "tv" or "kl", in nats. The exact divergence is that from the rollout's parameters in its own precision.
    """
    inputs = zero_outside_mask(inputs)
    divergence = require(inputs, f"exact.{kind}")
    return _divergence_mask(inputs, inputs.behavior_logp, divergence, delta_low, delta_high, ratio_cap)


def minimal_mask(inputs: LossInputs, *, delta_low: float, ratio_cap: float) -> LossOutput:
    """Masked when A<0 and mu-pi >= delta_low, and nothing else (2602.04879, section 5.3). Equal is masked here."""
    inputs = zero_outside_mask(inputs)
    diff = prob_diff(inputs.logp, inputs.behavior_logp)
    keep = ~((inputs.advantages < 0) & (-diff >= delta_low))
    return from_keep(inputs, keep, ratio_cap=ratio_cap, metrics={"divergence": (jnp.abs(diff), inputs.mask)})


def binary_tv_unsigned(inputs: LossInputs, *, delta_low: float, delta_high: float, ratio_cap: float) -> LossOutput:
    """Masked when pi-mu > delta_high or mu-pi > delta_low, whatever the sign of A: binary DPPO without its condition.

    The rule of the prime-rl library's IPO: its default loss in March 2026 with 0.2, and with `prime_rl`'s penalty; an
    option from June with 0.1; the default again since August, since September with 0.3 and without the penalty.
    """
    inputs = zero_outside_mask(inputs)
    diff = prob_diff(inputs.logp, inputs.behavior_logp)
    keep = (diff <= delta_high) & (-diff <= delta_low)
    return from_keep(inputs, keep, ratio_cap=ratio_cap, metrics={"divergence": (jnp.abs(diff), inputs.mask)})


def kpop(inputs: LossInputs, *, delta: float, ratio_cap: float) -> LossOutput:
    """Kept iff KL(Bern mu || Bern pi) <= delta and KL(Bern pi || Bern mu) <= delta, in nats, whatever the sign of A."""
    inputs = zero_outside_mask(inputs)
    forward, reverse = binary_kl(inputs.logp, inputs.behavior_logp), binary_kl(inputs.behavior_logp, inputs.logp)
    divergence = jnp.maximum(forward, reverse)
    metrics = {"divergence": (divergence, inputs.mask)}
    return from_keep(inputs, divergence <= delta, ratio_cap=ratio_cap, metrics=metrics)


def drpo(inputs: LossInputs, *, delta: float, ratio_cap: float) -> LossOutput:
    """c = A min(r, C) [1 - sign(A) (pi-mu)/delta]: binary TV as a quadratic penalty; beyond delta it pulls back.

    DRPO, 2606.09821, table 1.
    """
    inputs = zero_outside_mask(inputs)
    ratio = jnp.minimum(bounded_exp(log_ratio(inputs.logp, inputs.behavior_logp)), ratio_cap)
    diff = prob_diff(inputs.logp, inputs.behavior_logp)
    return output(
        inputs,
        ratio * (1 - jnp.sign(inputs.advantages) * diff / delta),
        metrics={"divergence": (jnp.abs(diff), inputs.mask)},
    )


def prime_rl(inputs: LossInputs, *, delta_low: float, delta_high: float, tau: float) -> LossOutput:
    """c = M r A - 2 tau log r, with the mask of `dppo_binary_tv`.

    The second term, of the penalty tau log(r)^2, acts on masked tokens too, as in `kimi_k25`. The default loss of the
    prime-rl library from April to August 2026 (`default_loss_fn`); IPO, `binary_tv_unsigned`, came before and after it.
    """
    inputs = zero_outside_mask(inputs)
    logs = log_ratio(inputs.logp, inputs.behavior_logp)
    diff = prob_diff(inputs.logp, inputs.behavior_logp)
    keep = two_sided(inputs.advantages, diff > delta_high, -diff > delta_low)
    metrics = {"divergence": (jnp.abs(diff), inputs.mask)}
    return output(inputs, bounded_exp(logs), keep, extra=-2 * tau * logs, metrics=metrics)
