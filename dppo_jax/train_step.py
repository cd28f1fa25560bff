"""The update: score tokens under the policy, ask the loss for coefficients, take one optimizer step per minibatch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32

from dppo_jax import metrics as metrics_lib
from dppo_jax import packing
from dppo_jax.divergences import sampled_in_topk
from dppo_jax.losses import policy_objective
from dppo_jax.metrics import Metrics
from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import Params, forward, head_weight, param_axes
from dppo_jax.packing import Plan
from dppo_jax.sharding import constrain, named, rows
from dppo_jax.token_head import token_head
from dppo_jax.types import (
    HeadOutput,
    LossInputs,
    LossOutput,
    PackedBatch,
    PromptBatch,
    RolloutBatch,
    TopKPair,
    TrainBatch,
)


@struct.dataclass
class TrainState:
    """Float32 master weights and optimizer state; `updates` counts optimizer steps."""

    params: Params
    opt_state: Any
    updates: Int32[Array, ""]

    def with_ahead(self, ahead: RolloutBatch) -> "StaleState":
        """This state and the next step's rollout, for a checkpoint."""
        return StaleState(self.params, self.opt_state, self.updates, ahead)

    def without_ahead(self) -> "tuple[TrainState, RolloutBatch | None]":
        """The state that updates take, and the next step's rollout if there is one."""
        return self, None


@struct.dataclass
class StaleState(TrainState):
    """What a checkpoint holds where the next step's rollout was drawn before this step's updates."""

    ahead: RolloutBatch

    def without_ahead(self) -> tuple[TrainState, RolloutBatch | None]:
        return TrainState(self.params, self.opt_state, self.updates), self.ahead


Score = Callable[[Params, PackedBatch], HeadOutput]
Update = Callable[[TrainState, TrainBatch, Plan], tuple[TrainState, Metrics]]


def make_score(
    config: ModelConfig,
    *,
    temperature: float,
    dtype: Any,
    remat: str,
    pieces: int | None = None,
    attention: str = "xla",
) -> Score:
    """A pure function (params, packed) -> logp, entropy and tracked logp of every response token, teacher-forced.

    At the rollout's parameters this is the proximal policy; inside the update it is the policy.
    """

    def score(params: Params, packed: PackedBatch) -> HeadOutput:
        hidden = forward(
            config,
            params,
            packed.tokens,
            packed.segments,
            packed.positions,
            dtype=dtype,
            remat=remat,
            attention=attention,
        )
        before = jnp.take_along_axis(hidden, jnp.maximum(packed.columns - 1, 0)[..., None], axis=1)
        return token_head(
            before,
            head_weight(params),
            packed.targets,
            temperature=temperature,
            softcap=config.logit_softcap,
            ids=packed.topk_ids,
            pieces=pieces,
        )

    return score


def make_proximal(score: Score) -> Callable[[Params, TrainBatch, Plan], TrainBatch]:
    """A pure function (params, batch, plan of all its rows) -> the batch with the proximal policy's logp."""

    def proximal(params: Params, batch: TrainBatch, plan: Plan) -> TrainBatch:
        ones = jnp.ones((len(plan.rows), batch.tokens.shape[1]), jnp.float32)

        def one(number, found):
            part = packing.piece(plan, number)
            head = score(params, packing.pack(batch, ones, part))
            values = (head.logp, head.ids_logp)[: len(found)]
            return tuple(packing.unpack(batch, part, x, into) for x, into in zip(values, found, strict=True))

        shapes = (batch.behavior_logp, batch.topk_behavior_logp)[: 1 if batch.topk_ids is None else 2]
        found = jax.lax.fori_loop(0, plan.count, one, tuple(jnp.zeros_like(x) for x in shapes))
        batch = dataclasses.replace(batch, proximal_logp=found[0])
        return batch if batch.topk_ids is None else dataclasses.replace(batch, topk_proximal_logp=found[1])

    return proximal


