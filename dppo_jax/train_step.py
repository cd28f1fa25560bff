"""The update: score tokens under the policy, ask the loss for coefficients, take one optimizer step per minibatch."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from dppo_jax import metrics as metrics_lib
from dppo_jax import packing, sampling
from dppo_jax.devices.sharding import batch_sharding, constrain, named_shardings
from dppo_jax.divergences import sampled_in_topk
from dppo_jax.lora import joined
from dppo_jax.losses.core import BoundLoss, policy_objective
from dppo_jax.metrics import Metrics
from dppo_jax.models.decoder import Params
from dppo_jax.packing import Plan
from dppo_jax.skipping import taken_if_finite
from dppo_jax.teacher_forced import BehaviorForward, BehaviorHead, PolicyLogprobs
from dppo_jax.types import (
    HeadOutput,
    LossInputs,
    PackedBatch,
    PromptBatch,
    RolloutBatch,
    TopKPair,
    TrainBatch,
)


@struct.dataclass
class TrainState:
    """Float32 master weights and optimizer state; `updates` counts optimizer steps.

    `params` are the trained parameters. `frozen` are the others, where only adapters are trained.
    """

    params: Params
    opt_state: Any
    updates: Int32[Array, ""]
    frozen: Params = struct.field(default_factory=dict)

    @property
    def policy(self) -> Params:
        """All parameters."""
        return joined(self.frozen, self.params)

    def saved(self, **extras: Any) -> dict[str, Any]:
        """What a checkpoint holds: this state, and whatever else the run needs to go on (None: nothing). Not `frozen`,
        which is read from the model directory again."""
        state = {"params": self.params, "opt_state": self.opt_state, "updates": self.updates}
        return state | {name: value for name, value in extras.items() if value is not None}


NOISE = 2  # folded into the seed's key beside the step; the rollout and the evaluation have 0 and 1 (run/setup.py)

# (state, batch, plan), and the behavior parameters where exact divergences are needed
Update = Callable[..., tuple[TrainState, Metrics]]
Gradient = Callable[[TrainState, TrainBatch, Plan, Array, Any, Any], tuple[Params, Metrics]]


def assemble(prompts: PromptBatch, rollout: RolloutBatch) -> TrainBatch:
    """Every row with its prompt; advantages are 0 until the rewards are known."""
    rows_count = rollout.tokens.shape[0]
    repeat = rows_count // prompts.tokens.shape[0]
    return TrainBatch(
        prompt_tokens=jnp.repeat(prompts.tokens, repeat, axis=0),
        prompt_mask=jnp.repeat(prompts.mask, repeat, axis=0),
        tokens=rollout.tokens,
        mask=rollout.response_mask if rollout.own is None else rollout.response_mask & rollout.own,
        behavior_logp=rollout.behavior_logp,
        advantages=jnp.zeros(rows_count, jnp.float32),
        group=rollout.group,
        topk_ids=rollout.topk_ids,
        topk_behavior_logp=rollout.topk_logp,
        prompt_experts=None if rollout.experts is None else jnp.repeat(rollout.prompt_experts, repeat, axis=0),
        experts=rollout.experts,
        own=rollout.own,
        behavior_entropy=rollout.behavior_entropy,
    )


def loss_inputs(packed: PackedBatch, head: HeadOutput) -> LossInputs:
    """What the loss may see, from a packed batch and the policy's head on it."""
    topk = None
    if packed.topk_ids is not None:
        has_sampled = sampled_in_topk(packed.targets, packed.topk_ids)
        topk = TopKPair(
            logp=head.ids_logp,
            behavior_logp=packed.topk_behavior_logp,
            has_sampled=has_sampled,
            proximal_logp=packed.topk_proximal_logp,
            outside=None if head.vocabulary is None else head.vocabulary - packed.topk_ids.shape[-1] - ~has_sampled,
        )
    return LossInputs(
        logp=head.logp,
        behavior_logp=packed.behavior_logp,
        advantages=packed.advantages,
        mask=packed.mask,
        segments=jnp.take_along_axis(packed.segments, packed.columns, axis=1),
        proximal_logp=packed.proximal_logp,
        reference_logp=packed.reference_logp,
        teacher_logp=packed.teacher_logp,
        behavior_entropy=packed.behavior_entropy,
        topk=topk,
        exact=head.exact,
    )


