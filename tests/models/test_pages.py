"""Pages of keys and values: attention against NumPy, the kernels of jax, and a table of pages that loses none."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.gpu import paged_attention as gpu

from dppo_jax.models import pages
from dppo_jax.models.pages import CHUNK, PAGE
from tests.helpers.fixtures import COMPILER_OPTIONS

jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)

# No token, one, the edges of a page, and more pages than one step of the loop reads.
LENGTHS = np.array([0, 1, 127, 128, 129, 300, 512, 5 * PAGE, 0, 4 * PAGE + 1], np.int32)
WIDTH = 6


def problem(heads: int, kv_heads: int, size: int, lengths=LENGTHS, dtype=np.float32):
    """(q, pool, table, lengths): every page in use stands anywhere in the pool, and the rest of the table at random."""
    numbers = np.random.default_rng(0)
    slots, total = len(lengths), len(lengths) * WIDTH
    q = numbers.normal(size=(slots, heads, size))
    pool = [3 * numbers.normal(size=(kv_heads, total, PAGE, size)) for _ in range(2)]
    table = numbers.permutation(total).reshape(slots, WIDTH)
    q, keys, values = (jnp.asarray(x, dtype) for x in (q, *pool))
    return q, (keys, values), jnp.asarray(table, jnp.int32), jnp.asarray(lengths)


def by_definition(q, pool, table, lengths, scale=None, softcap=None, window=None) -> np.ndarray:
    """In float64, slot by slot."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, *pool))
    group, out = q.shape[1] // len(keys), np.zeros(q.shape)
    for slot, head in itertools.product(range(len(q)), range(q.shape[1])):
        length = int(lengths[slot])
        if length == 0:
            continue
        k, v = (x[head // group, np.asarray(table)[slot]].reshape(-1, x.shape[-1])[:length] for x in (keys, values))
        scores = k @ q[slot, head] * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        scores = scores if window is None else np.where(np.arange(length) >= length - window, scores, -np.inf)
        weights = np.exp(scores - scores.max())
        out[slot, head] = weights @ v / weights.sum()
    return out


SETTINGS = [
    {},
    {"scale": 0.7},
    {"scale": 0.2, "softcap": 1.5},
    {"window": 1},
    {"window": 128},
    {"window": 200, "softcap": 2.0},
    {"window": np.iinfo(np.int32).max},
]


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (3, 3, 5), (6, 1, 16)])
def test_attention_is_that_of_the_definition(heads, kv_heads, size):
    q, pool, table, lengths = problem(heads, kv_heads, size)
    assert sum(pages.count_for(LENGTHS)) > CHUNK
    for settings in SETTINGS if kv_heads == 2 else SETTINGS[:1]:
        window = settings.get("window")
        numbers = {name: x for name, x in settings.items() if name != "window"}
        run = jit(functools.partial(pages.attend, **numbers))
        found = run(q, pool, table, lengths, window=None if window is None else jnp.int32(window))
        np.testing.assert_allclose(found, by_definition(q, pool, table, lengths, **settings), rtol=0, atol=2e-5)
        assert not np.asarray(found)[LENGTHS == 0].any()


def test_slots_that_are_all_empty_read_nothing():
    q, (keys, values), table, lengths = problem(4, 2, 8)
    found = pages.attend(q, (keys * jnp.nan, values), table, lengths * 0)
    assert not np.asarray(found).any()


