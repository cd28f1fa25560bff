"""Matrices held in int8 or float8, for the rollout: qwix's values and scales, and its products.

A quantised weight W [..., I, O] is its values under its own name and float32 scales [..., 1, O], one for each output
channel, under `<name>_scale` beside it: W is about values * scales. Embedding and head, norms, biases and a mixture's
router stay as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float, Shaped

from dppo_jax.models.config import MATRICES

FORMATS = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}
# The largest magnitude becomes the format's. qwix's own 127.5 for int8 lies between two roundings, and which of them it
# takes would differ from one compiled program to the next.
CALIBRATION = {"int8": f"absmax,{127.5 / 127}", "float8": "absmax"}
SCALE = "_scale"  # after a weight's name


def quantized(params: dict[str, Any], name: str) -> dict[str, Any]:
    """Parameters with the matrices of every layer in that format."""
    layers = dict(params["layers"])
    for matrix in MATRICES:
        w = layers[matrix]
        quantized_w = _quantize(w, name, (*range(w.ndim - 2), w.ndim - 1))
        layers[matrix], layers[matrix + SCALE] = quantized_w.qvalue, quantized_w.scale
    return {**params, "layers": layers}


def _quantize(x: Array, name: str, channels: tuple[int, ...]) -> qwix.QArray:
    """x in the format `name`, with a scale for each index along the `channels` axes."""
    return qwix.quantize(
        x.astype(jnp.float32), FORMATS[name], channelwise_axes=channels, calibration_method=CALIBRATION[name]
    )


def product(
    x: Float[Array, "B T I"], values: Shaped[Array, "I O"], scales: Float[Array, "1 O"], name: str, *, activations: bool
) -> Float[Array, "B T O"]:
    """x W. With `activations` x is quantised too, token by token, and the product is one of narrow numbers."""
    # A loop's products must not be given weights that were dequantised once, before it: that is what is saved here.
    x, values = jax.lax.optimization_barrier((x, values))
    weight, contracting = qwix.QArray(values, scales), (((2,), (0,)), ((), ()))
    if not activations:
        return qwix.dot_general(x, weight.astype(x.dtype), contracting)
    return qwix.dot_general(_quantize(x, name, (0, 1)), weight, contracting).astype(x.dtype)


def dequantized(values: Shaped[Array, "*n I O"], scales: Float[Array, "*n 1 O"], dtype: Any) -> Float[Array, "*n I O"]:
    """W = values * scales, in `dtype`."""
    return qwix.dequantize(qwix.QArray(values, scales)).astype(dtype)
