"""Packed training: samples one after another in rows of fixed length, so that hardly a trained position is padding.

The host decides where each sample goes, from lengths alone (`plan`); the device moves the tokens there (`pack`). Every
microbatch has the same shape and a minibatch is as many of them as its tokens need, so one compiled update serves all.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float32, Int32, Shaped

from dppo_jax.types import PackedBatch, TrainBatch


class PackShape(NamedTuple):
    """The shape of a microbatch: `rows` (M) of `length` tokens (T), `responses` of which (Q) may be response tokens."""

    rows: int
    length: int
    responses: int


@struct.dataclass
class Plan:
    """Where the tokens of a minibatch of b samples go: I microbatches, the first `num_microbatches` of which hold any.

    It has a few numbers for each sample and for each row, since every device holds all of it; `microbatch` finds the
    place of each token. Packed rows are counted over all microbatches.
    """

    batch_rows: Int32[Array, "b"]  # each sample's row of the TrainBatch
    rows: Int32[Array, "b"]  # its packed row; I M: it has no token
    columns: Int32[Array, "b"]  # the column of its first token
    response_columns: Int32[Array, "b"]  # the column of its first response token
    responses_before: Int32[Array, "b"]  # response tokens that stand before it in its packed row
    tokens_per_row: Int32[Array, "I M"]
    responses_per_row: Int32[Array, "I M"]
    num_microbatches: Int32[Array, ""]  # microbatches that hold any token
    shape: PackShape = struct.field(pytree_node=False)


@struct.dataclass
class Places:
    """Where the tokens of one microbatch go. A sample's tokens are numbered from 0, its prompt first."""

    batch_rows: Int32[Array, "b"]  # each sample's row of the TrainBatch; samples are those of the minibatch
    sample_of: Int32[Array, "M T"]  # the sample that a token belongs to, 0 .. b-1; -1: no token
    offset: Int32[Array, "M T"]  # the token's number in its sample
    response_columns: Int32[Array, "M Q"]  # columns of the row's response tokens, in order; 0 beyond the last
    responses_per_row: Int32[Array, "M"]  # response tokens in the row


def pack_shape(
    *, prompt_length: int, max_new_tokens: int, rows: int, mean_prompt: float | None = None, multiple: int = 1
) -> PackShape:
    """The shape of a microbatch of `rows` rows, each long enough for any sample.

    T is P + R, rounded up to a multiple of `multiple`. Q is the number of response tokens in a row that is filled with
    prompts of `mean_prompt` tokens (None: `prompt_length`) and responses of R = `max_new_tokens`, at least R and less
    than T, since prompts take their part of the row. A row takes no more response tokens than Q: the token head (the
    product with the vocabulary) computes Q columns of each row.
    """
    length = math.ceil((prompt_length + max_new_tokens) / multiple) * multiple
    mean = prompt_length if mean_prompt is None else mean_prompt
    responses = min(math.ceil(length * max_new_tokens / (mean + max_new_tokens)), length - 1)
    return PackShape(rows, length, max(responses, max_new_tokens))


def minibatch_rows(groups: int, group_size: int, minibatches: int, *, key: tuple[int, int, int]) -> list[np.ndarray]:
    """Rows of the batch, i[b], for every minibatch of an epoch; groups stay whole.

    `key` is (seed, step, epoch). The first epoch keeps the order of the batch; the order of any other is a function of
    the key.
    """
    order = np.random.default_rng(key).permutation(groups) if key[2] else np.arange(groups)
    rows = order[:, None] * group_size + np.arange(group_size)
    return list(rows.reshape(minibatches, -1).astype(np.int32))


def assign(prompt_lengths: np.ndarray, response_lengths: np.ndarray, shape: PackShape) -> list[list[int]]:
    """The samples of every row, by number: the longest sample first, each into the first row that has room for it."""
    lengths = prompt_lengths + response_lengths
    tokens: np.ndarray = np.zeros(len(lengths), int)
    responses: np.ndarray = np.zeros(len(lengths), int)
    bins: list[list[int]] = []
    for sample in np.argsort(-lengths, kind="stable"):
        fits = (tokens + lengths[sample] <= shape.length) & (responses + response_lengths[sample] <= shape.responses)
        at = int(np.argmax(fits))
        if not fits[at]:
            raise ValueError(f"a sample of {lengths[sample]} tokens does not fit into {shape}")
        if at >= len(bins):
            at = len(bins)
            bins.append([])
        bins[at].append(int(sample))
        tokens[at] += lengths[sample]
        responses[at] += response_lengths[sample]
    return bins


