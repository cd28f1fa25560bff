"""Rollout against the teacher-forced pass: cached equals uncached, and what was drawn is what is claimed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import packing
from dppo_jax.models.decoder import abstract_params
from dppo_jax.rollout import Rollout
from dppo_jax.teacher_forced import make_policy_logprobs
from dppo_jax.train_step import assemble
from dppo_jax.types import PromptBatch
from tests.helpers.fixtures import COMPILER_OPTIONS, EOS, PAD, TINY, random_params
from tests.helpers.rollouts import (
    FAMILY,
    LENGTHS,
    SCENARIOS,
    TEMPERATURES,
    TOLERANCE,
    G,
    K,
    N,
    P,
    R,
    V,
    at_tokens,
    ends,
    entropies,
    first_end,
    free,
    log_probabilities,
    normalised,
    policy,
    prompts,
    redraw,
    rollout,
    uniforms_of,
)


@functools.cache
def scenario(temperature: float, name: str):
    """(eos_ids, pad_id, rollout)"""
    eos_ids, pad_id = ends(temperature, name)
    return eos_ids, pad_id, rollout(temperature, eos_ids, pad_id)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_behavior_logp_equals_teacher_forced_logp(temperature, name):
    """Of the sampled tokens, and of the K topk ones, and the entropy; a wrong temperature would be far off."""
    _, pad_id, out = scenario(temperature, name)
    mask = out.response_mask
    log_p = log_probabilities(out, temperature, temperature)
    np.testing.assert_allclose(out.behavior_logp[mask], at_tokens(log_p, out.tokens)[mask], rtol=0, atol=TOLERANCE)
    topk = np.take_along_axis(log_p, out.topk_ids, axis=-1)
    np.testing.assert_allclose(out.topk_logp[mask], topk[mask], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(out.behavior_entropy[mask], entropies(log_p)[mask], rtol=0, atol=TOLERANCE)
    assert np.abs(out.behavior_logp[mask]).mean() > 0.1, "there is something to compare"
    if name == "pad is drawn":
        assert ((out.tokens == pad_id) & mask).sum() >= 5, "the pad token was sampled"


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_training_scores_a_rollout_as_the_rollout_did(temperature):
    """One sample a row: what the update computes of the tokens and of the topk ones, and the entropy beside them."""
    _, _, out = scenario(temperature, "pad is drawn")
    batch = jax.tree.map(jnp.asarray, assemble(prompts(), out))
    lengths = np.asarray(batch.prompt_mask.sum(axis=1)), np.asarray(batch.mask.sum(axis=1))
    shape = packing.pack_shape(prompt_length=P, max_new_tokens=R, rows=N * G)
    plan = packing.plan(np.arange(N * G), *lengths, shape, packed=False)
    config = policy(FAMILY[temperature])[0]
    score = make_policy_logprobs(config, temperature=temperature, dtype=jnp.float32, remat="none")

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def scored(params, batch, plan):
        piece = packing.microbatch(plan, 0)
        head = score(params, packing.pack(batch, jnp.ones((N * G, R)), piece))
        values = {"logp": head.logp, "topk_logp": head.ids_logp, "entropy": head.entropy}
        into = {name: jnp.zeros((N * G, R, *x.shape[2:])) for name, x in values.items()}
        return {name: packing.unpack(batch, piece, x, into[name]) for name, x in values.items()}

    found = jax.tree.map(np.asarray, scored(policy(FAMILY[temperature])[1], batch, plan))
    mask = out.response_mask
    np.testing.assert_allclose(found["logp"][mask], out.behavior_logp[mask], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found["topk_logp"][mask], out.topk_logp[mask], rtol=0, atol=TOLERANCE)
    want = entropies(log_probabilities(out, temperature, temperature))
    np.testing.assert_allclose(found["entropy"][mask], want[mask], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_tokens_are_those_of_the_row_s_own_numbers(temperature):
    """Every draw again, in float64 from the teacher-forced distribution; float32 may differ at a boundary only."""
    tokens, far = redraw(
        log_probabilities(free(temperature), temperature, temperature), uniforms_of(free(temperature), G, 0)
    )
    clear = far > 1e-5
    assert clear.mean() > 0.97
    np.testing.assert_array_equal(free(temperature).tokens[clear], tokens[clear])


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_response_ends_with_its_first_end_of_sequence_token(temperature, name):
    """Ending changes nothing before it: rows are those of the endless rollout, cut after the first EOS."""
    eos_ids, pad_id, out = scenario(temperature, name)
    endless = free(temperature)
    end = first_end(endless.tokens, eos_ids)
    mask = np.arange(R) <= end[:, None]
    np.testing.assert_array_equal(out.response_mask, mask)
    np.testing.assert_array_equal(out.truncated, end == R)
    np.testing.assert_array_equal(out.tokens, np.where(mask, endless.tokens, pad_id))
    np.testing.assert_allclose(out.behavior_logp, np.where(mask, endless.behavior_logp, 0), atol=TOLERANCE)
    np.testing.assert_array_equal(out.group, np.repeat(np.arange(N), G))
    if name == "no end":
        assert out.truncated.all() and out.response_mask.all()
    else:
        last = np.take_along_axis(out.tokens, out.response_mask.sum(axis=1, keepdims=True) - 1, axis=1)[:, 0]
        assert set(last[~out.truncated]) == set(eos_ids), "several tokens ended rows"
        assert 0 < out.truncated.sum() < N * G
    if name == "ends at once":
        assert (out.response_mask.sum(axis=1) == 1).any()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_tracked_ids_are_the_likeliest_tokens(temperature):
    """Against the whole teacher-forced distribution, in descending order, without duplicates."""
    out = free(temperature)
    log_p = log_probabilities(out, temperature, temperature)
    np.testing.assert_allclose(out.topk_logp, -np.sort(-log_p, axis=-1)[..., :K], atol=TOLERANCE)
    np.testing.assert_allclose(out.topk_logp, np.take_along_axis(log_p, out.topk_ids, axis=-1), atol=TOLERANCE)
    assert (np.diff(np.sort(out.topk_ids, axis=-1), axis=-1) > 0).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_tokens_are_drawn_at_the_temperature_that_scores_them(temperature):
    """The mean of logp + entropy is 0 under the distribution drawn from; at 1.3 times the temperature it is not."""
    surprise, wrong = [], []
    for seed in range(12):
        out = free(temperature, seed)
        log_p = log_probabilities(out, temperature, temperature)
        for found, z in ((surprise, log_p), (wrong, normalised(log_p / 1.3))):
            found.append(at_tokens(z, out.tokens) + entropies(z))

    def deviations(x):
        return np.mean(x) / (np.std(x) / np.sqrt(np.size(x)))

    assert abs(deviations(surprise)) < 4
    assert deviations(wrong) > 8


def test_greedy_takes_the_likeliest_token():
    out = rollout(0.0, like=1.0)
    log_p = log_probabilities(out, 1.0)
    np.testing.assert_allclose(
        at_tokens(log_p, out.tokens), log_p.max(axis=-1), atol=1e-5
    )  # the same token, but for ties
    assert (out.tokens == log_p.argmax(axis=-1)).mean() > 0.99
    np.testing.assert_array_equal(out.tokens, np.repeat(out.tokens[::G], G, axis=0))


def test_nucleus_logp_is_of_the_truncated_distribution():
    """Sampled tokens lie in the nucleus, and their logp is renormalised over it; the rest of the K is impossible."""
    top_p = 0.7
    out = rollout(1.0, top_p=top_p, topk=V)
    p = np.exp(log_probabilities(out, 1.0))
    order = np.argsort(-p, axis=-1)
    before = np.cumsum(np.take_along_axis(p, order, axis=-1), axis=-1) - np.take_along_axis(p, order, axis=-1)
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, order, before < top_p, axis=-1)
    clear = np.abs(before - top_p).min(axis=-1) > 1e-5  # where float32 and float64 agree on who is in
    mass = np.where(kept, p, 0).sum(axis=-1)
    assert clear.mean() > 0.9 and (mass < 0.95).mean() > 0.5

    assert at_tokens(kept, out.tokens)[clear].all()
    want = np.log(at_tokens(p, out.tokens)) - np.log(mass)
    np.testing.assert_allclose(out.behavior_logp[clear], want[clear], atol=TOLERANCE)
    whole = np.empty(p.shape)
    np.put_along_axis(whole, out.topk_ids, out.topk_logp, axis=-1)
    np.testing.assert_array_equal(np.isfinite(whole)[clear], kept[clear])
    np.testing.assert_allclose(np.exp(whole).sum(axis=-1), 1, atol=1e-5)
    shares = np.where(kept, p, 1) / np.where(kept, mass[..., None], 1)
    np.testing.assert_allclose(out.behavior_entropy[clear], -(shares * np.log(shares)).sum(axis=-1)[clear], atol=1e-4)


def test_a_row_does_not_depend_on_batch_group_size_or_length():
    """One prompt alone, in a smaller group and a shorter response: the same member of the same group, cut short."""
    whole, shorter = free(1.0), 9
    for n in range(N):
        alone = jax.tree.map(lambda x, n=n: x[n : n + 1], prompts())
        out = rollout(1.0, batch=alone, group_size=2, length=shorter)
        same = whole.tokens.reshape(N, G, R)[n, :2, :shorter]
        np.testing.assert_array_equal(out.tokens, same)
        np.testing.assert_allclose(
            out.behavior_logp, whole.behavior_logp.reshape(N, G, R)[n, :2, :shorter], atol=TOLERANCE
        )
        assert (out.group == n).all()


def test_a_row_does_not_depend_on_order_or_neighbours():
    """Groups keep their number: permuted prompts give permuted rows; changed neighbours change nothing."""
    whole, order = free(1.0).tokens.reshape(N, G, R), [2, 0, 3, 1]
    permuted = rollout(1.0, batch=prompts(order=order)).tokens.reshape(N, G, R)
    np.testing.assert_array_equal(permuted, whole[order])
    other = prompts(np.array([7, 6, 2, 4]))
    changed = rollout(1.0, batch=other).tokens.reshape(N, G, R)
    np.testing.assert_array_equal(changed[0], whole[0])
    assert (changed[1:] != whole[1:]).any()


def test_samples_differ_between_keys_and_within_groups():
    tokens = [free(1.0, seed).tokens for seed in range(2)]
    assert (tokens[0] != tokens[1]).mean() > 0.5
    np.testing.assert_array_equal(rollout(1.0).tokens, tokens[0])
    for group in tokens[0].reshape(N, G, R):
        assert len({tuple(row) for row in group}) == G


def test_bfloat16_rollout_differs_a_little_from_float32_training():
    """The mismatch that people study: not zero, and small; the rollout's numbers are float32 all the same."""
    out = rollout(1.0, dtype=jnp.bfloat16)
    assert out.behavior_logp.dtype == np.float32
    gap = np.abs(np.exp(out.behavior_logp) - np.exp(at_tokens(log_probabilities(out, 1.0), out.tokens)))
    assert 10 * TOLERANCE < gap.max() < 0.2 and 1e-4 < gap.mean() < 0.03
    assert (gap > 0).mean() > 0.9


