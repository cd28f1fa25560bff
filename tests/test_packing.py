"""Packed rows: every token once and in its place, no more than fits, and the same numbers as one sample a row."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_jax import packing
from dppo_jax.losses import bind_loss
from dppo_jax.metrics import summary
from dppo_jax.models.decoder import forward
from dppo_jax.optimizer import make_optimizer
from dppo_jax.packing import PackShape
from dppo_jax.teacher_forced import make_policy_logprobs, make_recompute
from dppo_jax.train_step import init_state, make_update
from dppo_jax.types import TrainBatch
from dppo_jax.weights import WEIGHTS
from experiments.benchmark.workloads import WORKLOADS, lengths
from tests.helpers.fixtures import COMPILER_OPTIONS, TINY, random_params

P, R, K = 5, 6, 3
PIECE = jax.jit(lambda plan, number: packing.microbatch(plan, number))


# --- layouts ---


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.floats(0, 1), st.sampled_from([1, 64, 128]))
def test_a_layout_holds_any_sample(prompt, response, rows, share, multiple):
    """Its rows are no longer than they must be; response columns suffice for one whole response."""
    shape = packing.pack_shape(
        prompt_length=prompt,
        max_new_tokens=response,
        rows=rows,
        mean_prompt=1 + share * (prompt - 1),
        multiple=multiple,
    )
    assert shape.rows == rows
    assert shape.length % multiple == 0 and prompt + response <= shape.length < prompt + response + multiple
    assert response <= shape.responses < shape.length


def test_layouts_by_hand():
    """Response columns: the row's length, shared as a mean prompt and the longest response would share it."""
    layout = functools.partial(packing.pack_shape, prompt_length=16, max_new_tokens=64, rows=8)
    assert layout() == PackShape(8, 80, 64)
    assert layout(mean_prompt=16) == PackShape(8, 80, 64)
    assert layout(mean_prompt=8) == PackShape(8, 80, 72)  # 80 * 64 / 72 = 71.1
    assert layout(multiple=64) == PackShape(8, 128, 103)  # 128 * 64 / 80 = 102.4
    assert layout(mean_prompt=0.5) == PackShape(8, 80, 79)  # 79.4, but every sample has a prompt of one token at least


# --- plans ---


@st.composite
def cases(draw):
    """(rows of the minibatch, prompt lengths of all rows, response lengths of all rows, layout)"""
    longest_prompt, longest_response = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    count = draw(st.integers(1, 16))
    extreme = lambda longest: st.one_of(st.just(1), st.just(longest), st.integers(1, longest))  # noqa: E731
    prompts, responses = (
        np.array(draw(st.lists(extreme(longest), min_size=count, max_size=count)))
        for longest in (longest_prompt, longest_response)
    )
    rows = np.array(draw(st.permutations(range(count)))[: draw(st.integers(1, count))])
    shape = packing.pack_shape(
        prompt_length=longest_prompt,
        max_new_tokens=longest_response,
        rows=draw(st.integers(1, 5)),
        mean_prompt=draw(st.one_of(st.none(), st.floats(1, longest_prompt))),
        multiple=draw(st.sampled_from([1, 8])),
    )
    return rows, prompts, responses, shape


def written_out(plan, prompts, responses):
    """Places of all microbatches, a sample at a time: the sample of each token and its number in it, [I, M, T], and the
    columns of response tokens [I, M, Q]. Lengths are those of the minibatch's samples."""
    shape, count = plan.shape, plan.tokens_per_row.size
    sample_of = np.full((count, shape.length), -1)
    offset, columns = np.zeros((count, shape.length), int), np.zeros((count, shape.responses), int)
    for sample, row in enumerate(plan.rows):
        first, size, before = plan.columns[sample], prompts[sample] + responses[sample], plan.responses_before[sample]
        if row == count:
            continue
        assert (sample_of[row, first : first + size] == -1).all(), "two samples in one place"
        sample_of[row, first : first + size] = sample
        offset[row, first : first + size] = np.arange(size)
        columns[row, before : before + responses[sample]] = plan.response_columns[sample] + np.arange(responses[sample])
    return tuple(x.reshape(len(plan.tokens_per_row), shape.rows, -1) for x in (sample_of, offset, columns))


