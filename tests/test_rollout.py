"""Rollout against the teacher-forced pass: cached equals uncached, and what was drawn is what is claimed.

The golden models, their last norm scaled until the likeliest token has about half the mass. A rollout is compiled
once per temperature; which tokens end a response, and which one pads, are arguments of the compiled function here.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models import load_policy
from dppo_jax.models.decoder import abstract_params, forward, head_weight
from dppo_jax.rollout import make_rollout
from dppo_jax.train_step import assemble, make_score
from dppo_jax.types import PromptBatch, RolloutBatch

GOLDEN = Path(__file__).parent / "golden" / "models"
FAMILY = {0.5: "qwen3", 1.0: "llama", 1.7: "qwen2"}  # each temperature on another architecture; qwen2 is tied
SOFTCAP = {"qwen3": None, "llama": None, "qwen2": 8.0}
TEMPERATURES = list(FAMILY)
N, P, G, R, K, V = 4, 7, 3, 14, 5, 96
LENGTHS = np.array([7, 3, 1, 5])
TOLERANCE = 1e-4
NEVER = (-1, -1)  # no token ends a response


@functools.cache
def policy(family: str):
    loaded = load_policy(str(GOLDEN / family))
    config = dataclasses.replace(loaded.config, logit_softcap=SOFTCAP[family])
    return config, loaded.params | {"final_norm": 5 * loaded.params["final_norm"]}


def prompts(lengths=LENGTHS, order=None) -> PromptBatch:
    """Ragged prompts, padded on the left with a token that also occurs in them."""
    tokens = np.random.RandomState(0).randint(0, V, (len(lengths), P)).astype(np.int32)
    mask = np.arange(P) >= P - lengths[:, None]
    tokens = np.where(mask, tokens, tokens[0, 0])
    order = np.arange(len(lengths)) if order is None else np.asarray(order)
    return PromptBatch(tokens=tokens[order], mask=mask[order], group=order.astype(np.int32))


@functools.cache
def compiled(temperature: float, group_size: int = G, length: int = R, **options):
    """(params, prompts, key, eos_ids, pad_id) -> rollout."""
    config, _ = policy(FAMILY[options.pop("like", temperature)])
    usual = (group_size, length, options) == (G, R, {})
    quickly = None if usual else {"xla_backend_optimization_level": 0}  # these compile longer than they run

    @functools.partial(jax.jit, compiler_options=quickly)
    def run(params, prompts, key, eos_ids, pad_id):
        return make_rollout(
            config, group_size=group_size, max_new_tokens=length, temperature=temperature,
            eos_ids=tuple(eos_ids), pad_id=pad_id, **{"tracked": K} | options,
        )(params, prompts, key)  # fmt: skip

    return run


def rollout(temperature: float, eos_ids=NEVER, pad_id=0, *, batch=None, seed=0, like=None, **options) -> RolloutBatch:
    like = temperature if like is None else like
    params, batch = policy(FAMILY[like])[1], prompts() if batch is None else batch
    run = compiled(temperature, like=like, **options)
    out = run(params, batch, jax.random.key(seed), np.asarray(eos_ids, np.int32), np.int32(pad_id))
    return jax.tree.map(np.asarray, out)


@functools.cache
def free(temperature: float, seed: int = 0) -> RolloutBatch:
    """Without an end: every row fills its length."""
    return rollout(temperature, seed=seed)


@functools.cache
def scorer(temperature: float, like: float):
    """What training computes of a rollout: all tokens at once, no cache."""
    return jax.jit(
        make_score(policy(FAMILY[like])[0], temperature=temperature, dtype=jnp.float32, remat="none", chunk_tokens=64)
    )


def teacher_forced(out: RolloutBatch, temperature: float, like: float | None = None, batch: PromptBatch | None = None):
    like = temperature if like is None else like
    found = scorer(temperature, like)(policy(FAMILY[like])[1], assemble(prompts() if batch is None else batch, out))
    return jax.tree.map(np.asarray, found)


@functools.cache
def hidden_states(like: float):
    config, _ = policy(FAMILY[like])
    return jax.jit(lambda params, tokens, mask: forward(config, params, tokens, mask)[:, P - 1 : -1])


def log_probabilities(out: RolloutBatch, like: float) -> np.ndarray:
    """Teacher-forced, the whole vocabulary, at temperature 1: float64 from the hidden states on."""
    _, params = policy(FAMILY[like])
    batch = assemble(prompts(), out)
    tokens = np.concatenate([batch.prompt_tokens, batch.tokens], axis=1)
    mask = np.concatenate([batch.prompt_mask, batch.mask], axis=1)
    hidden = np.asarray(hidden_states(like)(params, tokens, mask), np.float64)
    z = hidden @ np.asarray(head_weight(params), np.float64).T
    if (cap := SOFTCAP[FAMILY[like]]) is not None:
        assert np.abs(z).max() > 1.5 * cap
        z = cap * np.tanh(z / cap)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def common_tokens(out: RolloutBatch) -> list[int]:
    """Token ids, the most frequent first."""
    return np.argsort(-np.bincount(out.tokens.ravel(), minlength=V), kind="stable").tolist()


def first_end(tokens: np.ndarray, eos_ids) -> np.ndarray:
    """Column of each row's first end-of-sequence token; R where there is none."""
    return np.array([next((t for t, x in enumerate(row) if x in eos_ids), R) for row in tokens])


