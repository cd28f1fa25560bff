"""A critic for PPO: the policy's architecture with a value head, trained on returns.

The head is linear, or bounded to the range of the rewards; the returns are those of its own estimates, or what the
responses earned (BPCO, 2608.23566).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32

from dppo_jax import metrics as metrics_lib
from dppo_jax import packing
from dppo_jax.advantages import EPSILON, gae
from dppo_jax.metrics import Metrics
from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import Params, param_axes
from dppo_jax.packing import Plan
from dppo_jax.skipping import taken_if_finite
from dppo_jax.teacher_forced import states_before
from dppo_jax.train_step import TrainState, minibatch_weights, sum_of_microbatches
from dppo_jax.types import PackedBatch, TrainBatch

Values = Callable[[Params, PackedBatch], Float32[Array, "M Q"]]


@struct.dataclass
class Estimates:
    """The critic's values before the updates, and the returns that it is trained towards; 0 outside the mask."""

    values: Float32[Array, "B R"]
    returns: Float32[Array, "B R"]


def critic_config(config: ModelConfig) -> ModelConfig:
    """The policy's, without an output embedding of its own."""
    return dataclasses.replace(config, tie_embeddings=True)


def init_critic(params: Params) -> Params:
    """The policy's parameters under a value head of zeros: every value is 0 at first."""
    body = {key: value for key, value in params.items() if key in ("embed", "layers", "final_norm")}
    return {"body": body, "value": {"weight": jnp.zeros(body["embed"].shape[1]), "bias": jnp.zeros(())}}


def critic_axes(config: ModelConfig) -> Params:
    """Logical axis names of every parameter, as tuples."""
    return {"body": param_axes(critic_config(config)), "value": {"weight": ("norm",), "bias": ()}}


def bounded(logits: Float32[Array, "..."], low: float, high: float) -> Float32[Array, "..."]:
    """low + (high - low) (1/2 + atan(z) / pi): values between the rewards' bounds, the middle at z = 0 (BPCO,
    2608.23566). The gradient falls as 1 / (1 + z^2), and not exponentially as a sigmoid's."""
    return low + (high - low) * (0.5 + jnp.arctan(logits) / jnp.pi)


def make_values(
    config: ModelConfig, *, dtype: Any, remat: str, attention: str = "xla", bounds: tuple[float, ...] = ()
) -> Values:
    """A pure function (critic parameters, packed) -> the value of the state before each response token.

    `bounds`: least and greatest reward, between which `bounded` keeps every value; (): the head is linear.
    """
    config = critic_config(config)

    def values(params: Params, packed: PackedBatch) -> Float32[Array, "M Q"]:
        packed = dataclasses.replace(packed, experts=None)  # the recorded experts are the policy's
        states, _ = states_before(config, params["body"], packed, dtype=dtype, remat=remat, attention=attention)
        head = states.astype(jnp.float32) @ params["value"]["weight"] + params["value"]["bias"]
        return bounded(head, *bounds) if bounds else head

    return values


def length_lam(lengths: Int32[Array, "B"], alpha: float) -> Float32[Array, "B"]:
    """lambda = 1 - 1 / (alpha L) for responses of L tokens: the last reward weighs about exp(-1 / alpha) at the first
    token, however long the response is (BPCO, 2608.23566; first in VAPO, 2504.05118).

    It is held at 0 where alpha L < 1, of which the paper says nothing; its authors' code lets lambda be negative there.
    """
    return jnp.maximum(1.0 - 1.0 / (alpha * jnp.maximum(lengths, 1)), 0.0)


# What the values are trained towards: returns of the estimates, advantage + value; or the discounted sum of what the
# response earned, in which the critic's own values have no part.
TARGETS = dict.fromkeys(("gae", "monte_carlo"))


