"""Rows in flight: drawn over several steps, each token is that of its key and of the parameters in force."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dppo_jax.models.decoder import forward, head_weight
from dppo_jax.rollout import Finished, InFlight, Rollout
from dppo_jax.types import PromptBatch
from experiments.benchmark.workloads import WORKLOADS, lengths
from tests.helpers.fixtures import COMPILER_OPTIONS, TINY, random_params

N, G, P, R, K, STEPS = 4, 2, 6, 40, 3, 8
KEY = jax.random.key(3)
PARAMS = random_params()
SETTINGS = dict(group_size=G, max_new_tokens=R, temperature=1.0, eos_ids=(-1,), pad_id=0, topk=K, record_entropy=True)
# (batches ahead, age, options): caches, scanned layers, shards, slots for all, pages for one row alone.
CASES = {
    "blocks": (2, 2, dict(slots=4)),
    "blocks, older": (3, 5, dict(slots=8)),
    "pages": (1, 3, dict(slots=4, paged=True)),
    "few pages": (2, 2, dict(slots=6, paged=True, pages=2, shards=2)),
    "scanned": (2, 3, dict(slots=4, shards=2, unrolled=False)),
    "a slot each": (1, 1, dict(paged=True, unrolled=False)),
}


LONG = ("blocks", "a slot each")  # more of the same
cases = pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in LONG)) for c in CASES])


def batch(number: int) -> PromptBatch:
    """Prompts and long-tailed limits of a step."""
    rng = np.random.default_rng(number)
    mask = np.arange(P) >= P - rng.integers(1, P + 1, N)[:, None]
    tokens = np.where(mask, rng.integers(2, TINY.vocab_size, (N, P)), 0).astype(np.int32)
    limit = np.clip(rng.lognormal(np.log(8), 1, (N, G)), 1, R).astype(np.int32)
    return PromptBatch(tokens=tokens, mask=mask, group=np.arange(N, dtype=np.int32), limit=limit)


def moved(step: int):
    """The parameters of a step."""
    return jax.tree.map(lambda x: x * (1 + 0.02 * step), PARAMS)


@functools.cache
def programs(case: str):
    ahead, age, options = CASES[case]
    in_flight = InFlight(Rollout(TINY, **SETTINGS, **options), N, ahead, age)
    compiled = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    return in_flight, compiled(in_flight), compiled(in_flight.join)


@functools.cache
def drawn(case: str, moves: bool) -> list[Finished]:
    """What every step gives, with parameters that move from step to step or stay."""
    in_flight, draw, join = programs(case)
    flight, joined, found = in_flight.empty(P), 0, []
    for step in range(STEPS):
        for number in range(joined, min(step + in_flight.ahead, STEPS - 1) + 1):
            flight, joined = join(flight, batch(number), number), number + 1
        flight, finished = draw(moved(step) if moves else PARAMS, flight, KEY, step)
        found.append(jax.tree.map(np.asarray, finished))
    assert not flight.count.any()
    return found


@functools.cache
def at_once(number: int):
    """The rollout of one step's prompts, drawn at once."""
    plain = plain_program()
    return jax.tree.map(np.asarray, plain(PARAMS, batch(number), jax.random.fold_in(KEY, number)))


@functools.cache
def plain_program():
    return jax.jit(Rollout(TINY, **SETTINGS), compiler_options=COMPILER_OPTIONS)


def origins(found: list[Finished]) -> list[tuple[int, int]]:
    return [tuple(origin.tolist()) for finished in found for origin in finished.origin]


@cases
def test_every_group_is_trained_once_in_the_order_in_which_it_began(case):
    found = drawn(case, True)
    assert sorted(origins(found)) == [(number, group) for number in range(STEPS) for group in range(N)]
    shards = CASES[case][2].get("shards", 1)
    for finished in found:
        for shard in finished.origin.reshape(shards, -1, 2):
            assert shard.tolist() == sorted(shard.tolist())  # of those that are complete, the first to begin come first
        for row, (number, group) in enumerate(finished.origin):
            np.testing.assert_array_equal(finished.prompts.tokens[row], batch(number).tokens[group])
        np.testing.assert_array_equal(finished.rollout.group, np.repeat(np.arange(N), G))


