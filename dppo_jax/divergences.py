"""Per-token estimates of D(anchor || policy), from log-probabilities alone.

All functions are elementwise over [B, R], float32 in and out, finite with finite gradients for any log-probability in
[-inf, 0]. The anchor is the behavior policy, except in the decoupled variants. For one position (data processing),

    binary <= top-K <= exact        for TV and for KL.

Source: arXiv 2602.04879, section 4 and its appendix on approximations.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from dppo_jax.types import SlopeSums, TopKPair

# Probabilities 0 and 1 have no finite log (or log complement): log-probabilities are held inside [-LOG_MIN, -LOG_TINY].
LOG_MIN = 1e4
LOG_TINY = 1e-18


def _clipped(logp: Array) -> Array:
    return jnp.clip(logp.astype(jnp.float32), -LOG_MIN, -LOG_TINY)


def log1mexp(logp: Array) -> Array:
    """log(1 - exp(logp)) for logp < 0, without cancellation at either end (Maechler, 2012)."""
    near = logp > -0.6931472
    # Each branch sees only its own inputs: the gradient of the one not taken would be NaN at the other's end.
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, logp, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, logp))),
    )


def prob_diff(logp: Float32[Array, "*n"], anchor_logp: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """pi - mu of the sampled token, in [-1, 1].

    Taken from the complements where both are likely, so that two nearly certain tokens keep their digits.
    """
    logp, anchor_logp = _clipped(logp), _clipped(anchor_logp)
    likely = (logp > -0.6931472) & (anchor_logp > -0.6931472)
    return jnp.where(likely, jnp.expm1(logp) - jnp.expm1(anchor_logp), jnp.exp(logp) - jnp.exp(anchor_logp))


def binary_tv(logp: Float32[Array, "*n"], anchor_logp: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """|pi - mu| of the sampled token: the total variation between two Bernoullis, in [0, 1]."""
    return jnp.abs(prob_diff(logp, anchor_logp))


def binary_kl(logp: Float32[Array, "*n"], anchor_logp: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """KL(Bern(mu) || Bern(pi)) in nats: mu log(mu/pi) + (1-mu) log((1-mu)/(1-pi)), at least 0."""
    logp, anchor_logp = _clipped(logp), _clipped(anchor_logp)
    sampled = jnp.exp(anchor_logp) * (anchor_logp - logp)
    others = -jnp.expm1(anchor_logp) * (log1mexp(anchor_logp) - log1mexp(logp))
    return jnp.maximum(sampled + others, 0.0)


def _union(logp: Array, anchor_logp: Array, topk: TopKPair, topk_anchor_logp: Array) -> tuple[Array, Array, Array]:
    """TopK ∪ {sampled} as K+1 entries [B,R,K+1]: (policy, anchor, in use); the last is the sampled token's."""
    in_use = jnp.concatenate([jnp.ones_like(topk.logp, bool), ~topk.has_sampled[..., None]], axis=-1)
    policy = jnp.concatenate([topk.logp, logp[..., None]], axis=-1)
    anchor = jnp.concatenate([topk_anchor_logp, anchor_logp[..., None]], axis=-1)
    return _clipped(policy), _clipped(anchor), in_use


def _log_rest(entries: Array, in_use: Array) -> Array:
    """log of the mass outside the entries, [B,R]. The largest entry goes first, through its complement: what is
    left to subtract is then small, and so is the rounding."""
    entries = jnp.where(in_use, entries, -LOG_MIN)
    largest = jnp.argmax(entries, axis=-1, keepdims=True)
    is_largest = jnp.arange(entries.shape[-1]) == largest
    complement = -jnp.expm1(jnp.max(entries, axis=-1))
    rest = complement - jnp.sum(jnp.where(is_largest, 0.0, jnp.exp(entries)), axis=-1)
    return jnp.log(jnp.maximum(rest, LOG_TINY))


def topk_tv(
    logp: Float32[Array, "M Q"],
    anchor_logp: Float32[Array, "M Q"],
    topk: TopKPair,
    topk_anchor_logp: Float32[Array, "M Q K"] | None = None,
) -> Float32[Array, "M Q"]:
    """Total variation over TopK(mu, K) ∪ {sampled} ∪ {rest}: half the sum of |pi - mu|, in [0, 1].

    `topk_anchor_logp` replaces `topk.behavior_logp` in the decoupled variants.
    """
    topk_anchor_logp = topk.behavior_logp if topk_anchor_logp is None else topk_anchor_logp
    policy, anchor, in_use = _union(logp, anchor_logp, topk, topk_anchor_logp)
    diff = jnp.where(in_use, prob_diff(policy, anchor), 0.0)
    # What the entries gained, the rest lost.
    return 0.5 * (jnp.sum(jnp.abs(diff), axis=-1) + jnp.abs(jnp.sum(diff, axis=-1)))


