"""Exact rollouts: the update's own log-probabilities, to the bit, whatever drafted them; and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import packing, precision
from dppo_jax.errors import UserError
from dppo_jax.isolated import make_isolated_pass, with_values_of
from dppo_jax.losses import bind_loss
from dppo_jax.optimizer import make_optimizer
from dppo_jax.rollout import ExactRollout, Rollout
from dppo_jax.teacher_forced import make_policy_logprobs
from dppo_jax.train_step import assemble, init_state, make_update
from dppo_jax.types import PromptBatch
from dppo_jax.weights import WEIGHTS
from experiments.questions.mismatch.exact import counting
from experiments.run import checks
from experiments.run.setup import Setup
from tests.helpers.fixtures import EOS, MOE, PAD, TINY, random_params, small_config

N, G, P, R, K, MINIBATCHES, TEMPERATURE = 64, 8, 6, 12, 3, 2, 0.7
# 256 rows of a minibatch in microbatches of 24: the last of each has rows without a sample.
SHAPE = packing.pack_shape(prompt_length=P, max_new_tokens=R, rows=24)
SETTINGS = dict(temperature=TEMPERATURE, dtype=jnp.float32)
RECORDED = dict(topk=K, record_entropy=True)
DRAFT = Rollout(TINY, group_size=G, max_new_tokens=R, eos_ids=(EOS,), pad_id=PAD, **RECORDED, **SETTINGS)
PASS = make_isolated_pass(TINY, **SETTINGS)


def prompts() -> PromptBatch:
    numbers = np.random.default_rng(0)
    return PromptBatch(
        tokens=numbers.integers(2, TINY.vocab_size, (N, P)).astype(np.int32),
        mask=np.arange(P) >= numbers.integers(0, P, N)[:, None],
        group=np.arange(N, dtype=np.int32),
    )


def drawn(rollout):
    return jax.jit(rollout)(random_params(), prompts(), jax.random.key(0))


@functools.cache
def differing_tokens():
    """(batch) -> tokens whose logp in the update is not behavior_logp to the bit, and all tokens."""
    score = make_policy_logprobs(TINY, remat="dots", vocab_chunks=1, **SETTINGS)
    loss = counting(bind_loss("dppo_topk_tv", dict(delta_low=0.2, delta_high=0.2, ratio_cap=5.0)))
    optimizer = make_optimizer(lambda _: 1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    weigh = functools.partial(WEIGHTS["token_mean"], constant=1.0)
    update = jax.jit(make_update(with_values_of(PASS, score), loss, weigh, optimizer))
    state = init_state(random_params(), optimizer)

    def count(batch):
        lengths = np.asarray(batch.prompt_mask.sum(axis=1)), np.asarray(batch.mask.sum(axis=1))
        rows = packing.minibatch_rows(N, G, MINIBATCHES, key=(0, 0, 0))
        plans = [packing.plan(index, *lengths, SHAPE, packed=False) for index in rows]
        return np.sum([update(state, batch, plan)[1].sums["loss/differ"] for plan in plans], axis=0)

    return count


def trained_on(out):
    return dataclasses.replace(assemble(prompts(), out), advantages=jnp.linspace(-1, 1, N * G))


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_update_sees_the_rollout_s_own_bits():
    """At a temperature other than 1, where a fused division by it is enough to part them. Drafts do differ."""
    exact, draft = drawn(ExactRollout(DRAFT, PASS, SHAPE, MINIBATCHES)), drawn(DRAFT)
    differ, tokens = differing_tokens()(trained_on(exact))
    assert tokens == np.asarray(exact.response_mask).sum() > 2000 and differ == 0
    differ, tokens = differing_tokens()(trained_on(draft))
    assert 0.05 * tokens < differ


def test_what_is_drawn_does_not_depend_on_the_draft():
    """Of weights with 2 bits of mantissa most rows are others, and all come out as those of float32, to the bit."""
    rough = dataclasses.replace(DRAFT, weights=precision.weights("m2"))
    exact, again = (drawn(ExactRollout(draft, PASS, SHAPE, MINIBATCHES)) for draft in (DRAFT, rough))
    assert (np.asarray(drawn(rough).tokens) != np.asarray(exact.tokens)).any(axis=1).mean() > 0.5
    jax.tree.map(np.testing.assert_array_equal, exact, again)

    usual = drawn(DRAFT)
    same = (np.asarray(usual.tokens) == np.asarray(exact.tokens)).all(axis=1)
    assert same.mean() > 0.99
    for name in ("response_mask", "truncated", "topk_ids"):
        np.testing.assert_array_equal(getattr(exact, name)[same], getattr(usual, name)[same], name)
    for name in ("behavior_logp", "behavior_entropy", "topk_logp"):
        mask = np.asarray(usual.response_mask)[same]
        np.testing.assert_allclose(getattr(exact, name)[same][mask], getattr(usual, name)[same][mask], atol=1e-4)
    assert 0 < np.asarray(exact.truncated).sum() < N * G


def test_gradients_are_those_of_the_pass_itself():
    score = make_policy_logprobs(TINY, remat="none", vocab_chunks=1, **SETTINGS)
    batch = trained_on(drawn(DRAFT))
    lengths = np.asarray(batch.prompt_mask.sum(axis=1)), np.asarray(batch.mask.sum(axis=1))
    plan = packing.plan(np.arange(24), *lengths, SHAPE, packed=False)
    packed = packing.pack(batch, jnp.ones((24, R)), packing.microbatch(plan, 0))

    def gradient(score):
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.where(packed.mask, score(params, packed).logp, 0.0))))

    found, want = (gradient(s)(random_params()) for s in (with_values_of(PASS, score), score))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, want)


REFUSED = {
    "rollout.dtype = 'bfloat16' would be another one; set rollout.dtype=float32": dict(rollout__dtype="bfloat16"),
    "policy.dtype = 'bfloat16' would be another one; set policy.dtype=float32": dict(policy__dtype="bfloat16"),
    "lora.rank = 4 would be another one; set lora.rank=0": dict(lora__rank=4),
    "policy.temperature = 0.5 would be another one; set policy.temperature=1.0": dict(policy__temperature=0.5),
    "lengths of others; set train.pack=False": dict(train__pack=True),
    "equal parameters, which rollout.weights = 'm4' parts": dict(rollout__weights="m4"),
    "which rollout.activations = 'm4' parts": dict(rollout__activations="m4"),
    "which rollout.quantize = 'int8' parts": dict(rollout__quantize="int8"),
    "which rollout.lag = 1 parts": dict(rollout__lag=1),
    "which rollout.in_flight = 1 parts": dict(rollout__in_flight=1),
    "which train.staleness = 1 parts": dict(train__staleness=1),
    "which rollout.resample = 1 parts": dict(rollout__resample=1),
    "which rollout.router_replay = True parts": dict(rollout__router_replay=True),
    "which alp.sigma = 0.1 parts": dict(alp__sigma=0.1),
    "not turns with an environment": dict(data__kind="environment", data__name="guess", data__path=""),
}


@pytest.mark.parametrize(("sentence", "changes"), REFUSED.items(), ids=[next(iter(c)) for c in REFUSED.values()])
def test_what_contradicts_it_is_refused(sentence, changes, tmp_path):
    config = small_config(tmp_path, **dict(rollout__exact=True, train__pack=False) | changes)
    with pytest.raises(UserError, match="^rollout.exact") as refusal:
        checks._check_exact(config)
    assert sentence in str(refusal.value)


def test_what_the_model_contradicts_is_refused(tmp_path):
    config = small_config(tmp_path, rollout__exact=True, train__pack=False)
    with pytest.raises(UserError, match="takes tokens of all rows in one product"):
        Setup(config, MOE).policy_logprobs  # noqa: B018
    config.policy.head_pieces = 2
    with pytest.raises(UserError, match="in 2 pieces; lower train.micro_rows, or set policy.head_pieces=1"):
        Setup(config, TINY).policy_logprobs  # noqa: B018
