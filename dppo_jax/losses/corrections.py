"""Corrections of the mismatch rho = pi'/mu, on top of `ppo_clip_recomputed` (q = pi/pi' in its mask and weight).

With any other loss they would correct twice: there the weight pi/mu holds the mismatch already.
"""

import jax.numpy as jnp

from dppo_jax.losses.core import Sequences, bounded_exp, log_ratio, output, require, zero_outside_mask
from dppo_jax.losses.ratio import clipped
from dppo_jax.types import LossInputs, LossOutput


def _corrected(inputs: LossInputs, eps_low: float, eps_high: float, correct) -> LossOutput:
    """c = M q w A with (w, keep) = correct(log rho, inputs)."""
    inputs = zero_outside_mask(inputs)
    proximal = require(inputs, "proximal_logp")
    logs, mismatch = log_ratio(inputs.logp, proximal), log_ratio(proximal, inputs.behavior_logp)
    weight, keep = correct(mismatch, inputs)
    keep &= clipped(jnp.exp(logs), inputs.advantages, eps_low, eps_high)
    return output(inputs, bounded_exp(logs) * weight, keep)


def token_tis(inputs: LossInputs, *, eps_low: float, eps_high: float, correction_cap: float) -> LossOutput:
    """c = M q min(rho, correction_cap) A: truncated importance sampling of every token (Yao et al., 2025)."""

    def correct(mismatch, inputs):
        return jnp.minimum(bounded_exp(mismatch), correction_cap), inputs.mask

    return _corrected(inputs, eps_low, eps_high, correct)


def sequence_tis(inputs: LossInputs, *, eps_low: float, eps_high: float, correction_cap: float) -> LossOutput:
    """c = M q min(prod rho, correction_cap) A, the product over the response (Liu, Li et al., 2025)."""

    def correct(mismatch, inputs):
        return jnp.minimum(bounded_exp(Sequences(inputs).sum(mismatch)), correction_cap), inputs.mask

    return _corrected(inputs, eps_low, eps_high, correct)


def token_mis(inputs: LossInputs, *, eps_low: float, eps_high: float, correction_cap: float) -> LossOutput:
    """c = M q rho A, a token dropped where rho > correction_cap: masked importance sampling (Liu, Li et al., 2025)."""

    def correct(mismatch, inputs):
        return bounded_exp(mismatch), jnp.exp(mismatch) <= correction_cap

    return _corrected(inputs, eps_low, eps_high, correct)


def sequence_mis(inputs: LossInputs, *, eps_low: float, eps_high: float, correction_cap: float) -> LossOutput:
    """c = M q prod(rho) A, a response dropped where the product > correction_cap (Liu, Li et al., 2025)."""

    def correct(mismatch, inputs):
        log_product = Sequences(inputs).sum(mismatch)
        return bounded_exp(log_product), jnp.exp(log_product) <= correction_cap

    return _corrected(inputs, eps_low, eps_high, correct)


def icepop(
    inputs: LossInputs, *, eps_low: float, eps_high: float, correction_low: float, correction_high: float
) -> LossOutput:
    """c = M q rho A, a token dropped where rho is outside [correction_low, correction_high] (Ring-1T, 2510.18855)."""

    def correct(mismatch, inputs):
        ratio = jnp.exp(mismatch)
        return bounded_exp(mismatch), (ratio >= correction_low) & (ratio <= correction_high)

    return _corrected(inputs, eps_low, eps_high, correct)
