"""A mixture of experts in place of the MLP: each token goes through the k experts that its router likes best.

Nothing is dropped: tokens are sorted by expert and go through grouped products, whatever the load; the few of a decode
step meet every expert instead. Over a mesh, each device holds whole experts: it gathers the tokens of the devices that
hold the others, runs its own experts on those that chose them, and gives every token's owner its part of the sum.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Bool, Float, Int32

from dppo_jax.devices.sharding import constrain, dividing, mesh_axes, spec
from dppo_jax.types import Rounding

# gate and up [X, E, F], or both side by side [X, E, 2F]; down [X, F, E]; of all layers, [L, X, ...]
Weights = tuple[Array, ...]

FIRST, MORE = 1.2, 0.3  # sizes of a device's first expert chunk and of further ones, in equal shares of the load
FEW = 256  # up to so many tokens, reading the experts costs more than every expert's product with every token
TILE = 512  # rows that the kernels take at a time
IN_PLACE = "in_place"  # the scope of products that read one layer's experts among those of all


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
    round_inputs: Rounding,
    layer: Int32[Array, ""] | None = None,
) -> Float[Array, "B T E"]:
    """sum_j weights_j down_j(silu(gate_j h) * up_j h) over each token's experts.

    With a `layer`, `experts` are those of all layers, read in place; no gradient flows.
    """
    mesh, weights = jax.sharding.get_abstract_mesh(), weights.astype(h.dtype)
    if mesh.empty:
        return _local(h, weights, chosen, experts, layer, round_inputs=round_inputs, gather_axes=(), sum_axes=())
    holders = mesh_axes("holder")
    by_token = dividing(mesh, h, "batch", "stream", None)
    token_axes = {axis for name in by_token if name for axis in mesh_axes(name)}  # mesh axes that cut the tokens
    of_all = () if layer is None else (None,)
    sharded = jax.shard_map(
        functools.partial(
            _local,
            round_inputs=round_inputs,
            gather_axes=tuple(axis for axis in holders if axis in token_axes),
            sum_axes=tuple(axis for axis in holders if axis not in token_axes),
        ),
        in_specs=(
            *[spec(*by_token)] * 3,
            (
                spec(*of_all, "expert", "expert_embed", "expert_mlp"),
                spec(*of_all, "expert", "expert_embed", "expert_mlp"),
                spec(*of_all, "expert", "expert_mlp", "expert_embed"),
            ),
            spec(),
        ),
        out_specs=spec(*by_token),
        check_vma=False,  # the grouped product is a kernel on a TPU, and does not say over which axes it varies
    )
    return sharded(h, weights, chosen, experts, layer)


def _local(
    h: Array,
    weights: Array,
    chosen: Array,
    experts: Weights,
    layer: Array | None,
    *,
    round_inputs: Rounding,
    gather_axes: tuple[str, ...],
    sum_axes: tuple[str, ...],
) -> Array:
    """`mixture` on one device. Tokens differ along the mesh axes `gather_axes`, and not along `sum_axes`."""
    shape, k = h.shape, chosen.shape[-1]
    holders = gather_axes + sum_axes
    if cut := tuple(axis for axis in mesh_axes("expert") if holders and axis not in mesh_axes("holder")):
        experts, layer = _of_layer(experts, layer), None
        gate, up, down = experts
        gate_up = jnp.concatenate([gate, up], axis=-1)  # one product in place of two
        experts = tuple(jax.lax.all_gather(w, cut, tiled=True) for w in (gate_up, down))
    count = experts[0].shape[-3]
    tokens, weights, chosen = h.reshape(-1, shape[-1]), weights.reshape(-1, k), chosen.reshape(-1, k)
    if gather_axes:
        tokens = _by_row(tokens)
        tokens, weights, chosen = (jax.lax.all_gather(x, gather_axes, tiled=True) for x in (tokens, weights, chosen))
    holders = mesh_axes("holder") if holders else ()
    first = jax.lax.axis_index(holders) * count if holders else 0
    on_device = (chosen >= first) & (chosen < first + count)
    chosen = jnp.where(on_device, chosen - first, count)
    shares = jax.lax.axis_size(holders) if holders else 1
    out = _grouped(tokens, weights, chosen, experts, round_inputs, shares, layer)
    out = _by_row(jax.lax.psum_scatter(out, gather_axes, tiled=True)) if gather_axes else out
    return (jax.lax.psum(out, sum_axes) if sum_axes else out).reshape(shape)


def _of_layer(experts: Weights, layer: Array | None) -> Weights:
    """The experts of one layer among those of all; without a layer, `experts` are its own."""
    if layer is None:
        return experts
    return tuple(jax.lax.dynamic_index_in_dim(w, layer, keepdims=False) for w in experts)


def _by_row(x: Array) -> Array:
    """x, laid out row by row: XLA for TPUs would exchange it laid out by columns, and then transpose all of it."""
    return with_layout_constraint(x, Layout((0, 1)))


def _grouped(
    tokens: Array,
    weights: Array,
    chosen: Array,
    experts: Weights,
    round_inputs: Rounding,
    shares: int,
    layer: Array | None,
) -> Array:
    """f[n, E]: for each of `tokens` [n, E], the weighted sum over those of its `chosen` experts that this device holds.

    `chosen` i[n, k] numbers the device's X experts from 0; X stands for an expert of another device. The pairs of token
    and expert are computed in expert chunks: a large one, sized for 1 / `shares` of all pairs, then as many small ones
    as the pairs need.
    """
    if len(tokens) <= FEW:
        return _dense(tokens, weights, chosen, _of_layer(experts, layer), round_inputs)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    starts = jnp.sum(flat[:, None] < jnp.arange(experts[0].shape[-3] + 1), axis=0, dtype=jnp.int32)
    if shares == 1:
        sizes = (len(flat), 0)
    else:
        first, more = (math.ceil(fraction * len(flat) / shares / TILE) * TILE for fraction in (FIRST, MORE))
        sizes = (min(first, len(flat)), more)
    inputs = (round_inputs, sizes), tokens, weights, experts, jnp.pad(order, (0, sizes[1])), starts
    return _of_pairs(*inputs) if layer is None else _sum_of_pairs(*inputs, layer)


def _dense(tokens: Array, weights: Array, chosen: Array, experts: Weights, round_inputs: Rounding) -> Array:
    """`_grouped` by every expert of every token, with weight 0 where it is not chosen: nothing is sorted or moved."""
    *into, down = experts
    share = jnp.sum(jnp.where(chosen[..., None] == jnp.arange(len(down)), weights[..., None], 0), axis=1)  # [n, X]
    hidden = _hidden(round_inputs, *(jnp.einsum("ne,xef->xnf", tokens, w) for w in into))
    return jnp.einsum("xne,nx->ne", jnp.einsum("xnf,xfe->xne", hidden, down), share)


def _hidden(round_inputs: Rounding, *products: Array) -> Array:
    """The input of `down`, from the products with gate and up, or from one product with both side by side."""
    gate, up = products if len(products) == 2 else jnp.split(products[0], 2, axis=-1)
    return round_inputs(jax.nn.silu(gate) * up)


class _ExpertChunk(NamedTuple):
    """Some of the pairs of token and expert, sorted by expert. Pair i k + j is token i with its choice j."""

    pair: Int32[Array, "p"]
    token: Int32[Array, "p"]
    valid: Bool[Array, "p 1"]  # false beyond the last pair
    sizes: Int32[Array, "X"]  # pairs of each expert

    def zero_invalid(self, x: Array) -> Array:
        """x with 0 beyond the last pair, where grouped products leave arbitrary values."""
        return jnp.where(self.valid, x, 0)

    def rows_of(self, x: Float[Array, "n E"]) -> Float[Array, "p E"]:
        """Each pair's row of x."""
        return x.at[self.token].get(mode="promise_in_bounds")

    def add(self, total: Float[Array, "n E"], rows: Float[Array, "p E"]) -> Float[Array, "n E"]:
        """`total` and each pair's row, summed by token."""
        return total.at[jnp.where(self.valid[:, 0], self.token, len(total))].add(rows, mode="drop")


