"""The update: score tokens under the policy, ask the loss for coefficients, take one optimizer step per minibatch."""

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
from dppo_jax.divergences import sampled_in_topk
from dppo_jax.losses import policy_objective
from dppo_jax.metrics import Metrics
from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import Params, forward, head_weight, param_axes
from dppo_jax.sharding import named, rows
from dppo_jax.token_head import token_head
from dppo_jax.types import HeadOutput, LossInputs, LossOutput, PromptBatch, RolloutBatch, TopKPair, TrainBatch


@struct.dataclass
class TrainState:
    """Float32 master weights and optimizer state; `updates` counts optimizer steps."""

    params: Params
    opt_state: Any
    updates: Int32[Array, ""]


Score = Callable[[Params, TrainBatch], HeadOutput]
Update = Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]


def make_score(config: ModelConfig, *, temperature: float, dtype: Any, remat: str, chunk_tokens: int) -> Score:
    """A pure function (params, batch) -> logp, entropy and tracked logp of every response token, teacher-forced.

    At the rollout's parameters this is the proximal policy; inside the update it is the policy.
    """

    def score(params: Params, batch: TrainBatch) -> HeadOutput:
        tokens = jnp.concatenate([batch.prompt_tokens, batch.tokens], axis=1)
        mask = jnp.concatenate([batch.prompt_mask, batch.mask], axis=1)
        hidden = forward(config, params, tokens, mask, dtype=dtype, remat=remat)
        before_response = hidden[:, batch.prompt_tokens.shape[1] - 1 : -1]
        return token_head(
            before_response,
            head_weight(params),
            batch.tokens,
            temperature=temperature,
            softcap=config.logit_softcap,
            ids=batch.topk_ids,
            chunk_tokens=chunk_tokens,
        )

    return score


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


def take_rows(batch: TrainBatch, index: Int32[Array, "b"]) -> TrainBatch:
    """The rows of one minibatch."""
    return jax.tree.map(lambda x: x[index], batch)


def loss_inputs(batch: TrainBatch, head: HeadOutput) -> LossInputs:
    """What the loss may see, from a batch and the policy's scores of it."""
    topk = None
    if batch.topk_ids is not None:
        topk = TopKPair(
            logp=head.ids_logp,
            behavior_logp=batch.topk_behavior_logp,
            has_sampled=sampled_in_topk(batch.tokens, batch.topk_ids),
            proximal_logp=batch.topk_proximal_logp,
        )
    return LossInputs(
        logp=head.logp,
        behavior_logp=batch.behavior_logp,
        advantages=jnp.broadcast_to(batch.advantages[:, None], batch.mask.shape),
        mask=batch.mask,
        proximal_logp=batch.proximal_logp,
        topk=topk,
    )


def make_update(
    score: Score,
    loss: Callable[[LossInputs], LossOutput],
    weigh: Callable[[Array], Array],
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
) -> Update:
    """A pure function (state, minibatch) -> (state, metrics): one optimizer step.

    Aggregation weights are those of the whole minibatch; `micro_batches` pieces of it are then scanned and their
    gradients added, which changes the memory and nothing else. Rows must divide by `micro_batches`.
    """

    def objective(params: Params, batch: TrainBatch, weights: Array) -> tuple[Array, Metrics]:
        head = score(params, batch)
        inputs = loss_inputs(batch, head)
        output = loss(inputs)
        measured = metrics_lib.trust_region_metrics(inputs, output, head.entropy, weights)
        return policy_objective(output.coef, weights, head.logp, batch.mask), jax.lax.stop_gradient(measured)

    def pieces(x: Array) -> Array:
        # Piece i holds rows i, i + n, ...: when rows are sharded, every piece is spread over all devices.
        return jnp.swapaxes(x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 0, 1)

    def update(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        gradient = jax.grad(objective, has_aux=True)
        whole = (batch, weigh(batch.mask))
        if micro_batches == 1:
            grads, measured = gradient(state.params, *whole)
        else:
            stacked = jax.tree.map(pieces, whole)
            first = jax.tree.map(lambda x: x[0], stacked)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, state.params, *first))

            def accumulate(carry, piece):
                grads, measured = gradient(state.params, *piece)
                return (jax.tree.map(jnp.add, carry[0], grads), metrics_lib.merge(carry[1], measured)), None

            (grads, measured), _ = jax.lax.scan(accumulate, zeros, stacked)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        one = jnp.float32(1.0)
        sums = measured.sums | {
            "grad_norm": (optax.global_norm(grads), one),
            "loss/surrogate": (measured.sums["loss/surrogate"][0], one),
        }
        state = TrainState(optax.apply_updates(state.params, updates), opt_state, state.updates + 1)
        return state, measured.replace(sums=sums)

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
    out = (shardings, NamedSharding(mesh, P()))
    return jax.jit(update, in_shardings=(shardings, rows(mesh)), out_shardings=out, donate_argnums=0)