def assemble(prompts: PromptBatch, rollout: RolloutBatch) -> TrainBatch:
    """Every row with its prompt; advantages are 0 until the rewards are known."""
    rows_count = rollout.tokens.shape[0]
    repeat = rows_count // prompts.tokens.shape[0]
    return TrainBatch(
        prompt_tokens=jnp.repeat(prompts.tokens, repeat, axis=0),
        prompt_mask=jnp.repeat(prompts.mask, repeat, axis=0),
        tokens=rollout.tokens,
        mask=rollout.response_mask,
        behavior_logp=rollout.behavior_logp,
        advantages=jnp.zeros(rows_count, jnp.float32),
        topk_ids=rollout.topk_ids,
        topk_behavior_logp=rollout.topk_logp,
    )


def loss_inputs(packed: PackedBatch, head: HeadOutput) -> LossInputs:
    """What the loss may see, from a batch and the policy's scores of it."""
    topk = None
    if packed.topk_ids is not None:
        topk = TopKPair(
            logp=head.ids_logp,
            behavior_logp=packed.topk_behavior_logp,
            has_sampled=sampled_in_topk(packed.targets, packed.topk_ids),
            proximal_logp=packed.topk_proximal_logp,
        )
    return LossInputs(
        logp=head.logp,
        behavior_logp=packed.behavior_logp,
        advantages=packed.advantages,
        mask=packed.mask,
        proximal_logp=packed.proximal_logp,
        topk=topk,
    )


def make_update(
    score: Score,
    loss: Callable[[LossInputs], LossOutput],
    weigh: Callable[[Array], Array],
    optimizer: optax.GradientTransformation,
) -> Update:
    """A pure function (state, batch, plan) -> (state, metrics): one optimizer step on the plan's minibatch.

    Aggregation weights are those of the whole minibatch; the gradients of its pieces are added. How it is cut and
    packed changes memory and time, and nothing else.
    """

    def objective(params: Params, packed: PackedBatch) -> tuple[Array, Metrics]:
        head = score(params, packed)
        inputs = loss_inputs(packed, head)
        output = loss(inputs)
        measured = metrics_lib.trust_region_metrics(inputs, output, head.entropy, packed.weights)
        return policy_objective(output.coef, packed.weights, head.logp, packed.mask), jax.lax.stop_gradient(measured)

    def update(state: TrainState, batch: TrainBatch, plan: Plan) -> tuple[TrainState, Metrics]:
        weights = weigh(batch.mask[plan.rows])

        def gradient(number):
            packed = packing.pack(batch, weights, packing.piece(plan, number))
            packed = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), packed)
            return jax.grad(objective, has_aux=True)(state.params, packed)

        if plan.sample.shape[0] == 1:
            grads, measured = gradient(0)
        else:
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, 0))

            def accumulate(number, total):
                grads, measured = gradient(number)
                return jax.tree.map(jnp.add, total[0], grads), metrics_lib.merge(total[1], measured)

            grads, measured = jax.lax.fori_loop(0, plan.count, accumulate, zeros)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        one = jnp.float32(1.0)
        sums = measured.sums | {
            "grad_norm": (optax.global_norm(grads), one),
            "loss/surrogate": (measured.sums["loss/surrogate"][0], one),
        }
        state = TrainState(optax.apply_updates(state.params, updates), opt_state, state.updates + 1)
        return state, dataclasses.replace(measured, sums=sums)

    return update


def state_shardings(config: ModelConfig, optimizer: optax.GradientTransformation, abstract: Params, mesh: Mesh):
    """Where a TrainState lives: optimizer moments beside their parameters, counters everywhere."""
    params = named(mesh, param_axes(config))
    everywhere = NamedSharding(mesh, P())
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(params=params, opt_state=opt_state, updates=everywhere)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, shardings: TrainState | None = None
) -> TrainState:
    """A fresh state around these parameters, laid out over the mesh if shardings are given."""
    if shardings is None:
        return TrainState(params, optimizer.init(params), jnp.int32(0))
    params = jax.device_put(params, shardings.params, may_alias=False)  # updates donate them; the caller's stay
    return jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings, donate_argnums=0)(params)


def jit_update(update: Update, shardings: TrainState, mesh: Mesh) -> Update:
    """The update compiled for the mesh, with its state donated."""
    everywhere = NamedSharding(mesh, P())
    places = (shardings, rows(mesh), everywhere)
    return jax.jit(update, in_shardings=places, out_shardings=(shardings, everywhere), donate_argnums=0)
