"""The key-value cache as pages of 128 tokens in one pool, and a table that says which pages every slot has.

A slot's tokens stand in its pages in order, without padding: token t in column t % 128 of the slot's page t // 128. A
step reads the pages that hold tokens of live slots, and no others. Members of a group share the full pages of their
prompt.

A pool holds [KV, N, 128, D], for keys and for values, as the paged attention of `jax.experimental.pallas` takes them.
Of all layers together it holds [KV, L N, 128, D], and page n of layer l is l N + n. Over a mesh every shard of the
batch has a pool, slots and page numbers of its own.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int32

from dppo_jax.devices.sharding import constrain

PAGE = 128  # tokens
CHUNK = 16  # pages that one step of the XLA loop reads
SPLITS = 16  # parts of a row's table that the GPU kernel reads at once

Pool = tuple[Float[Array, "KV N 128 D"], Float[Array, "KV N 128 D"]]  # keys, values; of all layers L N pages


@struct.dataclass
class PageTable:
    """Which pages every slot has. The first `shared` of them are its prompt's, the others its own."""

    pages: Int32[Array, "S M"]
    count: Int32[Array, "S"]  # pages that a slot has
    shared: Int32[Array, "S"]
    free: Int32[Array, "D F"]  # of every shard, a stack of the pages that nobody has
    free_count: Int32[Array, "D"]  # how many of the stack, from its bottom