def make_estimate(
    values: Values, *, discount: float, lam: float, whiten: bool, targets: str = "gae", lam_alpha: float | None = None
) -> Callable[..., Any]:
    """A pure function (critic parameters, batch, plan of all its rows, rewards [B], penalties=None) -> (advantages
    [B, R], Estimates).

    The reward comes with a response's last token, and of the penalties [B, R] each with its own, from which it is taken
    away. `whiten` gives the batch's advantages mean 0 and deviation 1. `targets` is a key of TARGETS. `lam_alpha` gives
    each response a lambda by its length, in the place of `lam`; see `length_lam`.
    """

    def estimate(
        params: Params,
        batch: TrainBatch,
        plan: Plan,
        rewards: Float32[Array, "B"],
        penalties: Float32[Array, "B R"] | None = None,
    ):
        ones = jnp.ones(batch.tokens.shape, jnp.float32)

        def fill_in(number, filled):
            microbatch = packing.microbatch(plan, number)
            return packing.unpack(batch, microbatch, values(params, packing.pack(batch, ones, microbatch)), filled)

        old_values = jax.lax.fori_loop(0, plan.num_microbatches, fill_in, jnp.zeros_like(ones))
        token_rewards = last_token(rewards, batch.mask)
        token_rewards = token_rewards if penalties is None else token_rewards - penalties
        lams = lam if lam_alpha is None else length_lam(jnp.sum(batch.mask, axis=1), lam_alpha)
        advantages = gae(token_rewards, old_values, batch.mask, discount=discount, lam=lams)
        returns = jnp.where(batch.mask, advantages + old_values, 0.0)
        if targets == "monte_carlo":  # without values, and with lambda 1, the estimate is the sum of the rewards
            returns = gae(token_rewards, jnp.zeros_like(old_values), batch.mask, discount=discount, lam=1.0)
        estimates = Estimates(old_values, returns)
        if whiten:
            count = jnp.maximum(jnp.sum(batch.mask), 1)
            centred = jnp.where(batch.mask, advantages - jnp.sum(advantages) / count, 0.0)
            advantages = centred / (jnp.sqrt(jnp.sum(centred**2) / count) + EPSILON)
        return advantages, estimates

    return estimate


def last_token(rewards: Float32[Array, "B"], mask: Bool[Array, "B R"]) -> Float32[Array, "B R"]:
    """Each response's reward at its last masked token, 0 elsewhere; nowhere of a row without one."""
    column = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, column, -1), axis=1, keepdims=True)
    return jnp.where(column == last, rewards[:, None], 0.0)


def make_critic_update(
    values: Values, weigh: Callable[..., Array], optimizer: optax.GradientTransformation, *, value_clip: float
) -> Callable[[TrainState, TrainBatch, Estimates, Plan], tuple[TrainState, Metrics]]:
    """A pure function (state, batch, estimates, plan) -> (state, metrics): one optimizer step on the plan's minibatch.

    The error is (v - return)^2 / 2, or that of v clipped to within `value_clip` of the old value, whichever is larger
    (PPO's clipped value loss; inf: not clipped).
    """

    def objective(params: Params, packed: PackedBatch, old_values: Array, returns: Array) -> tuple[Array, Metrics]:
        value = values(params, packed)
        clipped = old_values + jnp.clip(value - old_values, -value_clip, value_clip)
        error = jnp.maximum((value - returns) ** 2, (clipped - returns) ** 2) / 2
        measured = Metrics(
            {
                "critic/loss": metrics_lib.mean(error, packed.mask),
                "critic/value": metrics_lib.mean(value, packed.mask),
                "critic/return": metrics_lib.mean(returns, packed.mask),
            },
            {},
            {},
        )
        return jnp.sum(jnp.where(packed.mask, packed.weights * error, 0.0)), jax.lax.stop_gradient(measured)

    def update(state: TrainState, batch: TrainBatch, estimates: Estimates, plan: Plan) -> tuple[TrainState, Metrics]:
        weights = minibatch_weights(weigh, batch, plan)

        def gradient(number):
            microbatch = packing.microbatch(plan, number)
            packed = packing.pack(batch, weights, microbatch)
            old_values, returns = (packing.take(batch, microbatch, x) for x in (estimates.values, estimates.returns))
            return jax.grad(objective, has_aux=True)(state.params, packed, old_values, returns)

        grads, measured = sum_of_microbatches(gradient, plan)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        after = TrainState(optax.apply_updates(state.params, updates), opt_state, state.updates + 1)
        loss, norm = measured.sums["critic/loss"][0], optax.global_norm(grads)
        return taken_if_finite(state, after, measured, loss=loss, norm=norm, tag="critic/skipped")

    return update
