"""Draws follow their distribution, streams belong to their row, and the nucleus is the smallest set of its mass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from dppo_jax.sampling import draw, nucleus, row_keys, step_key, uniforms

DRAWS = 100_000
JUST_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def peaked(vocabulary: int, seed: int = 0) -> np.ndarray:
    """Logits of a distribution with a few likely tokens and a long tail."""
    return np.random.RandomState(seed).standard_normal(vocabulary).astype(np.float32) * 3


def probabilities(z) -> np.ndarray:
    p = np.exp(np.asarray(z, np.float64) - np.max(z))
    return p / p.sum(axis=-1, keepdims=True)


def at_position(keys, position: int) -> jax.Array:
    """Uniforms of rows that are all at the same position."""
    return uniforms(keys, jnp.full(keys.shape, position, jnp.int32))


@pytest.fixture(scope="module")
def stream() -> jax.Array:
    """Uniforms as a rollout makes them: a key per row, position 3."""
    return jax.jit(lambda: at_position(row_keys(step_key(0, 5, 1), jnp.arange(DRAWS)), 3))()


@jax.jit
def draw_many(z, u):
    """One draw from z per row of u, some rows at a time."""
    rows = u.reshape(100, -1, 2)
    return jax.lax.map(lambda part: draw(jnp.broadcast_to(z, (part.shape[0], z.shape[0])), part)[0], rows).reshape(-1)


def p_value(tokens, p: np.ndarray) -> float:
    """Chi-square of observed tokens; those expected fewer than 5 times are one class."""
    observed, wanted = np.bincount(tokens, minlength=len(p)), p * len(tokens)
    rare = wanted < 5
    merged = [np.append(x[~rare], x[rare].sum()) for x in (observed, wanted)]
    return chisquare(*[x if wanted[rare].sum() > 0 else x[:-1] for x in merged]).pvalue


@pytest.mark.parametrize("vocabulary", [50, 300])
def test_draws_follow_the_distribution(vocabulary, stream):
    """Seeds are fixed, so the test either always passes or never; the distribution need not be normalised."""
    z = peaked(vocabulary)
    p = probabilities(z)
    tokens = np.asarray(draw_many(z + 11.0, stream))
    assert 0.1 < p.max() < 0.9 and (p * DRAWS < 5).sum() > 5, "peaked, with a tail"
    assert p_value(tokens, p) > 1e-3
    # Cold by 5% would be seen.
    assert p_value(tokens, probabilities(z / 0.95)) < 1e-9


def test_the_last_block_may_be_short_and_the_vocabulary_tiny(stream):
    for vocabulary in (1, 2, 3, 17):
        z = peaked(vocabulary, seed=1) / 3
        tokens = np.asarray(draw_many(z, stream))
        assert vocabulary == 1 or p_value(tokens, probabilities(z)) > 1e-3
        assert tokens.max() < vocabulary


EXTREMES = np.array([0, 2**-30, 2**-24, 1e-3, 0.25, 0.5, 0.75, 1 - 2**-10, 1 - 2**-23, JUST_BELOW_ONE], np.float32)
GRID = np.stack(np.meshgrid(EXTREMES, EXTREMES), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize("alive", ["first", "last", "middle", "few", "one block", "all but the ends"])
def test_a_token_of_probability_zero_is_never_drawn(alive):
    """Whatever the uniforms, 0 and the largest float32 below 1 included; and no token outside the vocabulary."""
    vocabulary = 300  # blocks of 32, the last one 12 long
    allowed = {
        "first": [0], "last": [299], "middle": [150], "few": [3, 31, 32, 200, 298],
        "one block": range(64, 96), "all but the ends": range(1, 299),
    }[alive]  # fmt: skip
    z = np.full(vocabulary, -np.inf, np.float32)
    z[list(allowed)] = peaked(vocabulary)[list(allowed)]
    drawn = set(np.asarray(draw(jnp.broadcast_to(z, (len(GRID), vocabulary)), GRID)[0]).tolist())
    assert drawn <= set(allowed)
    z[list(allowed)[0]] -= 200.0  # a probability that is 0 in float32 only
    drawn = set(np.asarray(draw(jnp.broadcast_to(z, (len(GRID), vocabulary)), GRID)[0]).tolist())
    assert drawn <= set(allowed) and (len(allowed) == 1 or list(allowed)[0] not in drawn)


def test_probability_zero_in_many_random_rows():
    """Half the tokens are impossible, at random places, and the uniforms hug 1."""
    rng = np.random.RandomState(0)
    z = np.where(rng.rand(2000, 300) < 0.5, -np.inf, rng.standard_normal((2000, 300)) * 5).astype(np.float32)
    u = (1 - rng.randint(1, 4, (2000, 2)) * 2.0**-24).astype(np.float32)
    tokens, lse = map(np.asarray, draw(z, u))
    assert np.isfinite(z[np.arange(2000), tokens]).all()
    np.testing.assert_allclose(lse, np.log(np.exp(z.astype(np.float64)).sum(axis=1)), rtol=1e-6)


def test_a_probability_of_1e_9_is_reachable():
    """One uniform has steps of 1.2e-7. With two, a rare token in a block of mass 1e-3 is drawn as often as it should.

    The rare token is the first of its block, so that it owns the second uniform's lowest 1e-6.
    """
    p = np.zeros(300)
    p[0], p[63], p[32] = 1 - 1e-3 - 1e-9, 1e-3, 1e-9  # blocks of 32
    steps = np.arange(16) * 2.0**-23
    u = np.stack([np.full(16, 1 - 5e-4), steps], axis=-1).astype(np.float32)
    tokens = np.asarray(draw(np.broadcast_to(np.log(p + 1e-300), (16, 300)).astype(np.float32), u)[0])
    assert (tokens == 32).sum() == pytest.approx(1e-6 / 2**-23, abs=1) and set(tokens) == {32, 63}


def test_a_row_has_the_stream_of_its_number():
    """Not of its slot, of the batch, or of its neighbours."""
    key, other = step_key(0, 5, 1), step_key(0, 6, 1)
    many = at_position(row_keys(key, jnp.arange(64)), 7)
    few = at_position(row_keys(key, jnp.array([40, 3, 63])), 7)
    np.testing.assert_array_equal(few, many[np.array([40, 3, 63])])
    assert many.dtype == jnp.float32 and many.shape == (64, 2)
    assert not np.isin(many, at_position(row_keys(other, jnp.arange(64)), 7)).any()


def test_rows_may_be_at_different_positions():
    """Each draws what it draws at that position beside others; no position gives the numbers of another."""
    keys, positions = row_keys(step_key(0, 5, 1), jnp.array([40, 3, 40, 63])), jnp.array([2, 0, 9, 2])
    mixed = np.asarray(uniforms(keys, positions))
    for at, position in enumerate(positions.tolist()):
        np.testing.assert_array_equal(mixed[at], at_position(keys, position)[at])
        by_hand = jax.random.uniform(jax.random.fold_in(keys[at], position), (2,)) + 2.0**-24
        np.testing.assert_array_equal(mixed[at], by_hand)
    assert len(np.unique(mixed)) == mixed.size


def test_uniforms_are_never_0_or_1(stream):
    """Odd multiples of 2^-24. At u = 0 the first token that is possible at all was drawn, even one of 1e-30."""
    u = np.asarray(stream)
    assert (u > 0).all() and (u < 1).all() and (u * 2**24 % 2 == 1).all()
    z = np.array([[-69.0, 0.0, -1.0]], np.float32)
    assert draw(z, np.zeros((1, 2), np.float32))[0] == 0 and draw(z, np.full((1, 2), u.min()))[0] == 1


def test_keys_differ_by_seed_step_and_purpose():
    keys = [step_key(*triple) for triple in np.ndindex(3, 3, 3)]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == 27
    traced = jax.jit(lambda step: jax.random.key_data(step_key(1, step, 2)))(jnp.int32(2))
    np.testing.assert_array_equal(traced, jax.random.key_data(step_key(1, 2, 2)))


def test_uniforms_are_independent_of_row_position_and_each_other(stream):
    """Means, and correlations with the next row, the next position, the next step and the twin, within 4 deviations."""
    u = np.asarray(stream[:20_000])
    later = np.asarray(at_position(row_keys(step_key(0, 5, 1), jnp.arange(20_000)), 4))
    next_step = np.asarray(at_position(row_keys(step_key(0, 6, 1), jnp.arange(20_000)), 3))
    bound = 4 / np.sqrt(20_000)
    assert np.abs((u.mean(axis=0) - 0.5) * np.sqrt(12)).max() < bound
    pairs = [(u[:-1], u[1:]), (u, later), (u, next_step), (u, u[:, ::-1])]
    for a, b in pairs:
        for column in range(2):
            assert abs(np.corrcoef(a[:, column], b[:, column])[0, 1]) < bound


def smallest_set(z: np.ndarray, top_p: float) -> set[int]:
    """Likeliest tokens one after the other until their mass reaches top_p."""
    p, kept, mass = probabilities(z), set(), 0.0
    for token in np.argsort(-p):
        kept.add(int(token))
        mass += p[token]
        if mass >= top_p:
            return kept
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.95, 0.999])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    """Flat and peaked rows; what it keeps is unchanged, so that the normaliser afterwards is the truncated one."""
    z = np.stack([peaked(60, seed) * scale for seed, scale in enumerate((0.01, 0.3, 1.0, 3.0))])
    z[1, ::7] = -np.inf
    got = np.asarray(nucleus(jnp.asarray(z), top_p))
    for row, kept in zip(z, got, strict=True):
        want = smallest_set(row, top_p)
        assert set(np.flatnonzero(np.isfinite(kept))) == want
        np.testing.assert_array_equal(kept[list(want)], row[list(want)])


def test_nucleus_at_the_edge():
    """A mass that just reaches top_p is enough, and one that just falls short is not."""
    z = jnp.log(jnp.array([[0.25, 0.5, 0.125, 0.125]]))
    for top_p, want in ((0.499, [1]), (0.501, [0, 1]), (0.749, [0, 1]), (0.751, [0, 1, 2])):
        assert np.flatnonzero(np.isfinite(nucleus(z, top_p)[0])).tolist() == want