@cases
def test_no_token_is_older_than_it_may_be(case):
    ahead, most, _ = CASES[case]
    ages = [finished.age for finished in drawn(case, True)]
    assert max(age.max() for age in ages) <= most and max(age.max() for age in ages) >= 1
    for step, finished in enumerate(drawn(case, True)):
        assert (finished.origin[:, 0] >= step + ahead - most).all()  # no group waits longer
        mask = finished.rollout.response_mask
        assert (finished.age <= step).all() and not finished.age[~mask].any()
        assert finished.age_max == finished.age.max()
        np.testing.assert_allclose(finished.age_mean, finished.age.sum() / mask.sum(), rtol=1e-6)
        assert (np.diff(finished.age, axis=1)[mask[:, 1:]] <= 0).all()  # later tokens are younger


@cases
def test_parameters_that_stay_draw_what_they_draw_at_once(case):
    for finished in drawn(case, False):
        for place, (number, group) in enumerate(finished.origin):
            whole = at_once(number)
            for member in range(G):
                row, other = place * G + member, group * G + member
                mask = whole.response_mask[other]
                np.testing.assert_array_equal(finished.rollout.response_mask[row], mask)
                for name in ("tokens", "topk_ids"):
                    one, two = getattr(finished.rollout, name)[row], getattr(whole, name)[other]
                    np.testing.assert_array_equal(one[mask], two[mask])
                for name in ("behavior_logp", "topk_logp"):
                    one, two = getattr(finished.rollout, name)[row], getattr(whole, name)[other]
                    np.testing.assert_allclose(one[mask], two[mask], atol=2e-5)


@functools.cache
def teacher_forced():
    def logp(params, tokens, mask):
        return jax.nn.log_softmax(forward(TINY, params, tokens, mask)[:, P - 1 : -1] @ head_weight(params).T)

    return jax.jit(logp, compiler_options=COMPILER_OPTIONS)


