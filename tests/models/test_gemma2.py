"""Gemma-2 in the loop: its rollout against training, by every kernel, and the critic made from it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.critic import critic_axes, init_critic, make_values
from dppo_jax.models.attention import KERNELS, per_device, splash_kernel
from dppo_jax.models.config import ModelConfig, RopeConfig
from dppo_jax.models.decoder import forward, head_weight, init_params
from dppo_jax.packing import PackShape, microbatch, pack, plan
from dppo_jax.precision import weights
from dppo_jax.rollout import Rollout
from dppo_jax.teacher_forced import make_policy_logprobs, make_recompute
from dppo_jax.token_head import token_head
from dppo_jax.train_step import assemble
from dppo_jax.types import PromptBatch
from tests.helpers.fixtures import COMPILER_OPTIONS

# A window shorter than most prompts and than most responses; layers slide in no regular pattern.
GEMMA = ModelConfig(
    model_type="gemma2", vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=8, rms_norm_eps=1e-6, rope=RopeConfig(theta=1e4), max_position=64, tie_embeddings=True,
    qkv_bias=False, o_bias=False, qk_norm=False, logit_softcap=4.0, query_scalar=3, attn_softcap=1.5, window=5,
    sliding=(False, True, True),
)  # fmt: skip
N, P, G, R = 8, 12, 4, 20
jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
interpreted = functools.partial(per_device, kernel=functools.partial(splash_kernel, interpret=True))
LENGTHS = np.array([12, 1, 7, 4, 5, 9, 2, 11])


def params():
    """Random, far from uniform: norms away from 1, matrices several times as large as at the start of training."""
    rng = np.random.default_rng(0)
    noise = lambda w: 8 * w if w.ndim > 2 or len(w) == 40 else w + rng.normal(0, 0.3, w.shape)  # noqa: E731
    return jax.tree.map(lambda w: jnp.asarray(noise(w), jnp.float32), init_params(GEMMA, jax.random.key(0)))


@functools.cache
def drawn(slots: int = 5):
    """32 responses of very different lengths to ragged prompts, in a few slots: each is filled anew several times."""
    rollout = Rollout(
        GEMMA, group_size=G, max_new_tokens=R, temperature=1.0, eos_ids=(0, 1, 2), pad_id=0, slots=slots
    )
    tokens = np.random.default_rng(1).integers(3, 40, (N, P)).astype(np.int32)
    prompts = PromptBatch(tokens, np.arange(P) >= P - LENGTHS[:, None], np.arange(N, dtype=np.int32))
    return prompts, jit(rollout)(params(), prompts, jax.random.key(3))


def packed(length: int = 64):
    prompts, found = drawn()
    lengths = np.asarray(found.response_mask.sum(1))
    layout = PackShape(rows=8, length=length, responses=48)
    return assemble(prompts, found), plan(np.arange(N * G), np.repeat(LENGTHS, G), lengths, layout, packed=True)


def gap(attention: str = "xla", length: int = 64, **changes) -> float:
    """The largest |log pi - log mu| of a response's token: training, packed, against the rollout."""
    batch, where = packed(length)
    config = dataclasses.replace(GEMMA, **changes)
    numbers = dict(temperature=1.0, dtype=jnp.float32, remat="none", vocab_chunks=1)
    score = make_policy_logprobs(config, attention=attention, **numbers)
    logp = jit(make_recompute(score, "proximal"))(params(), batch, where).proximal_logp
    return float(np.abs(logp - drawn()[1].behavior_logp)[np.asarray(batch.mask)].max())


def test_responses_are_of_many_lengths_and_longer_than_the_window():
    lengths = np.asarray(drawn()[1].response_mask.sum(1))
    assert len(set(lengths.tolist())) > 6 and lengths.min() < GEMMA.window < 2 * GEMMA.window < lengths.max()
    assert LENGTHS.min() < GEMMA.window < LENGTHS.max()


def test_rollout_and_training_agree():
    assert gap() <= 1e-4


