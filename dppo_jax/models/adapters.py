"""Adapters of a model's weights: two thin matrices beside each, whose product is added to it (`dppo_jax.lora`)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

ADAPTER = ("_lora_a", "_lora_b")  # suffixes to a weight's name: the two matrices of its adapter


def adapt(layer: nnx.Module, name: str, rank: int, rngs: nnx.Rngs) -> None:
    """Gives a layer's weight W [..., I, O] an adapter: A [..., I, rank], uniform within 1 / sqrt(I) as in PEFT, and
    B [..., rank, O] of zeros."""
    weight = getattr(layer, name)
    *several, inner, outer = weight.shape
    *stacked, inner_axis, outer_axis = weight.get_metadata()["axes"]
    bound = inner**-0.5
    a = jax.random.uniform(rngs.params(), (*several, inner, rank), minval=-bound, maxval=bound)
    setattr(layer, name + ADAPTER[0], nnx.Param(a, axes=(*stacked, inner_axis, "rank")))
    b = jnp.zeros((*several, rank, outer))
    setattr(layer, name + ADAPTER[1], nnx.Param(b, axes=(*stacked, "rank", outer_axis)))


def add_adapter(
    w: Float[Array, "*n I O"], a: Float[Array, "*n I r"], b: Float[Array, "*n r O"], scale: float
) -> Float[Array, "*n I O"]:
    """W + scale A B, in float32, as W's dtype."""
    delta = jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return (w.astype(jnp.float32) + scale * delta).astype(w.dtype)