@cases
def test_a_token_has_the_log_probability_of_the_parameters_that_drew_it(case):
    longest = 0
    for step, finished in enumerate(drawn(case, True)):
        out, mask = finished.rollout, finished.rollout.response_mask
        tokens = np.concatenate([np.repeat(finished.prompts.tokens, G, axis=0), out.tokens], axis=1)
        attended = np.concatenate([np.repeat(finished.prompts.mask, G, axis=0), mask], axis=1)
        by_step = np.stack([np.asarray(teacher_forced()(moved(s), tokens, attended)) for s in range(step + 1)])
        log_p = np.take_along_axis(by_step, (step - finished.age)[None, :, :, None], axis=0)[0]
        want = np.take_along_axis(log_p, out.tokens[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(out.behavior_logp[mask], want[mask], atol=1e-5)
        np.testing.assert_allclose(
            out.topk_logp[mask], np.take_along_axis(log_p, out.topk_ids, axis=-1)[mask], atol=1e-5
        )
        entropy = -np.sum(np.exp(log_p) * log_p, axis=-1)
        np.testing.assert_allclose(out.behavior_entropy[mask], entropy[mask], atol=1e-5)
        now = np.take_along_axis(by_step[step], out.tokens[..., None], axis=-1)[..., 0]
        old = mask & (finished.age > 0)
        assert not old.any() or np.abs(out.behavior_logp - now)[old].max() > 1e-3
        longest = max([longest, *(len(np.unique(age[m])) for age, m in zip(finished.age, mask, strict=True))])
    assert longest > 1  # updates fall inside responses


def test_three_updates_inside_one_response():
    """All rows in slots, and steps that end early: a long row is under way for four steps."""
    spread = max(
        len(np.unique(age[mask]))
        for finished in drawn("blocks, older", True)
        for age, mask in zip(finished.age, finished.rollout.response_mask, strict=True)
    )
    assert spread >= 4


@cases
def test_it_is_compiled_once(case):
    drawn(case, True)
    _, draw, join = programs(case)
    assert draw._cache_size() == 1 and join._cache_size() == 1


@pytest.mark.slow
def test_a_batch_of_long_tailed_lengths_takes_little_more_steps_than_its_tokens_fill_slots():
    """Workload L: decode steps of all steps together over tokens / slots, the first and the last batch included."""
    load, slots, steps, ahead = WORKLOADS["L"], 48, 5, 1
    model = dataclasses.replace(TINY, num_layers=1, max_position=512)
    rollout = Rollout(
        model,
        group_size=load.group_size,
        max_new_tokens=load.max_new_tokens,
        temperature=1.0,
        eos_ids=(-1,),
        pad_id=0,
        slots=slots,
        paged=True,
    )
    in_flight = InFlight(rollout, load.prompts, ahead, 1)
    draw, join = (jax.jit(f, compiler_options=COMPILER_OPTIONS) for f in (in_flight, in_flight.join))
    params, flight, joined, works = random_params(model=model), in_flight.empty(4), 0, []
    rows = (load.prompts, load.group_size)
    prompts = np.full((load.prompts, 4), 3, np.int32)
    for step in range(steps):
        for number in range(joined, min(step + ahead, steps - 1) + 1):
            limit = lengths(dataclasses.replace(load, seed=number)).reshape(rows)
            group = np.arange(load.prompts, dtype=np.int32)
            flight, joined = join(flight, PromptBatch(prompts, prompts > 0, group, limit), number), number + 1
        flight, finished = draw(params, flight, KEY, step)
        works.append(jax.tree.map(float, finished.work))
    live = sum(work.live for work in works)
    assert live == sum(lengths(dataclasses.replace(load, seed=number)).sum() - np.prod(rows) for number in range(steps))
    assert sum(work.decode_steps for work in works) <= 1.1 * live / slots
    assert sum(work.pages_read for work in works) <= 1.05 * sum(work.pages_live for work in works)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_flight_of_other_shards_is_dealt_in_the_order_of_its_groups(shards):
    """From four shards, in which the first places of some have older groups than those of others."""
    before, after = (InFlight(Rollout(TINY, **SETTINGS, shards=count), N, 3, 3) for count in (4, shards))
    flight = before.empty(P)
    for number in (3, 5, 6):
        flight = before.join(flight, batch(number), np.int32(number))
    old = np.asarray(flight.batch).reshape(4, -1).copy()
    old[2, :3] = 1, 2, 4
    flight = dataclasses.replace(flight, batch=old.reshape(-1), tokens_drawn=np.arange(4 * N * G).reshape(-1, G))

    def groups(flight, shards: int) -> list[list[tuple]]:
        """Of every shard what it has: batch, number, limits, tokens drawn."""
        fields = flight.batch, flight.prompts.group, flight.prompts.limit, flight.tokens_drawn
        of_groups = zip(*map(np.asarray, fields), strict=True)
        rows = [tuple(np.ravel(x).tolist() for x in of_group) for of_group in of_groups]
        each = len(rows) // shards
        assert np.asarray(flight.count).tolist() == [12 // shards] * shards
        return [rows[number * each :][: 12 // shards] for number in range(shards)]

    dealt = jax.jit(after.dealt)(flight)
    everything = sorted(row for of_shard in groups(flight, 4) for row in of_shard)
    assert groups(dealt, shards) == [everything[number::shards] for number in range(shards)]
    back = before.dealt(dealt)
    assert groups(back, 4) == [everything[number::4] for number in range(4)]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), dealt) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after.empty(P)
    )
