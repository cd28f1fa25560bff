"""Rollout: the behavior policy draws G responses to every prompt.

One prefill per prompt serves its group; then one jitted loop decodes all rows until each has ended. The cache is one
pair of buffers per layer, carried through the loop and written in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32, Key

from dppo_jax import sampling, token_head
from dppo_jax.models.attention import attention, causal, positions
from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import Params, bind, head_weight, unstack
from dppo_jax.sharding import constrain
from dppo_jax.types import PromptBatch, RolloutBatch


@struct.dataclass
class _Loop:
    """What the decode loop carries. `hidden` predicts the token of column t."""

    t: Int32[Array, ""]
    hidden: Array  # [B, E]
    cache: list[tuple[Array, Array]]  # per layer: keys and values [B, P+R, KV, D]
    ended: Bool[Array, "B"]
    tokens: Int32[Array, "B R"]
    mask: Bool[Array, "B R"]
    logp: Float32[Array, "B R"]
    topk_ids: Int32[Array, "B R K"]
    topk_logp: Float32[Array, "B R K"]


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
) -> Callable[[Params, PromptBatch, Key[Array, ""]], RolloutBatch]:
    """A pure function (params, prompts, key) -> RolloutBatch; jit it.

    Row n * group_size + j is response j to prompt n, and draws from fold_in(fold_in(key, group[n]), j).
    `temperature` 0 is greedy, with the logp of temperature 1. `dtype` is what parameters and cache are cast to.
    `tracked` is K; 0 leaves top-K out.
    behavior_logp is that of the distribution drawn from: after temperature, and after truncation if top_p < 1.
    """
    if not 0 <= tracked <= config.vocab_size:
        raise ValueError(f"tracked = {tracked} tokens of a vocabulary of {config.vocab_size}")

    def pick(hidden: Array, weight: Array, keys: Array, t: Array):
        z = token_head.logits(hidden, weight, temperature=temperature or 1.0, softcap=config.logit_softcap)
        z = constrain(z, "batch", "vocab")
        if top_p < 1.0:
            z = sampling.nucleus(z, top_p)
        lse = token_head.log_normaliser(z)
        token = jnp.argmax(z, axis=-1) if temperature == 0 else sampling.draw(z, sampling.uniforms(keys, t))
        logp = jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0] - lse
        top, ids = jax.lax.top_k(z, tracked)
        return token.astype(jnp.int32), logp, ids.astype(jnp.int32), top - lse[:, None]

    def rollout(params: Params, prompts: PromptBatch, key: Key[Array, ""]) -> RolloutBatch:
        prompt_count, prompt_length = prompts.tokens.shape
        batch = prompt_count * group_size
        members = jnp.arange(group_size)
        keys = jax.vmap(lambda k: sampling.row_keys(k, members))(sampling.row_keys(key, prompts.group)).reshape(-1)
        listed = unstack(params, dtype)
        decoder, weight = bind(config, listed, stacked=False), head_weight(listed)

        visible = causal(jnp.arange(prompt_length), prompts.mask)

        def prefill(q, k, v, _):
            return attention(q, k, v, visible), (k, v)

        hidden, filled = decoder(prompts.tokens, positions(prompts.mask), prefill, [None] * config.num_layers)

        def widen(x: Array) -> Array:
            x = jnp.repeat(x, group_size, axis=0)
            return constrain(jnp.pad(x, [(0, 0), (0, max_new_tokens), (0, 0), (0, 0)]), "batch", None, "kv_heads", None)

        prompt_tokens = jnp.repeat(prompts.mask.sum(axis=1, dtype=jnp.int32), group_size)
        key_mask = jnp.pad(
            jnp.repeat(prompts.mask, group_size, axis=0), [(0, 0), (0, max_new_tokens)], constant_values=True
        )

        def decode(token: Array, t: Array, cache):
            column = prompt_length + t
            visible = causal(column[None], key_mask)

            def attend(q, k, v, cache):
                keys = jax.lax.dynamic_update_slice(cache[0], k, (0, column, 0, 0))
                values = jax.lax.dynamic_update_slice(cache[1], v, (0, column, 0, 0))
                return attention(q, keys, values, visible), (keys, values)

            hidden, cache = decoder(token[:, None], (prompt_tokens + t)[:, None], attend, cache)
            return hidden[:, 0], cache

        def step(loop: _Loop) -> _Loop:
            t, live = loop.t, ~loop.ended
            token, logp, ids, topk_logp = pick(loop.hidden, weight, keys, t)
            token = jnp.where(live, token, pad_id)
            ended = loop.ended | jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))
            hidden, cache = decode(token, t, loop.cache)
            return _Loop(
                t=t + 1,
                hidden=hidden,
                cache=cache,
                ended=ended,
                tokens=loop.tokens.at[:, t].set(token),
                mask=loop.mask.at[:, t].set(live),
                logp=loop.logp.at[:, t].set(jnp.where(live, logp, 0.0)),
                topk_ids=loop.topk_ids.at[:, t].set(ids),
                topk_logp=loop.topk_logp.at[:, t].set(topk_logp),
            )

        shape = (batch, max_new_tokens)
        start = _Loop(
            t=jnp.int32(0),
            hidden=jnp.repeat(hidden[:, -1], group_size, axis=0),
            cache=[(widen(k), widen(v)) for k, v in filled],
            ended=jnp.zeros(batch, bool),
            tokens=jnp.full(shape, pad_id, jnp.int32),
            mask=jnp.zeros(shape, bool),
            logp=jnp.zeros(shape, jnp.float32),
            topk_ids=jnp.zeros((*shape, tracked), jnp.int32),
            topk_logp=jnp.zeros((*shape, tracked), jnp.float32),
        )
        end = jax.lax.while_loop(lambda loop: (loop.t < max_new_tokens) & ~jnp.all(loop.ended), step, start)
        return RolloutBatch(
            tokens=end.tokens,
            response_mask=end.mask,
            behavior_logp=end.logp,
            truncated=~end.ended,
            group=jnp.repeat(prompts.group, group_size),
            topk_ids=end.topk_ids if tracked else None,
            topk_logp=end.topk_logp if tracked else None,
        )

    return rollout
