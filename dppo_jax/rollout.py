"""Rollout: the behavior policy draws G responses to every prompt, by continuous batching.

One prefill per prompt serves its group, and gives the first token of every response. The others are decoded in slots:
a slot whose response has ended takes the next one waiting, so that nobody waits for the longest. All of it is one
jitted function, scheduling included: whatever runs it, on however many hosts, takes the same decisions. What is drawn
depends on the row alone, never on its slot or its neighbours.

The cache is carried through the loop and written in place. A slot holds its prompt in columns 0 .. P-1 and its
response from column P on. Layers are `unrolled`, each with a cache of its own, which XLA's CPU backend wants, or
scanned over one cache of all, which compiles in a time that does not grow with their number.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32, Integer, Key

from dppo_jax import sampling, token_head
from dppo_jax.devices.sharding import ROLLOUT, constrain, reshard, using
from dppo_jax.models import cache as kv_cache
from dppo_jax.models.attention import self_attention
from dppo_jax.models.cache import Cache
from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import (
    Params,
    Routed,
    as_module,
    head_weight,
    in_dtype,
    param_axes,
    scores,
    slides,
    unstack,
)
from dppo_jax.models.rotary import positions
from dppo_jax.types import PromptBatch, RolloutBatch


@struct.dataclass
class _Drawn:
    """Sampled tokens, their behavior log-probabilities, and the top K tokens with theirs."""

    token: Int32[Array, "*n"]
    logp: Float32[Array, "*n"]
    topk_ids: Int32[Array, "*n K"]
    topk_logp: Float32[Array, "*n K"]


@struct.dataclass
class _Slots:
    """The state of the decode loop: S slots, and the batch as it is filled in.

    Slot s decodes row `row[s]` of the batch; row B says that it is idle. The slots and rows are cut into D shards, and
    a slot decodes rows of its own shard only.
    """

    row: Int32[Array, "S"]
    drawn: Int32[Array, "S"]  # response tokens that the row has so far
    token: Int32[Array, "S"]  # the row's last token, which the next step decodes from
    limit: Int32[Array, "S"]  # most response tokens that the row may have
    prompt_mask: Bool[Array, "S P"]
    cache: Cache | list[Cache]  # scanned: one cache of all layers; unrolled: a list of L caches
    handed: Int32[Array, "D"]  # how many rows of its queue each shard has given to slots
    out: _Drawn  # [B, R]
    experts: Integer[Array, "B R Lk"] | None  # of each token that was decoded from; None: not recorded


@struct.dataclass
class _Waiting:
    """What the prefill gives to the decode loop: every row's first token, and the queue of rows that need more."""

    first: _Drawn  # [B]
    limit: Int32[Array, "B"]
    prompt_mask: Bool[Array, "N P"]
    prompts: Any  # keys [L, N, KV, D, P] and values [L, N, KV, P, D]; of unrolled layers, a list of L pairs
    queue: Int32[Array, "D b"]  # each shard's b = B / D rows; the first `count` need more than their first token
    count: Int32[Array, "D"]
    uniforms: Float32[Array, "B R 2"]  # the random numbers of every token


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """A pure function (params, prompts, key) -> RolloutBatch, in stages; jit it, or a stage.

    Row n * group_size + j is response j to prompt n, and draws from fold_in(fold_in(key, group[n]), j).
    `temperature` 0 is greedy, with the logp of temperature 1. `dtype` is what parameters and cache are cast to.
    `topk` is K; 0 leaves top-K out. `slots` is S, how many rows are decoded at a time; None: all of them.
    `shards` is D, the number of shards of the batch over the mesh; it divides S and the number of prompts.
    `head_float32`: the head's product takes float32 parameters and hidden states, whatever `dtype`.
    `record_experts`: the batch has the experts of every token of a mixture, so that training can take the same ones.
    `weights` rounds the parameters to a narrower format, `round_inputs` the inputs of linear layers (precision.py).
    behavior_logp is that of the distribution drawn from: after temperature, and after truncation if top_p < 1.
    """

    config: ModelConfig
    _: dataclasses.KW_ONLY
    group_size: int
    max_new_tokens: int
    temperature: float
    eos_ids: tuple[int, ...]
    pad_id: int
    dtype: Any = jnp.float32
    topk: int = 0
    top_p: float = 1.0
    slots: int | None = None
    shards: int = 1
    attention: str = "xla"
    unrolled: bool = True
    weights: Callable[[Params], Params] | None = None
    round_inputs: Callable[[Array], Array] | None = None
    head_float32: bool = False
    record_experts: bool = False

    __name__ = "rollout"  # as jit calls it, in profiles and in the list of what was compiled

    def __post_init__(self) -> None:
        if not 0 <= self.topk <= self.config.vocab_size:
            raise ValueError(f"topk = {self.topk} tokens of a vocabulary of {self.config.vocab_size}")
        if self.record_experts and not self.config.num_experts:
            raise ValueError(f"record_experts: a {self.config.model_type} has no experts")

    def __call__(self, params: Params, prompts: PromptBatch, key: Key[Array, ""]) -> RolloutBatch:
        with using(ROLLOUT):
            published = self.publish(params)
            waiting, prompt_experts = self.prefill(published, prompts, key)
            state = self.idle(waiting, prompt_experts)
            layers = self._layers(published)
            state = jax.lax.while_loop(
                lambda state: jnp.any(state.row < len(waiting.limit)) | jnp.any(state.handed < waiting.count),
                lambda state: jax.lax.while_loop(
                    functools.partial(self._decoding, waiting),
                    functools.partial(self._step, published, layers, waiting),
                    self._admit(waiting, state),
                ),
                state,
            )
            return self._result(prompts, waiting, state, prompt_experts)

    def publish(self, params: Params) -> Params:
        """The training parameters rounded, cast to `dtype` and laid out by the table `ROLLOUT`, all on the devices.

        With `head_float32`, the key "head_float32" holds the head rounded, but not cast.
        """
        with using(ROLLOUT):
            axes = param_axes(self.config)
            params = params if self.weights is None else self.weights(params)
            params = {name: value for name, value in params.items() if name in axes}
            cast = reshard(in_dtype(params, self.dtype), axes)
            if self.head_float32:
                cast["head_float32"] = constrain(head_weight(params), "vocab", "embed")
            return cast

    def prefill(
        self, published: Params, prompts: PromptBatch, key: Key[Array, ""]
    ) -> tuple[_Waiting, Integer[Array, "N P L k"] | None]:
        """Every prompt through the model once: the queue of rows, and the experts of the prompts' tokens."""
        with using(ROLLOUT):
            return self._prefill(published, prompts, key)

    def step(self, published: Params, waiting: _Waiting, state: _Slots) -> _Slots:
        """One token more in every live slot."""
        with using(ROLLOUT):
            return self._step(published, self._layers(published), waiting, state)

    def _layers(self, published: Params) -> Params:
        """The model's parameters, layer by layer where they are unrolled: before the loop, which would copy them."""
        stacked = {name: value for name, value in published.items() if name != "head_float32"}
        return unstack(stacked) if self.unrolled else stacked

    def _distribution(self, published: Params, hidden: Array) -> Array:
        """Logits [b, V] of the distribution that tokens are drawn from."""
        weight = published["head_float32"] if self.head_float32 else head_weight(published)
        hidden = hidden.astype(jnp.float32) if self.head_float32 else hidden
        z = token_head.logits(hidden, weight, temperature=self.temperature or 1.0, softcap=self.config.logit_softcap)
        z = constrain(z, "batch", "vocab")
        return sampling.nucleus(z, self.top_p) if self.top_p < 1.0 else z

    def _draw(self, z: Array, uniforms: Array) -> tuple[Array, Array, Array]:
        """Tokens, their logp, and log sum exp(z)."""
        if self.temperature == 0:
            token, lse = jnp.argmax(z, axis=-1).astype(jnp.int32), token_head.log_normaliser(z)
        else:
            token, lse = sampling.draw(z, uniforms)
        return token, jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0] - lse, lse

    def _topk(self, z: Array, lse: Array) -> tuple[Array, Array]:
        """Ids and logp [b, K] of the K likeliest tokens."""
        top, ids = jax.lax.top_k(z, self.topk)
        return ids.astype(jnp.int32), top - lse[:, None]

    def _is_end(self, token: Array) -> Array:
        return jnp.isin(token, jnp.asarray(self.eos_ids, jnp.int32))

    def _recorded(self, routed: Routed | None) -> Array:
        """[L, b, t, k] -> [b, t, Lk], as small as the number of experts allows."""
        assert routed is not None
        kind = jnp.uint8 if self.config.num_experts <= 256 else jnp.int32
        return jax.lax.collapse(jnp.moveaxis(routed.experts, 0, 2).astype(kind), 2)

    # Shard d owns rows d * B/D .. and slots d * S/D ..: rows and prompts are moved within a shard only.

    def _local(self, x: Array) -> Array:
        return x.reshape(self.shards, len(x) // self.shards, *x.shape[1:])

    def _within(self, row: Array, batch: int) -> Array:
        """A slot's row, counted from its shard's first; B/D where the slot is idle."""
        first = jnp.arange(self.shards)[:, None] * (batch // self.shards)
        return jnp.where(self._local(row) < batch, self._local(row) - first, batch // self.shards)

    def _look_up(self, table: Array, row: Array, column: Array | None = None) -> Array:
        """table[row], or table[row, column], where `row` [D, S / D] counts from each shard's first row."""
        if column is None:
            values = jax.vmap(lambda table, row: table[row])(self._local(table), row)
            return values.reshape(row.size, *table.shape[1:])
        in_shard = jax.vmap(lambda table, row, column: table[row, column])
        return in_shard(self._local(table), row, self._local(column)).reshape(row.size, *table.shape[2:])

    def _put(self, table: Array, row: Array, column: Array, value: Array) -> Array:
        """`table` with table[row, column] = value, `row` as in `_look_up`; rows of idle slots are dropped."""
        in_shard = jax.vmap(lambda table, row, column, value: table.at[row, column].set(value, mode="drop"))
        return in_shard(self._local(table), row, self._local(column), self._local(value)).reshape(table.shape)

    def _prefill(self, published: Params, prompts: PromptBatch, key: Key[Array, ""]):
        prompt_count, group, limit_all = len(prompts.tokens), self.group_size, self.max_new_tokens
        batch = prompt_count * group
        prompts = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), prompts)
        keys = jax.vmap(lambda k: sampling.row_keys(k, jnp.arange(group)))(sampling.row_keys(key, prompts.group))
        keys = keys.reshape(-1)
        every = jax.vmap(lambda t: sampling.uniforms(keys, jnp.full(batch, t)))(jnp.arange(limit_all))
        uniforms = constrain(jnp.moveaxis(every, 0, 1), "batch", None, None)
        limit = jnp.full(batch, limit_all, jnp.int32) if prompts.limit is None else prompts.limit.reshape(-1)
        segments = prompts.mask.astype(jnp.int32)

        def attend(q, k, v, cache, number):
            sliding, settings = slides(self.config, number), scores(self.config)
            mixed = self_attention(q, k, v, segments, implementation=self.attention, sliding=sliding, **settings)
            return mixed, cache, kv_cache.of_prompt(k, v, one_layer=self.unrolled)

        stacked = as_module(self.config, {k: v for k, v in published.items() if k != "head_float32"})
        hidden, _, prompts_cache, routed = stacked(
            prompts.tokens, positions(prompts.mask), attend, None, round_inputs=self.round_inputs
        )
        if self.unrolled:
            prompts_cache = list(zip(*prompts_cache, strict=True))
        z = self._distribution(published, hidden[:, -1])
        by_member = jnp.swapaxes(uniforms[:, 0].reshape(prompt_count, group, 2), 0, 1)
        token, logp, lse = jax.lax.map(lambda uniforms: self._draw(z, uniforms), by_member)
        topk = (jnp.repeat(x, group, 0) for x in self._topk(z, lse[0]))
        first = _Drawn(token.T.reshape(-1), logp.T.reshape(-1), *topk)

        # Rows that need more than their first token wait, shard by shard, in order.
        waits = self._local(~self._is_end(first.token) & (limit > 1))
        queue = jnp.argsort(~waits, axis=1, stable=True) + jnp.arange(self.shards)[:, None] * (batch // self.shards)
        waiting = _Waiting(
            first=first,
            limit=limit,
            prompt_mask=prompts.mask,
            prompts=prompts_cache,
            queue=queue,
            count=jnp.sum(waits, axis=1, dtype=jnp.int32),
            uniforms=uniforms,
        )
        return waiting, self._recorded(routed) if self.record_experts else None

    def _responses(self, prompt_length: int) -> int:
        """Response columns of the cache: R - 1, since nothing attends to a response's last token.

        Scanned, the columns of prompt and response are rounded up to 128: a TPU copies arrays with other sides.
        """
        columns = prompt_length + self.max_new_tokens - 1
        return (columns if self.unrolled else -(-columns // 128) * 128) - prompt_length

    def idle(self, waiting: _Waiting, prompt_experts: Array | None) -> _Slots:
        """Idle slots, and a batch that holds each row's first token."""
        prompt_length = waiting.prompt_mask.shape[1]
        batch, c, first = len(waiting.limit), self.config, waiting.first
        slots = batch if self.slots is None else min(self.slots, batch)

        def buffer(x: Array, fill: int = 0) -> Array:
            return jnp.full((batch, self.max_new_tokens, *x.shape[1:]), fill, x.dtype).at[:, 0].set(x)

        columns = prompt_length + self._responses(prompt_length)
        shape = (slots, c.num_kv_heads, c.head_dim, columns, self.dtype)
        experts = None
        if prompt_experts is not None:
            experts = jnp.zeros((batch, self.max_new_tokens, *prompt_experts.shape[2:]), prompt_experts.dtype)
        return _Slots(
            row=jnp.full(slots, batch, jnp.int32),
            drawn=jnp.ones(slots, jnp.int32),
            token=jnp.zeros(slots, jnp.int32),
            limit=jnp.ones(slots, jnp.int32),
            prompt_mask=jnp.zeros((slots, prompt_length), bool),
            cache=[kv_cache.empty(*shape)] * c.num_layers if self.unrolled else kv_cache.empty(*shape, c.num_layers),
            handed=jnp.zeros(self.shards, jnp.int32),
            out=dataclasses.replace(jax.tree.map(buffer, first), token=buffer(first.token, self.pad_id)),
            experts=experts,
        )

    def _admit(self, waiting: _Waiting, state: _Slots) -> _Slots:
        """Idle slots take the next rows of their shard's queue."""
        batch, group = len(waiting.limit), self.group_size
        idle = self._local(state.row == batch)
        index = state.handed[:, None] + jnp.cumsum(idle, axis=1) - 1
        admitted = idle & (index < waiting.count[:, None])
        next_row = jnp.take_along_axis(waiting.queue, jnp.clip(index, 0, waiting.queue.shape[1] - 1), axis=1)
        fresh, row = admitted.reshape(-1), jnp.where(admitted, next_row, self._local(state.row)).reshape(-1)
        index = jnp.minimum(self._within(row, batch), batch // self.shards - 1)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        def refilled(cache: Cache, prompt: tuple[Array, Array], layer: Any = None) -> Cache:
            return kv_cache.fill(cache, fresh, tuple(self._look_up(x, index // group) for x in prompt), layer)

        if self.unrolled:
            cache: Any = [refilled(*pair) for pair in zip(state.cache, waiting.prompts, strict=True)]
        else:

            def fill_layer(layer: Array, cache: Cache) -> Cache:
                return refilled(cache, tuple(x[layer] for x in waiting.prompts), layer)

            cache = jax.lax.fori_loop(0, self.config.num_layers, fill_layer, state.cache)
        return dataclasses.replace(
            state,
            row=row,
            drawn=choose(jnp.ones_like(row), state.drawn),
            token=choose(self._look_up(waiting.first.token, index), state.token),
            limit=choose(self._look_up(waiting.limit, index), state.limit),
            prompt_mask=choose(self._look_up(waiting.prompt_mask, index // group), state.prompt_mask),
            cache=cache,
            handed=state.handed + jnp.sum(admitted, axis=1, dtype=jnp.int32),
        )

    def _step(self, published: Params, layers: Params, waiting: _Waiting, state: _Slots) -> _Slots:
        decoder = as_module(self.config, layers, stacked=not self.unrolled)
        batch, longest = len(waiting.limit), self.max_new_tokens
        live = state.row < batch
        column = state.prompt_mask.shape[1] + state.drawn - 1
        responses = jnp.arange(self._responses(state.prompt_mask.shape[1])) < state.drawn[:, None]
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
                cache = kv_cache.write(cache, column, k, v)
                mixed = kv_cache.attend(q, cache, attended, cached_length, **settings)
            else:
                mixed, cache = kv_cache.step_of_all(q, k, v, cache, column, attended, cached_length, number, **settings)
            return mixed[:, None], cache, None

        position = jnp.sum(state.prompt_mask, axis=1, dtype=jnp.int32) + state.drawn - 1
        hidden, cache, _, routed = decoder(
            state.token[:, None], position[:, None], attend, state.cache, round_inputs=self.round_inputs
        )
        z, row = self._distribution(published, hidden[:, 0]), self._within(state.row, batch)
        index = jnp.minimum(row, batch // self.shards - 1), jnp.minimum(state.drawn, longest - 1)
        token, logp, lse = self._draw(z, self._look_up(waiting.uniforms, *index))
        new = _Drawn(token, logp, *self._topk(z, lse))
        drawn = state.drawn + live
        experts = state.experts
        if experts is not None:
            experts = self._put(experts, row, state.drawn - 1, self._recorded(routed)[:, 0])
        last = live & (self._is_end(token) | (drawn >= state.limit))
        return dataclasses.replace(
            state,
            row=jnp.where(last, batch, state.row),
            drawn=drawn,
            token=new.token,
            cache=cache,
            out=jax.tree.map(lambda out, x: self._put(out, row, state.drawn, x), state.out, new),
            experts=experts,
        )

    def _decoding(self, waiting: _Waiting, state: _Slots) -> Array:
        """Whether to decode on before idle slots take further rows.

        False where no slot is live, and where idle slots can take all rows that remain in the queues, or as many as a
        sixteenth of the slots.
        """
        batch, remaining = len(waiting.limit), waiting.count - state.handed
        idle = jnp.sum(self._local(state.row == batch), axis=1)
        enough = jnp.clip(jnp.sum(remaining), 1, max(1, len(state.row) // 16))
        return jnp.any(state.row < batch) & (jnp.sum(jnp.minimum(idle, remaining)) < enough)

    def _result(
        self, prompts: PromptBatch, waiting: _Waiting, state: _Slots, prompt_experts: Array | None
    ) -> RolloutBatch:
        # Up to the first end-of-sequence token, or the limit: what pads the rest may be an end-of-sequence token too.
        column, limit = jnp.arange(self.max_new_tokens), waiting.limit
        end = jnp.min(jnp.where(self._is_end(state.out.token), column, self.max_new_tokens), axis=1)
        return RolloutBatch(
            tokens=state.out.token,
            response_mask=column < jnp.minimum(end + 1, limit)[:, None],
            behavior_logp=state.out.logp,
            truncated=end >= limit,
            group=jnp.repeat(prompts.group, self.group_size),
            topk_ids=state.out.topk_ids if self.topk else None,
            topk_logp=state.out.topk_logp if self.topk else None,
            prompt_experts=prompt_experts,
            experts=state.experts,
        )