def plan(
    rows: np.ndarray, prompt_lengths: np.ndarray, response_lengths: np.ndarray, shape: PackShape, *, packed: bool = True
) -> Plan:
    """The plan of the minibatch of these rows of the batch; lengths i[B] are those of all its rows, in tokens.

    With `packed` False every sample has a packed row of its own.
    """
    prompts, responses = np.asarray(prompt_lengths)[rows], np.asarray(response_lengths)[rows]
    prompts = np.where(responses > 0, prompts, 0)  # a sample without a response is not computed
    bins = assign(prompts, responses, shape) if packed else [[sample] for sample in range(len(rows))]
    capacity = math.ceil(len(rows) / shape.rows)
    row_of: np.ndarray = np.full(len(rows), capacity * shape.rows, np.int32)
    columns, before = np.zeros_like(row_of), np.zeros_like(row_of)
    tokens: np.ndarray = np.zeros(capacity * shape.rows, np.int32)
    filled = np.zeros_like(tokens)
    for row, members in enumerate(bins):
        for member in members:
            if responses[member]:
                row_of[member], columns[member], before[member] = row, tokens[row], filled[row]
                tokens[row] += prompts[member] + responses[member]
                filled[row] += responses[member]

    return Plan(
        batch_rows=np.asarray(rows, np.int32),
        rows=row_of,
        columns=columns,
        response_columns=(columns + prompts).astype(np.int32),
        responses_before=before,
        tokens_per_row=tokens.reshape(capacity, -1),
        responses_per_row=filled.reshape(capacity, -1),
        num_microbatches=np.int32(math.ceil(len(bins) / shape.rows)),
        shape=shape,
    )


def occupancy(*plans: Plan) -> float:
    """The share of real tokens among the positions that the model computes under these plans."""
    real = sum(int(plan.tokens_per_row.sum()) for plan in plans)
    return real / sum(int(plan.num_microbatches) * plan.shape.rows * plan.shape.length for plan in plans)


def sample_lengths(plan: Plan) -> np.ndarray:
    """Tokens of each sample that the model computes, prompt and response, i64[b]; 0 of one without a response."""
    rows, columns = np.asarray(plan.rows), np.asarray(plan.columns)
    order = np.lexsort((columns, rows))
    ends = np.append(np.ravel(plan.tokens_per_row), 0).astype(np.int64)[rows[order]]
    followed = rows[order][1:] == rows[order][:-1]
    ends[:-1] = np.where(followed, columns[order][1:], ends[:-1])
    lengths: np.ndarray = np.zeros(len(rows), np.int64)
    lengths[order] = ends - columns[order]
    return lengths


def microbatch(plan: Plan, number: Int32[Array, ""]) -> Places:
    """The places of the tokens of microbatch `number`."""
    shape, samples = plan.shape, jnp.arange(len(plan.batch_rows), dtype=jnp.int32)
    take = lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False)  # noqa: E731
    row = plan.rows - number * shape.rows
    row = jnp.where(row < 0, shape.rows, row)  # of another microbatch: dropped, and not counted from the end

    def last_begun(first: Int32[Array, "b"], width: int):
        """Of each column, the sample that was the last to begin, and how many columns ago."""
        column = jnp.arange(width, dtype=jnp.int32)
        begun = jnp.zeros((shape.rows, width), jnp.int32).at[row, first].set(samples + 1, mode="drop")
        start = jax.lax.cummax(jnp.where(begun > 0, column, 0), axis=1)
        return jnp.take_along_axis(begun, start, axis=1) - 1, column - start

    sample, offset = last_begun(plan.columns, shape.length)
    real = jnp.arange(shape.length) < take(plan.tokens_per_row)[:, None]
    of_response, since = last_begun(plan.responses_before, shape.responses)
    responses_per_row = take(plan.responses_per_row)
    is_response = jnp.arange(shape.responses) < responses_per_row[:, None]
    return Places(
        batch_rows=plan.batch_rows,
        sample_of=jnp.where(real, sample, -1),
        offset=jnp.where(real, offset, 0),
        response_columns=jnp.where(is_response, jnp.asarray(plan.response_columns)[of_response] + since, 0),
        responses_per_row=responses_per_row,
    )


