"""The token head against float64 by definition: values, gradients by finite differences, and the memory it needs."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from dppo_jax.models.decoder import head_weight
from dppo_jax.token_head import logits, token_head, vocab_chunk_count
from dppo_jax.types import HeadOutput

B, R, E, V, K = 2, 7, 6, 19, 4
OUTPUTS = ("logp", "entropy", "ids_logp")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


HIDDEN, WEIGHT = normal(0, B, R, E), normal(1, V, E)  # logits of about +-8
TARGETS = np.random.RandomState(2).randint(0, V, (B, R)).astype(np.int32)
IDS = np.random.RandomState(3).randint(0, V, (B, R, K)).astype(np.int32)
IDS[0, :, 1] = IDS[0, :, 0]  # twice the same
IDS[:, 0, 2] = TARGETS[:, 0]  # the target among them
COTANGENTS = dict(zip(OUTPUTS, (normal(4, B, R), normal(5, B, R), normal(6, B, R, K)), strict=True))


def reference(hidden, weight, targets, ids, temperature=1.0, softcap=None) -> dict[str, np.ndarray]:
    """The definition, in float64."""
    z = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
    z = (z if softcap is None else softcap * np.tanh(z / softcap)) / temperature
    z = z - z.max(axis=-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    found = {"logp": np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]}
    found["entropy"] = -(np.exp(log_p) * log_p).sum(axis=-1)
    return found if ids is None else found | {"ids_logp": np.take_along_axis(log_p, ids, axis=-1)}


def objective(found: dict) -> float:
    return sum((COTANGENTS[name] * found[name]).sum() for name in found)


def numeric_gradient(f, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences in float64."""
    x = x.astype(np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            ends.append(f(moved))
        gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def named(output: HeadOutput) -> dict:
    return {name: x for name in OUTPUTS if (x := getattr(output, name)) is not None}


CASES = {
    "plain": dict(),
    "cold": dict(temperature=0.5),
    "hot, four pieces": dict(temperature=1.7, vocab_chunks=4),
    "soft-cap, six pieces, which do not divide": dict(softcap=3.0, vocab_chunks=6),
    "soft-cap, cold": dict(softcap=5.0, temperature=0.5, vocab_chunks=2),
    "soft-cap, hot, a token a piece": dict(softcap=4.0, temperature=1.7, vocab_chunks=V),
    "no ids": dict(temperature=1.7, ids=None),
}


@functools.cache
def expected(case: str):
    """Values and both gradients of a case."""
    setting = {"ids": IDS} | {k: v for k, v in CASES[case].items() if k != "vocab_chunks"}
    f = functools.partial(reference, targets=TARGETS, **setting)
    gradients = (
        numeric_gradient(lambda h: objective(f(h, WEIGHT)), HIDDEN),
        numeric_gradient(lambda w: objective(f(HIDDEN, w)), WEIGHT),
    )
    return f(HIDDEN, WEIGHT), gradients


EAGER = ("plain", "soft-cap, hot, a token a piece")


@pytest.mark.parametrize("case, run", [(case, "jit") for case in CASES] + [(case, "eager") for case in EAGER])
def test_values_and_gradients_equal_float64(case, run):
    setting = {"ids": IDS} | CASES[case]

    def loss(hidden, weight):
        found = named(token_head(hidden, weight, TARGETS, **setting))
        return objective(found), found

    f = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, values), gradients = (jax.jit(f) if run == "jit" else f)(HIDDEN, WEIGHT)
    want_values, want_gradients = expected(case)
    assert set(values) == set(want_values)
    for name, want in want_values.items():
        assert values[name].dtype == jnp.float32 and values[name].shape == want.shape
        np.testing.assert_allclose(values[name], want, rtol=2e-6, atol=4e-6, err_msg=name)
    for got, want in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=4e-6 * np.abs(want).max())


@functools.cache
def both_ways(vocab_chunks: int):
    def loss(hidden, weight):
        found = named(token_head(hidden, weight, TARGETS, ids=IDS, vocab_chunks=vocab_chunks))
        return objective(found), found

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(HIDDEN, WEIGHT)