def check_plan(plan, rows, prompts, responses, shape):
    """Against the lengths of the minibatch's samples alone."""
    prompts, responses = prompts[rows], responses[rows]
    np.testing.assert_array_equal(plan.batch_rows, rows)
    pieces = math.ceil(len(rows) / shape.rows)
    assert plan.tokens_per_row.shape == plan.responses_per_row.shape == (pieces, shape.rows)
    assert {x.dtype for x in jax.tree.leaves(plan)} == {np.dtype("int32")}

    whole = written_out(plan, prompts, responses)
    sample, offset, columns = (x.reshape(pieces * shape.rows, -1) for x in whole)
    used = plan.responses_per_row.reshape(-1)
    np.testing.assert_array_equal((sample >= 0).sum(axis=1), plan.tokens_per_row.reshape(-1))
    seen: list[int] = []
    for row in range(len(sample)):
        # Contiguous: in a row, each sample is one run, its tokens numbered in order; -1 only behind the last.
        at, response_columns = 0, []
        for member, run in itertools.groupby(sample[row]):
            size = len(list(run))
            if member == -1:
                assert at + size == shape.length
            else:
                assert size == prompts[member] + responses[member]
                np.testing.assert_array_equal(offset[row, at : at + size], np.arange(size))
                response_columns.extend(range(at + prompts[member], at + size))
                seen.append(int(member))
            at += size
        assert len(response_columns) == used[row] <= shape.responses
        np.testing.assert_array_equal(columns[row], np.pad(response_columns, (0, shape.responses - used[row])))
    assert sorted(seen) == list(range(len(rows))), "every sample once, whole, in one row"

    filled = (whole[0] >= 0).any(axis=(1, 2))
    np.testing.assert_array_equal(filled, np.arange(pieces) < plan.num_microbatches)


@given(cases())
def test_every_token_stands_once_in_its_order_and_rows_hold_what_they_can(case):
    check_plan(packing.plan(*case), *case)


@given(cases())
def test_without_packing_every_sample_has_a_row_of_its_own(case):
    plan = packing.plan(*case, packed=False)
    check_plan(plan, *case)
    np.testing.assert_array_equal(plan.rows, np.arange(len(case[0])))
    assert not plan.columns.any() and plan.num_microbatches == len(plan.tokens_per_row)


@given(cases())
def test_packing_needs_no_more_pieces_and_shares_rows_that_it_can_share(case):
    packed, separate = packing.plan(*case), packing.plan(*case, packed=False)
    assert packed.num_microbatches <= separate.num_microbatches
    shape = case[3]
    sizes, used = packed.tokens_per_row.reshape(-1), packed.responses_per_row.reshape(-1)
    for i, j in itertools.combinations(np.flatnonzero(sizes), 2):
        fits = sizes[i] + sizes[j] <= shape.length and used[i] + used[j] <= shape.responses
        assert not fits, "two rows in use that one could hold"


