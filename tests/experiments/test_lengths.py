"""A rollout's scheduler followed from lengths alone: its counts are those of the rollout itself."""

import functools

import jax
import numpy as np
import pytest

from dppo_jax.errors import UserError
from dppo_jax.models.decoder import init_params
from dppo_jax.models.pages import count_for
from dppo_jax.rollout import InFlight, Rollout
from dppo_jax.storage.run_log import RunLog
from dppo_jax.types import PromptBatch
from experiments.compile_for_tpu import lengths
from experiments.compile_for_tpu.lengths import Settings, decoding, drawn_from
from tests.helpers.fixtures import COMPILER_OPTIONS, TINY

GROUP, PROMPT, LONGEST = 2, 150, 400
PROMPTS = np.array([150, 20, 40, 33, 60, 128])
RESPONSES = np.array([300, 290, 1, 400, 340, 299, 128, 1, 400, 277, 300, 12])


def rollout(**options) -> Rollout:
    settings = dict(group_size=GROUP, max_new_tokens=LONGEST, temperature=1.0, eos_ids=(-1,), pad_id=0)
    return Rollout(TINY, **settings | options)


def batch() -> PromptBatch:
    mask = np.arange(PROMPT) >= PROMPT - PROMPTS[:, None]
    limit = RESPONSES.reshape(-1, GROUP).astype(np.int32)
    return PromptBatch(mask.astype(np.int32), mask, np.arange(len(PROMPTS), dtype=np.int32), limit)


@functools.cache
def params():
    return init_params(TINY, jax.random.key(0))


def counted(**options):
    run = jax.jit(rollout(**options).measured, compiler_options=COMPILER_OPTIONS)
    return run(params(), batch(), jax.random.key(1))[1]


CASES = [  # slots, shards, paged, pages, whether rows make room
    (3, 1, True, None, False),
    (3, 1, True, 6, True),
    (4, 2, True, 6, True),
    (12, 2, True, 8, True),
    (3, 1, False, None, False),
    (4, 2, False, None, False),
]


@pytest.mark.parametrize(("slots", "shards", "paged", "pages", "make_room"), CASES)
def test_counts_are_those_of_the_rollout(slots, shards, paged, pages, make_room):
    work = counted(slots=slots, shards=shards, paged=paged, pages=pages)
    settings = Settings(
        slots,
        GROUP,
        shards,
        pages=pages,
        width=count_for(PROMPT + LONGEST - 1),
        columns=None if paged else PROMPT + LONGEST - 1,
        prompt_columns=PROMPT,
    )
    found = decoding(np.repeat(PROMPTS, GROUP), RESPONSES, settings)
    for name in ("decode_steps", "live", "pages_read", "pages_live", "put_back"):
        assert getattr(found, name) == int(getattr(work, name)), name
    assert (found.put_back > 0) == make_room


@pytest.mark.parametrize("pages", [pytest.param(None, marks=pytest.mark.slow), 6])
def test_counts_are_those_of_rows_in_flight(pages):
    """Over five steps: the simulated groups are those that stay and leave in the rollout itself."""
    ahead, prompts, steps = 2, 2, 5
    whole = InFlight(rollout(slots=4, shards=2, paged=True, pages=pages), prompts=prompts, ahead=ahead, max_age=3)

    def lengths_of(number: int) -> tuple[np.ndarray, np.ndarray]:
        own = np.random.default_rng(number)
        return own.integers(1, PROMPT + 1, prompts), own.integers(1, LONGEST + 1, prompts * GROUP)

    join, draw = jax.jit(whole.join), jax.jit(whole, compiler_options=COMPILER_OPTIONS)
    flight, works = whole.empty(PROMPT), []
    for step in range(steps):
        for number in range(step + ahead if step else 0, step + ahead + 1):
            prompt, response = lengths_of(number)
            mask = np.arange(PROMPT) >= PROMPT - prompt[:, None]
            limit = response.reshape(-1, GROUP).astype(np.int32)
            new = PromptBatch(mask.astype(np.int32), mask, np.arange(prompts, dtype=np.int32), limit)
            flight = join(flight, new, np.int32(number))
        flight, finished = draw(params(), flight, jax.random.key(0), np.int32(step))
        works.append(finished.work)
    found = lengths.in_flight(
        lambda number: (np.repeat(lengths_of(number)[0], GROUP), lengths_of(number)[1]),
        Settings(4, GROUP, 2, pages=pages, width=count_for(PROMPT + LONGEST - 1)),
        lengths.Flight(prompts, ahead, 3),
        steps,
    )
    for one, work in zip(found, works, strict=True):
        for name in ("decode_steps", "live", "pages_read", "pages_live", "put_back"):
            assert getattr(one, name) == int(getattr(work, name)), name


def test_lengths_are_of_their_distribution():
    lognormal, uniform = (drawn_from(text, 100_000, 100_000) for text in ("lognormal:3700:1", "uniform:10:20"))
    assert np.mean(lognormal) == pytest.approx(3700, rel=0.03) and np.std(np.log(lognormal)) == pytest.approx(1, 0.01)
    assert set(uniform) == set(range(10, 21)) and drawn_from("uniform:10:20", 50, 12).max() == 12


@pytest.mark.parametrize(
    "text, sentence",
    [
        (x, "are neither")
        for x in ("normal:1:2", "lognormal:5", "uniform:a:b", "", "nan", "lognormal:nan:1", "uniform:1:2:3")
    ]
    + [(f"lognormal:{x}", "MEAN must be above 0") for x in ("0:1", "-3:1", "1e9:1", "5:1e200", "5:-1", "5:6", "inf:1")]
    + [(f"uniform:{x}", "A must be at least 1") for x in ("9:3", "0:5", "1e300:1e308", "5:inf")],
)
def test_other_lengths_are_refused(text, sentence):
    with pytest.raises(UserError, match=sentence):
        drawn_from(text, 3, 10)


def test_lengths_of_a_run(tmp_path):
    with RunLog(tmp_path, hparams={}, resume_step=0, total_steps=2) as log:
        log.scalars(0, {lengths.TAG: 90.0})
        log.scalars(1, {lengths.TAG: 110.0})
    assert np.array_equal(drawn_from(str(tmp_path), 9, 500), drawn_from("lognormal:100:1", 9, 500))


def test_a_kernel_reads_whole_blocks_of_pages_and_one_for_an_idle_slot():
    """Two slots, rows of 1 + 300 and 1 + 2 tokens in blocks of 2 pages."""
    found = decoding(np.array([1, 1]), np.array([301, 2]), Settings(2, 1, page_block=2))
    assert (found.decode_steps, found.live) == (300, 301)
    assert found.pages_live == 127 + 2 * 128 + 3 * 45 + 1
    assert found.pages_read == 255 * 2 + 45 * 4 + 2 + 299 * 2
