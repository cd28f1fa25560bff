"""A rollout's keys and values as blocks of columns, which all slots share: one of the two `caches`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from dppo_jax.models import cache as block
from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import Attend, slides
from dppo_jax.models.pages import count_for
from dppo_jax.rollout.slots import Shards, Slots, Waiting


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A slot holds its prompt in columns 0 .. P-1 and its response from column P on; every slot reads as many blocks
    of columns as the longest needs. Layers are `unrolled`, each with a cache of its own, which XLA's CPU backend wants,
    or scanned over one cache of all, which compiles in a time that does not grow with their number."""

    config: ModelConfig
    dtype: Any
    unrolled: bool
    max_new_tokens: int
    shards: Shards

    def of_prompts(self, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
        """What is kept of the prompts' keys and values of one layer, [N, P, KV, D]."""
        return block.of_prompt(k, v, one_layer=self.unrolled)

    def _responses(self, prompt_length: int) -> int:
        """Columns of the cache after the prompt's: no last token is attended to. A TPU copies what has odd sides."""
        columns = prompt_length + self.max_new_tokens - 1
        return (columns if self.unrolled else -(-columns // 128) * 128) - prompt_length

    def empty(self, slots: int, waiting: Waiting) -> tuple[Any, None]:
        """The cache and the table of idle slots."""
        c, prompt_length = self.config, waiting.prompt_mask.shape[1]
        columns = prompt_length + self._responses(prompt_length)
        shape = (slots, c.num_kv_heads, c.head_dim, columns, self.dtype)
        return [block.empty(*shape)] * c.num_layers if self.unrolled else block.empty(*shape, c.num_layers), None

    def admissible(self, waiting: Waiting, state: Slots) -> Bool[Array, "D b"]:
        """Rows for which there is room."""
        return state.waits

    def may_run_out(self, slots: int, waiting: Waiting) -> bool:
        """Whether rows may have to make room."""
        return False

    def short(self, state: Slots) -> Bool[Array, ""]:
        """Whether rows must make room before the next step."""
        return jnp.bool_(False)

    def make_room(self, state: Slots) -> Slots:
        """Without the rows that must make room."""
        return state

    def release(self, state: Slots, slots: Bool[Array, "S"]) -> Slots:
        """After the last token of these slots' rows."""
        return state

    def admit(self, waiting: Waiting, state: Slots, fresh: Bool[Array, "S"], prompt: Int32[Array, "D s"]) -> Slots:
        """The prompts of these slots in the cache; `prompt` by its number within the shard."""

        def filled_anew(cache: Any, prompts: tuple[Array, Array], layer: Any = None) -> Any:
            return block.fill(cache, fresh, tuple(self.shards.look_up(x, prompt) for x in prompts), layer)

        if self.unrolled:
            cache: Any = [filled_anew(*pair) for pair in zip(state.cache, waiting.prompts, strict=True)]
        else:

            def fill_layer(layer: Array, cache: Any) -> Any:
                return filled_anew(cache, tuple(x[layer] for x in waiting.prompts), layer)

            cache = jax.lax.fori_loop(0, self.config.num_layers, fill_layer, state.cache)
        return dataclasses.replace(state, cache=cache)

    def fill(
        self, state: Slots, slot: Int32[Array, "D T"], number: Int32[Array, "D T"], filled: tuple[Array, Array]
    ) -> Slots:
        """The cache with tokens of rows: token `number` of the row in `slot`, counted within the shard; none where that
        is negative. `filled` are their keys and values in all layers, [L, D, T, KV, D]."""
        prompt_length = state.prompt_mask.shape[1]
        padding = prompt_length - jnp.sum(state.prompt_mask, axis=1, dtype=jnp.int32)
        column = self.shards.look_up(padding, slot).reshape(slot.shape) + number
        column = jnp.where(number < 0, prompt_length + self._responses(prompt_length), column)
        if self.unrolled:
            by_layer = zip(state.cache, *filled, strict=True)
            cache: Any = [block.put(cache, slot, column, k, v) for cache, k, v in by_layer]
        else:
            cache = block.put(state.cache, slot, column, *filled)
        return dataclasses.replace(state, cache=cache)

    def step(self, state: Slots, live: Bool[Array, "S"]) -> tuple[Slots, Attend, Int32[Array, "S"]]:
        """The state, this step's attention, and how many pages of 128 columns every slot reads."""
        prompt_length = state.prompt_mask.shape[1]
        column = prompt_length + state.drawn - 1
        responses = jnp.arange(self._responses(prompt_length)) < state.drawn[:, None]
        visible = jnp.concatenate([state.prompt_mask, responses], axis=1)
        cached_length = jnp.max(jnp.where(live, column, 0)) + 1

        # A prompt ends where its response begins: columns are as far apart as positions.
        near = visible
        if self.config.window is not None:
            near &= column[:, None] - jnp.arange(visible.shape[1]) < self.config.window
        settings = dict(scale=self.config.attn_scale, softcap=self.config.attn_softcap)

        def attend(q, k, v, cache, number):
            q, k, v, sliding = q[:, 0], k[:, 0], v[:, 0], slides(self.config, number)
            attended = visible if sliding is None else jnp.where(sliding, near, visible)
            if self.unrolled:
                cache = block.write(cache, column, k, v)
                mixed = block.attend(q, cache, attended, cached_length, **settings)
            else:
                mixed, cache = block.step_of_all(q, k, v, cache, column, attended, cached_length, number, **settings)
            return mixed[:, None], cache, None

        edges = jnp.asarray(block.edges(visible.shape[1]))
        read = count_for(edges[jnp.searchsorted(edges[1:], cached_length) + 1])
        return state, attend, jnp.full_like(column, read)
