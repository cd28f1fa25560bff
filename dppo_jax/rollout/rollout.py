"""Rollout: the behavior policy draws G responses to every prompt, by continuous batching.

One prefill per prompt serves its group, and gives the first token of every response. The others are decoded in slots:
a slot whose response has ended takes the next one waiting, so that nobody waits for the longest. All of it is one
jitted function, or a few (`calls`), scheduling included (`decode_loop`): whatever runs it, on however many hosts, takes
the same decisions. What is drawn depends on the row alone, never on its slot or its neighbours.

The cache is carried through the loop and written in place, as blocks of columns or as pages (`caches`). Where pages run
out, a row waits again, and is later prefilled with the tokens that it has.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32, Integer, Key

from dppo_jax import sampling
from dppo_jax.devices.sharding import ROLLOUT, constrain, reshard, using
from dppo_jax.models.attention import self_attention
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
from dppo_jax.models.pages import count_for
from dppo_jax.models.rotary import positions
from dppo_jax.rollout.blocks import Blocks
from dppo_jax.rollout.decode_loop import DecodeLoop
from dppo_jax.rollout.paged import Pages
from dppo_jax.rollout.slots import Drawn, Shards, Slots, Waiting, Work
from dppo_jax.rollout.stops import Stops
from dppo_jax.rollout.token_sampler import TokenSampler
from dppo_jax.types import PromptBatch, RolloutBatch


@struct.dataclass
class Begun:
    """A rollout that is being drawn, beside the state of its slots: what stays as it is."""

    published: Params
    waiting: Waiting
    prompt_experts: Integer[Array, "N P L k"] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """A pure function (params, prompts, key) -> RolloutBatch, in stages; jit it, or a stage.

    Row n * group_size + j is response j to prompt n, and draws from fold_in(fold_in(key, group[n]), j).
    `temperature` 0 is greedy, with the logp of temperature 1. `dtype` is what parameters and cache are cast to.
    `topk` is K; 0 leaves top-K out. `record_entropy`: the batch has the entropy of every token's distribution.
    `slots` is S, how many rows are decoded at a time; None: all of them.
    `shards` is D, the number of shards of the batch over the mesh; it divides S and the number of prompts.
    `head_float32`: the head's product takes float32 parameters and hidden states, whatever `dtype`.
    `attention` is of prompts, `resume_attention` of `resumed_tokens` tokens: names in `attention.KERNELS`.
    `record_experts`: the batch has the experts of every token of a mixture, so that training can take the same ones.
    `weights` rounds the parameters to a narrower format, `round_inputs` the inputs of linear layers (precision.py).
    `paged` keeps the cache as pages, of which a shard has `pages` beside its prompts' (None: enough for all slots, and
    in any case for one row); `paged_attention` is one of `pages.IMPLEMENTATIONS`.
    `stops` are the stop strings, after the first of which a response ends, as after a token of `eos_ids`.
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
    record_entropy: bool = False
    top_p: float = 1.0
    slots: int | None = None
    shards: int = 1
    attention: str = "xla"
    resume_attention: str = "xla"
    unrolled: bool = True
    weights: Callable[[Params], Params] | None = None
    round_inputs: Callable[[Array], Array] | None = None
    head_float32: bool = False
    record_experts: bool = False
    paged: bool = False
    pages: int | None = None
    paged_attention: str = "xla"
    stops: Stops | None = None

    __name__ = "rollout"  # as jit calls it, in profiles and in the list of what was compiled

    def __post_init__(self) -> None:
        if not 0 <= self.topk <= self.config.vocab_size:
            raise ValueError(f"topk = {self.topk} tokens of a vocabulary of {self.config.vocab_size}")
        if self.record_experts and not self.config.num_experts:
            raise ValueError(f"record_experts: a {self.config.model_type} has no experts")

    def __call__(self, params: Params, prompts: PromptBatch, key: Key[Array, ""]) -> RolloutBatch:
        return self.measured(params, prompts, key)[0]

    def measured(self, params: Params, prompts: PromptBatch, key: Key[Array, ""]) -> tuple[RolloutBatch, Work]:
        """The batch, and what decoding it cost."""
        begun, state = self.begin(params, prompts, key)
        return self.end(params, prompts, key, begun, self.draw(begun, state)[0])

    # --- the same in several calls ---

    def begin(self, params: Params, prompts: PromptBatch, key: Key[Array, ""]) -> tuple[Begun, Slots]:
        """Every prompt through the model once."""
        with using(ROLLOUT):
            published = self.publish(params)
            waiting, prompt_experts = self.prefill_with(published, prompts, sampling.row_keys(key, prompts.group))
            return self.begun(published, waiting, self.idle(waiting, prompt_experts), prompt_experts)

    def begun(
        self, published: Params, waiting: Waiting, state: Slots, prompt_experts: Array | None = None
    ) -> tuple[Begun, Slots]:
        """As `begin` gives it."""
        # A cache of pages has the prompts; those of blocks are copied from `waiting`.
        waiting = dataclasses.replace(waiting, prompts=None) if self.paged else waiting
        return Begun(published, waiting, prompt_experts), state

    def draw(self, begun: Begun, state: Slots, most: int = 0) -> tuple[Slots, Bool[Array, ""]]:
        """`most` decode steps more (0: all that there are), and whether there is more to draw. However many calls it
        takes, the same is drawn in the same order."""
        with using(ROLLOUT):
            loop = self._loop(begun.published, begun.waiting)
            state = loop.run(state, most)
            return state, loop.unfinished(state)

    def end(
        self, params: Params, prompts: PromptBatch, key: Key[Array, ""], begun: Begun, state: Slots
    ) -> tuple[RolloutBatch, Work]:
        """What was drawn, of the arguments of `begin`. It reads no key or value, and not `begun.published`."""
        with using(ROLLOUT):
            return self.result(prompts, begun.waiting, state, begun.prompt_experts), state.work.total()

    def decoded(self, published: Params, waiting: Waiting, state: Slots) -> Slots:
        """All that is to be drawn, drawn."""
        return self._loop(published, waiting).run(state, 0)

    def _loop(self, published: Params, waiting: Waiting) -> DecodeLoop:
        layers = self._layers(published)

        def forward(tokens: Array, position: Array, segments: Array) -> tuple[Array, Array]:
            return self._forward(published, tokens, position, segments, self.resume_attention, lambda k, v: (k, v))[0]

        return DecodeLoop(
            waiting,
            cache=self._cache,
            shards=self._shards,
            group_size=self.group_size,
            max_new_tokens=self.max_new_tokens,
            step=functools.partial(self._step, published, layers, waiting),
            forward=forward,
        )

    @functools.cached_property
    def _shards(self) -> Shards:
        return Shards(self.shards)

    @functools.cached_property
    def sampler(self) -> TokenSampler:
        return TokenSampler(
            self.config.logit_softcap,
            self.temperature,
            self.top_p,
            self.head_float32,
            self.topk,
            self.record_entropy,
            self.eos_ids,
            self.stops,
        )

    @functools.cached_property
    def _cache(self) -> Blocks | Pages:
        settings = self.config, self.dtype, self.unrolled, self.max_new_tokens, self._shards
        return Pages(*settings, self.pages, self.paged_attention) if self.paged else Blocks(*settings)

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
    ) -> tuple[Waiting, Integer[Array, "N P L k"] | None]:
        """Every prompt through the model once: the queue of rows, and the experts of the prompts' tokens."""
        with using(ROLLOUT):
            return self.prefill_with(published, prompts, sampling.row_keys(key, prompts.group))

    def step(self, published: Params, waiting: Waiting, state: Slots) -> Slots:
        """One token more in every live slot."""
        with using(ROLLOUT):
            return self._step(published, self._layers(published), waiting, state)

    def _layers(self, published: Params) -> Params:
        """The model's parameters, layer by layer where they are unrolled: before the loop, which would copy them."""
        stacked = {name: value for name, value in published.items() if name != "head_float32"}
        return unstack(stacked) if self.unrolled else stacked

    def _recorded(self, routed: Routed | None) -> Array:
        """[L, b, t, k] -> [b, t, Lk], as small as the number of experts allows."""
        assert routed is not None
        kind = jnp.uint8 if self.config.num_experts <= 256 else jnp.int32
        return jax.lax.collapse(jnp.moveaxis(routed.experts, 0, 2).astype(kind), 2)

    def uniforms(self, group_keys: Key[Array, "N"]) -> Float32[Array, "B R 2"]:
        """The random numbers of every token."""
        keys = jax.vmap(lambda k: sampling.row_keys(k, jnp.arange(self.group_size)))(group_keys).reshape(-1)
        columns = jnp.arange(self.max_new_tokens)
        every = jax.vmap(lambda t: sampling.uniforms(keys, jnp.full(len(keys), t)))(columns)
        return constrain(jnp.moveaxis(every, 0, 1), "batch", None, None)

    def limits(self, prompts: PromptBatch) -> Int32[Array, "B"]:
        """Most tokens of every response."""
        rows = len(prompts.tokens) * self.group_size
        return jnp.full(rows, self.max_new_tokens, jnp.int32) if prompts.limit is None else prompts.limit.reshape(-1)

    def prefill_with(
        self, published: Params, prompts: PromptBatch, group_keys: Key[Array, "N"]
    ) -> tuple[Waiting, Integer[Array, "N P L k"] | None]:
        """`prefill` under the table `ROLLOUT`; row j of a group draws from fold_in(its group's key, j)."""
        prompt_count, group = len(prompts.tokens), self.group_size
        batch = prompt_count * group
        prompts = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), prompts)
        uniforms, limit = self.uniforms(group_keys), self.limits(prompts)
        kept, hidden, routed = self._forward(
            published,
            prompts.tokens,
            positions(prompts.mask),
            prompts.mask.astype(jnp.int32),
            self.attention,
            functools.partial(self._cache.of_prompts, mask=prompts.mask),
        )
        z = self.sampler.distribution(published, hidden[:, -1])
        by_member = jnp.swapaxes(uniforms[:, 0].reshape(prompt_count, group, 2), 0, 1)
        token, logp, lse = jax.lax.map(lambda uniforms: self.sampler.draw(z, uniforms), by_member)
        recorded = self.sampler.recorded(z, lse[0])
        of_rows = jax.tree.map(lambda x: jnp.repeat(x, group, 0), recorded)
        first = Drawn(token.T.reshape(-1), logp.T.reshape(-1), *of_rows)
        stop = None if self.stops is None else self.sampler.stop_after(self.stops.start(batch), first.token)

        waiting = Waiting(
            first=first,
            waits=self._shards.local(~self.sampler.ends(first.token, stop) & (limit > 1)),
            limit=limit,
            prompt_tokens=prompts.tokens,
            prompt_mask=prompts.mask,
            prompts=list(zip(*kept, strict=True)) if self.unrolled else kept,
            uniforms=uniforms,
            stop=stop,
        )
        return waiting, self._recorded(routed) if self.record_experts else None

    def _forward(
        self,
        published: Params,
        tokens: Array,
        position: Array,
        segments: Array,
        attention: str,
        keep: Callable[[Array, Array], Any],
    ) -> tuple[Any, Array, Routed | None]:
        """What `keep` keeps of the keys and values of every layer, stacked; hidden states; the routes of tokens."""

        def attend(q, k, v, cache, number):
            sliding, settings = slides(self.config, number), scores(self.config)
            mixed = self_attention(q, k, v, segments, implementation=attention, sliding=sliding, **settings)
            return mixed, cache, keep(k, v)

        stacked = as_module(self.config, {k: v for k, v in published.items() if k != "head_float32"})
        settings: dict[str, Any] = dict(round_inputs=self.round_inputs, in_place=True)
        hidden, _, kept, routed = stacked(tokens, position, attend, None, **settings)
        return kept, hidden, routed

    def idle(self, waiting: Waiting, prompt_experts: Array | None) -> Slots:
        """Idle slots, and a batch that holds each row's first token."""
        prompt_length = waiting.prompt_mask.shape[1]
        batch, first = len(waiting.limit), waiting.first
        slots = batch if self.slots is None else min(self.slots, batch)

        def buffer(x: Array, fill: int = 0) -> Array:
            return jnp.full((batch, self.max_new_tokens, *x.shape[1:]), fill, x.dtype).at[:, 0].set(x)

        cache, table = self._cache.empty(slots, waiting)
        nothing = jnp.zeros(slots)
        experts = None
        if prompt_experts is not None:
            experts = jnp.zeros((batch, self.max_new_tokens, *prompt_experts.shape[2:]), prompt_experts.dtype)
        return Slots(
            row=jnp.full(slots, batch, jnp.int32),
            drawn=jnp.ones(slots, jnp.int32),
            token=jnp.zeros(slots, jnp.int32),
            limit=jnp.ones(slots, jnp.int32),
            prompt_mask=jnp.zeros((slots, prompt_length), bool),
            waits=waiting.waits,
            progress=jnp.ones_like(waiting.waits, jnp.int32),
            missing=None,
            cache=cache,
            table=table,
            out=dataclasses.replace(jax.tree.map(buffer, first), token=buffer(first.token, self.pad_id)),
            experts=experts,
            work=Work(jnp.int32(0), nothing, nothing, nothing, nothing),
            stop=None if self.stops is None else self.stops.start(slots),
            stops=None if waiting.stop is None else buffer(waiting.stop),
        )

    def _step(self, published: Params, layers: Params, waiting: Waiting, state: Slots) -> Slots:
        decoder = as_module(self.config, layers, stacked=not self.unrolled)
        batch, longest = len(waiting.limit), self.max_new_tokens
        live = state.row < batch
        state, attend, read = self._cache.step(state, live)
        position = state.position
        hidden, cache, _, routed = decoder(
            state.token[:, None], position[:, None], attend, state.cache, round_inputs=self.round_inputs
        )
        z, row = self.sampler.distribution(published, hidden[:, 0]), self._shards.within(state.row, batch)
        index = jnp.minimum(row, batch // self.shards - 1), jnp.minimum(state.drawn, longest - 1)
        token, logp, lse = self.sampler.draw(z, self._shards.look_up(waiting.uniforms, *index))
        new = Drawn(token, logp, *self.sampler.recorded(z, lse))
        stop, drawn = self.sampler.stop_after(state.stop, token), state.drawn + live
        experts = state.experts
        if experts is not None:
            experts = self._shards.put(experts, row, state.drawn - 1, self._recorded(routed)[:, 0])
        last = live & (self.sampler.ends(token, stop) | (drawn >= state.limit))
        state = self._cache.release(state, last)
        if state.missing is not None:
            of_group = self._shards.within(state.row, batch) // self.group_size
            ended = jax.vmap(lambda missing, at, last: missing.at[at].add(-last.astype(jnp.int32), mode="drop"))
            state = dataclasses.replace(state, missing=ended(state.missing, of_group, self._shards.local(last)))

        def put(buffer: Array, new: Array) -> Array:
            return self._shards.put(buffer, row, state.drawn, new)

        return dataclasses.replace(
            state,
            row=jnp.where(last, batch, state.row),
            drawn=drawn,
            token=new.token,
            cache=cache,
            out=jax.tree.map(put, state.out, new),
            stop=stop,
            stops=None if stop is None or state.stops is None else put(state.stops, stop),
            experts=experts,
            work=dataclasses.replace(
                state.work,
                decode_steps=state.work.decode_steps + 1,
                live=state.work.live + live,
                pages_read=state.work.pages_read + read,
                pages_live=state.work.pages_live + jnp.where(live, count_for(position + 1), 0),
            ),
        )

    def result(
        self, prompts: PromptBatch, waiting: Waiting, state: Slots, prompt_experts: Array | None
    ) -> RolloutBatch:
        """The batch as it is in the slots' state."""
        response_mask, truncated = self.extent(state.out.token, state.stops, waiting.limit)
        return RolloutBatch(
            tokens=state.out.token,
            response_mask=response_mask,
            behavior_logp=state.out.logp,
            truncated=truncated,
            group=jnp.repeat(prompts.group, self.group_size),
            topk_ids=state.out.topk_ids if self.topk else None,
            topk_logp=state.out.topk_logp if self.topk else None,
            prompt_experts=prompt_experts,
            experts=state.experts,
            behavior_entropy=state.out.entropy,
        )

    def extent(
        self, tokens: Int32[Array, "B R"], stops: Array | None, limit: Int32[Array, "B"]
    ) -> tuple[Bool[Array, "B R"], Bool[Array, "B"]]:
        """Which tokens are of the response, and whether it reached its limit; `stops` is the state after each token."""
        # Up to the first end, or the limit: what pads the rest may be an end-of-sequence token too.
        column = jnp.arange(self.max_new_tokens)
        end = jnp.min(jnp.where(self.sampler.ends(tokens, stops), column, self.max_new_tokens), axis=1)
        return column < jnp.minimum(end + 1, limit)[:, None], end >= limit