def make_gradient(
    policy_logprobs: PolicyLogprobs,
    loss: BoundLoss,
    *,
    behavior_forward: BehaviorForward | None = None,
    slope_sums: bool = False,
    shadow_losses: Mapping[str, functools.partial] = MappingProxyType({}),
    count_tokens: int = 0,
    noise_seed: int | None = None,
) -> Gradient:
    """A pure function (state, batch, plan, weights, number, behavior parameters) -> (gradient, metrics) of microbatch
    `number` of a plan. The weights f32[b, R] are those of the plan's samples; the arguments are as in `make_update`."""

    def objective(
        params: Params, frozen: Params, packed: PackedBatch, behavior_head: BehaviorHead | None, noise_key: Array | None
    ) -> tuple[Array, Metrics]:
        extras = {"behavior_head": behavior_head, "noise_key": noise_key, "slope_sums": slope_sums or None}
        extras = {name: value for name, value in extras.items() if value is not None}
        head = policy_logprobs(joined(frozen, params), packed, **extras)
        inputs = loss_inputs(packed, head)
        output = loss(inputs)
        measured = metrics_lib.trust_region_metrics(inputs, output, head.entropy, packed.weights)
        if head.routing is not None:
            measured |= metrics_lib.routing_metrics(head.routing)
        if shadow_losses:
            measured |= metrics_lib.shadow_loss_metrics(inputs, shadow_losses, packed.weights)
        if count_tokens:
            measured |= metrics_lib.token_counts(inputs, output, packed.targets, count_tokens)
        return policy_objective(output.coef, packed.weights, head.logp, packed.mask), jax.lax.stop_gradient(measured)

    def gradient(
        state: TrainState, batch: TrainBatch, plan: Plan, weights: Array, number: Any, behavior_params: Any
    ) -> tuple[Params, Metrics]:
        packed = packing.pack(batch, weights, packing.microbatch(plan, number))
        packed = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), packed)
        behavior_head = None
        if behavior_forward is not None:
            behavior_head = behavior_forward(joined(state.frozen, behavior_params), packed)
        noise_key = None
        if noise_seed is not None:
            noise_key = jax.random.fold_in(sampling.step_key(noise_seed, state.updates, NOISE), number)
        return jax.grad(objective, has_aux=True)(state.params, state.frozen, packed, behavior_head, noise_key)

    return gradient


