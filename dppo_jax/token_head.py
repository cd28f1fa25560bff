"""The token head: hidden states to log-probabilities. The only log-softmax.

It takes the vocabulary in chunks and never holds logits of [B, R, V]; the backward pass computes each chunk's logits
once more. With z = softcap(h W^T) / temperature, per position,

    logp = z[target] - lse(z),      entropy = lse(z) - sum_v p_v z_v,      ids_logp = z[ids] - lse(z)

and, for incoming gradients a, b, c_k of these three,

    dL/dz_v = a (1[v = target] - p_v) - b p_v (log p_v + entropy) + sum_k c_k (1[v = ids_k] - p_v).

Chunks of the vocabulary, not of the positions: each chunk of the weight's gradient is then written once, where chunks
of the positions would read and write all of it again and again. With one chunk, its logits are kept for the backward
pass.

The product with W takes the dtype of the hidden states and accumulates in float32; everything after it is float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Float32, Int32

from dppo_jax.devices.sharding import constrain, is_cut, summed_product
from dppo_jax.types import ExactDivergence, HeadOutput, SlopeSums

LOWEST = -1e30  # in place of log 0, so that 0 log 0 is 0


def logits(
    hidden: Float[Array, "*n E"], weight: Float[Array, "V E"], *, temperature: float, softcap: float | None
) -> Float32[Array, "*n V"]:
    """softcap * tanh(h W^T / softcap) / temperature; no cap if `softcap` is None."""
    z = jnp.einsum("...e,ve->...v", hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    return z / temperature


def log_normaliser(z: Float32[Array, "*n V"]) -> Float32[Array, "*n"]:
    """log sum exp over the vocabulary."""
    return jax.nn.logsumexp(z, axis=-1)


def vocab_chunk_count(tokens: int, vocabulary: int, memory: int | None = None) -> int:
    """The number of vocabulary chunks, for `tokens` positions and `vocabulary` tokens of the vocabulary on one device.

    So many that the float32 logits of one chunk take 1/64 of the device's `memory` in bytes. Where that is not known:
    one chunk if all logits take 64 MiB or less, else 48. The count is raised, to at most twice as many, to the first
    that divides the vocabulary, if there is one.
    """
    logits_bytes = 4 * tokens * vocabulary
    if logits_bytes <= (2**26 if memory is None else memory // 64):
        return 1
    least = min(48 if memory is None else math.ceil(64 * logits_bytes / memory), vocabulary)
    return next((count for count in range(least, min(2 * least, vocabulary) + 1) if vocabulary % count == 0), least)


def token_head(
    hidden: Float[Array, "M Q E"],
    weight: Float[Array, "V E"],
    targets: Int32[Array, "M Q"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ids: Int32[Array, "M Q K"] | None = None,
    vocab_chunks: int | None = None,
) -> HeadOutput:
    """logp of `targets`, entropy in nats and, if `ids` are given, their logp; differentiable in `hidden` and `weight`.

    `vocab_chunks`: the number of chunks of the vocabulary; None: `vocab_chunk_count` of these shapes.
    """
    if vocab_chunks is None:
        vocab_chunks = vocab_chunk_count(math.prod(targets.shape), len(weight))
    static = (float(temperature), None if softcap is None else float(softcap), min(vocab_chunks, len(weight)))
    logp, entropy, ids_logp = _head(static, hidden, weight, targets, ids)
    return HeadOutput(logp=logp, entropy=entropy, ids_logp=ids_logp, vocabulary=jnp.int32(len(weight)))


def whole_head(
    hidden: Float[Array, "M Q E"],
    weight: Float[Array, "V E"],
    targets: Int32[Array, "M Q"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ids: Int32[Array, "M Q K"] | None = None,
) -> tuple[HeadOutput, Float32[Array, "M Q V"]]:
    """`token_head` with one chunk, not differentiable, and the logits that it takes logp from."""
    static = (float(temperature), None if softcap is None else float(softcap), 1)
    (logp, entropy, ids_logp), _, z = _values(static, hidden, weight, targets, ids)
    return HeadOutput(logp=logp, entropy=entropy, ids_logp=ids_logp), z


def exact_divergence(
    hidden: Float[Array, "M Q E"],
    weight: Float[Array, "V E"],
    behavior_hidden: Float[Array, "M Q E"],
    behavior_weight: Float[Array, "V E"],
    targets: Int32[Array, "M Q"] | None = None,
    *,
    temperature: float = 1.0,
    behavior_temperature: float = 1.0,
    softcap: float | None = None,
    vocab_chunks: int | None = None,
) -> ExactDivergence:
    """TV and KL(mu || pi), in nats, over the whole vocabulary, from the hidden states of both policies; no gradient.

    With the sampled tokens `targets` it has the sums of both slopes, too. Two passes over the vocabulary in chunks, the
    first for the two normalisers: never a buffer of all logits.
    """
    sides = [(temperature, hidden, weight), (behavior_temperature, behavior_hidden, behavior_weight)]
    both_logits, vocab_chunks = _chunks_of_both(sides, softcap, vocab_chunks)

    def normalise(number, states):
        return [
            jnp.logaddexp(state, jax.nn.logsumexp(z, axis=-1))
            for state, z in zip(states, both_logits(number), strict=True)
        ]

    start = jnp.full(hidden.shape[:-1], -jnp.inf, jnp.float32)
    lse, behavior_lse = jax.lax.fori_loop(0, vocab_chunks, normalise, [start, start])

    def add(number, sums):
        z, behavior_z = both_logits(number)
        logp = jnp.maximum(z - lse[..., None], LOWEST)
        behavior_logp = jnp.maximum(behavior_z - behavior_lse[..., None], LOWEST)
        pi, mu = jnp.exp(logp), jnp.exp(behavior_logp)
        diff = pi - mu
        terms = [jnp.abs(diff), mu * (behavior_logp - logp)]
        if targets is not None:
            is_target = jnp.arange(z.shape[-1]) * vocab_chunks + number == targets[..., None]
            pi = jnp.where(is_target, 0.0, pi)
            terms += [-pi * diff, pi**2, jnp.sign(diff) * pi, jnp.sign(diff) * pi**2]  # as SlopeSums has them
        return [total + jnp.sum(term, axis=-1) for total, term in zip(sums, terms, strict=True)]

    zeros = [jnp.zeros(hidden.shape[:-1], jnp.float32)] * (2 if targets is None else 6)
    gap, kl, *slope = jax.lax.fori_loop(0, vocab_chunks, add, zeros)
    return ExactDivergence(tv=0.5 * gap, kl=jnp.maximum(kl, 0.0), slope=SlopeSums(*slope) if slope else None)


class LogitSums(NamedTuple):
    """Sums over the vocabulary, of the logits z of the policy and y of the behavior policy."""

    difference: Float32[Array, "M Q"]  # (z - y)^2
    product: Float32[Array, "M Q"]  # z y
    policy: Float32[Array, "M Q"]  # z^2
    behavior: Float32[Array, "M Q"]  # y^2


def logit_sums(
    hidden: Float[Array, "M Q E"],
    weight: Float[Array, "V E"],
    behavior_hidden: Float[Array, "M Q E"],
    behavior_weight: Float[Array, "V E"],
    *,
    temperature: float,
    behavior_temperature: float,
    softcap: float | None,
    vocab_chunks: int | None = None,
) -> LogitSums:
    """What tells a factor between the logits of two policies, from their hidden states; no gradient.

    The factor f that fits y = f z best is product / policy. Arguments as those of `exact_divergence`.
    """
    sides = [(temperature, hidden, weight), (behavior_temperature, behavior_hidden, behavior_weight)]
    both_logits, vocab_chunks = _chunks_of_both(sides, softcap, vocab_chunks)

    def add(number, sums):
        z, y = (jnp.where(jnp.isfinite(a), a, 0.0) for a in both_logits(number))
        products = (z - y) * (z - y), z * y, z * z, y * y
        return [total + jnp.sum(product, axis=-1) for total, product in zip(sums, products, strict=True)]

    zeros = [jnp.zeros(hidden.shape[:-1], jnp.float32)] * 4
    return LogitSums(*jax.lax.fori_loop(0, vocab_chunks, add, zeros))


def _chunks_of_both(sides, softcap: float | None, vocab_chunks: int | None):
    """(number -> the logits of both sides in that chunk, number of chunks); a side is (temperature, hidden, weight)."""
    sides = [(temperature, *jax.lax.stop_gradient((hidden, weight))) for temperature, hidden, weight in sides]
    _, hidden, weight = sides[0]
    if vocab_chunks is None:
        vocab_chunks = vocab_chunk_count(math.prod(hidden.shape[:-1]), len(weight))
    vocab_chunks = min(vocab_chunks, len(weight))
    cuts = [_cut(w, vocab_chunks) for _, _, w in sides]

    def both_logits(number):
        return [
            _chunk_logits((float(t), softcap, vocab_chunks), h, cut, number, len(weight))
            for (t, h, _), cut in zip(sides, cuts, strict=True)
        ]

    return both_logits, vocab_chunks


# Chunk j of n holds the tokens j, j + n, j + 2n, ...: where the vocabulary is sharded, every device has its share of
# every chunk.


def _cut(weight: Array, vocab_chunks: int) -> Array:
    """[V, E] -> [ceil(V / chunks), chunks, E], zeros at the end where the count does not divide V."""
    padded = jnp.pad(weight, [(0, -len(weight) % vocab_chunks), (0, 0)])
    return constrain(padded.reshape(-1, vocab_chunks, weight.shape[1]), "vocab", None, None)


def _chunk_logits(static, hidden: Array, cut: Array, number: Array | int, vocabulary: int) -> Array:
    """Logits of chunk `number`, -inf where it goes beyond the vocabulary."""
    temperature, softcap, vocab_chunks = static
    weight_chunk = jax.lax.dynamic_index_in_dim(cut, number, axis=1, keepdims=False)
    z = logits(hidden, weight_chunk, temperature=temperature, softcap=softcap)
    if len(weight_chunk) * vocab_chunks > vocabulary:
        z = jnp.where(jnp.arange(len(weight_chunk)) * vocab_chunks + number < vocabulary, z, -jnp.inf)
    return constrain(z, "batch", None, "vocab")


def _pick(z: Array, token: Array, number: Array | int, vocab_chunks: int) -> Array:
    """Logits [B, R, K] of the tokens [B, R, K] that are in chunk `number`, 0 for the others."""
    if vocab_chunks == 1:
        return jnp.take_along_axis(z, token, axis=-1)
    picked = jnp.take_along_axis(z, token // vocab_chunks, axis=-1)
    return jnp.where(token % vocab_chunks == number, picked, 0.0)


def _head_of(static, hidden, weight, targets, ids):
    return _values(static, hidden, weight, targets, ids)[0]


def _values(static, hidden, weight, targets, ids):
    """((logp, entropy, ids_logp), lse, the logits if there is one chunk, else None)"""
    vocab_chunks, vocabulary = static[2], len(weight)
    tokens = targets[..., None] if ids is None else jnp.concatenate([targets[..., None], ids], axis=-1)
    cut = _cut(weight, vocab_chunks)

    def merge_chunk(number, state):
        z = _chunk_logits(static, hidden, cut, number, vocabulary)
        return z, _merge(state, z, _pick(z, tokens, number, vocab_chunks))

    # With m the largest logit so far: m, sum exp(z - m), sum exp(z - m) (z - m), and the logits of `tokens`.
    zero = jnp.zeros(targets.shape, jnp.float32)
    state = (jnp.full(targets.shape, -jnp.inf, jnp.float32), zero, zero, jnp.zeros(tokens.shape, jnp.float32))
    if vocab_chunks == 1:
        z, state = merge_chunk(0, state)
    else:
        z, state = None, jax.lax.fori_loop(0, vocab_chunks, lambda number, state: merge_chunk(number, state)[1], state)
    largest, sum_exp, moment, picked = state
    lse = largest + jnp.log(sum_exp)
    logp = picked - lse[..., None]
    # Both terms are at least 0: nothing cancels, however peaked the distribution.
    entropy = jnp.log(sum_exp) - moment / sum_exp
    return (logp[..., 0], entropy, None if ids is None else logp[..., 1:]), lse, z


def _merge(state, z, picked):
    """The state after one more chunk: its logits z, and those of them that belong to the picked tokens."""
    largest, sum_exp, moment, so_far = state
    new_largest = jnp.maximum(largest, jnp.max(z, axis=-1))
    shift = jnp.where(largest == -jnp.inf, 0.0, largest - new_largest)
    scale = jnp.where(largest == -jnp.inf, 0.0, jnp.exp(shift))
    gap = jnp.maximum(z - new_largest[..., None], LOWEST)
    p = jnp.exp(gap)
    moment = scale * (moment + sum_exp * shift) + jnp.sum(p * gap, axis=-1)
    return new_largest, scale * sum_exp + jnp.sum(p, axis=-1), moment, so_far + picked


def _head_forward(static, hidden, weight, targets, ids):
    hidden, weight, targets, ids = (None if x is None else x.value for x in (hidden, weight, targets, ids))
    outputs, lse, whole_logits = _values(static, hidden, weight, targets, ids)
    return outputs, (hidden, weight, targets, ids, lse, outputs[1], whole_logits)


def _head_backward(static, residuals, cotangents):
    temperature, softcap, vocab_chunks = static
    hidden, weight, targets, ids, lse, entropy, whole_logits = residuals
    # A loss through logp alone, as every policy loss is, pays nothing for the other two.
    d_logp, d_entropy, d_ids = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    d_logp = jnp.zeros(lse.shape, jnp.float32) if d_logp is None else d_logp
    d_logp_sum = (d_logp if d_ids is None else d_logp + jnp.sum(d_ids, axis=-1))[..., None]
    cut = _cut(weight, vocab_chunks)

    def chunk_gradients(number, z):
        z = _chunk_logits(static, hidden, cut, number, len(weight)) if z is None else z
        log_p = z - lse[..., None]
        through = d_logp_sum
        if d_entropy is not None:
            log_p = jnp.maximum(log_p, LOWEST)
            through = d_logp_sum + d_entropy[..., None] * (log_p + entropy[..., None])
        is_target = jnp.arange(z.shape[-1]) * vocab_chunks + number == targets[..., None]
        d_z = jnp.where(is_target, d_logp[..., None], 0.0) - jnp.exp(log_p) * through
        if d_ids is not None:
            row, column = jnp.indices(targets.shape)
            in_chunk = jnp.where(ids % vocab_chunks == number, d_ids, 0.0)
            d_z = d_z.at[row[..., None], column[..., None], ids // vocab_chunks].add(in_chunk)
        d_z = d_z / temperature
        if softcap is not None:
            d_z = d_z * (1 - jnp.square(jnp.where(jnp.isfinite(z), z, 0.0) * temperature / softcap))
        d_z = d_z.astype(hidden.dtype)
        weight_chunk = jax.lax.dynamic_index_in_dim(cut, number, axis=1, keepdims=False).astype(hidden.dtype)
        d_hidden = jnp.einsum("brv,ve->bre", d_z, weight_chunk, preferred_element_type=jnp.float32)
        if is_cut("embed"):
            d_weight_chunk = summed_product(hidden, d_z, "vocab", dtype=jnp.float32).T
        else:
            flat = [x.reshape(-1, x.shape[-1]) for x in (d_z, hidden)]  # in one dimension XLA's CPU copies less
            d_weight_chunk = jnp.einsum("nv,ne->ve", *flat, preferred_element_type=jnp.float32)
        return constrain(d_hidden, "batch", None, None), d_weight_chunk

    if vocab_chunks == 1:
        d_hidden, d_weight = chunk_gradients(0, whole_logits)
    else:

        def add(number, carry):
            d_hidden, d_weight_chunk = chunk_gradients(number, None)
            d_chunk = d_weight_chunk.astype(weight.dtype)
            d_weight = jax.lax.dynamic_update_index_in_dim(carry[1], d_chunk, number, axis=1)
            return carry[0] + d_hidden, constrain(d_weight, "vocab", None, "embed")

        zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(cut.shape, weight.dtype)
        d_hidden, d_weight = jax.lax.fori_loop(0, vocab_chunks, add, zeros)
        d_weight = d_weight.reshape(-1, weight.shape[1])[: len(weight)]
    none = [None if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in (targets, ids)]
    return d_hidden.astype(hidden.dtype), d_weight.astype(weight.dtype), *none


_head = jax.custom_vjp(_head_of, nondiff_argnums=(0,))
_head.defvjp(_head_forward, _head_backward, symbolic_zeros=True)