def pair_that_ends(tokens: np.ndarray, first: list[int], second: list[int]) -> tuple[int, int]:
    """One of `first` and one of `second` that each end some row; and some row has neither."""
    for pair in ((a, b) for a in first for b in second if a != b):
        end = first_end(tokens, pair)
        if (end == R).any() and {int(row[t]) for row, t in zip(tokens, end, strict=True) if t < R} == set(pair):
            return pair
    raise AssertionError("no two tokens end rows")


@functools.cache
def scenario(temperature: float, name: str):
    """(eos_ids, pad_id, rollout), chosen among the tokens that the model does draw."""
    tokens, often = free(temperature).tokens, common_tokens(free(temperature))
    if name == "no end":
        eos_ids, pad_id = NEVER, 0
    elif name == "ends at once":
        eos_ids, pad_id = pair_that_ends(tokens, tokens[:, 0].tolist(), often), often[0]
    else:
        eos_ids = pair_that_ends(tokens, often[1:], often[1:])
        pad_id = eos_ids[0] if name == "pad is eos" else often[0]
    return eos_ids, pad_id, rollout(temperature, eos_ids, pad_id)


SCENARIOS = ["no end", "pad is eos", "pad is drawn", "ends at once"]


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_behavior_logp_equals_teacher_forced_logp(temperature, name):
    """Of the sampled tokens, and of the K tracked ones; scaling by the wrong temperature would be far off."""
    _, pad_id, out = scenario(temperature, name)
    mask = out.response_mask
    scored = teacher_forced(out, temperature)
    np.testing.assert_allclose(out.behavior_logp[mask], scored.logp[mask], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(out.topk_logp[mask], scored.ids_logp[mask], rtol=0, atol=TOLERANCE)
    assert np.abs(out.behavior_logp[mask]).mean() > 0.1, "there is something to compare"
    if name == "pad is drawn":
        assert ((out.tokens == pad_id) & mask).sum() >= 5, "the pad token was sampled"


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
    log_p = log_probabilities(out, temperature) / temperature
    log_p = log_p - np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(out.topk_logp, -np.sort(-log_p, axis=-1)[..., :K], atol=TOLERANCE)
    np.testing.assert_allclose(out.topk_logp, np.take_along_axis(log_p, out.topk_ids, axis=-1), atol=TOLERANCE)
    assert (np.diff(np.sort(out.topk_ids, axis=-1), axis=-1) > 0).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_tokens_are_drawn_at_the_temperature_that_scores_them(temperature):
    """The mean of logp + entropy is 0 under the distribution drawn from; at 1.3 times the temperature it is not."""
    surprise, wrong = [], []
    for seed in range(12):
        out = free(temperature, seed)
        scored = teacher_forced(out, temperature)
        surprise.append(scored.logp + scored.entropy)
        if temperature == 1.0:
            log_p = log_probabilities(out, 1.0) / 1.3
            log_p = log_p - np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
            entropy = -(np.exp(log_p) * log_p).sum(axis=-1)
            wrong.append(np.take_along_axis(log_p, out.tokens[..., None], axis=-1)[..., 0] + entropy)

    def deviations(x):
        return np.mean(x) / (np.std(x) / np.sqrt(np.size(x)))

    assert abs(deviations(surprise)) < 4
    assert not wrong or deviations(wrong) > 8


def test_greedy_takes_the_likeliest_token():
    out = rollout(0.0, like=1.0)
    log_p = log_probabilities(out, 1.0)
    drawn = np.take_along_axis(log_p, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(drawn, log_p.max(axis=-1), atol=1e-5)  # the same token, but for ties
    assert (out.tokens == log_p.argmax(axis=-1)).mean() > 0.99
    np.testing.assert_array_equal(out.tokens, np.repeat(out.tokens[::G], G, axis=0))


def test_nucleus_logp_is_of_the_truncated_distribution():
    """Sampled tokens lie in the nucleus, and their logp is renormalised over it; the rest of the K is impossible."""
    top_p = 0.7
    out = rollout(1.0, top_p=top_p, tracked=V)
    p = np.exp(log_probabilities(out, 1.0))
    order = np.argsort(-p, axis=-1)
    before = np.cumsum(np.take_along_axis(p, order, axis=-1), axis=-1) - np.take_along_axis(p, order, axis=-1)
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, order, before < top_p, axis=-1)
    clear = np.abs(before - top_p).min(axis=-1) > 1e-5  # where float32 and float64 agree on who is in
    mass = np.where(kept, p, 0).sum(axis=-1)
    assert clear.mean() > 0.9 and (mass < 0.95).mean() > 0.5

    def at_tokens(x):
        return np.take_along_axis(x, out.tokens[..., None], axis=-1)[..., 0]

    assert at_tokens(kept)[clear].all()
    np.testing.assert_allclose(out.behavior_logp[clear], (np.log(at_tokens(p)) - np.log(mass))[clear], atol=TOLERANCE)
    whole = np.empty(p.shape)
    np.put_along_axis(whole, out.topk_ids, out.topk_logp, axis=-1)
    np.testing.assert_array_equal(np.isfinite(whole)[clear], kept[clear])
    np.testing.assert_allclose(np.exp(whole).sum(axis=-1), 1, atol=1e-5)


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
    gap = np.abs(np.exp(out.behavior_logp) - np.exp(teacher_forced(out, 1.0).logp))
    assert 10 * TOLERANCE < gap.max() < 0.2 and 1e-4 < gap.mean() < 0.03
    assert (gap > 0).mean() > 0.9


def test_top_k_is_left_out_unless_asked_for():
    config, params = policy("llama")
    for tracked in (0, V):
        generate = make_rollout(
            config, group_size=2, max_new_tokens=3, temperature=1.0, eos_ids=(2,), pad_id=0, tracked=tracked
        )
        out = jax.eval_shape(generate, params, prompts(), jax.random.key(0))
        assert (out.topk_ids is None) == (out.topk_logp is None) == (tracked == 0)
        assert tracked == 0 or out.topk_ids.shape == out.topk_logp.shape == (2 * N, 3, V)
    with pytest.raises(ValueError, match="97 tokens of a vocabulary of 96"):
        make_rollout(config, group_size=1, max_new_tokens=1, temperature=1.0, eos_ids=(), pad_id=0, tracked=V + 1)


def test_the_cache_is_carried_in_place():
    """Memory beside arguments and results: one cache of eight layers and scratch for one layer, not a second cache."""
    config = dataclasses.replace(policy("llama")[0], num_layers=8)
    length, rows = 4000, len(LENGTHS) * G
    run = make_rollout(config, group_size=G, max_new_tokens=length, temperature=1.0, eos_ids=(0,), pad_id=0)
    compiled = jax.jit(run).lower(abstract_params(config), prompts(), jax.random.key(0)).compile()
    cache = config.num_layers * 2 * rows * (P + length) * config.num_kv_heads * config.head_dim * 4
    assert cache < compiled.memory_analysis().temp_size_in_bytes < 1.5 * cache