def _sources(batch: TrainBatch, places: Places):
    """Of each response column [M, Q]: its row of the batch, its column among the responses, and whether it is one."""
    at = jnp.take_along_axis(places.sample_of, places.response_columns, axis=1)
    mask = jnp.arange(places.response_columns.shape[1]) < places.responses_per_row[:, None]
    row = jnp.asarray(places.batch_rows)[jnp.maximum(at, 0)]
    prompt = jnp.sum(batch.prompt_mask, axis=1, dtype=jnp.int32)[row]
    column = jnp.take_along_axis(places.offset, places.response_columns, axis=1) - prompt
    return row, jnp.where(mask, column, 0), mask


def pack(batch: TrainBatch, weights: Float32[Array, "b R"], places: Places) -> PackedBatch:
    """One microbatch; `places` come from `microbatch`, `weights` are those of the minibatch's samples."""
    real = places.sample_of >= 0
    sample = jnp.maximum(places.sample_of, 0)
    row = jnp.asarray(places.batch_rows)[sample]
    width = batch.prompt_tokens.shape[1]
    prompt = jnp.sum(batch.prompt_mask, axis=1, dtype=jnp.int32)[row]
    # Prompts end in column P - 1, responses start in column P.
    column = jnp.where(real, width - prompt + places.offset, 0)
    tokens = jnp.concatenate([batch.prompt_tokens, batch.tokens], axis=1)[row, column]
    experts = None
    if batch.experts is not None:
        experts = jnp.concatenate([batch.prompt_experts, batch.experts], axis=1)[row, column]

    source, column, mask = _sources(batch, places)
    if batch.own is not None:  # what an environment said is context
        mask &= batch.own[source, column]

    def take(x):
        if x is None:
            return None
        values = x[source, column]
        return jnp.where(mask.reshape(mask.shape + (1,) * (values.ndim - 2)), values, 0)

    at = jnp.take_along_axis(sample, places.response_columns, axis=1)
    advantages = batch.advantages
    per_token = advantages if advantages.ndim == 2 else jnp.broadcast_to(advantages[:, None], batch.tokens.shape)
    return PackedBatch(
        tokens=tokens,
        segments=jnp.where(real, places.sample_of + 1, 0),
        positions=places.offset,
        columns=places.response_columns,
        targets=take(batch.tokens),
        mask=mask,
        weights=jnp.where(mask, weights[at, column], 0.0),
        behavior_logp=take(batch.behavior_logp),
        advantages=take(per_token),
        topk_ids=take(batch.topk_ids),
        topk_behavior_logp=take(batch.topk_behavior_logp),
        proximal_logp=take(batch.proximal_logp),
        topk_proximal_logp=take(batch.topk_proximal_logp),
        reference_logp=take(batch.reference_logp),
        teacher_logp=take(batch.teacher_logp),
        behavior_entropy=take(batch.behavior_entropy),
        experts=experts,
    )


def take(batch: TrainBatch, places: Places, values: Shaped[Array, "B R"]) -> Shaped[Array, "M Q"]:
    """Values [B, R] of the response tokens at their positions [M, Q] in one microbatch; 0 beyond a row's last."""
    row, column, mask = _sources(batch, places)
    return jnp.where(mask, values[row, column], 0)


def unpack(batch: TrainBatch, places: Places, values: Array, into: Array) -> Array:
    """The inverse of `take`: `into` [B, R, ...] with one microbatch's values [M, Q, ...] at their response tokens.

    Rows of `into` that have no sample in the microbatch stay as they are.
    """
    row, column, mask = _sources(batch, places)
    return into.at[jnp.where(mask, row, len(into)), column].set(values, mode="drop")
