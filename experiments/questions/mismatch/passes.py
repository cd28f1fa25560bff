"""The rollout's arithmetic and the training pass on the same tokens, side by side from layer to layer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dppo_jax import packing, precision
from dppo_jax.models import DTYPES
from dppo_jax.models.decoder import Params, head_weight
from dppo_jax.models.hidden import LayerByLayer, layer_by_layer
from dppo_jax.packing import PackShape
from dppo_jax.token_head import LogitSums, logit_sums, token_head
from dppo_jax.types import PackedBatch, TrainBatch
from experiments.probe import Probe
from experiments.run.setup import Setup


class Compared(NamedTuple):
    """Both passes, teacher-forced on the batch that the rollout drew.

    `difference` is |x - y| / |y| of a token's state x in training and y in the rollout's arithmetic, f32[L+2, T], mean
    over the tokens that have that position in their sample, prompt included: of the embedding, of the residual stream
    after each layer, and after the final norm. `tokens` counts them, f32[T].
    """

    difference: np.ndarray
    tokens: np.ndarray
    logp: np.ndarray  # of the response tokens [B, R], by training
    forced_logp: np.ndarray  # of the same, by the rollout's arithmetic in one pass
    logits: LogitSums  # at the response tokens, each [B, R]; the policy is training's, behavior is the rollout's


class _Side(NamedTuple):
    walk: LayerByLayer
    head: Float[Array, "V E"]
    head_dtype: Any
    temperature: float

    def states(self, hidden: Float[Array, "M T E"], packed: PackedBatch) -> Float[Array, "M Q E"]:
        """Those that predict the response tokens."""
        before = jnp.maximum(packed.columns - 1, 0)[..., None]
        return jnp.take_along_axis(hidden, before, axis=1).astype(self.head_dtype)


def compare(
    probe: Probe,
    training: Setup,
    params: Params,
    behavior: Params,
    batch: TrainBatch,
    lengths: np.ndarray,
    prompts: np.ndarray,
) -> Compared:
    """The probe's rollout at parameters `behavior` against the pass of `training` at `params`, on a batch of `draw`."""
    shape = probe.setup.pack_shape
    plan = probe.plan(np.arange(len(lengths)), lengths, prompts)
    run = _compiled(probe.setup, training, shape)
    by_position, tokens, (logp, forced, *logits) = jax.device_get(run(params, behavior, batch, plan))
    return Compared(by_position / np.maximum(tokens, 1), tokens, logp, forced, LogitSums(*logits))


@functools.cache
def _compiled(rollout: Setup, training: Setup, shape: PackShape):
    """(params, behavior, batch, plan) -> sums of `Compared.difference`, its `tokens`, and the fields by token."""
    softcap = training.model.logit_softcap

    def run(params, behavior, batch, plan):
        zeros = jnp.zeros(batch.tokens.shape, jnp.float32)

        def add(number, sums):
            by_position, tokens, by_token = sums
            microbatch = packing.microbatch(plan, number)
            packed = packing.pack(batch, zeros, microbatch)
            both = _training(training, params, packed, shape), _rollout(rollout, behavior, packed, shape)
            difference, values = _microbatch(*both, packed, softcap)
            at = jnp.where(packed.segments > 0, packed.positions, shape.length)
            by_position = by_position.at[:, at].add(difference, mode="drop")
            tokens = tokens.at[at].add(1.0, mode="drop")
            by_token = [packing.unpack(batch, microbatch, x, into) for x, into in zip(values, by_token, strict=True)]
            return by_position, tokens, by_token

        by_position = jnp.zeros((training.model.num_layers + 2, shape.length), jnp.float32)
        start = by_position, jnp.zeros(shape.length, jnp.float32), [zeros] * (2 + len(LogitSums._fields))
        return jax.lax.fori_loop(0, plan.num_microbatches, add, start)

    return jax.jit(run)


def _microbatch(training: _Side, rollout: _Side, packed: PackedBatch, softcap: float | None):
    """`Compared.difference` of every token [L+2, M, T], and [logp, forced logp, *LogitSums], each [M, Q]."""

    def step(both, layers):
        x, y = training.walk.step(both[0], layers[0]), rollout.walk.step(both[1], layers[1])
        return (x, y), _relative(x, y)

    first = training.walk.entering, rollout.walk.entering
    last, after = jax.lax.scan(step, first, (training.walk.layers, rollout.walk.layers))
    hidden = training.walk.leave(last[0]), rollout.walk.leave(last[1])
    difference = jnp.concatenate([_relative(*first)[None], after, _relative(*hidden)[None]])
    states = [side.states(h, packed) for side, h in zip((training, rollout), hidden, strict=True)]
    heads = [
        token_head(h, side.head, packed.targets, temperature=side.temperature, softcap=softcap)
        for side, h in zip((training, rollout), states, strict=True)
    ]
    sums = logit_sums(
        states[0], training.head, states[1], rollout.head,
        temperature=training.temperature, behavior_temperature=rollout.temperature, softcap=softcap,
    )  # fmt: skip
    return difference, [*(head.logp for head in heads), *sums]


def _relative(x: Array, y: Array) -> Float32[Array, "M T"]:
    """|x - y| / |y| over the last axis."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.linalg.norm(x - y, axis=-1) / jnp.maximum(jnp.linalg.norm(y, axis=-1), jnp.finfo(jnp.float32).tiny)


def training_temperature(setup: Setup) -> float:
    """What divides the policy's logits."""
    return setup.config.policy.temperature or setup.config.rollout.temperature


def _training(setup: Setup, params: Params, packed: PackedBatch, shape: PackShape) -> _Side:
    """As `Setup.policy_logprobs_of` computes."""
    c = setup.config.policy
    walk = _walk(setup, setup.trained_model, params, packed, shape, c.dtype)
    kind = jnp.float32 if c.head_float32 else DTYPES[c.dtype]
    return _Side(walk, head_weight(params), kind, training_temperature(setup))


def _rollout(setup: Setup, params: Params, packed: PackedBatch, shape: PackShape) -> _Side:
    """As `Setup.behavior_forward_of` computes."""
    c = setup.config.rollout
    params = params if setup.behavior_weights is None else setup.behavior_weights(params)
    rounding = precision.activations(c.activations)
    walk = _walk(setup, setup.behavior_model, params, packed, shape, c.dtype, rounding)
    kind = jnp.float32 if setup.config.policy.head_float32 else DTYPES[c.dtype]
    return _Side(walk, head_weight(params).astype(kind), kind, c.temperature)


def _walk(setup: Setup, model, params, packed, shape: PackShape, dtype: str, round_inputs=None) -> LayerByLayer:
    return layer_by_layer(
        model,
        params,
        packed.tokens,
        packed.segments,
        packed.positions,
        dtype=DTYPES[dtype],
        attention=setup.attention(dtype=dtype, length=shape.length).name,
        round_inputs=round_inputs,
        experts=packed.experts,
    )
