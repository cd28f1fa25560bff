"""The cache of keys and values against attention by definition in float64, around the edges of its blocks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models import cache as kv_cache
from tests.helpers.fixtures import COMPILER_OPTIONS

ROWS, HEADS, KV_HEADS, SIZE = 4, 6, 2, 8
COLUMNS = [1, 127, 128, 129, 191, 192, 271, 600]
EDGES = {
    1: [0, 1],
    127: [0, 127],
    128: [0, 128],
    129: [0, 129],
    191: [0, 191],
    192: [0, 128, 192],
    271: [0, 128, 271],
    383: [0, 128, 383],
    384: [0, 128, 256, 384],
    600: [0, 128, 256, 600],
    640: [0, 128, 256, 640],
    767: [0, 128, 256, 767],
    768: [0, 128, 256, 512, 768],
}


def jit(function):
    return jax.jit(function, compiler_options=COMPILER_OPTIONS)


write, attend = map(jit, (kv_cache.write, kv_cache.attend))
fill = jit(lambda cache, rows, keys, values: kv_cache.fill(cache, rows, (keys, values)))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def whole(cache) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values in NumPy, both [B, KV, C, D]."""
    keys = np.concatenate([np.asarray(k).swapaxes(2, 3) for k, _ in cache], axis=2)
    return keys, np.concatenate([np.asarray(v) for _, v in cache], axis=2)


def filled(columns: int, dtype=jnp.float32):
    """A cache of random numbers, and what is in it."""
    keys, values = numbers(ROWS, KV_HEADS, columns, SIZE), numbers(ROWS, KV_HEADS, columns, SIZE, seed=1)
    empty = kv_cache.empty(ROWS, KV_HEADS, SIZE, columns, dtype)
    cache = fill(empty, np.ones(ROWS, bool), keys.swapaxes(2, 3).astype(dtype), values.astype(dtype))
    return cache, keys, values


def by_definition(q, keys, values, visible, scale=None, softcap=None) -> np.ndarray:
    """Row by row and head by head, over the columns that are visible."""
    out = np.zeros(q.shape)
    for row, head in np.ndindex(q.shape[:2]):
        seen = np.flatnonzero(visible[row])
        shared = head // (q.shape[1] // keys.shape[1])
        score = keys[row, shared, seen].astype(np.float64) @ q[row, head] * (scale or 1 / np.sqrt(q.shape[2]))
        score = score if softcap is None else softcap * np.tanh(score / softcap)
        weight = np.exp(score - score.max())
        out[row, head] = weight @ values[row, shared, seen] / weight.sum()
    return out


