"""Mistral in the loop: every layer slides, and cos and sin have an attention factor. Its rollout against training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models.config import ModelConfig, RopeConfig
from dppo_jax.models.decoder import init_params
from dppo_jax.packing import PackShape, plan
from dppo_jax.rollout import Rollout
from dppo_jax.teacher_forced import make_policy_logprobs, make_recompute
from dppo_jax.train_step import assemble
from dppo_jax.types import PromptBatch
from tests.helpers.fixtures import COMPILER_OPTIONS

ROPE = RopeConfig(
    1e4, "longrope", original_max_position=16, attention_factor=1.3, short_factor=(1.0, 1.1, 1.2, 1.3),
    long_factor=(1.0, 2.0, 3.0, 4.0), long=True,
)  # fmt: skip
# A window shorter than most prompts and than most responses.
MISTRAL = ModelConfig(
    model_type="mistral", vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, rms_norm_eps=1e-6, rope=ROPE, max_position=64, tie_embeddings=False,
    qkv_bias=False, o_bias=False, qk_norm=False, window=5, sliding=(True, True),
)  # fmt: skip
N, P, G, R = 8, 12, 4, 20
LENGTHS = np.array([12, 1, 7, 4, 5, 9, 2, 11])
jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


@functools.cache
def params():
    """Random, far from uniform."""
    rng = np.random.default_rng(0)
    noise = lambda w: 8 * w if w.ndim > 2 or len(w) == 40 else w + rng.normal(0, 0.3, w.shape)  # noqa: E731
    return jax.tree.map(lambda w: jnp.asarray(noise(w), jnp.float32), init_params(MISTRAL, jax.random.key(0)))


@functools.cache
def drawn(paged: bool):
    """32 responses to ragged prompts in five slots, each of which is filled anew several times."""
    rollout = Rollout(
        MISTRAL, group_size=G, max_new_tokens=R, temperature=1.0, eos_ids=(0, 1, 2), pad_id=0, slots=5, paged=paged
    )
    tokens = np.random.default_rng(1).integers(3, 40, (N, P)).astype(np.int32)
    prompts = PromptBatch(tokens, np.arange(P) >= P - LENGTHS[:, None], np.arange(N, dtype=np.int32))
    return prompts, jit(rollout)(params(), prompts, jax.random.key(3))


def gap(paged: bool, **changes) -> float:
    """The largest |log pi - log mu| of a response's token: training, packed, against the rollout."""
    prompts, found = drawn(paged)
    lengths = np.asarray(found.response_mask.sum(1))
    assert lengths.max() > 2 * MISTRAL.window and len(set(lengths.tolist())) > 6
    layout = PackShape(rows=8, length=64, responses=48)
    batch, where = assemble(prompts, found), plan(np.arange(N * G), np.repeat(LENGTHS, G), lengths, layout, packed=True)
    numbers = dict(temperature=1.0, dtype=jnp.float32, remat="none", vocab_chunks=1)
    score = make_policy_logprobs(dataclasses.replace(MISTRAL, **changes), attention="xla", **numbers)
    logp = jit(make_recompute(score, "proximal"))(params(), batch, where).proximal_logp
    return float(np.abs(logp - found.behavior_logp)[np.asarray(batch.mask)].max())


@pytest.mark.parametrize("paged", [False, True])
def test_rollout_and_training_agree(paged):
    assert gap(paged) <= 1e-4


@pytest.mark.parametrize("change", [
    {"window": 4}, {"window": 6}, {"window": None, "sliding": ()}, {"sliding": (True, False)},
    {"rope": ROPE.for_rows(16)}, {"rope": dataclasses.replace(ROPE, attention_factor=1.0)},
])  # fmt: skip
def test_a_training_of_another_model_would_not(change):
    assert gap(False, **change) > 0.01