def _over_chunks(sizes: tuple[int, int], k: int, order: Array, starts: Array, work: Callable, carry: Any) -> Any:
    """carry = work(carry, chunk) for a first expert chunk and, while there are pairs left, further ones."""

    def chunk(begin, size: int) -> _ExpertChunk:
        bounds = jnp.clip(starts - begin, 0, size)
        pair = jax.lax.dynamic_slice_in_dim(order, begin, size)
        valid = jnp.arange(size) < bounds[-1]
        return _ExpertChunk(pair, pair // k, valid[:, None], bounds[1:] - bounds[:-1])

    first, more = sizes
    carry = work(carry, chunk(0, first))
    if not more:
        return carry
    turns = (starts[-1] - first + more - 1) // more
    return jax.lax.fori_loop(0, turns, lambda turn, carry: work(carry, chunk(first + turn * more, more)), carry)


def _sum_of_pairs(
    static: tuple[Rounding, tuple[int, int]],
    tokens: Array,
    weights: Array,
    experts: Weights,
    order: Array,
    starts: Array,
    layer: Array | None = None,
) -> Float[Array, "n E"]:
    """The sum by token over the pairs in this `order`, where pairs starts[x] to starts[x + 1] - 1 are expert x's."""
    round_inputs, sizes = static
    *into, down = experts

    def work(out, chunk):
        rows = chunk.rows_of(tokens)
        products = (_times(rows, w, chunk.sizes, layer) for w in into)
        hidden = _weighted(round_inputs, chunk, _weight(weights, chunk), *products)
        return chunk.add(out, _times(hidden, down, chunk.sizes, layer))

    return _over_chunks(sizes, weights.shape[1], order, starts, work, jnp.zeros_like(tokens))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_pairs(static, tokens, weights, experts, order, starts):
    """`_sum_of_pairs` of one layer's experts. No row of a pair is kept for the backward pass, which looks them up
    again."""
    return _sum_of_pairs(static, tokens, weights, experts, order, starts)


def _weight(weights: Array, chunk: _ExpertChunk) -> Array:
    return weights.reshape(-1)[chunk.pair, None]


def _weighted(round_inputs: Rounding, chunk: _ExpertChunk, weight: Array, *products: Array) -> Array:
    """The hidden values times their pair's weight: as the outputs times it, on narrower arrays."""
    return chunk.zero_invalid(_hidden(round_inputs, *products) * weight)


def _of_pairs_forward(static, *inputs):
    return _of_pairs(static, *inputs), inputs


def _of_pairs_backward(static, inputs, g):
    (round_inputs, sizes), (tokens, weights, experts, order, starts) = static, inputs
    *into, down = experts

    def work(carry, chunk):
        d_tokens, d_weights, d_experts = carry
        rows, g_rows = chunk.rows_of(tokens), chunk.rows_of(g)
        products = [_times(rows, w, chunk.sizes) for w in into]
        hidden, pull = jax.vjp(functools.partial(_weighted, round_inputs, chunk), _weight(weights, chunk), *products)
        d_weight, *d_products = pull(_times_transposed(g_rows, down, chunk.sizes))
        d_chunk = [*(_by_group(rows, d, chunk.sizes) for d in d_products), _by_group(hidden, g_rows, chunk.sizes)]
        back = (_times_transposed(d, w, chunk.sizes) for d, w in zip(d_products, into, strict=True))
        return (
            chunk.add(d_tokens, functools.reduce(jnp.add, back)),
            d_weights.at[chunk.pair].add(d_weight[:, 0]),
            [summed + gradient for summed, gradient in zip(d_experts, d_chunk, strict=True)],
        )

    zeros = jnp.zeros_like(tokens), jnp.zeros_like(weights.reshape(-1)), [jnp.zeros_like(w) for w in experts]
    d_tokens, d_weights, d_experts = _over_chunks(sizes, weights.shape[1], order, starts, work, zeros)
    none = (np.zeros(x.shape, jax.dtypes.float0) for x in (order, starts))
    return d_tokens, d_weights.reshape(weights.shape), tuple(d_experts), *none


_of_pairs.defvjp(_of_pairs_forward, _of_pairs_backward)


def _times(
    x: Float[Array, "n I"], w: Float[Array, "X I O"], sizes: Int32[Array, "X"], layer: Array | None = None
) -> Float[Array, "n O"]:
    """The first sizes[0] rows of x times w[0], the next sizes[1] times w[1], ...; arbitrary in the rows beyond.

    With a `layer`, w is [L, X, I, O], and w[layer] is meant.
    """
    if layer is None:
        return jax.lax.ragged_dot(x, w, sizes)

    def by_xla(x, w, sizes):
        return jax.lax.ragged_dot(x, *_of_layer((w,), layer), sizes)

    def by_kernel(x, w, sizes):  # XLA for TPUs copies the layer's experts to multiply by them
        of_all = jnp.zeros(w.shape[0] * w.shape[1], sizes.dtype)
        of_all = jax.lax.dynamic_update_slice_in_dim(of_all, sizes, layer * len(sizes), axis=0)
        with jax.named_scope(IN_PLACE):  # the kernel passes over groups without rows
            return gmm(x, w.reshape(-1, *w.shape[2:]), of_all, x.dtype, tiling=_tiling(*w.shape[2:]))

    return _on_tpu(by_kernel, by_xla, x, w, sizes)


def _times_transposed(
    x: Float[Array, "n O"], w: Float[Array, "X I O"], sizes: Int32[Array, "X"]
) -> Float[Array, "n I"]:
    """`_times` by each expert's transpose."""

    def by_xla(x, w, sizes):
        return _times(x, w.swapaxes(1, 2), sizes)

    def by_kernel(x, w, sizes):  # XLA for TPUs copies the weights to transpose them
        return gmm(x, w, sizes, x.dtype, tiling=_tiling(w.shape[2], w.shape[1]), transpose_rhs=True)

    return _on_tpu(by_kernel, by_xla, x, w, sizes)


def _by_group(x: Float[Array, "n I"], g: Float[Array, "n O"], sizes: Int32[Array, "X"]) -> Float[Array, "X I O"]:
    """x^T g of each expert's rows."""

    def by_xla(x, g, sizes):
        zeros = jnp.zeros((len(sizes), x.shape[1], g.shape[1]), x.dtype)
        return jax.vjp(lambda w: jax.lax.ragged_dot(x, w, sizes), zeros)[1](g)[0]

    def by_kernel(x, g, sizes):  # XLA for TPUs multiplies every row by every expert here
        return tgmm(x.T, g, sizes, x.dtype, tiling=_tiling(x.shape[1], g.shape[1]))

    return _on_tpu(by_kernel, by_xla, x, g, sizes)


def _tiling(*widths: int) -> tuple[int, ...]:
    """Tiles of a kernel's rows, and of its two other sides."""
    return TILE, *(max((t for t in range(512, 1025, 128) if width % t == 0), default=512) for width in widths)


def _on_tpu(by_kernel: Callable, by_xla: Callable, x: Array, other: Array, sizes: Array) -> Array:
    """The kernel on a TPU, where x has whole tiles of bfloat16; else XLA's way to the same."""
    if len(x) % TILE or x.dtype != jnp.bfloat16 or min(x.shape[1], *other.shape[-2:]) < 128:
        return by_xla(x, other, sizes)
    return jax.lax.platform_dependent(x, other, sizes, tpu=by_kernel, default=by_xla)
