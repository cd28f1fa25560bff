"""The key-value cache of rows that decode side by side and are at different lengths: of one layer, or of all.

Its columns are cut into blocks of their own: 128 columns, 128 more, then 256, 512, ... A step reads the blocks that
some row uses and leaves the others alone; nothing is copied. The cache of one layer has keys [B, KV, D, c] and values
[B, KV, c, D], so that both of attention's products run along the last axis. The cache of all layers has both as
[L, B, KV, c, D]: what a TPU writes in place, and reads a layer of without copying it out.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from dppo_jax.devices.sharding import constrain, mesh_axes, num_shards, spec

Cache = tuple[tuple[Array, Array], ...]  # blocks of (keys, values)

FIRST = 128  # columns of the first block


def edges(columns: int) -> list[int]:
    """Where the blocks begin, and where the last one ends."""
    starts = [0]
    width = FIRST
    while columns - width >= width // 2:  # no last block much smaller than the one before it
        starts.append(width)
        width *= 2
    return [*starts, columns]


def empty(rows: int, kv_heads: int, head_dim: int, columns: int, dtype, layers: int | None = None) -> Cache:
    """A cache of zeros, of one layer, or of `layers` layers."""
    widths = [end - start for start, end in itertools.pairwise(edges(columns))]

    def zeros(*shape: int) -> Array:
        return constrain_cache(jnp.zeros(shape, dtype))

    if layers is None:
        per_layer = (rows, kv_heads)
        return tuple((zeros(*per_layer, head_dim, width), zeros(*per_layer, width, head_dim)) for width in widths)
    shape = (layers, rows, kv_heads)
    return tuple((zeros(*shape, width, head_dim), zeros(*shape, width, head_dim)) for width in widths)


def constrain_cache(x: Array) -> Array:
    """Keys or values laid out over the mesh, of one layer or of all."""
    return constrain(x, *["layers"] * (x.ndim - 4), "batch", "kv_heads", None, None)


def of_prompt(
    k: Float[Array, "B P KV D"], v: Float[Array, "B P KV D"], *, one_layer: bool
) -> tuple[Float[Array, "B KV ..."], Float[Array, "B KV P D"]]:
    """Keys and values of a prompt as a cache holds them."""
    keys = jnp.einsum("btkd->bkdt" if one_layer else "btkd->bktd", k)
    return constrain_cache(keys), constrain_cache(jnp.einsum("btkd->bktd", v))


def fill(cache: Cache, rows: Bool[Array, "B"], prompt: tuple[Array, Array], layer: Any = None) -> Cache:
    """The cache with columns 0 .. P-1 of the given rows replaced; of this `layer`, where it holds all."""
    keys, values = prompt
    at, blocks = 0, []
    chosen, of_layer = rows[:, None, None, None], () if layer is None else (layer,)

    def filled(block: Array, prompt_side: Array, axis: int, width: int) -> Array:
        columns = (*of_layer, *[slice(None)] * (axis % 4), slice(width))
        prompt_columns = jax.lax.slice_in_dim(prompt_side, at, at + width, axis=axis)
        return block.at[columns].set(jnp.where(chosen, prompt_columns, block[columns]))

    for k, v in cache:
        width = min(v.shape[-2], values.shape[-2] - at)
        if width > 0:
            k, v = filled(k, keys, -1 if layer is None else -2, width), filled(v, values, -2, width)
        blocks.append((k, v))
        at += v.shape[-2]
    return tuple(blocks)


def write(cache: Cache, column: Int32[Array, "B"], key: Float[Array, "B KV D"], value: Float[Array, "B KV D"]) -> Cache:
    """The cache of one layer with one column of every row set."""
    rows = jnp.arange(len(column))
    at, blocks = 0, []
    for k, v in cache:
        where = _column_in(column, at, v.shape[2])
        blocks.append((k.at[rows, :, :, where].set(key, mode="drop"), v.at[rows, :, where].set(value, mode="drop")))
        at += v.shape[2]
    return tuple(blocks)


def _column_in(column: Array, start: int, width: int) -> Array:
    """A column's number in a block, beyond its end if it is in another."""
    return jnp.where((column >= start) & (column < start + width), column - start, width)


def put(
    cache: Cache,
    row: Int32[Array, "D T"],
    column: Int32[Array, "D T"],
    key: Float[Array, "*L D T KV H"],
    value: Float[Array, "*L D T KV H"],
) -> Cache:
    """The cache of one layer, or of all, with tokens put into any rows and columns; none where the column is beyond.

    Rows are counted within their shard, of which there are D.
    """
    of_all, start, blocks = key.ndim == 5, 0, []
    rows_axis = 1 if of_all else 0

    def put_in(block: Array, new: Array, where: Array, keys_last: bool) -> Array:
        def one(block: Array, row: Array, where: Array, new: Array) -> Array:
            if of_all:
                return block.at[:, row, :, where].set(jnp.moveaxis(new, 1, 0), mode="drop")
            at = (row, slice(None), slice(None), where) if keys_last else (row, slice(None), where)
            return block.at[at].set(new, mode="drop")

        shape = *block.shape[:rows_axis], len(row), -1, *block.shape[rows_axis + 1 :]
        by_shard = jax.vmap(one, in_axes=(rows_axis, 0, 0, rows_axis), out_axes=rows_axis)
        return by_shard(block.reshape(shape), row, where, new).reshape(block.shape)

    for k, v in cache:
        where = _column_in(column, start, v.shape[-2])
        blocks.append((put_in(k, key, where, True), put_in(v, value, where, False)))
        start += v.shape[-2]
    return tuple(blocks)


