"""A rollout in several calls is to the bit the rollout in one, its schedule too; and may be given up between them."""

import functools

import jax
import numpy as np
import pytest

from dppo_jax.rollout import Abandoned, ExactRollout, InChunks, Rollout, make_stops
from tests.helpers.fixtures import TINY, random_params
from tests.rollout import test_exact_rollout as exact
from tests.rollout import test_stops as stopped

PARAMS = random_params()
KEY = jax.random.key(1)


class Counting:
    """Counts how often it is asked, and says at the `at`-th time (0: never) that the rollout is to be given up."""

    count = at = 0

    def __call__(self) -> bool:
        self.count += 1
        return self.count == self.at


def in_chunks(begin, draw, end, most: int, asked: Counting) -> InChunks:
    options: dict = dict(arguments=None, results=None, everywhere=None)
    return InChunks(begin, draw, end, most=most, asked=asked, **options)


def identical(one, two) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(first, second)


def with_stop_strings_and_few_pages():
    texts = stopped.FLIGHT_TEXTS[:1], stopped.LATER, stopped.FIRST
    stops = make_stops(*texts, vocab_size=TINY.vocab_size, silent=(stopped.END,))
    rollout = Rollout(
        TINY, group_size=stopped.G, max_new_tokens=stopped.R, pad_id=0, topk=3, temperature=1.0, unrolled=False,
        eos_ids=(stopped.END,), slots=4, paged=True, pages=4, stops=stops, record_entropy=True,
    )  # fmt: skip
    return rollout, rollout, (stopped.prompts(), KEY)


def exactly():
    whole = ExactRollout(exact.DRAFT, exact.PASS, exact.SHAPE, exact.MINIBATCHES)
    return exact.DRAFT, whole, (exact.prompts(), KEY)


CASES = {"stops, few pages": (with_stop_strings_and_few_pages, 61), "exact": (exactly, 4)}


@functools.cache
def whole(name: str):
    _, rollout, arguments = CASES[name][0]()
    return jax.jit(rollout.measured)(PARAMS, *arguments)


@functools.cache
def chunked(name: str) -> tuple[InChunks, Counting]:
    (make, most), asked = CASES[name], Counting()
    rollout, ends, _ = make()
    return in_chunks(rollout.begin, rollout.draw, ends.end, most, asked), asked


@pytest.mark.parametrize("name", CASES)
def test_several_calls_draw_what_one_draws(name):
    make, most = CASES[name]
    rollout, asked = chunked(name)
    batch, work = rollout(PARAMS, *make()[2])
    identical((batch, work), whole(name))
    assert asked.count == -(-int(work.decode_steps) // most) - 1 >= 2  # between all calls, and nowhere else
    assert name != "stops, few pages" or work.put_back > 0


def test_it_is_given_up_where_it_is_asked_and_drawn_again():
    rollout, asked = chunked("stops, few pages")
    arguments = CASES["stops, few pages"][0]()[2]
    asked.at = asked.count + 2
    with pytest.raises(Abandoned):
        rollout(PARAMS, *arguments)
    assert asked.count == asked.at
    identical(rollout(PARAMS, *arguments), whole("stops, few pages"))
