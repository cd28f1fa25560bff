"""Aggregation weights w_t: how the tokens of one optimizer minibatch share its gradient.

Computed once per minibatch, before it is cut into micro-batches or shards, so that neither changes the sum.
Each function is WEIGHTS[name](mask bool[B,R], constant=float, group=i32[B]) -> f32[B,R], 0 outside the mask. A row
without a token counts for nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32


def _rows(mask: Array) -> Array:
    return jnp.maximum(jnp.sum(jnp.any(mask, axis=1)), 1).astype(jnp.float32)


def token_mean(
    mask: Bool[Array, "B R"], *, constant: float, group: Int32[Array, "B"] | None = None
) -> Float32[Array, "B R"]:
    """1 / tokens in the minibatch: every token counts the same (DAPO, 2503.14476)."""
    return mask / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)


def seq_mean_token_mean(
    mask: Bool[Array, "B R"], *, constant: float, group: Int32[Array, "B"] | None = None
) -> Float32[Array, "B R"]:
    """1 / (rows * the row's tokens): every response counts the same (GRPO, 2402.03300)."""
    return mask / (_rows(mask) * jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1))


def seq_mean_token_sum(
    mask: Bool[Array, "B R"], *, constant: float, group: Int32[Array, "B"] | None = None
) -> Float32[Array, "B R"]:
    """1 / rows: the sum over a response, averaged over responses."""
    return mask / _rows(mask)


def seq_sum_const(
    mask: Bool[Array, "B R"], *, constant: float, group: Int32[Array, "B"] | None = None
) -> Float32[Array, "B R"]:
    """1 / (rows * constant): a fixed denominator, such as the longest response, in tokens (Dr. GRPO, 2503.20783)."""
    return mask / (_rows(mask) * constant)


def prompt_mean_token_mean(
    mask: Bool[Array, "B R"], *, constant: float, group: Int32[Array, "B"] | None = None
) -> Float32[Array, "B R"]:
    """1 / (prompts * tokens of the prompt's responses): every prompt counts the same (ScaleRL, 2510.13786).

    `group` says which prompt a row answers.
    """
    assert group is not None
    _, prompt = jnp.unique(group, return_inverse=True, size=len(mask))
    tokens = jax.ops.segment_sum(jnp.sum(mask, axis=1).astype(jnp.float32), prompt, len(mask))
    prompts = jnp.maximum(jnp.sum(tokens > 0), 1)
    return mask / (prompts * jnp.maximum(tokens, 1.0))[prompt][:, None]


WEIGHTS: dict[str, Callable[..., Array]] = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "seq_sum_const": seq_sum_const,
    "prompt_mean_token_mean": prompt_mean_token_mean,
}