def attend(
    q: Float[Array, "B H D"],
    cache: Cache,
    visible: Bool[Array, "B C"],
    cached_length: Int32[Array, ""],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B H D"]:
    """Attention of one query per row to the cache of one layer; none sees beyond the first `cached_length` columns.

    Scores are scale q . k (None: 1 / sqrt(D)), or softcap tanh(scale q . k / softcap). Softmax in float32.
    """
    batch, heads, size = q.shape
    q = (q * (size**-0.5 if scale is None else scale)).reshape(batch, cache[0][0].shape[1], -1, size)
    mixed = _attend(q, cache, visible, cached_length, softcap, "bkgd,bkdc->bkgc", "bkgc,bkcd->bkgd", None)
    return mixed.reshape(batch, heads, size)


def _attend(q, cache, visible, cached_length, softcap, scores: str, mix: str, layer) -> Array:
    """`attend`, with the two products as the einsums `scores` and `mix`. Where the cache holds all layers, `layer` is
    sliced out beside the products, so that XLA reads it in place; None: the cache holds one layer.

    Blocks are never concatenated: each has its own scores and largest score. The mixed values are divided by the
    softmax's sum, which is less work than dividing the weights.
    """
    at = edges(visible.shape[-1])

    def score(q, keys, attended):
        score = jnp.einsum(scores, q, keys, preferred_element_type=jnp.float32)
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        by_row = score.reshape(len(attended), -1, *score.shape[-2:])
        return jnp.where(attended[:, None, None], by_row, -1e30).reshape(score.shape)

    def over_blocks(count: int):
        def read(q, cache, visible):
            blocks = cache[:count]
            if layer is not None:
                blocks = [tuple(jax.lax.dynamic_slice_in_dim(x, layer, 1) for x in pair) for pair in blocks]
            keys, values = zip(*blocks, strict=True)
            attended = jnp.split(visible[:, : at[count]], at[1:count], axis=-1)
            scored = [score(q, k, s) for k, s in zip(keys, attended, strict=True)]
            largest = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scored])
            weights = [jnp.exp(s - largest) for s in scored]
            normaliser = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
            weights = [w.astype(q.dtype) for w in weights]
            product = functools.partial(jnp.einsum, mix, preferred_element_type=jnp.float32)
            return (sum(map(product, weights, values)) / normaliser).astype(q.dtype)

        return read

    last_block = jnp.searchsorted(jnp.asarray(at[1:]), cached_length)
    return jax.lax.switch(last_block, [over_blocks(count + 1) for count in range(len(cache))], q, cache, visible)


def step_of_all(
    q: Float[Array, "B H D"],
    key: Float[Array, "B KV D"],
    value: Float[Array, "B KV D"],
    cache: Cache,
    column: Int32[Array, "B"],
    visible: Bool[Array, "B C"],
    cached_length: Int32[Array, ""],
    layer: Int32[Array, ""],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, "B H D"], Cache]:
    """`write` and `attend` in the cache of all layers, each device with its own rows and heads."""
    step = functools.partial(_step_of_all, scale=scale, softcap=softcap)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # Where the mesh has more shards of the heads than there are key heads, every device has all heads.
        divides = key.shape[1] % num_shards(mesh, *mesh_axes("kv_heads")) == 0
        heads, kv_heads = ("heads", "kv_heads") if divides else (None, None)
        blocks = jax.tree.map(lambda _: spec(None, "batch", kv_heads, None, None), cache)
        q_spec, row_spec = spec("batch", heads, None), spec("batch", kv_heads, None)
        step = jax.shard_map(
            step,
            in_specs=(q_spec, row_spec, row_spec, blocks, spec("batch"), spec("batch", None), spec(), spec()),
            out_specs=(q_spec, blocks),
            check_vma=False,  # branches on `cached_length`, which is the same on every device
        )
    return step(q, key, value, cache, column, visible, cached_length, layer)


def _step_of_all(q, key, value, cache, column, visible, cached_length, layer, *, scale, softcap):
    (batch, kv_heads, size), heads = key.shape, q.shape[1]
    rows, columns = jnp.arange(batch * kv_heads), jnp.repeat(column, kv_heads)
    at, blocks = 0, []
    for pair in cache:
        width = pair[0].shape[3]
        where = _column_in(columns, at, width)

        def written(block: Array, values: Array, where: Array = where) -> Array:
            flat = block.reshape(block.shape[0], -1, *block.shape[3:])
            return flat.at[layer, rows, where].set(values.reshape(-1, size), mode="drop")

        blocks.append((written(pair[0], key), written(pair[1], value)))
        at += width
    q = (q * (size**-0.5 if scale is None else scale)).reshape(1, batch * kv_heads, -1, size)
    mixed = _attend(q, tuple(blocks), visible, cached_length, softcap, "lbgd,lbcd->lbgc", "lbgc,lbcd->lbgd", layer)
    cache_after = jax.tree.map(lambda x, before: x.reshape(before.shape), tuple(blocks), cache)
    return mixed.reshape(batch, heads, size), cache_after