@pytest.mark.parametrize("change", [
    {"window": 4}, {"window": 6}, {"sliding": (True, True, True)}, {"sliding": (True, False, True)},
    {"attn_softcap": 1.6}, {"attn_softcap": None}, {"logit_softcap": None}, {"query_scalar": 4},
])  # fmt: skip
def test_a_training_of_another_model_would_not(change):
    assert gap(**change) > 0.01


def test_what_is_drawn_does_not_depend_on_the_slot():
    few, many = drawn()[1], drawn(slots=N * G)[1]
    np.testing.assert_array_equal(few.tokens, many.tokens)
    np.testing.assert_allclose(few.behavior_logp, many.behavior_logp, rtol=0, atol=1e-5)


def test_rollout_and_training_agree_by_splash(monkeypatch):
    monkeypatch.setitem(KERNELS, "splash", interpreted)
    assert gap("splash", length=128) <= 1e-4


def loss(params, tokens, attention: str, remat: str):
    """Two samples a row."""
    half = tokens.shape[1] // 2
    segments = jnp.repeat(jnp.array([[1, 2]]), half, axis=1) * jnp.ones_like(tokens)
    position = jnp.tile(jnp.arange(half), 2)[None] * jnp.ones_like(tokens)
    hidden = forward(GEMMA, params, tokens, segments, position, attention=attention, remat=remat)
    head = token_head(hidden[:, :-1], head_weight(params), tokens[:, 1:], temperature=1.0, softcap=GEMMA.logit_softcap)
    return head.logp.mean()


TOKENS = np.random.default_rng(0).integers(0, 40, (2, 128)).astype(np.int32)


def test_gradients_by_splash_are_those_by_xla(monkeypatch):
    """Under remat, where a layer's kernel is chosen within the scan; and none is zero."""
    monkeypatch.setitem(KERNELS, "splash", interpreted)
    one, other = (
        jit(jax.grad(functools.partial(loss, attention=name, remat="full")))(params(), TOKENS)
        for name in ("splash", "xla")
    )
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max(), err_msg=str(path))
        for part in b if path[0].key == "layers" else [b]:
            assert float(jnp.abs(part).max()) > 1e-6, path


def test_embeddings_are_scaled_by_a_number_of_their_dtype():
    """sqrt(3072) = 55.43 is 55.5 in bfloat16, as in the models that are trained with it."""
    wide = dataclasses.replace(GEMMA, hidden_size=3072, num_layers=1, sliding=(False,), rms_norm_eps=1e12)
    params = jax.tree.map(jnp.zeros_like, init_params(wide, jax.random.key(0)))
    for name in ("attn_post_norm", "mlp_post_norm"):
        params["layers"][name] -= 1.0  # the layer adds nothing
    params["final_norm"] += 1e6 - 1.0  # and the last norm takes away what the epsilon does
    embed = jax.random.normal(jax.random.key(1), params["embed"].shape).astype(jnp.bfloat16).astype(jnp.float32)
    for dtype, scale in ((jnp.float32, 3072**0.5), (jnp.bfloat16, 55.5)):
        ones = jnp.ones((1, 1), jnp.int32)
        hidden = jit(functools.partial(forward, wide, dtype=dtype))(params | {"embed": embed}, ones, ones)[0, 0]
        want = (embed[1] * scale).astype(dtype)
        np.testing.assert_allclose(hidden.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-5)


def test_a_critic_starts_at_zero_and_has_the_norms():
    critic = init_critic(params())
    is_axes = dict(is_leaf=lambda x: isinstance(x, tuple))
    assert jax.tree.structure(critic) == jax.tree.structure(critic_axes(GEMMA), **is_axes)
    assert {"attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"} <= critic["body"]["layers"].keys()
    critic["value"]["weight"] += 1.0
    batch, where = packed()
    values = make_values(GEMMA, dtype=jnp.float32, remat="none")
    ones = jnp.ones(batch.tokens.shape, jnp.float32)
    found = jit(lambda critic: values(critic, pack(batch, ones, microbatch(where, 0))))(critic)
    assert np.isfinite(found).all() and np.std(found) > 0


def test_rounding_of_weights_leaves_norms_alone():
    rounded, given = weights("int4")(params()), params()
    for name, w in given["layers"].items():
        assert np.array_equal(rounded["layers"][name], w) == name.endswith("norm"), name
