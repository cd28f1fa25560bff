"""A rollout's keys and values as pages, of which a slot reads its own: one of the two `caches`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from dppo_jax.devices.sharding import mesh_axes, num_shards, spec
from dppo_jax.models import pages
from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import Attend, slides
from dppo_jax.models.pages import PAGE, PageTable, count_for
from dppo_jax.rollout.slots import Shards, Slots, Waiting

BY_SLOT = ("batch",)


@dataclasses.dataclass(frozen=True)
class Pages:
    """A slot has pages of 128 tokens, its prompt's full ones together with its group, and reads those alone.

    `pages` is how many there are in a shard beside the prompts' (None: as many as its slots could ever fill). Where
    they run out, the rows that began last make room: they wait, and are prefilled again with the tokens they have.
    """

    config: ModelConfig
    dtype: Any
    unrolled: bool
    max_new_tokens: int
    shards: Shards
    pages: int | None
    attention: str  # of pages.IMPLEMENTATIONS

    def of_prompts(self, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
        """What is kept of the prompts' keys and values of one layer, [N, P, KV, D]. No mask: none is padded."""
        return pages.prompt_pages(k, mask), pages.prompt_pages(v, mask)

    def empty(self, slots: int, waiting: Waiting) -> tuple[Any, PageTable]:
        """The cache and the table of idle slots. The prompts' pages are the first of every shard."""
        prompts, prompt_length = waiting.prompt_mask.shape
        per_prompt = count_for(prompt_length)
        of_prompts = prompts // self.shards.count * per_prompt
        width = count_for(prompt_length + self.max_new_tokens - 1)
        most = slots // self.shards.count * width
        free = most if self.pages is None else min(max(self.pages, width), most)

        def pool(stored: Array) -> Array:
            """[KV, D L N, 128, D], of [KV, n, p, 128, D] of one layer or of L."""
            layers = stored[None] if self.unrolled else stored
            count, heads, size = len(layers), layers.shape[1], layers.shape[-1]
            by_shard = layers.reshape(count, heads, self.shards.count, of_prompts, PAGE, size)
            room = jnp.zeros((count, heads, self.shards.count, free, PAGE, size), stored.dtype)
            whole = jnp.moveaxis(jnp.concatenate([by_shard, room], axis=3), 0, 2)
            return pages.constrain_pool(whole.reshape(heads, -1, PAGE, size))

        stored = waiting.prompts if self.unrolled else [waiting.prompts]
        cache = [tuple(pool(x) for x in pair) for pair in stored]
        numbers = jnp.broadcast_to(of_prompts + jnp.arange(free, dtype=jnp.int32), (self.shards.count, free))
        width = pages.table_width(self.attention, width)
        return cache if self.unrolled else cache[0], pages.empty_table(slots, width, numbers)

    # --- room ---

    def may_run_out(self, slots: int, waiting: Waiting) -> bool:
        """Whether rows may have to make room."""
        if self.pages is None:
            return False
        width = count_for(waiting.prompt_mask.shape[1] + self.max_new_tokens - 1)
        return self.pages < slots // self.shards.count * width

    def release(self, state: Slots, slots: Bool[Array, "S"]) -> Slots:
        """Without the own pages of these slots."""
        assert state.table is not None
        return dataclasses.replace(state, table=pages.release(state.table, slots))

    def _most(self, state: Slots) -> Int32[Array, "S"]:
        """Pages that the row of every slot may come to need."""
        return count_for(state.position - state.drawn + state.limit)

    def admissible(self, waiting: Waiting, state: Slots) -> Bool[Array, "D b"]:
        """Rows for which there is room: the first that wait, while every row that may grow finds its next page."""
        assert state.table is not None
        batch, group = len(waiting.limit), len(waiting.limit) // len(waiting.prompt_mask)
        length = self.shards.local(jnp.repeat(jnp.sum(waiting.prompt_mask, axis=1, dtype=jnp.int32), group))
        limit, live = self.shards.local(waiting.limit), self.shards.local(state.row < batch)
        held = length + state.progress - 1
        needs = count_for(held + 1) - length // PAGE
        grows = (count_for(length + limit - 1) > count_for(held + 1)).astype(jnp.int32)
        growing = jnp.sum(live & self.shards.local(self._most(state) > state.table.count), axis=1)
        asked_for = jnp.cumsum(jnp.where(state.waits, needs + grows, 0), axis=1)
        fits = asked_for + growing[:, None] <= state.table.free_count[:, None]
        alone = ~jnp.any(live, axis=1, keepdims=True) & (jnp.cumsum(state.waits, axis=1) == 1)
        return state.waits & (fits | alone)

    def _wants(self, state: Slots, live: Bool[Array, "S"]) -> Int32[Array, "S"]:
        """Pages that every slot needs for the next step: 0 or 1."""
        assert state.table is not None
        return (live & (state.position >= state.table.count * PAGE)).astype(jnp.int32)

    def short(self, state: Slots) -> Bool[Array, ""]:
        """Whether rows must make room before the next step."""
        assert state.table is not None
        wants = self.shards.local(self._wants(state, state.row < state.waits.size))
        return jnp.any(jnp.sum(wants, axis=1) > state.table.free_count)

    def make_room(self, state: Slots) -> Slots:
        """The rows that began last wait again, as many as leave a page for every other row that needs one."""
        table, batch = state.table, state.waits.size
        assert table is not None
        live = state.row < batch
        wants = self.shards.local(self._wants(state, live))
        own = self.shards.local(jnp.where(live, table.count - table.shared, 0))
        row = self.shards.within(state.row, batch)
        last_first = jnp.argsort(jnp.where(self.shards.local(live), -row, 1), axis=1)
        freed = jnp.cumsum(jnp.take_along_axis(own, last_first, axis=1), axis=1)
        dropped = jnp.cumsum(jnp.take_along_axis(wants, last_first, axis=1), axis=1)
        needed = jnp.sum(wants, axis=1, keepdims=True)
        enough = needed - dropped <= table.free_count[:, None] + freed
        short = needed[:, 0] > table.free_count
        number = jnp.where(short, jnp.argmax(enough, axis=1) + 1, 0)
        rank = jnp.argsort(last_first, axis=1)
        leaves = rank < number[:, None]
        at = jnp.where(leaves, row, batch)
        leaving = leaves.reshape(-1)
        mark = jax.vmap(lambda waits, at: waits.at[at].set(True, mode="drop"))
        note = jax.vmap(lambda progress, at, drawn: progress.at[at].set(drawn, mode="drop"))
        return dataclasses.replace(
            state,
            row=jnp.where(leaving, batch, state.row),
            waits=mark(state.waits, at),
            progress=note(state.progress, at, self.shards.local(state.drawn)),
            table=pages.release(table, leaving),
            work=dataclasses.replace(state.work, put_back=state.work.put_back + leaving),
        )

    # --- what is in the pages ---

    def _per_layer(self, pool: pages.Pool) -> int:
        """Pages of one layer in one shard."""
        return pool[0].shape[1] // (self.shards.count * (1 if self.unrolled else self.config.num_layers))

    def _offset(self, pool: pages.Pool, slots: int) -> Int32[Array, "S"]:
        """Where the pages of a slot's shard begin, in the pool of the device that has it."""
        mesh = jax.sharding.get_abstract_mesh()
        of_shard = pool[0].shape[1] // self.shards.count if mesh.empty else 0
        return jnp.repeat(jnp.arange(self.shards.count, dtype=jnp.int32) * of_shard, slots // self.shards.count)

    def _on_devices(self, function: Callable, pool: pages.Pool, *arguments: tuple[Array, tuple], mixed: bool = False):
        """function(pool, *arguments), each device with its own pages, slots and heads; an argument comes with the
        logical names of its dimensions. `mixed`: the function returns what has the first one's names beside the pool.
        """
        values, names = zip(*arguments, strict=True)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return function(pool, *values)
        # Where the mesh cuts the heads into more pieces than there are key heads, every device has all of them.
        whole = () if pool[0].shape[0] % num_shards(mesh, *mesh_axes("kv_heads")) == 0 else ("heads", "kv_heads")
        own = [spec(*[None if name in whole else name for name in axes]) for axes in names]
        pools = (spec(None if whole else "kv_heads", "batch", None, None),) * 2
        out = (own[0], pools) if mixed else pools
        # A shard's loop is as long as its own pages.
        return jax.shard_map(function, in_specs=(pools, *own), out_specs=out, check_vma=False)(pool, *values)

    def _layers(self, pool: pages.Pool) -> Int32[Array, "l 1"]:
        """Where the layers of a pool begin."""
        count = 1 if self.unrolled else self.config.num_layers
        return (jnp.arange(count, dtype=jnp.int32) * self._per_layer(pool))[:, None]

    def admit(self, waiting: Waiting, state: Slots, fresh: Bool[Array, "S"], prompt: Int32[Array, "D s"]) -> Slots:
        """The prompts of these slots in their pages; `prompt` by its number within the shard."""
        assert state.table is not None
        length = state.position - state.drawn + 1
        full, first = length // PAGE, prompt.reshape(-1) * count_for(waiting.prompt_mask.shape[1])
        table = pages.share(state.table, fresh, first, full)
        table = pages.take(table, jnp.where(fresh, count_for(state.position + 1) - full, 0))
        # What is left of the prompt after its full pages is copied: the slot writes on behind it.
        begun = fresh & (length % PAGE > 0)
        to = jnp.take_along_axis(table.pages, full[:, None], axis=1, mode="clip")[:, 0]

        def copied(pool: pages.Pool) -> pages.Pool:
            layers, offset = self._layers(pool), self._offset(pool, len(begun))

            def local(pool, begun, source, target, offset):
                none = pool[0].shape[1]
                source = (layers + source + offset).reshape(-1)
                target = jnp.where(begun, layers + target + offset, none).reshape(-1)
                return tuple(x.at[:, target].set(x[:, jnp.minimum(source, none - 1)], mode="drop") for x in pool)

            return self._on_devices(local, pool, *[(x, BY_SLOT) for x in (begun, first + full, to, offset)])

        cache = [copied(pool) for pool in state.cache] if self.unrolled else copied(state.cache)
        return dataclasses.replace(state, cache=cache, table=table)

    def fill(
        self, state: Slots, slot: Int32[Array, "D T"], number: Int32[Array, "D T"], filled: tuple[Array, Array]
    ) -> Slots:
        """The slots' own pages with tokens of rows: token `number` of the row in `slot`, counted within the shard; none
        where that is negative. `filled` are their keys and values in all layers, [L, D, T, KV, D]."""
        assert state.table is not None
        of_row = jnp.clip(number // PAGE, 0).reshape(-1)
        page = self.shards.look_up(state.table.pages, slot, of_row)
        own = (number.reshape(-1) >= 0) & (of_row >= self.shards.look_up(state.table.shared, slot))
        column = number.reshape(-1) % PAGE

        def put(pool: pages.Pool, *new: Array) -> pages.Pool:
            layers, offset = self._layers(pool), self._offset(pool, page.size)

            def local(pool, own, page, column, offset, *new):
                at = jnp.where(own, layers + page + offset, pool[0].shape[1])
                columns = jnp.broadcast_to(column, at.shape).reshape(-1)
                return pages.write(pool, at.reshape(-1), columns, *(jax.lax.collapse(x, 0, 2) for x in new))

            by_token = [(x, BY_SLOT) for x in (own, page, column, offset)]
            return self._on_devices(local, pool, *by_token, *[(x, (None, *BY_SLOT, "kv_heads", None)) for x in new])

        flat = [jax.lax.collapse(x, 1, 3) for x in filled]
        if self.unrolled:
            cache: Any = [put(pool, k[None], v[None]) for pool, k, v in zip(state.cache, *flat, strict=True)]
        else:
            cache = put(state.cache, *flat)
        return dataclasses.replace(state, cache=cache)

    def step(self, state: Slots, live: Bool[Array, "S"]) -> tuple[Slots, Attend, Int32[Array, "S"]]:
        """The state, this step's attention, and how many pages every slot reads."""
        assert state.table is not None
        table = pages.take(state.table, self._wants(state, live))
        position = state.position
        target = jnp.take_along_axis(table.pages, (position // PAGE)[:, None], axis=1, mode="clip")[:, 0]
        length = jnp.where(live, position + 1, 0)
        settings = dict(scale=self.config.attn_scale, softcap=self.config.attn_softcap)

        reach = table.pages.shape[1] * PAGE

        def attend(q, k, v, cache, number):
            sliding = slides(self.config, number) if (self.config.window or reach) < reach else None
            window = None if sliding is None else jnp.where(sliding, self.config.window, jnp.iinfo(jnp.int32).max)
            first = self._offset(cache, len(live)) + (0 if self.unrolled else number * self._per_layer(cache))

            def local(pool, q, k, v, live, own, target, length, first, *window):
                target = jnp.where(live, target + first, pool[0].shape[1])
                pool = pages.write(pool, target, (length - 1) % PAGE, k, v)
                options = settings | dict(window=window[0] if window else None, implementation=self.attention)
                return pages.attend(q, pool, own + first[:, None], length, **options), pool

            mixed, cache = self._on_devices(
                local,
                cache,
                (q[:, 0], (*BY_SLOT, "heads", None)),
                *[(x[:, 0], (*BY_SLOT, "kv_heads", None)) for x in (k, v)],
                (live, BY_SLOT),
                (table.pages, (*BY_SLOT, None)),
                *[(x, BY_SLOT) for x in (target, length, first)],
                *[(x, ()) for x in (window,) if x is not None],
                mixed=True,
            )
            return mixed[:, None], cache, None

        return (
            dataclasses.replace(state, table=table),
            attend,
            pages.read_by(self.attention, length, table.pages.shape[1]),
        )
