"""Distillation on the policy's own responses: what a teacher says of a token takes the advantage's place."""

import dataclasses

import jax.numpy as jnp

from dppo_jax.divergences import prob_diff
from dppo_jax.losses.core import from_keep, log_ratio, require, zero_outside_mask
from dppo_jax.types import LossInputs, LossOutput


def distill(inputs: LossInputs, *, delta_low: float, ratio_cap: float) -> LossOutput:
    """c = M min(r, C) (log pi_T - log pi), pi_T the teacher: minus the gradient of KL(pi || pi_T) of each next token,
    from the one that was drawn (2306.13649, the reverse KL on the student's own responses).

    Masked when pi_T < pi and mu-pi > delta_low: what fell so far is not lowered further. No advantage is looked at.
    """
    inputs = zero_outside_mask(inputs)
    gap = log_ratio(require(inputs, "teacher_logp"), inputs.logp)
    masked = (gap < 0) & (-prob_diff(inputs.logp, inputs.behavior_logp) > delta_low)
    metrics = {"distill/kl": (-gap, inputs.mask), "distill/masked": (masked.astype(jnp.float32), inputs.mask)}
    return from_keep(dataclasses.replace(inputs, advantages=gap), ~masked, ratio_cap=ratio_cap, metrics=metrics)
