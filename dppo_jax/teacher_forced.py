"""Teacher-forced passes over packed rows: log-probabilities of the policy, of others, and what they are made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Key

from dppo_jax import packing
from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import Params, Routed, forward_routed, head_weight
from dppo_jax.packing import Plan
from dppo_jax.token_head import exact_divergence, token_head
from dppo_jax.types import HeadOutput, PackedBatch, Routing, TrainBatch


@struct.dataclass
class BehaviorHead:
    """What the behavior policy's distributions on packed samples are computed from."""

    hidden: Float[Array, "M Q E"]  # before each response token
    weight: Float[Array, "V E"]


PolicyLogprobs = Callable[..., HeadOutput]  # (params, packed, behavior_head=None, noise_key=None, slope_sums=False)
BehaviorForward = Callable[[Params, PackedBatch], BehaviorHead]


def states_before(
    config: ModelConfig, params: Params, packed: PackedBatch, **settings: Any
) -> tuple[Float[Array, "M Q E"], Routed | None]:
    """The hidden states that predict the response tokens, teacher-forced, and the routes of all M T tokens.

    `settings` are keyword arguments of `forward_routed`. The routes are None for a model without experts.
    """
    hidden, routed = forward_routed(
        config, params, packed.tokens, packed.segments, packed.positions, experts=packed.experts, **settings
    )
    return jnp.take_along_axis(hidden, jnp.maximum(packed.columns - 1, 0)[..., None], axis=1), routed


def make_behavior_forward(
    config: ModelConfig,
    *,
    dtype: Any,
    attention: str = "xla",
    weights: Callable[[Params], Params] | None = None,
    round_inputs: Callable[[Array], Array] | None = None,
    head_float32: bool = False,
) -> BehaviorForward:
    """A pure function (behavior parameters, packed) -> BehaviorHead: a teacher-forced pass in the rollout's precision.

    Arguments as those of `Rollout`; no gradient flows.
    """

    def behavior_forward(params: Params, packed: PackedBatch) -> BehaviorHead:
        params = params if weights is None else weights(params)
        states, _ = states_before(config, params, packed, dtype=dtype, attention=attention, round_inputs=round_inputs)
        kind = jnp.float32 if head_float32 else dtype
        states, weight = states.astype(kind), head_weight(params).astype(kind)
        return jax.lax.stop_gradient(BehaviorHead(states, weight))

    return behavior_forward


def make_policy_logprobs(
    config: ModelConfig,
    *,
    temperature: float,
    dtype: Any,
    remat: str,
    vocab_chunks: int | None = None,
    attention: str = "xla",
    behavior_temperature: float | None = None,
    head_float32: bool = False,
) -> PolicyLogprobs:
    """A pure function (params, packed, and what follows) -> HeadOutput, by a teacher-forced pass.

    The HeadOutput [M, Q] has the logp of every response token and the entropy, in nats, and the logp of the top-K
    tokens where `packed` has them. With a `behavior_head` it has the exact divergences from the behavior policy, too,
    and with `slope_sums` what their slopes are made of. With a `noise_key` the policy is perturbed (ALP, 2603.19470).

    At the rollout's parameters this is the proximal policy; inside the update it is the policy.
    `temperature` divides the policy's logits, `behavior_temperature` the behavior policy's (None: `temperature`).
    `head_float32` is as in `Rollout`, `remat` and `attention` are as in `forward_routed`, `vocab_chunks` as in
    `token_head`.
    """
    of_head: dict[str, Any] = dict(temperature=temperature, softcap=config.logit_softcap, vocab_chunks=vocab_chunks)

    def policy_logprobs(
        params: Params,
        packed: PackedBatch,
        behavior_head: BehaviorHead | None = None,
        noise_key: Key[Array, ""] | None = None,
        slope_sums: bool = False,
    ) -> HeadOutput:
        states, routed = states_before(
            config, params, packed, dtype=dtype, remat=remat, attention=attention, noise_key=noise_key
        )
        states = states.astype(jnp.float32) if head_float32 else states
        head = token_head(states, head_weight(params), packed.targets, ids=packed.topk_ids, **of_head)
        if routed is not None:
            head = dataclasses.replace(head, routing=routing(routed, packed.segments > 0, config.num_experts))
        if behavior_head is None:
            return head
        exact = exact_divergence(
            states,
            head_weight(params),
            behavior_head.hidden,
            behavior_head.weight,
            packed.targets if slope_sums else None,
            behavior_temperature=temperature if behavior_temperature is None else behavior_temperature,
            **of_head,
        )
        return dataclasses.replace(head, exact=exact)

    return policy_logprobs


def routing(routed: Routed, mask: Bool[Array, "M T"], experts: int) -> Routing:
    """Load and router entropy over the tokens where `mask` is true; `experts` is their number X."""
    chosen = jnp.where(mask[..., None], routed.experts, experts)[..., None] == jnp.arange(experts)
    return jax.lax.stop_gradient(
        Routing(
            load=jnp.sum(chosen, axis=(1, 2, 3), dtype=jnp.float32),
            entropy=jnp.sum(jnp.where(mask, routed.entropy, 0.0), axis=(1, 2)),
            tokens=jnp.sum(mask, dtype=jnp.float32),
        )
    )


def make_recompute(policy_logprobs: PolicyLogprobs, policy: str) -> Callable[[Params, TrainBatch, Plan], TrainBatch]:
    """A pure function (params, batch, plan of all its rows) -> the batch with another policy's logp.

    `policy` "proximal": at the rollout's parameters, top-K tokens too. "reference": at the run's first parameters.
    "teacher": another model, which has experts of its own where it is a mixture.
    """
    fields = {
        "proximal": ("proximal_logp", "topk_proximal_logp"),
        "reference": ("reference_logp",),
        "teacher": ("teacher_logp",),
    }[policy]

    def recompute(params: Params, batch: TrainBatch, plan: Plan) -> TrainBatch:
        ones = jnp.ones((len(plan.batch_rows), batch.tokens.shape[1]), jnp.float32)
        # Of each field to fill in, an array of its shape. Without top-K tokens there is one field.
        shapes = (batch.behavior_logp, batch.topk_behavior_logp)[: 1 if batch.topk_ids is None else len(fields)]

        def fill_in(number, filled):
            microbatch = packing.microbatch(plan, number)
            packed = packing.pack(batch, ones, microbatch)
            if policy == "teacher":
                packed = dataclasses.replace(packed, experts=None, topk_ids=None)
            head = policy_logprobs(params, packed)
            values = (head.logp, head.ids_logp)[: len(filled)]
            return tuple(packing.unpack(batch, microbatch, x, into) for x, into in zip(values, filled, strict=True))

        filled = jax.lax.fori_loop(0, plan.num_microbatches, fill_in, tuple(jnp.zeros_like(x) for x in shapes))
        return dataclasses.replace(batch, **dict(zip(fields, filled, strict=False)))

    return recompute