def test_a_plan_by_hand():
    """Five samples in rows of eight tokens, five of them response tokens: 8 | 4 + 3 | 4 + 2; 4 + 4 would have six."""
    prompts, responses = np.array([1, 1, 3, 1, 1]), np.array([1, 3, 5, 3, 2])
    plan = packing.plan(np.arange(5), prompts, responses, PackShape(2, 8, 5))
    assert plan.rows.tolist() == [2, 1, 0, 2, 1]
    assert plan.columns.tolist() == [4, 0, 0, 0, 4]
    assert plan.tokens_per_row.tolist() == [[8, 7], [6, 0], [0, 0]]
    pieces = [jax.device_get(PIECE(plan, number)) for number in range(3)]
    assert [piece.sample_of.tolist() for piece in pieces] == [
        [[2, 2, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 4, 4, 4, -1]],
        [[3, 3, 3, 3, 0, 0, -1, -1], [-1] * 8],
        [[-1] * 8, [-1] * 8],
    ]
    assert pieces[0].offset[1].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert pieces[0].response_columns.tolist() == [[3, 4, 5, 6, 7], [1, 2, 3, 5, 6]]
    assert pieces[1].response_columns.tolist() == [[1, 2, 3, 5, 0], [0] * 5]
    assert [piece.responses_per_row.tolist() for piece in pieces] == [[5, 5], [4, 0], [0, 0]]
    assert plan.num_microbatches == 2


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=7, max_size=7), st.booleans())
def test_the_device_writes_a_plan_out(lengths, packed):
    """Also where samples have no response, and so no place."""
    prompts, responses = np.array(lengths).T
    plan = packing.plan(np.arange(7), prompts, responses, PackShape(2, 9, 6), packed=packed)
    of_samples = np.where(responses > 0, prompts, 0)
    for number, want in enumerate(zip(*written_out(plan, of_samples, responses), strict=True)):
        got = jax.device_get(PIECE(plan, number))
        for mine, other in zip((got.sample_of, got.offset, got.response_columns), want, strict=True):
            np.testing.assert_array_equal(mine, other)
        np.testing.assert_array_equal(got.responses_per_row, plan.responses_per_row[number])


def test_occupancy_by_hand():
    """Of the pieces in use; several plans count by their tokens."""
    plan = packing.plan(np.arange(5), np.array([1, 1, 3, 1, 1]), np.array([1, 3, 5, 3, 2]), PackShape(2, 8, 5))
    assert packing.occupancy(plan) == (8 + 7 + 6) / (2 * 2 * 8)
    full = packing.plan(np.arange(2), np.array([3, 3]), np.array([5, 5]), PackShape(2, 8, 5))
    assert packing.occupancy(full) == 1
    assert packing.occupancy(plan, full) == (21 + 16) / (32 + 16)


def test_the_long_tail_fills_nine_tenths():
    """Workload L of the benchmark, in four minibatches of 128 rows; one sample a row fills less than a third."""
    work = WORKLOADS["L"]
    shape = packing.pack_shape(prompt_length=16, max_new_tokens=256, rows=8, mean_prompt=16)
    prompts, responses = np.full(work.rows, work.prompt_length), lengths(work)
    assert (work.rows, work.prompt_length, responses.max()) == (512, 16, 256)
    parts = np.arange(work.rows).reshape(4, 128)
    assert packing.occupancy(*(packing.plan(rows, prompts, responses, shape) for rows in parts)) >= 0.90
    assert packing.occupancy(*(packing.plan(rows, prompts, responses, shape, packed=False) for rows in parts)) < 1 / 3


@pytest.mark.parametrize(("prompt", "response"), [(4, 5), (2, 6)])
def test_a_sample_that_is_too_long_is_refused(prompt, response):
    """Too many tokens, and too many response tokens."""
    with pytest.raises(ValueError, match=f"a sample of {prompt + response} tokens does not fit into PackShape"):
        packing.plan(np.arange(2), np.array([1, prompt]), np.array([1, response]), PackShape(2, 8, 5))


# --- on the device ---

B = 12
PACKED, SEPARATE = True, False
SCORE = make_policy_logprobs(TINY, temperature=0.7, dtype=jnp.float32, remat="dots", vocab_chunks=2)
SHAPE = packing.pack_shape(prompt_length=P, max_new_tokens=R, rows=3, mean_prompt=3)
SOME = np.array([7, 2, 9, 0, 11, 4])


