"""A mixture of experts in place of the MLP: each token goes through the k experts that its router likes best.

Nothing is dropped: tokens are sorted by expert and go through grouped products, whatever the load; the few of a decode
step meet every expert instead. Over a mesh, each
device holds whole experts: it gathers the tokens of the devices that hold the others, runs its own experts on those
that chose them, and gives every token's owner its part of the sum.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array, Float, Int32

from dppo_jax.sharding import constrain, dividing, mesh_axes, spec

Rounding = Callable[[Array], Array]
Weights = tuple[Array, Array, Array]  # gate and up [X, E, F], down [X, F, E]

PIECE = 0.6  # of an equal share of the load: two pieces hold a device's share and a fifth more
FEW = 256  # tokens: of no more, reading the experts costs more than all experts' products of all tokens
TILE = 512  # rows that the kernel of a weight's gradient takes at a time


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
    holders = mesh_axes("holder")
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
    holders = gather + same
    if cut := tuple(axis for axis in mesh_axes("expert") if holders and axis not in mesh_axes("holder")):
        experts = jax.tree.map(lambda w: jax.lax.all_gather(w, cut, tiled=True), experts)
    gate, up, down = experts
    tokens, weights, chosen = h.reshape(-1, shape[-1]), weights.reshape(-1, k), chosen.reshape(-1, k)
    if gather:
        tokens, weights, chosen = (jax.lax.all_gather(x, gather, tiled=True) for x in (tokens, weights, chosen))
    holders = mesh_axes("holder") if holders else ()
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
    if len(tokens) <= FEW:
        return _dense(tokens, weights, chosen, experts, narrow)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    starts = jnp.searchsorted(flat[order], jnp.arange(count + 1)).astype(jnp.int32)
    if shares == 1:
        return _piece(tokens, weights, experts, order, starts, narrow)
    size = min(pairs, math.ceil(PIECE * pairs / shares / TILE) * TILE)
    order = jnp.pad(order, (0, size))
    return _in_pieces((narrow, size), tokens, weights, experts, order, starts)


def _dense(tokens: Array, weights: Array, chosen: Array, experts: Weights, narrow: Rounding) -> Array:
    """`_grouped` by every expert of every token, those not chosen with weight 0: nothing is sorted or moved."""
    gate, up, down = experts
    share = jnp.sum(jnp.where(chosen[..., None] == jnp.arange(len(gate)), weights[..., None], 0), axis=1)  # [n, X]
    hidden = jax.nn.silu(jnp.einsum("ne,xef->xnf", tokens, gate)) * jnp.einsum("ne,xef->xnf", tokens, up)
    return jnp.einsum("xne,nx->ne", jnp.einsum("xnf,xfe->xne", narrow(hidden), down), share)


def _piece(tokens: Array, weights: Array, experts: Weights, order: Array, bounds: Array, narrow: Rounding) -> Array:
    """The pairs `order` (that of token i and its choice j is i k + j), from bounds[x] to bounds[x + 1] expert x's."""
    gate, up, down = experts
    sizes, token = bounds[1:] - bounds[:-1], order // weights.shape[1]
    weight = jnp.where(jnp.arange(len(order)) < bounds[-1], weights.reshape(-1)[order], 0)
    rows = tokens[token]
    hidden = jax.nn.silu(_grouped_product(rows, gate, sizes)) * _grouped_product(rows, up, sizes)
    out = _grouped_product(narrow(hidden), down, sizes)
    return jnp.zeros_like(tokens).at[token].add(jnp.where(weight[:, None] == 0, 0, out * weight[:, None]))


@jax.custom_vjp
def _grouped_product(x: Float[Array, "n I"], w: Float[Array, "X I O"], sizes: Int32[Array, "X"]) -> Float[Array, "n O"]:
    """The first sizes[0] rows of x times w[0], the next sizes[1] times w[1], ...; rows beyond them give 0."""
    return _rows_of_groups(jax.lax.ragged_dot(x, w, sizes), sizes)


def _rows_of_groups(x: Array, sizes: Array) -> Array:
    return jnp.where(jnp.arange(len(x))[:, None] < jnp.sum(sizes), x, 0)


def _grouped_product_forward(x, w, sizes):
    return _grouped_product(x, w, sizes), (x, w, sizes)


def _grouped_product_backward(kept, g):
    x, w, sizes = kept
    d_x = _rows_of_groups(jax.lax.ragged_dot(g, w.swapaxes(1, 2), sizes), sizes)

    def by_xla(x, g, sizes):
        return jax.vjp(lambda w: jax.lax.ragged_dot(x, w, sizes), w)[1](g)[0]

    def by_kernel(x, g, sizes):  # XLA for TPUs multiplies every row by every expert here
        return tgmm(x.T, g, sizes, w.dtype, tiling=(TILE, 512, 512))

    if len(x) % TILE or x.dtype != jnp.bfloat16 or min(w.shape[1:]) < 128:
        d_w = by_xla(x, g, sizes)
    else:
        d_w = jax.lax.platform_dependent(x, g, sizes, tpu=by_kernel, default=by_xla)
    return d_x, d_w, np.zeros(sizes.shape, jax.dtypes.float0)


_grouped_product.defvjp(_grouped_product_forward, _grouped_product_backward)


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
