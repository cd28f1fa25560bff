"""The mixture of experts against a loop in float64, its rollout against training, and router replay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models import moe
from dppo_jax.models.config import ModelConfig, RopeConfig
from dppo_jax.models.decoder import forward, forward_routed, head_weight, init_params
from dppo_jax.models.moe import mixture, route
from dppo_jax.packing import PackShape, plan
from dppo_jax.rollout import Rollout
from dppo_jax.teacher_forced import make_policy_logprobs, make_recompute
from dppo_jax.token_head import token_head
from dppo_jax.train_step import assemble
from dppo_jax.types import PromptBatch

MOE = ModelConfig(
    model_type="qwen3_moe", vocab_size=40, hidden_size=32, intermediate_size=16, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=8, rms_norm_eps=1e-6, rope=RopeConfig(theta=1e4), max_position=64, tie_embeddings=False,
    qkv_bias=False, o_bias=False, qk_norm=True, num_experts=64, experts_per_token=2, norm_topk=True,
)  # fmt: skip


def params(model=MOE):
    """Random, far from uniform, the experts far from each other."""
    scales = {"gate": 15, "up": 15, "down": 15, "embed": 6, "head": 6}

    def scaled(path, w):
        return scales.get(path[-1].key, 3 if w.ndim > 2 else 1) * w

    return jax.tree_util.tree_map_with_path(scaled, init_params(model, jax.random.key(0)))


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("few", [0, 30])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("replayed", [False, True])
def test_a_mixture_is_the_sum_over_its_experts(norm, replayed, few, layer, monkeypatch):
    """Sorted, or every expert of every token; the experts of one layer, or those of all, read in place."""
    monkeypatch.setattr(moe, "FEW", few)
    rng = np.random.default_rng(0)
    h, router = rng.normal(size=(30, 6)), rng.normal(size=(6, 5))
    gate, up, down = rng.normal(size=(5, 6, 4)), rng.normal(size=(5, 6, 4)), rng.normal(size=(5, 4, 6))
    given = np.stack([rng.permutation(5)[:2] for _ in range(30)]) if replayed else None
    single = [jnp.asarray(x, jnp.float32) for x in (h, router, gate, up, down)]
    given = None if given is None else given[None]
    weights, chosen, entropy = route(
        single[0][None], single[1], k=2, norm=norm, chosen=None if given is None else jnp.asarray(given)
    )
    experts = tuple(single[2:])
    if layer is not None:
        experts = tuple(jnp.stack([jnp.full_like(w, jnp.nan), w, -w]) for w in experts)
    ours, chosen = mixture(single[0][None], weights, chosen, experts, lambda x: x, layer)[0], chosen[0]
    for token in range(30):
        z = h[token] @ router
        probs = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        np.testing.assert_allclose(entropy[0, token], -(probs * np.log(probs)).sum(), rtol=1e-5)
        ids = given[0, token] if replayed else np.argsort(-probs)[:2]
        assert set(np.asarray(chosen[token]).tolist()) == set(ids.tolist())
        w = probs[ids] / (probs[ids].sum() if norm else 1)
        right = sum(a * (silu(h[token] @ gate[e]) * (h[token] @ up[e]) @ down[e]) for a, e in zip(w, ids, strict=True))
        np.testing.assert_allclose(ours[token], right, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_kernel_reads_one_layers_experts_among_those_of_all(layer, monkeypatch):
    """The kernel of TPUs, interpreted; an expert without rows, and rows beyond the last expert's."""
    monkeypatch.setattr(moe, "gmm", functools.partial(moe.gmm, interpret=True))
    monkeypatch.setattr(moe, "_on_tpu", lambda by_kernel, by_xla, *inputs: by_kernel(*inputs))
    rng, sizes = np.random.default_rng(1), np.array([300, 0, 500, 100], np.int32)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((1024, 128), (3, 4, 128, 256)))
    got = moe._times(x, w, jnp.asarray(sizes), jnp.int32(layer))
    want = jax.lax.ragged_dot(x, w[layer], jnp.asarray(sizes))
    np.testing.assert_allclose(*(np.asarray(y[: sizes.sum()], np.float32) for y in (got, want)), rtol=0.02, atol=0.1)