def visibility(columns: int, used: int) -> np.ndarray:
    """Rows of different lengths, with padding on the left and in the middle; one reaches `used`."""
    column, draw = np.arange(columns), np.random.default_rng([columns, used])
    ends = np.array([used, max(1, used - 1), max(1, used // 2), 1])
    visible = (column < ends[:, None]) & (draw.random((ROWS, columns)) < 0.7)
    visible[np.arange(ROWS), ends - 1] = True  # a query sees itself
    return visible


def places(columns: int) -> list[int]:
    """Numbers of columns in use around every edge."""
    near = {at + by for at in kv_cache.edges(columns) for by in (-1, 0, 1)} | {columns // 2}
    return sorted(used for used in near if 1 <= used <= columns)


@pytest.mark.parametrize("columns", EDGES)
def test_edges_by_hand(columns):
    assert kv_cache.edges(columns) == EDGES[columns]


def test_blocks_double_and_the_last_is_at_least_half_of_the_one_before():
    for columns in range(1, 3000):
        at = kv_cache.edges(columns)
        widths = [end - start for start, end in itertools.pairwise(at)]
        assert at[0] == 0 and at[-1] == columns and min(widths) > 0
        assert all(end == 2 * start for start, end in itertools.pairwise(at[1:-1]))
        assert len(widths) == 1 or widths[-1] >= widths[-2] / 2


@pytest.mark.parametrize("columns", COLUMNS)
def test_an_empty_cache_is_zero_and_has_its_columns(columns):
    for dtype in (jnp.float32, jnp.bfloat16):
        cache = kv_cache.empty(ROWS, KV_HEADS, SIZE, columns, dtype)
        assert all(x.dtype == dtype for x in jax.tree.leaves(cache))
        for x in whole(cache):
            assert x.shape == (ROWS, KV_HEADS, columns, SIZE) and not x.any()


@pytest.mark.parametrize("columns", COLUMNS)
def test_attention_is_that_of_the_definition(columns):
    """Rows at different lengths, up to every edge and beyond it."""
    cache, keys, values = filled(columns)
    q = numbers(ROWS, HEADS, SIZE, seed=2)
    for used in places(columns):
        visible = visibility(columns, used)
        got = attend(q, cache, visible, jnp.int32(used))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, by_definition(q, keys, values, visible), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [dict(scale=0.7), dict(softcap=1.5), dict(scale=0.7, softcap=1.5)])
def test_scale_and_cap_are_the_definition(options):
    cache, keys, values = filled(271)
    q, visible = numbers(ROWS, HEADS, SIZE, seed=2), visibility(271, 200)
    got = jit(functools.partial(kv_cache.attend, **options))(q, cache, visible, jnp.int32(200))
    np.testing.assert_allclose(got, by_definition(q, keys, values, visible, **options), rtol=0, atol=1e-5)
    assert np.abs(got - by_definition(q, keys, values, visible)).max() > 0.1


def test_attention_in_bfloat16_has_its_softmax_in_float32():
    """Scores of 200 and more, which bfloat16 would round by a half and more."""
    cache, *_ = filled(192, jnp.bfloat16)
    keys, values = whole(cache)
    q = (300 * numbers(ROWS, HEADS, SIZE, seed=2)).astype(jnp.bfloat16)
    visible = visibility(192, 150)
    got = attend(q, cache, visible, jnp.int32(150))
    assert got.dtype == jnp.bfloat16
    scaled = np.asarray(q * jnp.bfloat16(SIZE**-0.5)).astype(np.float64) * SIZE**0.5  # the query is rounded once more
    want = by_definition(scaled, keys.astype(np.float64), values.astype(np.float64), visible)
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=0, atol=0.03)


@pytest.mark.parametrize("columns", [192, 271, 600])
def test_blocks_that_no_row_uses_are_not_read(columns):
    """NaN in them changes nothing; NaN in a block in use is seen."""
    cache, _, _ = filled(columns)
    q = numbers(ROWS, HEADS, SIZE, seed=2)
    for count, end in enumerate(kv_cache.edges(columns)[1:-1], start=1):
        poisoned = (*cache[:count], *jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache[count:]))
        for used in (end - 1, end):
            visible = visibility(columns, used)
            got = np.asarray(attend(q, poisoned, visible, jnp.int32(used)))
            assert np.isfinite(got).all()
            np.testing.assert_array_equal(got, attend(q, cache, visible, jnp.int32(used)))
        assert np.isnan(attend(q, poisoned, visibility(columns, end + 1), jnp.int32(end + 1))).any()


@pytest.mark.parametrize("columns", COLUMNS)
def test_write_sets_one_column_of_every_row(columns):
    """Each row its own, around every edge; a column beyond the last, as an idle slot's may be, is dropped."""
    cache, keys, values = filled(columns)
    key, value = numbers(ROWS, KV_HEADS, SIZE, seed=3), numbers(ROWS, KV_HEADS, SIZE, seed=4)
    at = [used - 1 for used in places(columns)] + [columns]
    for first in range(0, len(at), ROWS):
        column = np.resize(at[first:], ROWS)
        got = whole(write(cache, column, key, value))
        for found, before, new in zip(got, (keys, values), (key, value), strict=True):
            want = before.copy()
            for row in range(ROWS):
                if column[row] < columns:
                    want[row, :, column[row]] = new[row]
            np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(("columns", "prompt"), [(1, 1), (127, 100), (129, 129), (192, 127), (192, 128), (192, 129)]
                         + [(271, 200), (600, 128), (600, 300), (600, 599)])  # fmt: skip
def test_fill_leaves_other_rows_and_later_columns_alone(columns, prompt):
    """Prompts shorter than the first block, longer, and as long."""
    cache, keys, values = filled(columns)
    new_keys, new_values = (numbers(ROWS, KV_HEADS, prompt, SIZE, seed=seed) for seed in (5, 6))
    for rows in ([False] * ROWS, [False, True, True, False], [True] * ROWS):
        chosen = np.array(rows)
        got = whole(fill(cache, chosen, new_keys.swapaxes(2, 3), new_values))
        for found, before, new in zip(got, (keys, values), (new_keys, new_values), strict=True):
            want = before.copy()
            want[chosen, :, :prompt] = new[chosen]
            np.testing.assert_array_equal(found, want)


def test_a_row_decoded_from_its_prompt_on():
    """Prompts that end in the first block, then one column at a time across an edge, rows starting at their own."""
    columns, prompt, steps = 271, 124, 10
    keys, values = numbers(ROWS, KV_HEADS, columns, SIZE), numbers(ROWS, KV_HEADS, columns, SIZE, seed=1)
    cache = kv_cache.empty(ROWS, KV_HEADS, SIZE, columns, jnp.float32)
    cache = fill(cache, np.ones(ROWS, bool), keys[:, :, :prompt].swapaxes(2, 3), values[:, :, :prompt])
    drawn = np.array([0, 3, 1, 0])
    for row, count in enumerate(drawn):  # some rows are ahead
        for at in range(prompt, prompt + count):
            column = np.where(np.arange(ROWS) == row, at, columns)
            cache = write(cache, column, keys[:, :, at], values[:, :, at])
    for step in range(steps):
        column = prompt + drawn + step
        key, value = (x[np.arange(ROWS), :, column] for x in (keys, values))
        cache = write(cache, column, key, value)
        q = numbers(ROWS, HEADS, SIZE, seed=10 + step)
        visible = np.arange(columns) <= column[:, None]
        got = attend(q, cache, visible, jnp.int32(column.max() + 1))
        np.testing.assert_allclose(got, by_definition(q, keys, values, visible), rtol=0, atol=1e-5)
