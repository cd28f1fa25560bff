"""Positions, and the rotation by them."""

import math
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

if TYPE_CHECKING:
    from dppo_jax.models.rope import RopeConfig


def positions(mask: Bool[Array, "B T"]) -> Int32[Array, "B T"]:
    """0 for a row's first real token; padding on the left gets 0 too."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


def inverse_frequencies(rope: "RopeConfig", head_dim: int) -> np.ndarray:
    """Radians per position of each rotated pair, f32[D/2] (RoFormer, 2104.09864); scaling as in `RopeConfig`."""
    frequency = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        # Slow pairs are slowed by `factor`, fast ones are left alone, and those between are blended.
        turns = rope.original_max_position * frequency / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        frequency = (1 - blend) * frequency / rope.factor + blend * frequency
    elif rope.kind == "yarn":
        blend = _yarn_blend(rope, head_dim)
        frequency = (1 - blend) * frequency / rope.factor + blend * frequency
    elif rope.kind == "longrope":
        frequency = frequency / np.array(rope.long_factor if rope.long else rope.short_factor)
    return frequency.astype(np.float32)


def _yarn_blend(rope: "RopeConfig", head_dim: int) -> np.ndarray:
    """1 for pairs that are left alone, 0 for those that `factor` divides, a ramp between, f64[D/2] (2309.00071)."""

    def pair(turns: float) -> float:
        """The one, not a whole number, that turns so often within the original positions."""
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high  # as transformers does
    return 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)


LANES = 128  # numbers in a row of a TPU's registers


def rotation(
    rope: "RopeConfig", head_dim: int, position: Int32[Array, "B T"]
) -> tuple[Float32[Array, "B T D2"], Float32[Array, "B T D2"]]:
    """cos and sin of every rotated pair, times rope's attention factor; computed once for all layers."""
    angle = position[..., None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if rope.attention_factor == 1 else (rope.attention_factor * cos, rope.attention_factor * sin)


def rotate(x: Float[Array, "B T H D"], cos: Float32[Array, "B T D2"], sin: Float32[Array, "B T D2"]) -> Array:
    """Rotates the pairs (x[i], x[i + D/2]), in float32."""
    half = x.shape[-1] // 2
    if x.shape[-1] % LANES:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = cos[:, :, None], sin[:, :, None]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    # A TPU lays halves of full lanes out anew: it is quicker to turn (a, b) into (-b, a) by a product, and as exact.
    turn = jnp.asarray(np.kron([[0, 1], [-1, 0]], np.eye(half)), x.dtype)
    turned = jnp.einsum("bthd,de->bthe", x, turn, precision="highest", preferred_element_type=jnp.float32)
    cos, sin = (jnp.concatenate([a, a], axis=-1)[:, :, None] for a in (cos, sin))
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