@functools.cache
def batch() -> TrainBatch:
    """Ragged prompts, padded on the left, and ragged responses, both from one token to all; top-K recorded."""
    numbers = np.random.default_rng(5)
    draw = lambda *shape: np.log(numbers.uniform(0.01, 0.9, size=shape)).astype(np.float32)  # noqa: E731
    prompts, responses = (numbers.integers(1, size + 1, size=(B, 1)) for size in (P, R))
    prompts[:2], responses[:2] = [[1], [P]], [[1], [R]]
    tokens = numbers.integers(TINY.vocab_size, size=(B, P + R)).astype(np.int32)
    return TrainBatch(
        prompt_tokens=tokens[:, :P],
        prompt_mask=np.arange(P) >= P - prompts,
        tokens=tokens[:, P:],
        mask=np.arange(R) < responses,
        behavior_logp=draw(B, R),
        advantages=np.linspace(-1, 1, B, dtype=np.float32),
        topk_ids=np.argsort(numbers.uniform(size=(B, R, TINY.vocab_size)))[..., :K].astype(np.int32),
        topk_behavior_logp=draw(B, R, K) - 3,
        proximal_logp=draw(B, R),
        topk_proximal_logp=draw(B, R, K) - 3,
        behavior_entropy=-draw(B, R),
    )


def plan(rows, packed):
    return packing.plan(rows, batch().prompt_mask.sum(axis=1), batch().mask.sum(axis=1), SHAPE, packed=packed)


PACK = jax.jit(packing.pack)
UNPACK = jax.jit(packing.unpack)


def pieces_of(rows, packed):
    whole = plan(rows, packed)
    return [PIECE(whole, number) for number in range(int(whole.num_microbatches))]


@pytest.mark.parametrize("packed", [PACKED, SEPARATE])
def test_a_packed_piece_holds_the_tokens_and_values_of_its_samples(packed):
    given, weights = batch(), np.random.default_rng(6).uniform(size=(len(SOME), R)).astype(np.float32)
    names = ("behavior_logp", "topk_ids", "topk_behavior_logp", "proximal_logp", "topk_proximal_logp")
    names += ("behavior_entropy",)
    found = 0
    for part in pieces_of(SOME, packed):
        piece = jax.device_get(PACK(given, weights, part))
        for m in range(SHAPE.rows):
            responses = iter(range(int(piece.mask[m].sum())))
            for segment in dict.fromkeys(piece.segments[m][piece.segments[m] > 0].tolist()):
                row, at = SOME[segment - 1], np.flatnonzero(piece.segments[m] == segment)
                prompt, response = given.prompt_tokens[row][given.prompt_mask[row]], given.tokens[row][given.mask[row]]
                np.testing.assert_array_equal(piece.tokens[m, at], np.concatenate([prompt, response]))
                np.testing.assert_array_equal(piece.positions[m, at], np.arange(len(at)))
                slots = list(itertools.islice(responses, len(response)))
                np.testing.assert_array_equal(piece.columns[m, slots], at[len(prompt) :])
                np.testing.assert_array_equal(piece.targets[m, slots], response)
                np.testing.assert_array_equal(piece.weights[m, slots], weights[segment - 1, : len(response)])
                assert (piece.advantages[m, slots] == given.advantages[row]).all()
                for name in names:
                    np.testing.assert_array_equal(
                        getattr(piece, name)[m, slots], getattr(given, name)[row][given.mask[row]]
                    )
                found += 1
        for name in (*names, "targets", "weights", "advantages"):
            assert not getattr(piece, name)[~piece.mask].any(), name
    assert found == len(SOME)


@pytest.mark.parametrize("packed", [PACKED, SEPARATE])
def test_unpack_undoes_pack(packed):
    """Values [B, R] and [B, R, K]; rows of no sample, and columns outside the mask, are left as they were."""
    given, ones = batch(), np.ones((len(SOME), R), np.float32)
    inside = given.mask & np.isin(np.arange(B), SOME)[:, None]
    for name in ("behavior_logp", "topk_behavior_logp"):
        values = getattr(given, name)
        into = jnp.full(values.shape, 7.0)
        for part in pieces_of(SOME, packed):
            into = UNPACK(given, part, getattr(PACK(given, ones, part), name), into)
        np.testing.assert_array_equal(
            into, np.where(inside.reshape(inside.shape + (1,) * (values.ndim - 2)), values, 7)
        )


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def plain(params, batch):
    """logp, entropy and tracked logp [B, R, ...] without packing, and without the token head."""
    tokens = jnp.concatenate([batch.prompt_tokens, batch.tokens], axis=1)
    hidden = forward(TINY, params, tokens, jnp.concatenate([batch.prompt_mask, batch.mask], axis=1))[:, P - 1 : -1]
    log_p = jax.nn.log_softmax(jnp.einsum("bre,ve->brv", hidden, params["embed"]) / 0.7)
    at = lambda ids: jnp.take_along_axis(log_p, ids, axis=-1)  # noqa: E731
    return at(batch.tokens[..., None])[..., 0], -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), at(batch.topk_ids)


