"""Narrower numbers for the rollout: the mismatch between the two policies, on demand.

A format rounds values to those that it can hold; shape and dtype stay: "bfloat16", "float16", "float8" (e4m3),
"int8", "int4", or "m<n>": n bits of mantissa with float32's exponent. Integers and float8 are scaled by the largest
magnitude: of each output channel of a weight, of each token's activations.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array

from dppo_jax.errors import UserError, nearest
from dppo_jax.models.decoder import Params
from dppo_jax.types import Rounding

FLOATS = {"bfloat16": (8, 7), "float16": (5, 10)}  # bits of exponent and mantissa
SCALED = {"int8": jnp.int8, "int4": jnp.int4, "float8": jnp.float8_e4m3fn}


def _rounding(name: str, key: str, channels: Callable[[Array], tuple[int, ...]]) -> Rounding:
    """The format called `name`; `channels` are the axes along which scales differ. UserError, naming the config key."""
    if name in SCALED:

        def scaled(x: Array) -> Array:
            quantized = qwix.quantize(x.astype(jnp.float32), SCALED[name], channelwise_axes=channels(x))
            return qwix.dequantize(quantized).astype(x.dtype)

        return scaled
    bits = FLOATS.get(name)
    if match := re.fullmatch(r"m(\d+)", name):
        bits = (8, int(match[1]))
    if bits is None or not 1 <= bits[1] <= 23:
        names = [*FLOATS, *SCALED, "m4"]
        formats = ", ".join(names)
        raise UserError(f"{key} = {name!r} is not a format{nearest(name, names)}; formats: {formats} (m1 to m23)")
    exponent, mantissa = bits
    return lambda x: jax.lax.reduce_precision(x, exponent, mantissa)


def activations(name: str) -> Rounding | None:
    """The rounding of the inputs of every linear layer; None for ""."""
    if not name:
        return None
    return _rounding(name, "rollout.activations", lambda x: tuple(range(x.ndim - 1)))


def weights(name: str) -> Callable[[Params], Params] | None:
    """Parameters with their matrices rounded (norms and biases are not); None for ""."""
    if not name:
        return None
    # [L, in, out], and [L, X, in, out] of experts
    layers = _rounding(name, "rollout.weights", lambda w: (*range(w.ndim - 2), w.ndim - 1))
    tables = _rounding(name, "rollout.weights", lambda w: (0,))  # [V, E]

    def rounded(params: Params) -> Params:
        matrices = {key: layers(w) if w.ndim >= 3 else w for key, w in params["layers"].items()}
        return {key: tables(w) if w.ndim == 2 else w for key, w in params.items() if key != "layers"} | {
            "layers": matrices
        }

    return rounded
