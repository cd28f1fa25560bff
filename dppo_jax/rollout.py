"""Rollout: the behavior policy draws G responses to every prompt, by continuous batching.

One prefill per prompt serves its group, and gives the first token of every response. The others are decoded in slots:
a slot whose response has ended takes the next one waiting, so that nobody waits for the longest. All of it is one
jitted function, scheduling included: whatever runs it, on however many hosts, takes the same decisions. What is drawn
depends on the row alone, never on its slot or its neighbours.

The cache is one pair of buffers per layer, carried through the loop and written in place. A slot holds its prompt in
columns 0 .. P-1 and its response from column P on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32, Integer, Key

from dppo_jax import sampling, token_head
from dppo_jax.models import cache as kv_cache
from dppo_jax.models.attention import self_attention
from dppo_jax.models.cache import Cache
from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import Params, bind, head_weight, scores, sliding_layers, unstack
from dppo_jax.models.rotary import positions
from dppo_jax.sharding import constrain
from dppo_jax.types import PromptBatch, RolloutBatch


@struct.dataclass
class _Drawn:
    """Tokens with what is recorded of them."""

    token: Int32[Array, "*n"]
    logp: Float32[Array, "*n"]
    topk_ids: Int32[Array, "*n K"]
    topk_logp: Float32[Array, "*n K"]


@struct.dataclass
class _Slots:
    """The loop's state. An idle slot has row B; D shards of the batch hand out their own rows to their own slots."""

    row: Int32[Array, "S"]
    drawn: Int32[Array, "S"]  # response tokens so far
    token: Int32[Array, "S"]  # the last of them
    limit: Int32[Array, "S"]  # of the row's tokens
    prompt_mask: Bool[Array, "S P"]
    cache: list[Cache]  # per layer; P + R - 1 columns, since no response is attended to by what follows it
    handed: Int32[Array, "D"]  # how many of its waiting rows each shard has handed out
    out: _Drawn  # [B, R]
    experts: Integer[Array, "B R L k"] | None  # of the tokens that were decoded from, if they are recorded


