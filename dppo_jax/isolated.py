"""The training pass as a program of its own inside others, so that all of them compute the same bits.

What a pass gives to the last bit depends on the shapes of its products, on which operations the compiler fuses (a
multiplication and an addition in one fusion become one rounding), and on what else is computed beside it: the update's
backward pass changes its forward pass. Here the pass is the body of a loop that turns once. XLA fuses nothing across
the edge of a loop, so two programs that hold the same body compile it to the same code.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import Params, head_weight
from dppo_jax.teacher_forced import BehaviorHead, PolicyLogprobs, states_before
from dppo_jax.token_head import whole_head
from dppo_jax.types import HeadOutput, PackedBatch

# (params, packed) -> the policy at every response token, and the logits f32[M, Q, V] that it is computed from
IsolatedPass = Callable[[Params, PackedBatch], tuple[HeadOutput, Float32[Array, "M Q V"]]]

READ = {"tokens", "segments", "positions", "columns", "targets", "topk_ids"}  # what the pass reads of a microbatch
UNREAD: dict[str, Any] = {field.name: None for field in dataclasses.fields(PackedBatch) if field.name not in READ}


def isolated(function: Callable[[Any, Any], Any], constants: Any, inputs: Any) -> Any:
    """function(constants, inputs), computed in a loop of its own; a pytree of arrays. No gradient flows.

    The compiler must not see through the loop. The inputs change as it turns, or what is computed of them would be
    moved out; its end depends on all outputs, or those that one program does not use would be left out of it there.
    """
    constants, inputs = jax.lax.stop_gradient((constants, inputs))
    shapes = jax.eval_shape(function, constants, inputs)
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def turn(state):
        count, inputs, _ = state
        outputs = jax.lax.optimization_barrier(function(constants, inputs))
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(outputs)]))
        count = count + jnp.where(finite, 1, 2)
        return count, jax.tree.map(lambda x: x + count.astype(x.dtype), inputs), outputs

    return jax.lax.while_loop(lambda state: state[0] < 1, turn, (jnp.int32(0), inputs, nothing))[2]


def make_isolated_pass(
    config: ModelConfig, *, temperature: float, dtype: Any, attention: str = "xla", head_float32: bool = False
) -> IsolatedPass:
    """The pass of `make_policy_logprobs`, isolated; arguments as there. It holds the logits of a microbatch at once."""

    def whole(params: Params, packed: PackedBatch) -> tuple[HeadOutput, Array]:
        states, _ = states_before(config, params, packed, dtype=dtype, attention=attention)
        states = states.astype(jnp.float32) if head_float32 else states
        settings: dict[str, Any] = dict(temperature=temperature, softcap=config.logit_softcap)
        return whole_head(states, head_weight(params), packed.targets, ids=packed.topk_ids, **settings)

    return lambda params, packed: isolated(whole, params, dataclasses.replace(packed, **UNREAD))


def with_values_of(isolated_pass: IsolatedPass, policy_logprobs: PolicyLogprobs) -> PolicyLogprobs:
    """`policy_logprobs` whose logp and entropy have the values of the isolated pass, and the gradients of their own.

    The two differ by rounding alone. It costs one forward pass.
    """

    def logprobs(params: Params, packed: PackedBatch, behavior_head: BehaviorHead | None = None) -> HeadOutput:
        head = policy_logprobs(params, packed, behavior_head)
        values, _ = isolated_pass(params, packed)
        fields = ("logp", "entropy") if head.ids_logp is None else ("logp", "entropy", "ids_logp")
        replaced = {name: _with_value(getattr(values, name), getattr(head, name)) for name in fields}
        return dataclasses.replace(head, **replaced)

    return logprobs


@jax.custom_vjp
def _with_value(value: Array, differentiable: Array) -> Array:
    """`value`, whose gradient flows through the other."""
    return value


_with_value.defvjp(lambda value, _: (value, None), lambda _, g: (jnp.zeros_like(g), g))