def topk_kl(
    logp: Float32[Array, "M Q"],
    anchor_logp: Float32[Array, "M Q"],
    topk: TopKPair,
    topk_anchor_logp: Float32[Array, "M Q K"] | None = None,
) -> Float32[Array, "M Q"]:
    """KL(mu || pi) in nats over TopK(mu, K) ∪ {sampled} ∪ {rest}, at least 0. Arguments as `topk_tv`."""
    topk_anchor_logp = topk.behavior_logp if topk_anchor_logp is None else topk_anchor_logp
    policy, anchor, in_use = _union(logp, anchor_logp, topk, topk_anchor_logp)
    entries = jnp.sum(jnp.where(in_use, jnp.exp(anchor) * (anchor - policy), 0.0), axis=-1)
    log_rest_anchor = _log_rest(anchor, in_use)
    rest = jnp.exp(log_rest_anchor) * (log_rest_anchor - _log_rest(policy, in_use))
    return jnp.maximum(entries + rest, 0.0)


def topk_slope_sums(
    logp: Float32[Array, "M Q"], anchor_logp: Float32[Array, "M Q"], topk: TopKPair, tail_tokens: Array | int
) -> SlopeSums:
    """Over TopK(mu, K) without the sampled token, and the rest as so many equally likely tokens: `tail_tokens` [M, Q].

    With as many as there are this is the uniform tail of arXiv 2607.10848, with 1 its aggregated tail.
    """
    policy, anchor, in_use = _union(logp, anchor_logp, topk, topk.behavior_logp)
    diff = jnp.where(in_use, prob_diff(policy, anchor), 0.0)
    rest, rest_diff = jnp.exp(_log_rest(policy, in_use)), -jnp.sum(diff, axis=-1)
    # The entry that is the sampled token: the one like it under both policies.
    distance = jnp.sum(jnp.abs(jnp.stack([policy, anchor]) - jnp.stack([policy, anchor])[..., -1:]), axis=0)[..., :-1]
    is_sampled = jnp.arange(distance.shape[-1]) == jnp.argmin(distance, axis=-1, keepdims=True)
    pi = jnp.where(is_sampled & topk.has_sampled[..., None], 0.0, jnp.exp(policy[..., :-1]))
    diff, tail_tokens = diff[..., :-1], jnp.maximum(tail_tokens, 1)
    sign, rest_sign = jnp.sign(diff), jnp.sign(rest_diff)
    return SlopeSums(
        gap=-jnp.sum(pi * diff, axis=-1) - rest * rest_diff / tail_tokens,
        square=jnp.sum(pi**2, axis=-1) + rest**2 / tail_tokens,
        signed=jnp.sum(sign * pi, axis=-1) + rest_sign * rest,
        signed_square=jnp.sum(sign * pi**2, axis=-1) + rest_sign * rest**2 / tail_tokens,
    )


def kl_slope(logp: Float32[Array, "M Q"], anchor_logp: Float32[Array, "M Q"], sums: SlopeSums) -> Float32[Array, "M Q"]:
    """The derivative of KL(mu || pi), in nats, when the logits move along the gradient of log pi(a), a the sampled
    token (2607.10848): (pi_a - mu_a) + sum_j pi_j (mu_j - pi_j).

    a's own part of the sum is added to the first term, (1 - pi_a)(pi_a - mu_a), so that nothing cancels where a is
    nearly certain.
    """
    return -jnp.expm1(_clipped(logp)) * prob_diff(logp, anchor_logp) + sums.gap


def tv_slope(logp: Float32[Array, "M Q"], anchor_logp: Float32[Array, "M Q"], sums: SlopeSums) -> Float32[Array, "M Q"]:
    """The derivative of TV along the same step. The logits' gradient is e_a - pi, so d pi_j = pi_j (1[j = a] - pi_j -
    pi_a + sum_k pi_k^2), and with s the sign of pi - mu the derivative is half of

        s_a pi_a - sum_j s_j pi_j^2 - (pi_a - sum_j pi_j^2) sum_j s_j pi_j,

    the terms of a again gathered. Ours: 2607.10848 has KL alone.
    """
    pi, others = jnp.exp(_clipped(logp)), -jnp.expm1(_clipped(logp))
    sampled = jnp.sign(prob_diff(logp, anchor_logp)) * pi * (others**2 + sums.square)
    return 0.5 * (sampled - sums.signed_square - (pi * others - sums.square) * sums.signed)


def sampled_in_topk(tokens: Array, topk_ids: Array) -> Bool[Array, "M Q"]:
    """Whether each sampled token [B,R] is among its position's top-K ids [B,R,K]."""
    return jnp.any(topk_ids == tokens[..., None], axis=-1)
