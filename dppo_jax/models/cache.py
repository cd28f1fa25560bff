"""The key-value cache of one layer, for rows that decode side by side and are at different lengths.

Its columns are cut into blocks of their own: 128 columns, 128 more, then 256, 512, ... A step reads the blocks that
some row uses and leaves the others alone; nothing is copied. Keys lie [B, KV, D, C] and values [B, KV, C, D], so that
both of attention's products run along the last axis.
"""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from dppo_jax.sharding import constrain

Cache = tuple[tuple[Array, Array], ...]  # blocks of (keys [B, KV, D, c], values [B, KV, c, D])

FIRST = 128  # columns of the first block


def edges(columns: int) -> list[int]:
    """Where the blocks begin, and where the last one ends."""
    starts = [0]
    width = FIRST
    while columns - width >= width // 2:  # no last block much smaller than the one before it
        starts.append(width)
        width *= 2
    return [*starts, columns]


def empty(rows: int, kv_heads: int, head_dim: int, columns: int, dtype) -> Cache:
    """All zero."""

    def zeros(*shape: int) -> Array:
        return place(jnp.zeros((rows, kv_heads, *shape), dtype))

    widths = [end - start for start, end in itertools.pairwise(edges(columns))]
    return tuple((zeros(head_dim, width), zeros(width, head_dim)) for width in widths)


def place(x: Array) -> Array:
    """Keys or values laid out over the mesh."""
    return constrain(x, "batch", "kv_heads", None, None)


def fill(
    cache: Cache, rows: Bool[Array, "B"], keys: Float[Array, "B KV D P"], values: Float[Array, "B KV P D"]
) -> Cache:
    """The cache with columns 0 .. P-1 of the given rows replaced."""
    at, blocks = 0, []
    chosen = rows[:, None, None, None]
    for k, v in cache:
        end = min(at + v.shape[2], values.shape[2])
        if end > at:
            n = end - at
            k = k.at[..., :n].set(jnp.where(chosen, keys[..., at:end], k[..., :n]))
            v = v.at[:, :, :n].set(jnp.where(chosen, values[:, :, at:end], v[:, :, :n]))
        blocks.append((k, v))
        at += v.shape[2]
    return tuple(blocks)


def write(
    cache: Cache, column: Int32[Array, "B"], key: Float[Array, "B KV D"], value: Float[Array, "B KV D"]
) -> Cache:
    """The cache with one column of every row set."""
    rows = jnp.arange(len(column))
    at, blocks = 0, []
    for k, v in cache:
        inside = (column >= at) & (column < at + v.shape[2])
        where = jnp.where(inside, column - at, v.shape[2])
        blocks.append((k.at[rows, :, :, where].set(key, mode="drop"), v.at[rows, :, where].set(value, mode="drop")))
        at += v.shape[2]
    return tuple(blocks)


def attend(
    q: Float[Array, "B H D"],
    cache: Cache,
    visible: Bool[Array, "B C"],
    used: Int32[Array, ""],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B H D"]:
    """Attention of one query per row, of which none sees beyond the first `used` columns. Softmax in float32.

    Scores are scale q . k (None: 1 / sqrt(D)), or softcap tanh(scale q . k / softcap).
    """
    batch, heads, size = q.shape
    q = (q * (size**-0.5 if scale is None else scale)).reshape(batch, cache[0][0].shape[1], -1, size)
    at = edges(visible.shape[1])

    def over(count: int):
        def read(q, cache, visible):
            blocks = cache[:count]
            score = [jnp.einsum("bkgd,bkdc->bkgc", q, k, preferred_element_type=jnp.float32) for k, _ in blocks]
            score = jnp.concatenate(score, axis=-1)
            if softcap is not None:
                score = softcap * jnp.tanh(score / softcap)
            score = jnp.where(visible[:, None, None, : at[count]], score, -1e30)
            p = jax.nn.softmax(score, axis=-1).astype(q.dtype)
            parts = zip(jnp.split(p, at[1:count], axis=-1), blocks, strict=True)
            return sum(jnp.einsum("bkgc,bkcd->bkgd", p, v) for p, (_, v) in parts)

        return read

    which = jnp.searchsorted(jnp.asarray(at[1:]), used)
    mixed = jax.lax.switch(which, [over(count + 1) for count in range(len(cache))], q, cache, visible)
    return mixed.reshape(batch, heads, size)
