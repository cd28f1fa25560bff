"""The state of a rollout's decode loop, and lookups that stay within a shard of the batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32, Integer

from dppo_jax.models.pages import PageTable


@struct.dataclass
class Drawn:
    """Sampled tokens, their behavior log-probabilities, the top K tokens with theirs, and the behavior entropy."""

    token: Int32[Array, "*n"]
    logp: Float32[Array, "*n"]
    topk_ids: Int32[Array, "*n K"] | None
    topk_logp: Float32[Array, "*n K"] | None
    entropy: Float32[Array, "*n"] | None


@struct.dataclass
class Work:
    """What decoding cost: of every slot so far, or of all together at the end."""

    decode_steps: Int32[Array, ""]
    live: Float32[Array, "*S"]  # decode steps in which a slot had a row
    pages_read: Float32[Array, "*S"]  # of the cache, 128 tokens each
    pages_live: Float32[Array, "*S"]  # those that held tokens of the slot's row
    put_back: Float32[Array, "*S"]  # how often the slot's row had to make room

    def total(self) -> "Work":
        """Of all slots."""
        return jax.tree.map(jnp.sum, self)


@struct.dataclass
class Slots:
    """The state of the decode loop: S slots, and the batch as it is filled in.

    Slot s decodes row `row[s]` of the batch; row B says that it is idle. The slots and rows are cut into D shards, and
    a slot decodes rows of its own shard only.
    """

    row: Int32[Array, "S"]
    drawn: Int32[Array, "S"]  # response tokens that the row has so far
    token: Int32[Array, "S"]  # the row's last token, which the next step decodes from
    limit: Int32[Array, "S"]  # most response tokens that the row may have
    prompt_mask: Bool[Array, "S P"]
    waits: Bool[Array, "D b"]  # rows that need more tokens and have no slot; b = B / D
    progress: Int32[Array, "D b"]  # tokens of a row that waits
    missing: Int32[Array, "D n"] | None  # rows of every group that have not ended; None: all are drawn to their end
    cache: Any  # as `caches` has it: scanned, of all layers; unrolled, a list of L
    table: PageTable | None
    out: Drawn  # [B, R]
    experts: Integer[Array, "B R Lk"] | None  # of each token that was decoded from; None: not recorded
    work: Work
    stop: Integer[Array, "S"] | None = None  # state of the stop strings' automaton, after the row's last token
    stops: Integer[Array, "B R"] | None = None  # after each token of `out`; None: there are no stop strings

    @property
    def position(self) -> Int32[Array, "S"]:
        """Of the token that the next step decodes from: as many tokens of the row are in the cache."""
        return jnp.sum(self.prompt_mask, axis=1, dtype=jnp.int32) + self.drawn - 1


@struct.dataclass
class Waiting:
    """What the prefill gives to the decode loop."""

    first: Drawn  # [B], every row's first token
    waits: Bool[Array, "D b"]  # rows that need more than it
    limit: Int32[Array, "B"]
    prompt_tokens: Int32[Array, "N P"]
    prompt_mask: Bool[Array, "N P"]
    prompts: Any  # the prompts' keys and values, as `caches` has them; of unrolled layers, a list of L
    uniforms: Float32[Array, "B R 2"]  # the random numbers of every token
    due: Bool[Array, "D n"] | None = None  # groups that are drawn to their end; None: all
    stop: Integer[Array, "B"] | None = None  # state of the stop strings' automaton after every row's first token
    wanted: int = struct.field(pytree_node=False, default=0)  # groups of a shard that are, those among them
    left_over: Int32[Array, ""] | None = None  # rows that may be left when drawing ends; None: see `due`


@dataclasses.dataclass(frozen=True)
class Shards:
    """Shard d of D has the rows d * B/D .. and the slots d * S/D ..: rows and prompts are moved within a shard only."""

    count: int

    def local(self, x: Array) -> Array:
        """[D, n/D, ...] of [n, ...]."""
        return x.reshape(self.count, len(x) // self.count, *x.shape[1:])

    def within(self, row: Array, batch: int) -> Array:
        """[D, S/D]: a slot's row, counted from its shard's first; B/D where the slot is idle."""
        first = jnp.arange(self.count)[:, None] * (batch // self.count)
        return jnp.where(self.local(row) < batch, self.local(row) - first, batch // self.count)

    def look_up(self, table: Array, row: Array, column: Array | None = None) -> Array:
        """table[row, column] for rows [D, n] counted within their shards."""
        if column is None:
            found = jax.vmap(lambda table, row: table[row])(self.local(table), row)
            return found.reshape(row.size, *table.shape[1:])
        one = jax.vmap(lambda table, row, column: table[row, column])
        return one(self.local(table), row, self.local(column)).reshape(row.size, *table.shape[2:])

    def put(self, table: Array, row: Array, column: Array, value: Array) -> Array:
        """`table` with table[row, column] = value; nothing where a row is beyond its shard."""
        one = jax.vmap(lambda table, row, column, value: table.at[row, column].set(value, mode="drop"))
        return one(self.local(table), row, self.local(column), self.local(value)).reshape(table.shape)
