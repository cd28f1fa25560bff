"""A cache of pages against one of blocks: the same rows, whatever the model, the slots and the room there is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models import load_policy
from dppo_jax.models.config import ModelConfig
from dppo_jax.models.pages import PAGE, count_for
from dppo_jax.rollout import Rollout, Work, choose_cache
from dppo_jax.types import PromptBatch, RolloutBatch
from tests.helpers.fixtures import COMPILER_OPTIONS, MOE, TINY, random_params
from tests.helpers.rollouts import MODELS, policy

TOLERANCE = 5e-5  # both are within 2e-5 of float64
N, P, G, R = 4, 150, 2, 150
# Prompts of a full page and nothing else, of one that a group shares and a rest, of none that is full; rows that end at
# the edge of a page, and one beyond it.
EDGES = np.array([128, 1, 150, 37]), np.array([[1, 150], [129, 128], [3, 107], [92, 91]])
# Rows that begin with one page, and soon have two, and then three.
GROWING = np.array([125, 120, 150, 127]), np.array([[140, 3], [145, 138], [9, 107], [132, 150]])
END = 5  # a token that every vocabulary here has
WINDOW = 40


@functools.cache
def model(name: str) -> tuple[ModelConfig, dict]:
    match name:
        case "tiny":
            return TINY, random_params()
        case "moe":
            return MOE, random_params(model=MOE)
        case "gemma2":
            loaded = load_policy(str(MODELS / name))
            assert loaded.config.attn_softcap and loaded.config.sliding is not None
            return dataclasses.replace(loaded.config, window=WINDOW), loaded.params
        case "mistral":
            loaded = load_policy(str(MODELS / name))
            assert all(loaded.config.sliding)
            return dataclasses.replace(loaded.config, window=WINDOW), loaded.params
    return policy(name)


def prompts(vocabulary: int, rows: tuple[np.ndarray, np.ndarray]) -> PromptBatch:
    tokens = np.random.default_rng(0).integers(2, vocabulary, (N, P)).astype(np.int32)
    mask = np.arange(P) >= P - rows[0][:, None]
    return PromptBatch(tokens, mask, np.arange(N, dtype=np.int32), rows[1].astype(np.int32))


@functools.cache
def compiled(name: str, **options):
    """(rows) -> (batch, work); GROWING rows never end before their limits."""
    config, params = model(name)
    settings = dict(group_size=G, max_new_tokens=R, pad_id=0, topk=3, temperature=1.0)

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(params, prompts, key, end):
        return Rollout(config, eos_ids=(end,), **(settings | options)).measured(params, prompts, key)

    @functools.cache
    def call(growing: bool = False) -> tuple[RolloutBatch, Work]:
        batch = prompts(config.vocab_size, GROWING if growing else EDGES)
        found = run(params, batch, jax.random.key(1), jnp.int32(-1 if growing else END))
        return jax.tree.map(np.asarray, found)

    return call


def check_same(found: RolloutBatch, want: RolloutBatch) -> None:
    for field in ("tokens", "response_mask", "truncated", "group", "topk_ids", "experts", "prompt_experts"):
        np.testing.assert_array_equal(getattr(found, field), getattr(want, field), field)
    for field in ("behavior_logp", "topk_logp"):
        np.testing.assert_allclose(getattr(found, field), getattr(want, field), rtol=0, atol=TOLERANCE)


def check_work(work: Work, batch: RolloutBatch, prompt_lengths: np.ndarray, *, paged: bool = True) -> None:
    """Against counts from the lengths: a row's first token is the prefill's, and a step reads what is there, its own
    token included."""
    steps = batch.response_mask.sum(axis=1) - 1
    held = [np.arange(count) + prompt for prompt, count in zip(np.repeat(prompt_lengths, G), steps, strict=True)]
    live = sum(count_for(position + 1).sum() for position in held)
    assert work.live == steps.sum() and work.pages_live == live
    assert work.pages_read == live if paged else work.pages_read > 1.1 * live


slow = pytest.mark.slow
CASES = [
    ("tiny", 1.0, dict(slots=3)),
    ("qwen2", 1.7, dict(slots=2, shards=2, unrolled=False)),
    ("gemma2", 1.0, dict(slots=3, unrolled=False)),
    ("mistral", 1.0, dict(slots=3, unrolled=False)),
    ("moe", 1.0, dict(slots=4, record_experts=True, unrolled=False, shards=2)),
    pytest.param("llama", 0.0, dict(unrolled=False), marks=slow),
    pytest.param("qwen3", 0.5, dict(slots=3), marks=slow),
    pytest.param("llama", 1.0, dict(slots=5, unrolled=False), marks=slow),
    pytest.param("qwen2", 1.7, dict(slots=4, shards=2), marks=slow),
    pytest.param("gemma2", 1.0, dict(slots=3), marks=slow),
    pytest.param("moe", 1.0, dict(slots=3, record_experts=True), marks=slow),
]


@pytest.mark.parametrize(("name", "temperature", "options"), CASES)
def test_pages_draw_what_blocks_draw(name, temperature, options):
    like = {key: value for key, value in options.items() if key == "record_experts"}
    want, blocks_work = compiled(name, temperature=temperature, unrolled=False, **like)()
    found, work = compiled(name, temperature=temperature, paged=True, **options)()
    check_same(found, want)
    check_work(work, found, EDGES[0])
    check_work(blocks_work, want, EDGES[0], paged=False)
    assert work.put_back == 0
    lengths = want.response_mask.sum(axis=1)
    assert len(set(lengths.tolist())) > 5
    if name in ("gemma2", "mistral"):
        assert (np.repeat(EDGES[0], G) + lengths).max() > PAGE + WINDOW, "a row has a page that its window has left"


# --- room ---

WIDTH = 3  # pages of the longest row there may be
SLOTS = 4


@functools.cache
def with_room(name: str, shards: int, **options):
    """(pages of a shard) -> (batch, work), compiled once for every number of them."""
    config, params = model(name)
    rollout = Rollout(
        config, group_size=G, max_new_tokens=R, eos_ids=(), pad_id=0, topk=3, temperature=1.0, slots=SLOTS,
        shards=shards, paged=True, pages=SLOTS // shards * WIDTH - 1, unrolled=False, **options,
    )  # fmt: skip

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(params, prompts, key, room):
        published = rollout.publish(params)
        waiting, prompt_experts = rollout.prefill(published, prompts, key)
        state = rollout.idle(waiting, prompt_experts)
        table = dataclasses.replace(state.table, free_count=jnp.full_like(state.table.free_count, room))
        state = rollout.decoded(published, waiting, dataclasses.replace(state, table=table))
        return rollout.result(prompts, waiting, state, prompt_experts), state.work.total(), state.table

    def call(room: int) -> tuple[RolloutBatch, Work]:
        found = run(params, prompts(config.vocab_size, GROWING), jax.random.key(1), jnp.int32(room))
        batch, work, table = jax.tree.map(np.asarray, found)
        assert (table.free_count == room).all() and not table.count.any() and not table.shared.any()
        return batch, work

    return call


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("tiny", 1),
        pytest.param("tiny", 2, marks=slow),
        pytest.param("gemma2", 1, marks=slow),
        pytest.param("moe", 2, marks=slow),
    ],
)
def test_rows_that_make_room_are_the_same_rows(name, shards):
    """For every number of pages, from those of one row up to enough; all pages are free in the end."""
    like = dict(record_experts=True) if name == "moe" else {}
    want, _ = compiled(name, temperature=1.0, unrolled=False, **like)(growing=True)
    np.testing.assert_array_equal(want.response_mask.sum(axis=1), GROWING[1].reshape(-1))
    put_back, steps = [], []
    for room in range(WIDTH, SLOTS // shards * WIDTH):
        found, work = with_room(name, shards, **like)(room)
        check_same(found, want)
        check_work(work, found, GROWING[0])
        put_back.append(int(work.put_back))
        steps.append(int(work.decode_steps))
    assert 0 < max(put_back) < N * G and steps[0] > steps[-1]
    assert put_back[-1] == 0 or shards > 1


@pytest.mark.slow
@pytest.mark.parametrize("unrolled", [True, False])
def test_pages_of_a_small_pool(unrolled):
    """As if there were more that somebody else has; and fewer than the longest row needs are as many as it needs."""
    want, _ = compiled("tiny", temperature=1.0, unrolled=False)(growing=True)
    for pages, room in ((1, WIDTH), (5, 5)) if unrolled else ((5, 5),):
        found, work = compiled("tiny", paged=True, pages=pages, slots=SLOTS, unrolled=unrolled)(growing=True)
        check_same(found, want)
        assert work == with_room("tiny", 1)(room)[1]


def test_pages_are_for_platforms_with_a_kernel_that_takes_the_model():
    def choice(platform, dtype=jnp.bfloat16, size=128, window=None, length=4096, **cache):
        config = dataclasses.replace(TINY, head_dim=size, window=window)
        return choose_cache(platform, config, dtype=dtype, length=length, **cache)[:2]

    assert choice("tpu") == (True, "pallas_tpu") and choice("gpu") == (True, "pallas_gpu")
    assert choice("gpu", jnp.float16, size=64) == (True, "pallas_gpu")
    for platform in ("tpu", "gpu"):
        assert choice(platform, jnp.float32) == choice(platform, size=80) == (False, "xla")
        assert choice(platform, window=1024) == (False, "xla")
        assert choice(platform, window=4096) == (True, f"pallas_{platform}")
        assert choice(platform, cache="blocks")[0] is False
        assert choice(platform, jnp.float32, cache="pages") == (True, "xla")
    assert choice("tpu", jnp.float16) == choice("tpu", size=64) == (False, "xla")
    assert choice("cpu", jnp.float32, length=513) == (True, "xla") and choice("cpu", length=512) == (False, "xla")
