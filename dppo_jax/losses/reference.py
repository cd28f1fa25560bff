"""A penalty on the divergence from a fixed reference policy: as the additive term e_t of any loss's coefficient, or as
a part of the reward."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from dppo_jax.errors import lookup
from dppo_jax.losses.core import Bound, BoundLoss, bounded_exp, log_ratio, require, zero_outside_mask
from dppo_jax.types import LossInputs, LossOutput

# Minus the derivative by log pi of each estimate of KL(pi || reference), from log(pi/reference): k1 = log(pi/ref) in
# expectation under pi, k2 = log(pi/ref)^2 / 2, k3 = ref/pi - 1 - log(ref/pi) (Schulman, "Approximating KL divergence").
ESTIMATORS = {
    "k1": lambda logs: -(1 + logs),
    "k2": lambda logs: -logs,
    "k3": lambda logs: bounded_exp(-logs) - 1,
}


# The estimates themselves.
ESTIMATES = {
    "k1": lambda logs: logs,
    "k2": lambda logs: logs**2 / 2,
    "k3": lambda logs: bounded_exp(-logs) - 1 + logs,
}


def token_kl(
    behavior_logp: Float32[Array, "B R"],
    reference_logp: Float32[Array, "B R"],
    mask: Bool[Array, "B R"],
    *,
    estimator: str,
) -> Float32[Array, "B R"]:
    """Estimates of KL(behavior policy || reference) at every response token, for the reward; 0 outside the mask.

    UserError for an unknown estimator.
    """
    estimate = lookup(ESTIMATES, estimator, "estimator")
    logs = log_ratio(jnp.where(mask, behavior_logp, 0.0), jnp.where(mask, reference_logp, 0.0))
    return jnp.where(mask, estimate(logs), 0.0)


def with_reference_kl(loss: BoundLoss, *, coef: float, estimator: str) -> Bound:
    """The loss with e_t = coef * -d(estimate)/d(log pi) added, masked tokens included (GRPO, 2402.03300, equation 3).

    Needs LossInputs.reference_logp. UserError for an unknown estimator.
    """
    return Bound(_penalised, loss=loss, coef=coef, slope=lookup(ESTIMATORS, estimator, "estimator"))


def _penalised(inputs: LossInputs, *, loss: BoundLoss, coef: float, slope: Callable[[Array], Array]) -> LossOutput:
    plain, clean = loss(inputs), zero_outside_mask(inputs)
    logs = log_ratio(clean.logp, require(clean, "reference_logp"))
    extra = jnp.where(inputs.mask, coef * slope(logs), 0.0)
    metrics = plain.metrics | {"reference_kl": (bounded_exp(-logs) - 1 + logs, inputs.mask)}
    return dataclasses.replace(plain, coef=jax.lax.stop_gradient(plain.coef + extra), metrics=metrics)