SCORED = jax.jit(
    lambda params, given, ones, part: SCORE(params, PACK(given, ones, part)), compiler_options=COMPILER_OPTIONS
)


@pytest.mark.parametrize("packed", [PACKED, SEPARATE])
def test_packed_scores_are_those_of_each_sample_alone(packed):
    given, params, ones = batch(), random_params(), np.ones((B, R), np.float32)
    found = [jnp.full(shape, jnp.nan) for shape in ((B, R), (B, R), (B, R, K))]
    for part in pieces_of(np.arange(B), packed):
        head = SCORED(params, given, ones, part)
        values = (head.logp, head.entropy, head.ids_logp)
        found = [UNPACK(given, part, x, into) for x, into in zip(values, found, strict=True)]
    for got, want in zip(found, plain(params, given), strict=True):
        np.testing.assert_allclose(got[given.mask], want[given.mask], rtol=1e-5, atol=1e-5)
        assert np.isnan(got[~given.mask]).all()


PROXIMAL = jax.jit(make_recompute(SCORE, "proximal"), compiler_options=COMPILER_OPTIONS)


@pytest.mark.parametrize("packed", [PACKED, SEPARATE])
def test_the_proximal_policy_is_scored_for_every_row(packed):
    given, params = batch(), random_params()
    got = PROXIMAL(params, given.replace(proximal_logp=None, topk_proximal_logp=None), plan(np.arange(B), packed))
    logp, _, ids_logp = plain(params, given)
    np.testing.assert_allclose(got.proximal_logp[given.mask], logp[given.mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.topk_proximal_logp[given.mask], ids_logp[given.mask], rtol=1e-5, atol=1e-5)
    assert not got.proximal_logp[~given.mask].any() and not got.topk_proximal_logp[~given.mask].any()
    for name in ("tokens", "behavior_logp", "topk_behavior_logp", "advantages"):
        np.testing.assert_array_equal(getattr(got, name), getattr(given, name))


OPTIMIZER = make_optimizer(
    lambda _: jnp.float32(0.01), b1=0.9, b2=0.99, eps=1e-4, weight_decay=0.0, clip_norm=float("inf")
)
# A loss that uses every field of the batch.
LOSS = bind_loss("dppo_topk_kl_proximal", dict(delta_low=1e-2, delta_high=1e-2, ratio_cap=2.0))
WEIGH = functools.partial(WEIGHTS["seq_mean_token_mean"], constant=1.0)
UPDATE = jax.jit(make_update(SCORE, LOSS, WEIGH, OPTIMIZER), compiler_options=COMPILER_OPTIONS)


def test_packed_losses_and_gradients_are_those_of_separate_rows():
    start = init_state(random_params(), OPTIMIZER)
    (state, metrics), (want, want_metrics) = (
        jax.device_get(UPDATE(start, batch(), plan(SOME, packed))) for packed in (PACKED, SEPARATE)
    )
    got, expected = summary(metrics), summary(want_metrics)
    assert got.keys() == expected.keys() and {"loss/divergence", "trust_region/masked", "grad_norm"} <= got.keys()
    for name in expected:
        assert got[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
    assert 0 < expected["trust_region/masked"] < 1
    jax.tree.map(np.testing.assert_array_equal, metrics.histograms, want_metrics.histograms)
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(want.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    assert UPDATE._cache_size() == 1, "one compiled update, packed or not"
