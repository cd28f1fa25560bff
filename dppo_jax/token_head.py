"""The token head: hidden states to log-probabilities. The only log-softmax.

It works through the positions in chunks and never holds logits of [B, R, V]; the backward pass computes each chunk's
logits once more. With z = softcap(h W^T) / temperature, per position,

    logp = z[target] - lse(z),      entropy = lse(z) - sum_v p_v z_v,      ids_logp = z[ids] - lse(z)

and, for incoming gradients a, b, c_k of these three,

    dL/dz_v = a (1[v = target] - p_v) - b p_v (log p_v + entropy) + sum_k c_k (1[v = ids_k] - p_v).

The product with W takes the dtype of the hidden states and accumulates in float32; everything after it is float32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from dppo_jax.sharding import constrain
from dppo_jax.types import HeadOutput


def logits(
    hidden: Float[Array, "*n E"], weight: Float[Array, "V E"], *, temperature: float, softcap: float | None
) -> Float32[Array, "*n V"]:
    """softcap * tanh(h W^T / softcap) / temperature; no cap if `softcap` is None."""
    z = jnp.einsum("...e,ve->...v", hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    return z / temperature


def log_normaliser(z: Float32[Array, "*n V"]) -> Float32[Array, "*n"]:
    """log sum exp over the vocabulary."""
    return jax.nn.logsumexp(z, axis=-1)


def token_head(
    hidden: Float[Array, "B R E"],
    weight: Float[Array, "V E"],
    targets: Int32[Array, "B R"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ids: Int32[Array, "B R K"] | None = None,
    chunk_tokens: int = 512,
) -> HeadOutput:
    """logp of `targets`, entropy in nats and, if `ids` are given, their logp; differentiable in `hidden` and `weight`.

    `chunk_tokens` is how many positions have logits at one time, over all rows (at least one per row): the memory is
    that times V floats, twice over in the backward pass.
    """
    batch, length, _ = hidden.shape
    columns = min(length, max(1, chunk_tokens // batch))
    columns = math.ceil(length / math.ceil(length / columns))  # as many chunks, evenly filled
    padding = -length % columns
    if padding:
        hidden, targets = (jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (hidden, targets))
        ids = None if ids is None else jnp.pad(ids, [(0, 0), (0, padding), (0, 0)])
    static = (float(temperature), None if softcap is None else float(softcap), columns)
    logp, entropy, ids_logp = _head(static, hidden, weight, targets, ids)
    ids_logp = None if ids_logp is None else ids_logp[:, :length]
    return HeadOutput(logp=logp[:, :length], entropy=entropy[:, :length], ids_logp=ids_logp)


def _chunks(x: Array | None, columns: int) -> Array | None:
    """[B, R, ...] -> [R / columns, B, columns, ...]"""
    if x is None:
        return None
    return jnp.moveaxis(x.reshape(x.shape[0], -1, columns, *x.shape[2:]), 1, 0)


def _whole(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _chunk_logits(static, hidden: Array, weight: Array) -> Array:
    z = logits(hidden, weight, temperature=static[0], softcap=static[1])
    return constrain(z, "batch", None, "vocab")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head(static, hidden, weight, targets, ids):
    return _head_forward(static, hidden, weight, targets, ids)[0]


def _head_forward(static, hidden, weight, targets, ids):
    columns = static[2]

    def one(_, chunk):
        h, target, at = chunk
        z = _chunk_logits(static, h, weight)
        lse = log_normaliser(z)
        log_p = z - lse[..., None]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)  # lse - sum p z would cancel, and fall below 0
        logp = jnp.take_along_axis(z, target[..., None], axis=-1)[..., 0] - lse
        at_logp = None if at is None else jnp.take_along_axis(z, at, axis=-1) - lse[..., None]
        return None, (logp, entropy, at_logp, lse)

    chunks = (_chunks(hidden, columns), _chunks(targets, columns), _chunks(ids, columns))
    _, outputs = jax.lax.scan(one, None, chunks)
    logp, entropy, ids_logp, lse = jax.tree.map(_whole, outputs)
    return (logp, entropy, ids_logp), (hidden, weight, targets, ids, lse, entropy)


def _head_backward(static, residuals, cotangents):
    temperature, softcap, columns = static
    hidden, weight, targets, ids, lse, entropy = residuals
    d_logp, d_entropy, d_ids = cotangents
    cast_weight = weight.astype(hidden.dtype)

    def one(d_weight, chunk):
        h, target, at, lse, entropy, d_logp, d_entropy, d_at = chunk
        z = _chunk_logits(static, h, weight)
        log_p = z - lse[..., None]
        p = jnp.exp(log_p)
        total = d_logp if d_at is None else d_logp + jnp.sum(d_at, axis=-1)
        d_z = -p * (total[..., None] + d_entropy[..., None] * (log_p + entropy[..., None]))
        d_z = d_z + jnp.where(jnp.arange(z.shape[-1]) == target[..., None], d_logp[..., None], 0.0)
        if d_at is not None:
            row, column = jnp.indices(target.shape)
            d_z = d_z.at[row[..., None], column[..., None], at].add(d_at)
        d_z = d_z / temperature
        if softcap is not None:
            d_z = d_z * (1 - jnp.square(z * temperature / softcap))
        d_z = d_z.astype(h.dtype)
        d_h = jnp.einsum("brv,ve->bre", d_z, cast_weight, preferred_element_type=jnp.float32)
        # As [E, V]: XLA then needs no second copy of d_z, transposed.
        d_weight = d_weight + jnp.einsum("bre,brv->ev", h, d_z, preferred_element_type=jnp.float32)
        return d_weight, d_h.astype(h.dtype)

    chunks: Any = tuple(_chunks(x, columns) for x in (hidden, targets, ids, lse, entropy, d_logp, d_entropy, d_ids))
    d_weight, d_hidden = jax.lax.scan(one, jnp.zeros(weight.shape[::-1], jnp.float32), chunks)
    none = [None if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in (targets, ids)]
    return _whole(d_hidden), d_weight.T.astype(weight.dtype), *none


_head.defvjp(_head_forward, _head_backward)