@pytest.mark.parametrize("vocab_chunks", [2, 6, V, 512])
def test_pieces_change_nothing(vocab_chunks):
    """Two and six, which do not divide the vocabulary; a token a piece; more pieces than tokens."""
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=3e-6)
    jax.tree.map(close, both_ways(vocab_chunks), both_ways(1))


def test_shapes_are_those_of_the_annotations():
    checked = jaxtyped(typechecker=beartype)(token_head)
    hidden, weight, targets, ids = map(jnp.asarray, (HIDDEN, WEIGHT, TARGETS, IDS))
    assert jax.eval_shape(checked, hidden, weight, targets, ids=ids).ids_logp.shape == (B, R, K)
    assert jax.eval_shape(checked, hidden, weight, targets).ids_logp is None
    with pytest.raises(TypeCheckError, match="targets"):
        checked(hidden, weight, targets[:, 1:])


def test_tied_embeddings_get_both_gradients():
    """One table as input and output: the gradient is the sum of its two uses."""
    tokens = np.random.RandomState(7).randint(0, V, (B, R))

    def loss(params):
        table = params["embed"]
        output = token_head(table[tokens], head_weight(params), TARGETS, ids=IDS, vocab_chunks=4)
        return objective(named(output))

    tied = {"embed": jnp.asarray(WEIGHT)}
    want = numeric_gradient(lambda w: objective(reference(w[tokens], w, TARGETS, IDS)), WEIGHT)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(tied)["embed"], want, atol=4e-6 * np.abs(want).max())
    untied = jax.grad(loss)(tied | {"head": jnp.asarray(WEIGHT)})
    np.testing.assert_allclose(untied["embed"] + untied["head"], want, atol=4e-6 * np.abs(want).max())