def test_what_no_slot_sees_does_not_matter():
    """Pages that nobody has, and the rest of a last page: they may hold anything that a rollout left there."""
    q, pool, table, lengths = problem(4, 2, 8)
    seen = np.zeros((pool[0].shape[1], PAGE), bool)
    for row, length in zip(np.asarray(table), LENGTHS, strict=True):
        for token in range(length):
            seen[row[token // PAGE], token % PAGE] = True
    attend = jit(pages.attend)
    other = [jnp.where(seen[None, ..., None], x, 1e4) for x in pool]
    np.testing.assert_array_equal(attend(q, tuple(other), table, lengths), attend(q, pool, table, lengths))


def test_attention_in_bfloat16_accumulates_in_float32():
    q, pool, table, lengths = problem(4, 2, 8, dtype=jnp.bfloat16)
    found = jit(pages.attend)(q, pool, table, lengths)
    assert found.dtype == jnp.bfloat16
    want = by_definition(*jax.tree.map(lambda x: x.astype(jnp.float32), (q, pool)), table, lengths)
    np.testing.assert_allclose(found.astype(jnp.float32), want, rtol=0, atol=0.05)


# --- the kernels of jax ---

SOFTCAPS = [None, 1.5]


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_the_gpu_kernel_computes_the_same(monkeypatch, softcap):
    """By Pallas' interpreter."""
    monkeypatch.setattr(gpu, "paged_attention", functools.partial(gpu.paged_attention, interpret=True))
    q, pool, table, lengths = problem(4, 2, 16)
    found, want = (
        jit(functools.partial(pages.attend, softcap=softcap, implementation=name))(q, pool, table, lengths)
        for name in ("pallas_gpu", "xla")
    )
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_the_tpu_kernel_computes_the_same(softcap):
    """By Pallas' interpreter, but for slots without tokens. It rounds keys and values to bfloat16, and no others."""
    q, pool, table, lengths = problem(4, 2, 128, lengths=LENGTHS[:6])
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), pool)
    with pltpu.force_tpu_interpret_mode():
        run = jit(functools.partial(pages.attend, softcap=softcap, implementation="pallas_tpu"))
        found = np.asarray(run(q, pool, table, lengths))
    want = by_definition(q, rounded, table, lengths, softcap=softcap)
    live = np.asarray(lengths) > 0
    np.testing.assert_allclose(found[live], want[live], rtol=0, atol=2e-5)
    assert np.abs(found - by_definition(q, pool, table, lengths, softcap=softcap))[live].max() > 1e-3


@pytest.mark.parametrize(
    ("platform", "size", "dtype"),
    [("cuda", 16, jnp.bfloat16), ("cuda", 64, jnp.bfloat16), ("cuda", 128, jnp.bfloat16), ("tpu", 128, jnp.bfloat16),
     ("tpu", 256, jnp.float32)],
)  # fmt: skip
def test_kernels_are_lowered_for_their_platform(platform, size, dtype):
    """Of models for which `caches.choose` takes them, with tables as wide as rollouts have: odd ones too."""
    name = {"cuda": "pallas_gpu", "tpu": "pallas_tpu"}[platform]
    chip = jax.sharding.AbstractDevice("NVIDIA H100", None, "cuda")  # which later versions of jax want to know
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=chip) if platform == "cuda" else None
    for heads, kv_heads, width in ((4, 2, 6), (14, 2, 5), (8, 8, 16)):
        pool = jax.ShapeDtypeStruct((kv_heads, 40, PAGE, size), dtype)
        ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, width), (4,))]
        q = jax.ShapeDtypeStruct((4, heads, size), dtype)
        attend = jax.jit(functools.partial(pages.attend, implementation=name, softcap=30.0))
        with jax.sharding.use_abstract_mesh(mesh) if mesh else contextlib.nullcontext():
            text = attend.trace(q, (pool, pool), *ints).lower(lowering_platforms=(platform,)).as_text()
        assert {"cuda": "triton", "tpu": "tpu_custom_call"}[platform] in text


def test_pages_read_by_the_kernels():
    length = jnp.array([0, 1, 128, 129, 513])
    for name in ("xla", "pallas_gpu"):
        assert pages.read_by(name, length, 6).tolist() == [0, 1, 1, 2, 5]
    assert pages.per_block(6) == 2 and pages.read_by("pallas_tpu", length, 6).tolist() == [2, 2, 2, 2, 6]


# --- what is written ---