def drawn(dtype, record: bool):
    rollout = Rollout(
        MOE, group_size=4, max_new_tokens=10, temperature=1.0, eos_ids=(0,), pad_id=0, dtype=dtype, slots=6,
        record_experts=record,
    )  # fmt: skip
    tokens = np.random.default_rng(1).integers(1, 40, (8, 7)).astype(np.int32)
    mask = np.arange(7) >= np.array([0, 2, 5, 0, 1, 3, 6, 4])[:, None]
    prompts = PromptBatch(tokens, mask, np.arange(8, dtype=np.int32))
    return prompts, jax.jit(rollout)(params(), prompts, jax.random.key(3))


def gap(dtype, record: bool) -> np.ndarray:
    """|pi - mu| of every response token: training in float32 against the rollout."""
    prompts, found = drawn(dtype, record)
    batch = assemble(prompts, found)
    lengths, widths = np.asarray(found.response_mask.sum(1)), np.repeat(prompts.mask.sum(1), 4)
    where = plan(np.arange(32), widths, lengths, PackShape(rows=8, length=34, responses=20), packed=True)
    score = make_policy_logprobs(MOE, temperature=1.0, dtype=jnp.float32, remat="none", vocab_chunks=1)
    logp = jax.jit(make_recompute(score, "proximal"))(params(), batch, where).proximal_logp
    return np.abs(np.exp(logp) - np.exp(found.behavior_logp))[np.asarray(batch.mask)]


def test_rollout_and_training_agree_packed_and_replayed():
    for record in (False, True):
        assert gap(jnp.float32, record).max() < 1e-4


def test_experts_are_those_that_training_would_choose():
    prompts, found = drawn(jnp.float32, True)
    row = 5
    kept = np.asarray(prompts.mask[row // 4])
    ours = np.concatenate([found.prompt_experts[row // 4][kept], found.experts[row]])
    tokens = np.concatenate([prompts.tokens[row // 4][kept], found.tokens[row]])[None]
    length = int(kept.sum() + found.response_mask[row].sum()) - 1  # the last token goes through no expert

    def experts(tokens):
        return forward_routed(MOE, params(), tokens, jnp.ones(tokens.shape, bool))[1].experts

    theirs = np.moveaxis(np.asarray(jax.jit(experts)(tokens)), 0, 2)[0]
    ours = ours[:length].reshape(length, *theirs.shape[1:])
    assert np.array_equal(np.sort(ours, -1), np.sort(theirs[:length], -1))


@pytest.mark.slow
def test_replay_lowers_the_mismatch():
    """A bfloat16 rollout against float32 training: other experts are a jump, that replay takes away."""
    free, replayed = gap(jnp.bfloat16, False), gap(jnp.bfloat16, True)
    assert free.mean() > 2 * replayed.mean() > 0


def test_every_parameter_has_a_gradient():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (4, 12)), jnp.int32)

    def loss(params):
        hidden = forward(MOE, params, tokens, jnp.ones(tokens.shape, bool))
        return token_head(hidden[:, :-1], head_weight(params), tokens[:, 1:], temperature=1.0).logp.mean()

    for path, grad in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params())):
        assert float(jnp.abs(grad).max()) > 0, path


def test_a_dense_model_has_no_experts_to_record():
    dense = dataclasses.replace(MOE, model_type="qwen3", num_experts=0)
    with pytest.raises(ValueError, match="no experts"):
        Rollout(
            dense, group_size=1, max_new_tokens=2, temperature=1.0, eos_ids=(0,), pad_id=0, record_experts=True
        )
