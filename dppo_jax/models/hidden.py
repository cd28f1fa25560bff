"""A teacher-forced pass one layer after the other, for those who ask what each layer makes of the residual stream."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, Integer

from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import Layer, Params, as_module, attend_within, in_dtype
from dppo_jax.models.rotary import rotation
from dppo_jax.types import Rounding


class LayerByLayer(NamedTuple):
    """`leave` of the scan of `step` over `layers`, from `entering` on, is what `decoder.forward` returns."""

    entering: Float[Array, "B T E"]  # the embeddings
    layers: Any  # what `step` takes of each layer, stacked over the layers
    step: Callable[[Array, Any], Array]  # (residual stream f[B, T, E], one layer of `layers`) -> the stream after it
    leave: Callable[[Array], Array]  # the stream after the last layer -> hidden states after the final norm


def layer_by_layer(
    config: ModelConfig,
    params: Params,
    tokens: Int32[Array, "B T"],
    segments: Int32[Array, "B T"],
    position: Int32[Array, "B T"],
    *,
    dtype: Any = jnp.float32,
    attention: str = "xla",
    round_inputs: Rounding | None = None,
    experts: Integer[Array, "B T Lk"] | None = None,
) -> LayerByLayer:
    """The pass of `decoder.forward`, by the same layers; arguments as there."""
    model, count = as_module(config, params, dtype=dtype), config.num_layers
    attend = attend_within(config, segments, attention)
    cos, sin = rotation(config.rope, config.head_dim, position)
    if experts is not None:
        experts = jnp.moveaxis(experts.reshape(*tokens.shape, count, -1), 2, 0)

    def step(x: Array, one: Any) -> Array:
        weights, number, chosen = one
        layer = nnx.merge(_layer(config), weights)
        return layer(x, cos, sin, attend, None, number, round_inputs, chosen)[0]

    return LayerByLayer(
        model.entering(tokens),
        (in_dtype(params, dtype)["layers"], jnp.arange(count), experts),
        step,
        functools.partial(model.leaving, round_inputs=round_inputs),
    )


@functools.cache
def _layer(config: ModelConfig):
    """The graph of one layer, without its parameters."""
    return nnx.split(nnx.eval_shape(lambda: Layer(config, nnx.Rngs(0))), nnx.Param, ...)[0]