def test_top_k_is_left_out_unless_asked_for():
    config, params = policy("llama")
    for topk in (0, V):
        generate = Rollout(config, group_size=2, max_new_tokens=3, temperature=1.0, eos_ids=(2,), pad_id=0, topk=topk)
        out = jax.eval_shape(generate, params, prompts(), jax.random.key(0))
        assert (out.topk_ids is None) == (out.topk_logp is None) == (topk == 0)
        assert topk == 0 or out.topk_ids.shape == out.topk_logp.shape == (2 * N, 3, V)
    with pytest.raises(ValueError, match="97 tokens of a vocabulary of 96"):
        Rollout(config, group_size=1, max_new_tokens=1, temperature=1.0, eos_ids=(), pad_id=0, topk=V + 1)


@pytest.mark.usefixtures("optimized")
def test_the_cache_is_carried_in_place():
    """Memory beside arguments and results: one cache of four layers and scratch for one layer, not a second cache."""
    config = dataclasses.replace(policy("llama")[0], num_layers=4)
    length, rows = 1500, len(LENGTHS) * G
    run = Rollout(config, group_size=G, max_new_tokens=length, temperature=1.0, eos_ids=(0,), pad_id=0)
    compiled = jax.jit(run).lower(abstract_params(config), prompts(), jax.random.key(0)).compile()
    cache = config.num_layers * 2 * rows * (P + length) * config.num_kv_heads * config.head_dim * 4
    assert cache < compiled.memory_analysis().temp_size_in_bytes < 1.5 * cache


@pytest.mark.parametrize("slots", [None, 3])
def test_scanned_layers_draw_what_unrolled_ones_draw(slots):
    """One cache of all layers against one of each: prompts of many lengths, slots filled anew."""
    config, params = TINY, random_params()
    unrolled = Rollout(
        config, group_size=G, max_new_tokens=9, temperature=1.0, eos_ids=(EOS,), pad_id=PAD, topk=2, slots=slots
    )
    numbers = np.random.default_rng(0)
    prompts = PromptBatch(
        tokens=numbers.integers(2, config.vocab_size, (4, 6)).astype(np.int32),
        mask=np.arange(6) >= np.array([0, 3, 5, 1])[:, None],
        group=np.arange(4, dtype=np.int32),
    )
    want, got = (
        jax.jit(dataclasses.replace(unrolled, unrolled=flag))(params, prompts, jax.random.key(1))
        for flag in (True, False)
    )
    assert len(set(np.asarray(want.response_mask).sum(axis=1).tolist())) > 2
    for name in ("tokens", "response_mask", "truncated", "topk_ids"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
    np.testing.assert_allclose(got.behavior_logp, want.behavior_logp, rtol=0, atol=1e-5)
