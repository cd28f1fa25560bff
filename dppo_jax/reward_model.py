"""A reward model's score of conversations, on the devices: batches of few shapes, so that little is compiled."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from dppo_jax.models.config import ModelConfig
from dppo_jax.models.decoder import Params, abstract_params, forward, param_axes

LENGTHS = 4  # different lengths of a batch: the longest, and halves of it

# (parameters, tokens, lengths, ends) -> f32[b]
Score = Callable[[Params, Array, Array, Array], Array]


class Batch(NamedTuple):
    """b conversations, padded on the right to T tokens; the last ones may be empty."""

    rows: np.ndarray  # i[...], at most b: which conversations they are
    tokens: np.ndarray  # i32[b, T]
    lengths: np.ndarray  # i32[b]
    ends: np.ndarray  # i32[b]: the token whose hidden state is scored


def score_axes(config: ModelConfig) -> Params:
    """Logical axis names of every parameter, as tuples."""
    return {"body": param_axes(config), "score": ("norm",)}


def score_shapes(config: ModelConfig, dtype: Any) -> Params:
    """Shapes and dtypes of every parameter."""
    whole = {"body": abstract_params(config), "score": jax.ShapeDtypeStruct((config.hidden_size,), dtype)}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), whole)


def make_score(config: ModelConfig, *, dtype: Any, attention: str = "xla") -> Score:
    """A pure function (parameters, tokens i32[b, T], lengths i32[b], ends i32[b]) -> the scores f32[b].

    Rows are padded on the right. `dtype` is what the decoder computes in; the score's product is in float32.
    """

    def score(
        params: Params, tokens: Int32[Array, "b T"], lengths: Int32[Array, "b"], ends: Int32[Array, "b"]
    ) -> Float32[Array, "b"]:
        mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
        hidden = forward(config, params["body"], tokens, mask, dtype=dtype, attention=attention)
        last = jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]
        return last.astype(jnp.float32) @ params["score"].astype(jnp.float32)

    return score


def end_of(ids: Sequence[int], pad_id: int | None) -> int:
    """Where `transformers` reads the score of a row: at the last token that is not `pad_id`, wherever others are; at
    the last of all without a pad_id, and at the first of a row of nothing else."""
    others = [at for at, token in enumerate(ids) if token != pad_id]
    return others[-1] if others else 0


def batch_lengths(longest: int, multiple: int = 1) -> tuple[int, ...]:
    """The lengths that batches may have, in tokens: `longest`, and halves of it, rounded up to a multiple."""
    return tuple(sorted({math.ceil(longest / 2**n / multiple) * multiple for n in range(LENGTHS)}))


def batches(
    tokens: np.ndarray, lengths: np.ndarray, ends: np.ndarray, rows: int, widths: Sequence[int]
) -> Iterator[Batch]:
    """Conversations of like length together, `rows` at a time, each batch of the least width that holds them.

    tokens: i32[B, L], padded on the right; lengths, ends: i32[B]. widths: increasing.
    """
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), rows):
        members = order[start : start + rows]
        width = next(width for width in widths if width >= lengths[members].max())
        batch = Batch(members, *(np.zeros(shape, np.int32) for shape in ((rows, width), rows, rows)))
        batch.tokens[: len(members), : tokens.shape[1]] = tokens[members, :width]
        batch.lengths[: len(members)], batch.ends[: len(members)] = lengths[members], ends[members]
        yield batch
