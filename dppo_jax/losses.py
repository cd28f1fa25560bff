"""Policy losses: pure functions from `LossInputs` to the coefficient of grad log pi.

Every method is the same gradient with different parts (arXiv 2602.04879, equation 23, extended):

    grad J = E[ sum_t  w_t c_t grad log pi(a_t|s_t) ],      c_t = M_t min(r_t, C) A_t,      r_t = pi(a_t) / mu(a_t)

mu is the behavior policy, C = `ratio_cap` (inf: no truncation), and c_t carries no gradient. A loss chooses the mask M.
Upper thresholds (`*_high`) guard A > 0, lower ones (`*_low`) guard A < 0. Inequalities are strict: what equals its
threshold is kept, except where a row says otherwise.

To add a loss: write one function of (LossInputs, *, hyperparameters) that returns `from_mask(...)` or a `LossOutput`,
and put it into LOSSES. Its keyword-only arguments become the config keys `loss.<name>`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from dppo_jax.divergences import LOG_MIN, binary_kl, prob_diff, topk_kl, topk_tv
from dppo_jax.errors import UserError, lookup, nearest
from dppo_jax.types import ExactDivergence, LossInputs, LossOutput, TopKPair

__all__ = ["LOSSES", "ExactDivergence", "LossInputs", "LossOutput", "TopKPair", "bind", "policy_objective"]

Loss = Callable[..., LossOutput]

# Keeps exp(log r), and the squared norm of a gradient that holds it, finite in float32. Masks never see it.
LOG_RATIO_LIMIT = 40.0


class MissingField(UserError):
    """A loss asked for an optional field that the batch lacks."""

    def __init__(self, field: str):
        super().__init__(f"this loss needs LossInputs.{field}, which is None")
        self.field = field


def require(inputs: LossInputs, field: str) -> Array:
    """inputs.<field> (dots reach into it), or MissingField."""
    value = functools.reduce(lambda at, name: None if at is None else getattr(at, name), field.split("."), inputs)
    if value is None:
        raise MissingField(field)
    return value  # type: ignore[return-value]


def safe(inputs: LossInputs) -> LossInputs:
    """The inputs with 0 for every value outside the mask, so that a NaN there reaches no arithmetic."""
    mask = inputs.mask

    def clean(x):
        if x.dtype == bool:
            return x
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, 0.0)

    return jax.lax.stop_gradient(jax.tree.map(clean, inputs))


def log_ratio(logp: Array, anchor_logp: Array) -> Array:
    """log(pi/anchor), finite at probability 0."""
    return jnp.maximum(logp, -LOG_MIN) - jnp.maximum(anchor_logp, -LOG_MIN)


def from_mask(inputs: LossInputs, keep: Array, *, ratio_cap: float, metrics: dict | None = None) -> LossOutput:
    """c = keep * min(r, ratio_cap) * A inside the mask, 0 outside."""
    ratio = jnp.exp(jnp.minimum(log_ratio(inputs.logp, inputs.behavior_logp), LOG_RATIO_LIMIT))
    weight = jnp.minimum(ratio, ratio_cap)
    coef = jnp.where(inputs.mask & keep, weight * inputs.advantages, 0.0)
    metrics = {} if metrics is None else metrics
    return LossOutput(coef=jax.lax.stop_gradient(coef), keep=inputs.mask & keep, metrics=metrics)


def two_sided(advantages: Array, high: Array, low: Array) -> Bool[Array, "B R"]:
    """The mask that drops `high` where A > 0 and `low` where A < 0."""
    return ~jnp.where(advantages > 0, high, (advantages < 0) & low)


def truncated_is(inputs: LossInputs, *, ratio_cap: float) -> LossOutput:
    """M = 1, no trust region: PG-IS with ratio_cap = inf, CISPO (PG-TIS) with a finite one (2602.04879, section 5)."""
    inputs = safe(inputs)
    return from_mask(inputs, jnp.ones_like(inputs.mask), ratio_cap=ratio_cap)


def ratio_clip(inputs: LossInputs, *, eps_low: float, eps_high: float, ratio_cap: float) -> LossOutput:
    """Masked when A>0 and r > 1+eps_high, or A<0 and r < 1-eps_low.

    PPO (1707.06347, equation 7) and GRPO with equal eps; Clip-Higher (DAPO, 2503.14476, equation 10) with eps_high
    larger.
    """
    inputs = safe(inputs)
    ratio = jnp.exp(log_ratio(inputs.logp, inputs.behavior_logp))
    keep = two_sided(inputs.advantages, ratio > 1 + eps_high, ratio < 1 - eps_low)
    return from_mask(inputs, keep, ratio_cap=ratio_cap)


def minirl(inputs: LossInputs, *, eps_low: float, eps_high: float, ratio_cap: float) -> LossOutput:
    """`ratio_clip` with the ratio to the proximal policy in the mask; the weight stays pi/mu (section 5)."""
    require(inputs, "proximal_logp")
    inputs = safe(inputs)
    ratio = jnp.exp(log_ratio(inputs.logp, require(inputs, "proximal_logp")))
    keep = two_sided(inputs.advantages, ratio > 1 + eps_high, ratio < 1 - eps_low)
    return from_mask(inputs, keep, ratio_cap=ratio_cap)


def _anchor(inputs: LossInputs, proximal: bool) -> Array:
    return require(inputs, "proximal_logp") if proximal else inputs.behavior_logp


def dppo_binary_tv(
    inputs: LossInputs, *, delta_low: float, delta_high: float, ratio_cap: float, proximal: bool = False
) -> LossOutput:
    """Masked when A>0 and pi-mu > delta_high, or A<0 and mu-pi > delta_low (2602.04879, section 4).

    `proximal`: the proximal policy takes mu's place in the mask, not in the weight (section 5.2).
    """
    _anchor(inputs, proximal)
    inputs = safe(inputs)
    diff = prob_diff(inputs.logp, _anchor(inputs, proximal))
    keep = two_sided(inputs.advantages, diff > delta_high, -diff > delta_low)
    metrics = {"divergence": (jnp.abs(diff), inputs.mask)}
    return from_mask(inputs, keep, ratio_cap=ratio_cap, metrics=metrics)


def _divergence_mask(
    inputs: LossInputs, anchor: Array, divergence: Array, delta_low: float, delta_high: float, ratio_cap: float
) -> LossOutput:
    """Masked when the update moves pi away from the anchor and the divergence exceeds its threshold."""
    away_up, away_down = inputs.logp > anchor, inputs.logp < anchor
    high, low = away_up & (divergence > delta_high), away_down & (divergence > delta_low)
    keep = two_sided(inputs.advantages, high, low)
    return from_mask(inputs, keep, ratio_cap=ratio_cap, metrics={"divergence": (divergence, inputs.mask)})


def dppo_binary_kl(
    inputs: LossInputs, *, delta_low: float, delta_high: float, ratio_cap: float, proximal: bool = False
) -> LossOutput:
    """Masked when moving away and KL(Bern mu || Bern pi) > delta, in nats (2602.04879, section 4)."""
    _anchor(inputs, proximal)
    inputs = safe(inputs)
    anchor = _anchor(inputs, proximal)
    return _divergence_mask(inputs, anchor, binary_kl(inputs.logp, anchor), delta_low, delta_high, ratio_cap)


def _dppo_topk(estimate, inputs: LossInputs, delta_low, delta_high, ratio_cap, proximal: bool) -> LossOutput:
    _anchor(inputs, proximal)
    require(inputs, "topk")
    if proximal:
        require(inputs, "topk.proximal_logp")
    inputs = safe(inputs)
    anchor = _anchor(inputs, proximal)
    topk: TopKPair = inputs.topk  # type: ignore[assignment]
    divergence = estimate(inputs.logp, anchor, topk, topk.proximal_logp if proximal else topk.behavior_logp)
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


def minimal_mask(inputs: LossInputs, *, delta_low: float, ratio_cap: float) -> LossOutput:
    """Masked when A<0 and mu-pi >= delta_low, and nothing else (2602.04879, section 5.3). Equal is masked here."""
    inputs = safe(inputs)
    diff = prob_diff(inputs.logp, inputs.behavior_logp)
    keep = ~((inputs.advantages < 0) & (-diff >= delta_low))
    return from_mask(inputs, keep, ratio_cap=ratio_cap, metrics={"divergence": (jnp.abs(diff), inputs.mask)})


def relaxed_clip(
    inputs: LossInputs, *, eps_low: float, eps_high: float, alpha: float, ratio_cap: float, low: bool, high: bool
) -> LossOutput:
    """`ratio_clip` with its lower (`low`) or upper (`high`) bound lifted where mu < alpha (2602.04879, section 6)."""
    inputs = safe(inputs)
    ratio = jnp.exp(log_ratio(inputs.logp, inputs.behavior_logp))
    rare = jnp.exp(inputs.behavior_logp) < alpha
    above = (ratio > 1 + eps_high) & ~(rare & high)
    below = (ratio < 1 - eps_low) & ~(rare & low)
    return from_mask(inputs, two_sided(inputs.advantages, above, below), ratio_cap=ratio_cap)


LOSSES: dict[str, Loss] = {
    "pg_is": truncated_is,
    "cispo": truncated_is,
    "ppo_clip": ratio_clip,
    "clip_higher": ratio_clip,
    "minirl": minirl,
    "minirl_tis": minirl,
    "dppo_binary_tv": dppo_binary_tv,
    "dppo_binary_kl": dppo_binary_kl,
    "dppo_topk_tv": dppo_topk_tv,
    "dppo_topk_kl": dppo_topk_kl,
    "dppo_binary_tv_proximal": functools.partial(dppo_binary_tv, proximal=True),
    "dppo_binary_kl_proximal": functools.partial(dppo_binary_kl, proximal=True),
    "dppo_topk_tv_proximal": functools.partial(dppo_topk_tv, proximal=True),
    "dppo_topk_kl_proximal": functools.partial(dppo_topk_kl, proximal=True),
    "minimal_mask": minimal_mask,
    "relax_low": functools.partial(relaxed_clip, low=True, high=False),
    "relax_high": functools.partial(relaxed_clip, low=False, high=True),
    "relax_both": functools.partial(relaxed_clip, low=True, high=True),
}


def hyperparameters(loss: Loss) -> frozenset[str]:
    """The names a loss must be given: its keyword-only arguments without a default."""
    parameters = inspect.signature(loss).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty)


def bind(name: str, given: Mapping[str, float]) -> Callable[[LossInputs], LossOutput]:
    """The loss called `name` with its hyperparameters fixed. UserError for an unknown name, and for a hyperparameter
    that is unknown or missing."""
    loss = lookup(LOSSES, name, "loss")
    wanted = hyperparameters(loss)
    for key in given:
        if key not in wanted:
            raise UserError(f"loss {name!r} has no hyperparameter {key!r}{nearest(key, wanted)}")
    if missing := sorted(wanted - set(given)):
        keys = ", ".join(f"loss.{key}" for key in missing)
        raise UserError(f"loss {name!r} needs {keys}, which nothing sets; its hyperparameters are {sorted(wanted)}")
    return functools.partial(loss, **given)


def required_fields(loss: Callable[[LossInputs], LossOutput]) -> frozenset[str]:
    """Which optional fields of LossInputs a bound loss needs, found by tracing it without each."""
    value, flag = jax.ShapeDtypeStruct((1, 1), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    tracked = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)
    full = LossInputs(
        logp=value,
        behavior_logp=value,
        advantages=value,
        mask=flag,
        proximal_logp=value,
        topk=TopKPair(logp=tracked, behavior_logp=tracked, has_sampled=flag, proximal_logp=tracked),
        exact=ExactDivergence(tv=value, kl=value),
    )

    def needs(field: str) -> bool:
        try:
            jax.eval_shape(loss, dataclasses.replace(full, **{field: None}))
        except (MissingField, TypeError, AttributeError):  # asked with `require`, or used as if it were there
            return True
        return False

    jax.eval_shape(loss, full)
    return frozenset(field for field in ("proximal_logp", "topk", "exact") if needs(field))


def policy_objective(
    coef: Float32[Array, "B R"], weights: Float32[Array, "B R"], logp: Float32[Array, "B R"], mask: Bool[Array, "B R"]
) -> Float32[Array, ""]:
    """The scalar to minimise, -sum w c log pi. Its gradient is the one at the top of this file; not its value."""
    scale = jax.lax.stop_gradient(jnp.where(mask, weights * coef, 0.0))
    return -jnp.sum(scale * jnp.where(mask, jnp.maximum(logp, -LOG_MIN), 0.0))
