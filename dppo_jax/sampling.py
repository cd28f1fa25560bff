"""Drawing tokens: keys per row, exact draws by inverse distribution, nucleus truncation for evaluation."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key, UInt32

from dppo_jax.token_head import log_normaliser


def step_key(seed: int, step: int | Int32[Array, ""] | UInt32[Array, ""], purpose: int) -> Key[Array, ""]:
    """The key of one step for one purpose: randomness is a function of (seed, step, purpose) and hides nowhere."""
    return jax.random.fold_in(purpose_key(seed, purpose), step)


def purpose_key(seed: int, purpose: int) -> Key[Array, ""]:
    """The key of all steps for one purpose."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def row_keys(key: Key[Array, ""], row: Int32[Array, "B"]) -> Key[Array, "B"]:
    """A key per row. A row's stream depends on its own number alone, not on its batch, slot or neighbours."""
    return jax.vmap(lambda r: jax.random.fold_in(key, r))(row)


def uniforms(keys: Key[Array, "B"], position: Int32[Array, "B"]) -> Float32[Array, "B 2"]:
    """Two numbers in (0, 1), odd multiples of 2^-24, for token number `position` of each row.

    A uniform of exactly 0 would draw a token however improbable, once in 8 million draws.
    """
    draw = jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at), (2,)))
    return draw(keys, position) + 2.0**-24


def _invert(weight: Float32[Array, "B n"], u: Float32[Array, "B"]) -> Int32[Array, "B"]:
    """The entry in which the cumulative weight passes u of the total; never one of weight 0."""
    passed = jnp.cumsum(weight, axis=-1)
    positive = weight > 0
    total = jnp.max(jnp.where(positive, passed, 0.0), axis=-1)
    return jnp.argmax(positive & (passed > (u * total)[:, None]), axis=-1)


def blocks(z: Float32[Array, "B V"]) -> Float32[Array, "B n w"]:
    """The vocabulary in about sqrt(V) blocks of a power of two, -inf at the end."""
    width = 2 ** math.ceil(math.log2(z.shape[1]) / 2)
    return jnp.pad(z, [(0, 0), (0, -z.shape[1] % width)], constant_values=-jnp.inf).reshape(len(z), -1, width)


def draw(z: Float32[Array, "B V"], u: Float32[Array, "B 2"]) -> tuple[Int32[Array, "B"], Float32[Array, "B"]]:
    """One token per row, distributed as exp(z), which need not be normalised, and log sum exp(z).

    In two levels, a block of tokens and then a token in it, each with a uniform of its own: one pass over the
    vocabulary, blocks resolved to 1e-7 and tokens to 1e-7 of their block's mass.
    """
    cut, largest = blocks(z), jnp.max(z, axis=-1)
    mass = jnp.sum(jnp.exp(cut - largest[:, None, None]), axis=-1)
    block = _invert(mass, u[:, 0])
    within = jnp.take_along_axis(cut, block[:, None, None], axis=1)[:, 0]
    token = block * cut.shape[2] + _invert(jnp.exp(within - largest[:, None]), u[:, 1])
    return token.astype(jnp.int32), largest + jnp.log(jnp.sum(mass, axis=-1))


def nucleus(z: Float32[Array, "B V"], top_p: float) -> Float32[Array, "B V"]:
    """-inf outside the smallest set of likeliest tokens whose mass reaches top_p (1904.09751)."""
    order = jnp.argsort(-z, axis=-1)
    p = jnp.take_along_axis(jnp.exp(z - log_normaliser(z)[:, None]), order, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    in_nucleus = jnp.put_along_axis(jnp.zeros(z.shape, bool), order, before < top_p, axis=-1, inplace=False)
    return jnp.where(in_nucleus, z, -jnp.inf)
