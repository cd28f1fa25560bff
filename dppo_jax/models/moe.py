"""A mixture of experts in place of the MLP: each token goes through the k experts that its router likes best.

Nothing is dropped: tokens are sorted by expert and go through one grouped product, whatever the load.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def route(
    h: Float[Array, "n E"], router: Float[Array, "E X"], *, k: int, norm: bool, chosen: Int32[Array, "n k"] | None
) -> tuple[Float[Array, "n k"], Int32[Array, "n k"]]:
    """Weights and numbers of each token's experts: softmax over all X, the k largest, summing to 1 if `norm`.

    Given the `chosen` experts (a replay of the rollout's), their weights under this router.
    """
    probs = jax.nn.softmax((h @ router).astype(jnp.float32), axis=-1)
    if chosen is None:
        chosen = jax.lax.top_k(probs, k)[1].astype(jnp.int32)
    weights = jnp.take_along_axis(probs, chosen, axis=-1)
    return weights / jnp.sum(weights, axis=-1, keepdims=True) if norm else weights, chosen


def mixture(
    h: Float[Array, "n E"],
    weights: Float[Array, "n k"],
    chosen: Int32[Array, "n k"],
    gate: Float[Array, "X E F"],
    up: Float[Array, "X E F"],
    down: Float[Array, "X F E"],
    narrow: Callable[[Array], Array],
) -> Float[Array, "n E"]:
    """sum_j weights_j down_j(silu(gate_j h) * up_j h) over each token's experts."""
    k = chosen.shape[1]
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=gate.shape[0]).astype(jnp.int32)
    rows = h[order // k]
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jax.lax.ragged_dot(narrow(hidden), down, sizes)
    out = out * weights.reshape(-1)[order][:, None].astype(out.dtype)
    return jnp.zeros_like(h).at[order // k].add(out)