def test_bfloat16_activations_accumulate_in_float32():
    """Against float64 of the rounded inputs, values err as float32 does; rounded logits err a thousandfold.

    The backward pass rounds dL/dz to bfloat16 before the two products, which again accumulate in float32.
    """
    hidden = jnp.asarray(normal(8, B, 256, 64), jnp.bfloat16)
    weight, targets = normal(9, V, 64) / 4, np.random.RandomState(10).randint(0, V, (B, 256)).astype(np.int32)
    exact = np.asarray(jnp.asarray(weight, jnp.bfloat16), np.float64)

    def loss(hidden, weight):
        output = token_head(hidden, weight, targets, vocab_chunks=64)
        return jnp.sum(output.logp) + jnp.sum(output.entropy), output

    (_, output), (d_hidden, d_weight) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, weight)
    assert (d_hidden.dtype, d_weight.dtype) == (jnp.bfloat16, jnp.float32)
    want = reference(np.asarray(hidden, np.float64), exact, targets, None)
    rounded = np.asarray(jnp.einsum("bre,ve->brv", hidden, jnp.asarray(weight, jnp.bfloat16)), np.float64)
    coarse = reference(rounded, np.eye(V), targets, None)
    for name in ("logp", "entropy"):
        error = np.abs(np.asarray(getattr(output, name)) - want[name]).max()
        assert error < 5e-6 and error < 1e-3 * np.abs(coarse[name] - want[name]).max(), name

    # The gradients, analytically: d logp / dz = 1[v = target] - p, d entropy / dz = -p (log p + entropy).
    everywhere = np.broadcast_to(np.arange(V), (B, 256, V))
    log_p = reference(np.asarray(hidden, np.float64), exact, targets, everywhere)["ids_logp"]
    p = np.exp(log_p)
    d_z = np.eye(V)[targets] - p - p * (log_p + want["entropy"][..., None])
    d_z = np.asarray(jnp.asarray(d_z, jnp.bfloat16), np.float64)
    for got, wanted, tolerance in (
        (d_hidden, d_z @ exact, 2**-8),  # it is bfloat16 itself
        (d_weight, np.einsum("brv,bre->ve", d_z, np.asarray(hidden, np.float64)), 5e-4),
    ):
        assert np.abs(np.asarray(got, np.float64) - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
def test_flat_and_peaked_distributions_stay_finite(scale):
    """Entropy in [0, log V], logp at most 0, gradients finite: at probabilities of 1 and of 0 in float32 too."""

    def loss(hidden):
        output = token_head(hidden, WEIGHT, TARGETS)
        return jnp.sum(output.logp + output.entropy), output

    (_, output), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(HIDDEN * scale)
    assert np.isfinite(output.logp).all() and (output.logp <= 0).all() and np.isfinite(gradient).all()
    assert (output.entropy >= 0).all() and (output.entropy <= math.log(V) + 1e-5).all()


# Memory, compiled and never run, at Qwen3's vocabulary. One logits buffer here is 2048 x 151,936 float32: 1.2 GB.
VOCABULARY, ROWS, LENGTH, WIDTH, TRACKED = 151_936, 8, 256, 16, 20


def compiled(f, length: int, dtype, with_ids: bool):
    shape = jax.ShapeDtypeStruct
    hidden, weight = shape((ROWS, length, WIDTH), dtype), shape((VOCABULARY, WIDTH), jnp.float32)
    targets, ids = shape((ROWS, length), jnp.int32), shape((ROWS, length, TRACKED), jnp.int32) if with_ids else None
    return jax.jit(f).lower(hidden, weight, targets, ids).compile()


def largest_buffer(program) -> int:
    """Elements of the largest array the optimised program names."""
    shapes = re.findall(r"\[(\d+(?:,\d+)*)\]", program.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def total(hidden, weight, targets, ids, vocab_chunks=None):
    return sum(x.sum() for x in named(token_head(hidden, weight, targets, ids=ids, vocab_chunks=vocab_chunks)).values())


def values(hidden, weight, targets, ids):
    return named(token_head(hidden, weight, targets, ids=ids))


GRADIENTS = jax.grad(total, argnums=(0, 1))


@pytest.mark.parametrize(
    "f, dtype, with_ids, share",
    [
        (values, jnp.float32, True, 0.05),  # a piece is 1/64 of the whole; three are held
        (values, jnp.bfloat16, False, 0.05),
        (GRADIENTS, jnp.float32, False, 0.07),  # one more for the gradient
        (GRADIENTS, jnp.float32, True, 0.07),
        (GRADIENTS, jnp.bfloat16, False, 0.07),
    ],
)
def test_no_buffer_of_all_logits(f, dtype, with_ids, share):
    """At 2048 positions with as many pieces as the head chooses; the share is that of one buffer of all logits."""
    program = compiled(f, LENGTH, dtype, with_ids)
    whole = ROWS * LENGTH * VOCABULARY
    assert largest_buffer(program) <= whole // 64
    assert program.memory_analysis().temp_size_in_bytes < share * 4 * whole


@pytest.mark.usefixtures("optimized")
def test_memory_does_not_grow_with_the_number_of_positions():
    """On a device that says how much memory it has: a piece of four times the positions is a fourth as wide."""
    memory = 8 * 2**30
    sizes = []
    for length in (LENGTH, 4 * LENGTH):
        vocab_chunks = vocab_chunk_count(ROWS * length, VOCABULARY, memory)
        gradients = jax.grad(functools.partial(total, vocab_chunks=vocab_chunks), argnums=(0, 1))
        sizes.append(compiled(gradients, length, jnp.float32, True).memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 1.2 * sizes[0]


def test_the_number_of_pieces_follows_from_the_memory():
    assert vocab_chunk_count(1024, 4096) == 1  # 16 MiB
    assert vocab_chunk_count(2048, VOCABULARY) == 64  # the first of 48 to 96 that divides it
    assert vocab_chunk_count(2048, 151_969) == 48  # a prime
    assert vocab_chunk_count(2048, VOCABULARY, 80 * 2**30) == 1
    assert vocab_chunk_count(65_536, VOCABULARY, 80 * 2**30) == 32  # 40 GB against 1.25 GiB
    assert vocab_chunk_count(10**9, 5) == 5


@pytest.mark.usefixtures("optimized")
def test_the_memory_analysis_sees_logits_where_there_are_some():
    def plain(hidden, weight, targets, _):
        log_p = jax.nn.log_softmax(logits(hidden, weight, temperature=1.0, softcap=None))
        return jnp.take_along_axis(log_p, targets[..., None], axis=-1).sum()

    program = compiled(jax.grad(plain, argnums=(0, 1)), LENGTH, jnp.float32, False)
    whole = ROWS * LENGTH * VOCABULARY
    assert largest_buffer(program) >= whole and program.memory_analysis().temp_size_in_bytes >= 4 * whole