def count_for(tokens: Any) -> Any:
    """Pages that so many tokens need."""
    return -(-tokens // PAGE)


def prompt_pages(k: Float[Array, "B P KV D"], mask: Bool[Array, "B P"] | None) -> Float[Array, "KV B p 128 D"]:
    """Keys or values of prompts that are padded on the left (no mask: not at all), as pages.

    They are moved to the left; the rest of the last page holds anything.
    """
    batch, length, heads, size = k.shape
    if mask is None and length % PAGE == 0:
        return jnp.moveaxis(k.reshape(batch, -1, PAGE, heads, size), 3, 0)
    columns = jnp.arange(count_for(length) * PAGE)
    pad = jnp.zeros(batch, jnp.int32) if mask is None else length - jnp.sum(mask, axis=1, dtype=jnp.int32)
    moved = jnp.take_along_axis(k, ((columns + pad[:, None]) % length)[:, :, None, None], axis=1)
    return jnp.moveaxis(moved.reshape(batch, -1, PAGE, heads, size), 3, 0)


def empty_table(slots: int, width: int, free: Int32[Array, "D F"]) -> PageTable:
    """Slots without pages; all of `free` are free."""
    nothing = jnp.zeros(slots, jnp.int32)
    count = jnp.full(len(free), free.shape[1], jnp.int32)
    return PageTable(jnp.zeros((slots, width), jnp.int32), nothing, nothing, free, count)


def _by_shard(table: PageTable, x: Array) -> Array:
    return x.reshape(len(table.free), -1, *x.shape[1:])


def _ranks(table: PageTable, count: Int32[Array, "S"]) -> Int32[Array, "D s"]:
    """How many pages the slots before it, of its shard, move, where every slot moves `count`."""
    by_shard = _by_shard(table, count)
    return jnp.cumsum(by_shard, axis=1) - by_shard


def take(table: PageTable, count: Int32[Array, "S"]) -> PageTable:
    """So many free pages more for every slot. The caller sees to it that there are enough."""
    column = jnp.arange(table.pages.shape[1])
    beyond = column - _by_shard(table, table.count)[..., None]  # the how manieth new page of its slot
    at = table.free_count[:, None, None] - 1 - _ranks(table, count)[..., None] - beyond
    found = jax.vmap(lambda free, at: free[jnp.clip(at, 0, len(free) - 1)])(table.free, at)
    is_new = (beyond >= 0) & (beyond < _by_shard(table, count)[..., None])
    return dataclasses.replace(
        table,
        pages=jnp.where(is_new, found, _by_shard(table, table.pages)).reshape(table.pages.shape),
        count=table.count + count,
        free_count=table.free_count - jnp.sum(_by_shard(table, count), axis=1),
    )


def release(table: PageTable, slots: Bool[Array, "S"]) -> PageTable:
    """These slots without pages: their own are free again."""
    own = jnp.where(slots, table.count - table.shared, 0)
    number = jnp.arange(table.pages.shape[1]) - table.shared[:, None]
    leaves = (number >= 0) & (number < own[:, None])
    at = table.free_count[:, None, None] + _ranks(table, own)[..., None] + _by_shard(table, number)
    at = jnp.where(_by_shard(table, leaves), at, table.free.shape[1])
    back = jax.vmap(lambda free, at, pages: free.at[at].set(pages, mode="drop"))
    return dataclasses.replace(
        table,
        count=jnp.where(slots, 0, table.count),
        shared=jnp.where(slots, 0, table.shared),
        free=back(table.free, at, _by_shard(table, table.pages)),
        free_count=table.free_count + jnp.sum(_by_shard(table, own), axis=1),
    )


def share(table: PageTable, slots: Bool[Array, "S"], first: Int32[Array, "S"], count: Int32[Array, "S"]) -> PageTable:
    """These slots, which have none, with `count` pages of their prompts: `first` and those that follow it."""
    column = jnp.arange(table.pages.shape[1])
    is_new = slots[:, None] & (column < count[:, None])
    own = jnp.where(slots, count, table.count), jnp.where(slots, count, table.shared)
    return dataclasses.replace(
        table, pages=jnp.where(is_new, first[:, None] + column, table.pages), count=own[0], shared=own[1]
    )


def write(
    pool: Pool, at: Int32[Array, "S"], column: Int32[Array, "S"], key: Float[Array, "S KV D"], value: Array
) -> Pool:
    """The pool with one token written for every slot, into `column` of page `at`; nowhere where `at` is no page.

    Heads and pages are one dimension of the scatter: over a dimension of heads beside them XLA would lay the whole pool
    out anew on a TPU.
    """
    heads, count = pool[0].shape[:2]
    rows = jnp.where(at < count, at + jnp.arange(heads)[:, None] * count, heads * count).reshape(-1)
    columns = jnp.broadcast_to(column, (heads, len(column))).reshape(-1)

    def put(pages: Array, new: Array) -> Array:
        flat, new = pages.reshape(-1, *pages.shape[2:]), jnp.moveaxis(new, 1, 0)
        return flat.at[rows, columns].set(new.reshape(-1, new.shape[-1]), mode="drop").reshape(pages.shape)

    return put(pool[0], key), put(pool[1], value)


def attend(
    q: Float[Array, "S H D"],
    pool: Pool,
    table: Int32[Array, "S M"],
    length: Int32[Array, "S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: Int32[Array, ""] | None = None,
    implementation: str = "xla",
) -> Float[Array, "S H D"]:
    """Attention of one query a slot, its last token's, to the first `length` tokens of its pages; 0 where that is 0.

    Scores are scale q . k (None: 1 / sqrt(D)), or softcap tanh(scale q . k / softcap). Softmax in float32. A token sees
    the last `window` tokens (None: all). `implementation` as `choose` gives it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[implementation](q * scale, pool, table, length, softcap, window)


def _xla(q, pool, table, length, softcap, window) -> Array:
    """Page by page: the pages of all slots make one list, of which each step of a loop takes CHUNK."""
    slots, heads, size = q.shape
    kv_heads = pool[0].shape[0]
    q = q.reshape(slots, kv_heads, heads // kv_heads, size)
    first = jnp.zeros_like(length) if window is None else jnp.maximum(length - window, 0) // PAGE
    ends = jnp.cumsum(jnp.maximum(count_for(length) - first, 0))
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])

    def read(number, carry):
        most, total, mixed = carry
        item = number * CHUNK + jnp.arange(CHUNK)
        slot = jnp.minimum(jnp.searchsorted(ends, item, side="right"), slots - 1)
        page = first[slot] + item - starts[slot]
        keys, values = (x[:, table[slot, jnp.minimum(page, table.shape[1] - 1)]] for x in pool)
        token = page[:, None] * PAGE + jnp.arange(PAGE)
        seen = (item < ends[-1])[:, None] & (token < length[slot, None])
        if window is not None:
            seen &= token >= length[slot, None] - window
        scores = jnp.einsum("ckgd,kcpd->ckgp", q[slot], keys, preferred_element_type=jnp.float32)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(seen[:, None, None], scores, -1e30)
        highest = most.at[slot].max(jnp.max(scores, axis=-1))
        weights = jnp.where(seen[:, None, None], jnp.exp(scores - highest[slot][..., None]), 0.0)
        part = jnp.einsum("ckgp,kcpd->ckgd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
        shrink = jnp.exp(most - highest)
        total = (total * shrink).at[slot].add(jnp.sum(weights, axis=-1))
        mixed = (mixed * shrink[..., None]).at[slot].add(part)
        return highest, total, mixed

    shape = q.shape[:-1]
    carry = jnp.full(shape, -1e30), jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32)
    _, total, mixed = jax.lax.fori_loop(0, -(-ends[-1] // CHUNK), read, carry)
    return (mixed / jnp.where(total == 0, 1.0, total)[..., None]).astype(q.dtype).reshape(slots, heads, size)


def _pallas_gpu(q, pool, table, length, softcap, window) -> Array:
    """The GPU kernel of jax. A slot without tokens has 0."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    assert window is None
    width = table.shape[1]
    mixed = paged_attention(
        q,
        *pool,
        table,
        length,
        pages_per_compute_block=1,
        k_splits=math.gcd(width, SPLITS),
        attn_logits_soft_cap=softcap,
    )
    return jnp.where((length > 0)[:, None, None], mixed, 0).astype(q.dtype)


def _pallas_tpu(q, pool, table, length, softcap, window) -> Array:
    """The TPU kernel of jax. A slot without tokens reads one page, and its result means nothing."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    assert window is None
    return paged_attention(
        q,
        *pool,
        jnp.maximum(length, 1),
        table,
        attn_logits_soft_cap=softcap,
        pages_per_compute_block=per_block(table.shape[1]),
    ).astype(q.dtype)


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"xla": _xla, "pallas_tpu": _pallas_tpu, "pallas_gpu": _pallas_gpu}


def table_width(implementation: str, width: int) -> int:
    """Of a table for rows of up to `width` pages: the GPU kernel cuts it into SPLITS equal parts."""
    return -(-width // SPLITS) * SPLITS if implementation == "pallas_gpu" else width


def per_block(width: int) -> int:
    """Pages that the TPU kernel reads at a time, of a table this wide."""
    return math.gcd(width, 4)


def read_by(implementation: str, length: Int32[Array, "S"], width: int) -> Int32[Array, "S"]:
    """How many pages every slot reads for the attention of its last token."""
    if implementation != "pallas_tpu":
        return count_for(length)
    block = per_block(width)
    return -(-jnp.maximum(count_for(length), 1) // block) * block


def constrain_pool(x: Array) -> Array:
    """Keys or values of a pool laid out over the mesh."""
    return constrain(x, "kv_heads", "batch", None, None)
