"""A mixture of experts in place of the MLP: each token goes through the k experts that its router likes best.

Nothing is dropped: tokens are sorted by expert and go through grouped products, whatever the load. Over a mesh, each
device holds whole experts: it gathers the tokens of the devices that hold the others, runs its own experts on those
that chose them, and gives every token's owner its part of the sum.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from dppo_jax.sharding import constrain, dividing, mesh_axes, spec, whole

Rounding = Callable[[Array], Array]
Weights = tuple[Array, Array, Array]  # gate and up [X, E, F], down [X, F, E]

PIECE = 0.6  # of an equal share of the load: two pieces hold a device's share and a fifth more


def route(
    h: Float[Array, "B T E"], router: Float[Array, "E X"], *, k: int, norm: bool, chosen: Int32[Array, "B T k"] | None
) -> tuple[Float[Array, "B T k"], Int32[Array, "B T k"], Float[Array, "B T"]]:
    """Weights and numbers of each token's experts, and the router's entropy in nats: softmax over all X, the k largest,
    summing to 1 if `norm`.

    Given the `chosen` experts (a replay of the rollout's), their weights under this router.
    """
    logp = jax.nn.log_softmax((h @ constrain(router, None, None)).astype(jnp.float32), axis=-1)
    probs = jnp.exp(logp)
    if chosen is None:
        chosen = jax.lax.top_k(probs, k)[1].astype(jnp.int32)
    weights = jnp.take_along_axis(probs, chosen, axis=-1)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True) if norm else weights
    return weights, chosen, -jnp.sum(jax.lax.stop_gradient(probs * logp), axis=-1)


def mixture(
    h: Float[Array, "B T E"],
    weights: Float[Array, "B T k"],
    chosen: Int32[Array, "B T k"],
    experts: Weights,
    narrow: Rounding,
) -> Float[Array, "B T E"]:
    """sum_j weights_j down_j(silu(gate_j h) * up_j h) over each token's experts."""
    mesh, weights = jax.sharding.get_abstract_mesh(), weights.astype(h.dtype)
    if mesh.empty:
        return _local(h, weights, chosen, experts, narrow=narrow, gather=(), same=())
    holders = mesh_axes("expert")
    by_token = dividing(mesh, h, "batch", "stream", None)
    differ = {axis for name in by_token if name for axis in mesh_axes(name)}  # mesh axes along which the tokens do
    share = jax.shard_map(
        functools.partial(
            _local,
            narrow=narrow,
            gather=tuple(axis for axis in holders if axis in differ),
            same=tuple(axis for axis in holders if axis not in differ),
        ),
        in_specs=(
            *[spec(*by_token)] * 3,
            (
                spec("expert", "expert_embed", "expert_mlp"),
                spec("expert", "expert_embed", "expert_mlp"),
                spec("expert", "expert_mlp", "expert_embed"),
            ),
        ),
        out_specs=spec(*by_token),
        check_vma=False,  # the grouped product is a kernel on a TPU, and does not say over which axes it varies
    )
    return share(h, weights, chosen, experts)


def _local(
    h: Array, weights: Array, chosen: Array, experts: Weights, *, narrow: Rounding, gather: tuple, same: tuple
) -> Array:
    """One device's part. Tokens are gathered over the mesh axes `gather`, and are the same over `same`."""
    shape, k = h.shape, chosen.shape[-1]
    columns = mesh_axes("expert_embed") if gather or same else ()
    gate, up, down = (whole(w, columns, axis) for w, axis in zip(experts, (1, 1, 2), strict=True))
    tokens, weights, chosen = h.reshape(-1, shape[-1]), weights.reshape(-1, k), chosen.reshape(-1, k)
    if gather:
        tokens, weights, chosen = (jax.lax.all_gather(x, gather, tiled=True) for x in (tokens, weights, chosen))
    holders = mesh_axes("expert") if gather or same else ()
    first = jax.lax.axis_index(holders) * len(gate) if holders else 0
    here = (chosen >= first) & (chosen < first + len(gate))
    chosen = jnp.where(here, chosen - first, len(gate))
    shares = jax.lax.axis_size(holders) if holders else 1
    out = _grouped(tokens, weights, chosen, (gate, up, down), narrow, shares)
    out = jax.lax.psum_scatter(out, gather, tiled=True) if gather else out
    return (jax.lax.psum(out, same) if same else out).reshape(shape)


def _grouped(tokens: Array, weights: Array, chosen: Array, experts: Weights, narrow: Rounding, shares: int) -> Array:
    """f[n, E]: of each token [n, E], the sum over those of its `chosen` [n, k] experts that are here; X: elsewhere.

    With 1 / `shares` of the load expected here, the pairs of token and expert are worked through in pieces, as many as
    there turn out to be.
    """
    pairs, count = chosen.size, len(experts[0])
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    starts = jnp.searchsorted(flat[order], jnp.arange(count + 1)).astype(jnp.int32)
    if shares == 1:
        return _piece(tokens, weights, experts, order, starts, narrow)
    size = min(pairs, math.ceil(PIECE * pairs / shares / 128) * 128)
    order = jnp.pad(order, (0, size))
    return _in_pieces((narrow, size), tokens, weights, experts, order, starts)


def _piece(tokens: Array, weights: Array, experts: Weights, order: Array, bounds: Array, narrow: Rounding) -> Array:
    """The pairs `order` (that of token i and its choice j is i k + j), from bounds[x] to bounds[x + 1] expert x's."""
    gate, up, down = experts
    sizes, token = bounds[1:] - bounds[:-1], order // weights.shape[1]
    weight = jnp.where(jnp.arange(len(order)) < bounds[-1], weights.reshape(-1)[order], 0)
    rows = tokens[token]
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jax.lax.ragged_dot(narrow(hidden), down, sizes)
    return jnp.zeros_like(tokens).at[token].add(jnp.where(weight[:, None] == 0, 0, out * weight[:, None]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_pieces(static, tokens, weights, experts, order, starts):
    def add(number, out):
        return out + _numbered(static, tokens, weights, experts, order, starts, number)

    return jax.lax.fori_loop(0, _pieces(static, starts), add, jnp.zeros_like(tokens))


def _pieces(static, starts) -> Array:
    return (starts[-1] + static[1] - 1) // static[1]


def _numbered(static, tokens, weights, experts, order, starts, number):
    narrow, size = static
    part = jax.lax.dynamic_slice_in_dim(order, number * size, size)
    return _piece(tokens, weights, experts, part, jnp.clip(starts - number * size, 0, size), narrow)


def _in_pieces_forward(static, *inputs):
    return _in_pieces(static, *inputs), inputs


def _in_pieces_backward(static, inputs, g):
    *values, order, starts = inputs

    def add(number, total):
        _, pull = jax.vjp(lambda *values: _numbered(static, *values, order, starts, number), *values)
        return jax.tree.map(jnp.add, total, pull(g))

    zeros = jax.tree.map(jnp.zeros_like, tuple(values))
    found = jax.lax.fori_loop(0, _pieces(static, starts), add, zeros)
    return *found, *(np.zeros(x.shape, jax.dtypes.float0) for x in (order, starts))


_in_pieces.defvjp(_in_pieces_forward, _in_pieces_backward)