def make_update(
    policy_logprobs: PolicyLogprobs,
    loss: BoundLoss,
    weigh: Callable[..., Array],
    optimizer: optax.GradientTransformation,
    *,
    behavior_forward: BehaviorForward | None = None,
    slope_sums: bool = False,
    shadow_losses: Mapping[str, functools.partial] = MappingProxyType({}),
    count_tokens: int = 0,
    noise_seed: int | None = None,
) -> Update:
    """A pure function (state, batch, plan) -> (state, metrics): one optimizer step on the plan's minibatch.

    Aggregation weights are those of the whole minibatch; the gradients of its microbatches are added. How it is cut
    and packed changes memory and time, and nothing else. All plans of a run have one shape, so it compiles once.
    With a `behavior_forward` it takes a fourth argument, the behavior parameters, and losses see exact divergences;
    with `slope_sums` the sums of their slopes, too. The masks of `shadow_losses` are measured beside that of the loss
    that trains; `count_tokens` is the size of the vocabulary, where masked tokens are to be counted. With a
    `noise_seed` the policy is perturbed, by noise that depends on it, on the update's number and the microbatch's.
    Where a number of the update is not finite, it is skipped: see `skipping.taken_if_finite`.
    """
    gradient = make_gradient(
        policy_logprobs,
        loss,
        behavior_forward=behavior_forward,
        slope_sums=slope_sums,
        shadow_losses=shadow_losses,
        count_tokens=count_tokens,
        noise_seed=noise_seed,
    )

    def update(
        state: TrainState, batch: TrainBatch, plan: Plan, behavior_params: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        weights = minibatch_weights(weigh, batch, plan)
        grads, measured = sum_of_microbatches(
            lambda number: gradient(state, batch, plan, weights, number, behavior_params), plan
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        one, norm, surrogate = jnp.float32(1.0), optax.global_norm(grads), measured.sums["loss/surrogate"][0]
        sums = measured.sums | {"grad_norm": (norm, one), "loss/surrogate": (surrogate, one)}
        after = TrainState(
            optax.apply_updates(state.params, updates), opt_state, state.updates + 1, frozen=state.frozen
        )
        return taken_if_finite(state, after, dataclasses.replace(measured, sums=sums), loss=surrogate, norm=norm)

    return update


def minibatch_weights(weigh: Callable[..., Array], batch: TrainBatch, plan: Plan) -> Float[Array, "b R"]:
    """The aggregation weights of the samples of a plan of a whole minibatch."""
    group = None if batch.group is None else batch.group[plan.batch_rows]
    return weigh(batch.mask[plan.batch_rows], group=group)


def sum_of_microbatches(gradient: Callable[[Any], tuple[Params, Metrics]], plan: Plan) -> tuple[Params, Metrics]:
    """Gradients and metrics of every microbatch of a plan, added up."""
    if len(plan.tokens_per_row) == 1:
        return gradient(0)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, 0))

    def accumulate(number, total):
        grads, measured = gradient(number)
        return jax.tree.map(jnp.add, total[0], grads), metrics_lib.merge(total[1], measured)

    return jax.lax.fori_loop(0, plan.num_microbatches, accumulate, zeros)


def state_shardings(
    axes: Params,
    optimizer: optax.GradientTransformation,
    param_shapes: Params,
    mesh: Mesh,
    frozen: Params | None = None,
):
    """The shardings of a TrainState: optimizer moments as their parameters, counters replicated.

    `axes` are the logical axis names of the trained parameters, `frozen` those of the others; `param_shapes` are the
    shapes and dtypes of the trained ones.
    """
    params = named_shardings(mesh, axes)
    replicated = NamedSharding(mesh, P())
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, param_shapes),
        params,
        transform_non_params=lambda _: replicated,
    )
    untrained = named_shardings(mesh, frozen or {})
    return TrainState(params=params, opt_state=opt_state, updates=replicated, frozen=untrained)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
    frozen: Params | None = None,
    *,
    owned: bool = False,
) -> TrainState:
    """A fresh state around these parameters, laid out over the mesh if shardings are given; around copies of them,
    unless they are `owned`: nobody else uses them any more."""
    frozen = {} if frozen is None else frozen
    if shardings is None:
        return TrainState(params, optimizer.init(params), jnp.int32(0), frozen)
    # Updates donate the state's arrays, and the caller may go on using its own.
    may_alias = jax.tree.map(lambda x: owned and isinstance(x, jax.Array), (params, frozen))
    params, frozen = jax.device_put((params, frozen), (shardings.params, shardings.frozen), may_alias=may_alias)
    make = jax.jit(
        lambda p: init_state(p, optimizer), out_shardings=dataclasses.replace(shardings, frozen={}), donate_argnums=0
    )
    return dataclasses.replace(make(params), frozen=frozen)


def jit_finite() -> Callable[[Any], Array]:
    """tree -> bool[]: whether the global norm of its floating leaves is a finite float32.

    That also tells parameters of 1e20 and more, which are finite and useless.
    """

    def finite(tree: Any) -> Array:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return jnp.isfinite(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))

    return jax.jit(finite)


def jit_update(update: Update, shardings: TrainState, mesh: Mesh, *, needs_exact: bool = False) -> Update:
    """The update compiled for the mesh, its state donated.

    `needs_exact`: it takes its fourth argument, the behavior parameters.
    """
    replicated = NamedSharding(mesh, P())
    shardings_in = (shardings, batch_sharding(mesh), replicated, *([shardings.params] if needs_exact else []))
    return jax.jit(update, in_shardings=shardings_in, out_shardings=(shardings, replicated), donate_argnums=0)