@pytest.mark.parametrize("length", [5, 128, 200])
def test_prompts_as_pages_stand_from_the_first_column_on(length):
    """Padded on the left or not at all."""
    numbers = np.random.default_rng(1)
    k = numbers.normal(size=(4, length, 2, 3)).astype(np.float32)
    lengths = np.array([length, 1, length // 2, length - 1])
    mask = np.arange(length) >= length - lengths[:, None]
    padded, whole = pages.prompt_pages(jnp.asarray(k), jnp.asarray(mask)), pages.prompt_pages(jnp.asarray(k), None)
    count = -(-length // PAGE)
    for found, starts in ((padded, length - lengths), (whole, 0 * lengths)):
        assert found.shape == (2, 4, count, PAGE, 3)
        columns = np.asarray(found).reshape(2, 4, -1, 3)
        for row, start in enumerate(starts):
            np.testing.assert_array_equal(columns[:, row, : length - start], np.moveaxis(k[row, start:], 1, 0))


def test_a_token_is_written_into_its_page_or_nowhere():
    pool = tuple(jnp.zeros((2, 3, PAGE, 4)) for _ in range(2))
    keys, values = (np.random.default_rng(2).normal(size=(3, 2, 4)).astype(np.float32) for _ in range(2))
    at, column = jnp.array([2, 3, 0]), jnp.array([127, 5, 0])
    for found, new in zip(jit(pages.write)(pool, at, column, keys, values), (keys, values), strict=True):
        want = np.zeros(found.shape, np.float32)
        want[:, 2, 127], want[:, 0, 0] = new[0], new[2]  # there is no page 3
        np.testing.assert_array_equal(found, want)


# --- which pages a slot has ---

SHARDS, SLOTS, PROMPTS, FREE = 2, 3, 4, 9  # SLOTS and FREE pages of a shard, beside those of its prompts


class Model:
    """A table in Python: of every slot its prompt's pages and its own; of every shard those that nobody has."""

    def __init__(self):
        self.shared: list[list[int]] = [[] for _ in range(SHARDS * SLOTS)]
        self.own: list[list[int]] = [[] for _ in range(SHARDS * SLOTS)]
        self.free = [set(range(PROMPTS, PROMPTS + FREE)) for _ in range(SHARDS)]

    def agree(self, table: pages.PageTable) -> None:
        """Takes over which pages each slot took, having checked that they were free, and compares the rest."""
        count, shared, numbers = (np.asarray(x) for x in (table.count, table.shared, table.pages))
        for slot in range(SHARDS * SLOTS):
            before = self.shared[slot] + self.own[slot]
            has = numbers[slot, : count[slot]].tolist()
            assert shared[slot] == len(self.shared[slot]) and has[: len(before)] == before
            for page in has[len(before) :]:
                self.free[slot // SLOTS].remove(page)  # KeyError: another slot has it
                self.own[slot].append(page)
        for shard in range(SHARDS):
            left = np.asarray(table.free[shard, : table.free_count[shard]]).tolist()
            assert len(left) == len(set(left)) and set(left) == self.free[shard]


def test_no_page_is_lost_or_held_twice_over_many_operations():
    numbers, model, width = np.random.default_rng(3), Model(), 5
    first = jnp.broadcast_to(PROMPTS + jnp.arange(FREE, dtype=jnp.int32), (SHARDS, FREE))
    table = pages.empty_table(SHARDS * SLOTS, width, first)
    take, release, share = map(jit, (pages.take, pages.release, pages.share))
    model.agree(table)
    emptied = 0
    for _ in range(400):
        match numbers.integers(3):
            case 0:
                wanted = numbers.integers(0, 3, SHARDS * SLOTS)
                for slot in numbers.permutation(SHARDS * SLOTS):
                    shard, has = slot // SLOTS, len(model.shared[slot]) + len(model.own[slot])
                    others = sum(wanted[s] for s in range(shard * SLOTS, (shard + 1) * SLOTS) if s != slot)
                    wanted[slot] = max(0, min(wanted[slot], width - has, len(model.free[shard]) - others))
                counts = [len(shared) + len(own) for shared, own in zip(model.shared, model.own, strict=True)]
                table = take(table, jnp.asarray(wanted, jnp.int32))
                assert table.count.tolist() == (counts + wanted).tolist()
            case 1:
                leave = numbers.random(SHARDS * SLOTS) < 0.4
                table = release(table, jnp.asarray(leave))
                for slot in np.flatnonzero(leave):
                    model.free[slot // SLOTS] |= set(model.own[slot])
                    model.own[slot], model.shared[slot] = [], []
            case _:
                empty = [not (shared or own) for shared, own in zip(model.shared, model.own, strict=True)]
                joins = np.array(empty) & (numbers.random(SHARDS * SLOTS) < 0.7)
                start, count = numbers.integers(0, 3, SHARDS * SLOTS), numbers.integers(0, 3, SHARDS * SLOTS)
                table = share(table, jnp.asarray(joins), *(jnp.asarray(x, jnp.int32) for x in (start, count)))
                for slot in np.flatnonzero(joins):
                    model.shared[slot] = list(range(start[slot], start[slot] + count[slot]))
        model.agree(table)
        emptied += any(not free for free in model.free)
    assert emptied > 10, "the last page was taken too"


def test_the_gpu_kernel_cuts_every_table_into_equal_parts():
    for width in (1, 15, 16, 17, 57, 71):
        wide = pages.table_width("pallas_gpu", width)
        assert width <= wide < width + pages.SPLITS and wide % pages.SPLITS == 0
        assert pages.table_width("pallas_tpu", width) == pages.table_width("xla", width) == width