def make_rollout(
    config: ModelConfig,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    eos_ids: tuple[int, ...],
    pad_id: int,
    dtype: Any = jnp.float32,
    tracked: int = 0,
    top_p: float = 1.0,
    slots: int | None = None,
    shards: int = 1,
    attention: str = "xla",
    weights: Callable[[Params], Params] | None = None,
    activations: Callable[[Array], Array] | None = None,
    head_float32: bool = False,
    record_experts: bool = False,
) -> Callable[[Params, PromptBatch, Key[Array, ""]], RolloutBatch]:
    """A pure function (params, prompts, key) -> RolloutBatch; jit it.

    Row n * group_size + j is response j to prompt n, and draws from fold_in(fold_in(key, group[n]), j).
    `temperature` 0 is greedy, with the logp of temperature 1. `dtype` is what parameters and cache are cast to.
    `tracked` is K; 0 leaves top-K out. `slots` is S, how many rows are decoded at a time; None: all of them.
    `shards` is D, how many pieces the batch is cut into over the mesh; it divides S and the number of prompts.
    `head_float32`: the head's product takes float32 parameters and hidden states, whatever `dtype`.
    `record_experts` of a mixture, so that training can go through the same ones.
    `weights` and `activations` round what they are given to a narrower format (dppo_jax.precision).
    behavior_logp is that of the distribution drawn from: after temperature, and after truncation if top_p < 1.
    """
    if not 0 <= tracked <= config.vocab_size:
        raise ValueError(f"tracked = {tracked} tokens of a vocabulary of {config.vocab_size}")
    if record_experts and not config.num_experts:
        raise ValueError(f"record_experts: a {config.model_type} has no experts")

    def distribution(hidden: Array, weight: Array) -> Array:
        """What is drawn from, up to a constant."""
        hidden = hidden.astype(jnp.float32) if head_float32 else hidden
        z = token_head.logits(hidden, weight, temperature=temperature or 1.0, softcap=config.logit_softcap)
        z = constrain(z, "batch", "vocab")
        return sampling.nucleus(z, top_p) if top_p < 1.0 else z

    def draw(z: Array, uniforms: Array) -> tuple[Array, Array, Array]:
        """Tokens, their logp, and log sum exp(z)."""
        if temperature == 0:
            token, lse = jnp.argmax(z, axis=-1).astype(jnp.int32), token_head.log_normaliser(z)
        else:
            token, lse = sampling.draw(z, uniforms)
        return token, jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0] - lse, lse

    def track(z: Array, lse: Array) -> tuple[Array, Array]:
        top, ids = jax.lax.top_k(z, tracked)
        return ids.astype(jnp.int32), top - lse[:, None]

    def is_end(token: Array) -> Array:
        return jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))

    def rollout(params: Params, prompts: PromptBatch, key: Key[Array, ""]) -> RolloutBatch:
        prompt_count, prompt_length = prompts.tokens.shape
        batch = prompt_count * group_size
        slot_count = batch if slots is None else min(slots, batch)
        prompts = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), prompts)
        members = jnp.arange(group_size)
        keys = jax.vmap(lambda k: sampling.row_keys(k, members))(sampling.row_keys(key, prompts.group)).reshape(-1)
        every = jax.vmap(lambda t: sampling.uniforms(keys, jnp.full(batch, t)))(jnp.arange(max_new_tokens))
        uniforms = constrain(jnp.moveaxis(every, 0, 1), "batch", None, None)  # [B, R, 2]
        limit = jnp.full(batch, max_new_tokens, jnp.int32) if prompts.limit is None else prompts.limit.reshape(-1)
        params = params if weights is None else weights(params)
        listed = unstack(params, dtype)
        decoder, weight = bind(config, listed, stacked=False), head_weight(params if head_float32 else listed)

        # Shard d owns rows d * B/D .. and slots d * S/D ..: rows and prompts are moved within a shard only.
        def local(x: Array) -> Array:
            return x.reshape(shards, len(x) // shards, *x.shape[1:])

        def within(row: Array) -> Array:
            """A slot's row, counted from its shard's first; B/D where the slot is idle."""
            first = jnp.arange(shards)[:, None] * (batch // shards)
            return jnp.where(local(row) < batch, local(row) - first, batch // shards)

        def look_up(table: Array, row: Array, column: Array | None = None) -> Array:
            if column is None:
                found = jax.vmap(lambda table, row: table[row])(local(table), row)
                return found.reshape(row.size, *table.shape[1:])
            found = jax.vmap(lambda table, row, column: table[row, column])(local(table), row, local(column))
            return found.reshape(row.size, *table.shape[2:])

        def put(table: Array, row: Array, column: Array, value: Array) -> Array:
            one = jax.vmap(lambda table, row, column, value: table.at[row, column].set(value, mode="drop"))
            return one(local(table), row, local(column), local(value)).reshape(table.shape)

        # Prefill, and the first token of every row.
        segments = prompts.mask.astype(jnp.int32)

        def prefill(q, k, v, sliding):
            pair = kv_cache.place(jnp.einsum("btkd->bkdt", k)), kv_cache.place(jnp.einsum("btkd->bktd", v))
            mixed = self_attention(q, k, v, segments, implementation=attention, sliding=sliding, **scores(config))
            return mixed, pair

        stacked = bind(config, params, dtype=dtype)  # scanned: the decode loop alone needs its layers one by one
        hidden, (keys_of_layers, values_of_layers), prompt_experts = stacked(
            prompts.tokens, positions(prompts.mask), prefill, sliding_layers(config), narrow=activations
        )
        filled = list(zip(keys_of_layers, values_of_layers, strict=True))
        z = distribution(hidden[:, -1], weight)
        by_member = jnp.swapaxes(uniforms[:, 0].reshape(prompt_count, group_size, 2), 0, 1)
        token, logp, lse = jax.lax.map(lambda uniforms: draw(z, uniforms), by_member)
        top = (jnp.repeat(x, group_size, 0) for x in track(z, lse[0]))
        first = _Drawn(token.T.reshape(-1), logp.T.reshape(-1), *top)

        # Rows that need more than their first token wait, shard by shard, in order.
        waits = local(~is_end(first.token) & (limit > 1))
        queue = jnp.argsort(~waits, axis=1, stable=True) + jnp.arange(shards)[:, None] * (batch // shards)
        waiting = jnp.sum(waits, axis=1, dtype=jnp.int32)

        def admit(state: _Slots) -> _Slots:
            idle = local(state.row == batch)
            index = state.handed[:, None] + jnp.cumsum(idle, axis=1) - 1
            taken = idle & (index < waiting[:, None])
            next_row = jnp.take_along_axis(queue, jnp.clip(index, 0, queue.shape[1] - 1), axis=1)
            fresh, row = taken.reshape(-1), jnp.where(taken, next_row, local(state.row)).reshape(-1)
            index = jnp.minimum(within(row), batch // shards - 1)

            def choose(new: Array, old: Array) -> Array:
                return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new, old)

            def filled_anew(cache: Cache, prompt: tuple[Array, Array]) -> Cache:
                return kv_cache.fill(cache, fresh, *(look_up(x, index // group_size) for x in prompt))

            return dataclasses.replace(
                state,
                row=row,
                drawn=choose(jnp.ones_like(row), state.drawn),
                token=choose(look_up(first.token, index), state.token),
                limit=choose(look_up(limit, index), state.limit),
                prompt_mask=choose(look_up(prompts.mask, index // group_size), state.prompt_mask),
                cache=[filled_anew(*pair) for pair in zip(state.cache, filled, strict=True)],
                handed=state.handed + jnp.sum(taken, axis=1, dtype=jnp.int32),
            )

        def step(state: _Slots) -> _Slots:
            live = state.row < batch
            column = prompt_length + state.drawn - 1
            responses = jnp.arange(max_new_tokens - 1) < state.drawn[:, None]
            visible = jnp.concatenate([state.prompt_mask, responses], axis=1)
            used = jnp.max(jnp.where(live, column, 0)) + 1

            # A prompt ends where its response begins: columns are as far apart as positions.
            near = visible
            if config.window is not None:
                near &= column[:, None] - jnp.arange(visible.shape[1]) < config.window

            def attend(q, k, v, layer):
                cache, sliding = layer
                cache = kv_cache.write(cache, column, k[:, 0], v[:, 0])
                seen = near if sliding else visible
                out = kv_cache.attend(q[:, 0], cache, seen, used, scale=config.attn_scale, softcap=config.attn_softcap)
                return out[:, None], cache

            position = jnp.sum(state.prompt_mask, axis=1, dtype=jnp.int32) + state.drawn - 1
            layers = list(zip(state.cache, config.sliding or [False] * config.num_layers, strict=True))
            hidden, cache, chosen = decoder(
                state.token[:, None], position[:, None], attend, layers, narrow=activations
            )
            z, row = distribution(hidden[:, 0], weight), within(state.row)
            index = jnp.minimum(row, batch // shards - 1), jnp.minimum(state.drawn, max_new_tokens - 1)
            token, logp, lse = draw(z, look_up(uniforms, *index))
            new = _Drawn(token, logp, *track(z, lse))
            drawn = state.drawn + live
            experts = state.experts
            if experts is not None:
                experts = put(experts, row, state.drawn - 1, as_recorded(chosen)[:, 0])
            last = live & (is_end(token) | (drawn >= state.limit))
            return dataclasses.replace(
                state,
                row=jnp.where(last, batch, state.row),
                drawn=drawn,
                token=new.token,
                cache=cache,
                out=jax.tree.map(lambda out, x: put(out, row, state.drawn, x), state.out, new),
                experts=experts,
            )

        def refillable(state: _Slots) -> Array:
            idle = jnp.sum(local(state.row == batch), axis=1)
            return jnp.sum(jnp.minimum(idle, waiting - state.handed))

        def decoding(state: _Slots) -> Array:
            """Until a sixteenth of the slots can be filled anew, or all that wait can be."""
            remaining = jnp.sum(waiting - state.handed)
            enough = jnp.clip(remaining, 1, max(1, slot_count // 16))
            return jnp.any(state.row < batch) & (refillable(state) < enough)

        def buffer(x: Array, fill: int = 0) -> Array:
            return jnp.full((batch, max_new_tokens, *x.shape[1:]), fill, x.dtype).at[:, 0].set(x)

        def as_recorded(experts: Array) -> Array:
            """[L, b, t, k] -> [b, t, L, k], as small as the number of experts allows."""
            return jnp.moveaxis(experts, 0, 2).astype(jnp.uint8 if config.num_experts <= 256 else jnp.int32)

        columns = prompt_length + max_new_tokens - 1
        cache = kv_cache.empty(slot_count, config.num_kv_heads, config.head_dim, columns, dtype)
        state = _Slots(
            row=jnp.full(slot_count, batch, jnp.int32),
            drawn=jnp.ones(slot_count, jnp.int32),
            token=jnp.zeros(slot_count, jnp.int32),
            limit=jnp.ones(slot_count, jnp.int32),
            prompt_mask=jnp.zeros((slot_count, prompt_length), bool),
            cache=[cache] * config.num_layers,
            handed=jnp.zeros(shards, jnp.int32),
            out=dataclasses.replace(jax.tree.map(buffer, first), token=buffer(first.token, pad_id)),
            experts=None,
        )
        if record_experts:
            prompt_experts = as_recorded(prompt_experts)
            empty = jnp.zeros((batch, max_new_tokens, *prompt_experts.shape[2:]), prompt_experts.dtype)
            state = dataclasses.replace(state, experts=empty)
        state = jax.lax.while_loop(
            lambda state: jnp.any(state.row < batch) | jnp.any(state.handed < waiting),
            lambda state: jax.lax.while_loop(decoding, step, admit(state)),
            state,
        )
        # Up to the first end-of-sequence token, or the limit: what pads the rest may be an end-of-sequence token too.
        column = jnp.arange(max_new_tokens)
        end = jnp.min(jnp.where(is_end(state.out.token), column, max_new_tokens), axis=1)
        return RolloutBatch(
            tokens=state.out.token,
            response_mask=column < jnp.minimum(end + 1, limit)[:, None],
            behavior_logp=state.out.logp,
            truncated=end >= limit,
            group=jnp.repeat(prompts.group, group_size),
            topk_ids=state.out.topk_ids if tracked else None,
            topk_logp=state.out.topk_logp if tracked else None,
            prompt_experts=prompt_experts if record_experts else None,
            experts=state.experts,
        )

    return rollout
