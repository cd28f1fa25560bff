"""The exact divergence: against float64, with itself, and what it costs in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dppo_jax import packing
from dppo_jax.divergences import binary_kl, binary_tv
from dppo_jax.losses import LOSSES, bind_loss
from dppo_jax.models.config import ModelConfig, RopeConfig
from dppo_jax.models.decoder import abstract_params
from dppo_jax.teacher_forced import make_behavior_forward, make_policy_logprobs
from dppo_jax.token_head import exact_divergence, logit_sums, token_head
from dppo_jax.train_step import init_state, make_update
from dppo_jax.types import TrainBatch
from dppo_jax.weights import token_mean

B, R, E, V = 3, 7, 16, 501


def policies(distance: float, seed: int = 0):
    """Hidden states and weights of a policy and of the behavior policy, so far apart."""
    draw = np.random.default_rng(seed).standard_normal
    hidden, weight = draw((B, R, E)).astype(np.float32), draw((V, E)).astype(np.float32)
    return (
        (hidden + distance * draw(hidden.shape)).astype(np.float32),
        (weight + distance * draw(weight.shape)).astype(np.float32),
        hidden,
        weight,
    )


def log_softmax(hidden, weight, temperature, softcap):
    z = hidden.astype(np.float64) @ weight.astype(np.float64).T
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
    z = z / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


TARGETS = np.random.default_rng(1).integers(0, V, (B, R)).astype(np.int32)


@pytest.mark.parametrize("pieces", [1, 4, 7])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("distance", [0.0, 1e-3, 0.1, 3.0])
def test_against_float64(distance, softcap, pieces):
    hidden, weight, behavior_hidden, behavior_weight = policies(distance)
    found = exact_divergence(
        hidden, weight, behavior_hidden, behavior_weight, TARGETS,
        temperature=0.8, behavior_temperature=1.1, softcap=softcap, vocab_chunks=pieces,
    )  # fmt: skip
    pi, mu = log_softmax(hidden, weight, 0.8, softcap), log_softmax(behavior_hidden, behavior_weight, 1.1, softcap)
    tv = 0.5 * np.abs(np.exp(pi) - np.exp(mu)).sum(-1)
    kl = (np.exp(mu) * (mu - pi)).sum(-1)
    np.testing.assert_allclose(found.tv, tv, atol=1e-5)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-5, atol=1e-5)
    others = np.arange(V) != TARGETS[..., None]
    p, diff = np.where(others, np.exp(pi), 0.0), np.exp(pi) - np.exp(mu)
    sums = {"gap": -p * diff, "square": p**2, "signed": np.sign(diff) * p, "signed_square": np.sign(diff) * p**2}
    if distance > 0.01:  # float32 knows the signs of differences
        for name, each in sums.items():
            np.testing.assert_allclose(getattr(found.slope, name), each.sum(-1), rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("pieces", [1, 4])
def test_sums_of_logits_against_float64(pieces):
    """501 tokens do not divide by 4: what pads the last piece counts for nothing."""
    sides = policies(0.1)
    found = logit_sums(*sides, temperature=0.8, behavior_temperature=1.1, softcap=5.0, vocab_chunks=pieces)
    z, y = (
        5.0 * np.tanh(hidden.astype(np.float64) @ weight.astype(np.float64).T / 5.0) / temperature
        for hidden, weight, temperature in ((*sides[:2], 0.8), (*sides[2:], 1.1))
    )
    for one, want in zip(found, ((z - y) ** 2, z * y, z * z, y * y), strict=True):
        np.testing.assert_allclose(one, want.sum(-1), rtol=1e-5, atol=1e-4)


def test_nothing_lies_between_a_policy_and_itself():
    hidden, weight, *_ = policies(0.0)
    found = exact_divergence(hidden, weight, hidden, weight, TARGETS, vocab_chunks=5)
    assert (found.tv == 0).all() and (found.kl == 0).all()
    assert (found.slope.gap == 0).all() and (found.slope.signed == 0).all() and (found.slope.signed_square == 0).all()


def test_slopes_are_summed_where_a_token_is_given_alone():
    hidden, weight, behavior_hidden, behavior_weight = policies(0.1)
    plain = exact_divergence(hidden, weight, behavior_hidden, behavior_weight)
    both = exact_divergence(hidden, weight, behavior_hidden, behavior_weight, TARGETS)
    assert plain.slope is None
    np.testing.assert_allclose(both.tv, plain.tv, rtol=1e-6)
    np.testing.assert_allclose(both.kl, plain.kl, rtol=1e-6)


def test_no_gradient_flows_and_binary_is_below():
    hidden, weight, behavior_hidden, behavior_weight = policies(0.3)

    def total(hidden, weight):
        found = exact_divergence(hidden, weight, behavior_hidden, behavior_weight)
        return jnp.sum(found.tv + found.kl), found

    gradients, found = jax.grad(total, argnums=(0, 1), has_aux=True)(jnp.asarray(hidden), jnp.asarray(weight))
    assert all((g == 0).all() for g in gradients)
    logp, behavior_logp = (
        token_head(h, w, TARGETS).logp for h, w in ((hidden, weight), (behavior_hidden, behavior_weight))
    )
    assert (binary_tv(logp, behavior_logp) <= found.tv + 1e-6).all()
    assert (binary_kl(logp, behavior_logp) <= found.kl + 1e-6).all()


WIDE = ModelConfig(
    model_type="qwen3", vocab_size=151_936, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=32, rms_norm_eps=1e-6, rope=RopeConfig(theta=10000.0), max_position=4096,
    tie_embeddings=True, qkv_bias=False, o_bias=False, qk_norm=True,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_memory_of_a_train_step_with_the_oracle():
    """V = 151,936, 2,048 response tokens a piece: temporaries at most 1.3 x those without, by the compiler's count."""
    rows, prompt, response = 4, 16, 512
    layout = packing.pack_shape(
        prompt_length=prompt, max_new_tokens=response, rows=rows, mean_prompt=None, multiple=1
    )
    plan = packing.plan(np.arange(rows), np.full(rows, prompt), np.full(rows, response), layout)
    shape = jax.ShapeDtypeStruct
    batch = TrainBatch(
        prompt_tokens=shape((rows, prompt), jnp.int32),
        prompt_mask=shape((rows, prompt), jnp.bool_),
        tokens=shape((rows, response), jnp.int32),
        mask=shape((rows, response), jnp.bool_),
        behavior_logp=shape((rows, response), jnp.float32),
        advantages=shape((rows,), jnp.float32),
    )
    score = make_policy_logprobs(WIDE, temperature=1.0, dtype=jnp.float32, remat="dots")
    optimizer = optax.adamw(1e-6)
    params = abstract_params(WIDE)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params)
    numbers = dict(delta_low=0.2, delta_high=0.2, ratio_cap=5.0)
    temporary = {}
    for name in ("dppo_binary_tv", "dppo_exact_tv"):
        exact = name == "dppo_exact_tv"
        oracle = make_behavior_forward(WIDE, dtype=jnp.float32) if exact else None
        weigh = functools.partial(token_mean, constant=1.0)
        update = make_update(score, bind_loss(name, numbers), weigh, optimizer, behavior_forward=oracle)
        lowered = jax.jit(update, donate_argnums=0).lower(state, batch, plan, *([params] if exact else []))
        temporary[name] = lowered.compile().memory_analysis().temp_size_in_bytes
    logits = 4 * rows * response * WIDE.vocab_size
    assert temporary["dppo_exact_tv"] <= 1.3 * temporary["dppo_binary_tv"], temporary
    assert temporary["dppo_exact_tv"] < logits / 2, temporary


def test_exact_rows_are_in_the_table():
    assert {"dppo_exact_tv", "dppo_exact_kl"} <= set(LOSSES)
