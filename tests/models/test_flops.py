"""The count of a model's operations: against XLA's of an unrolled forward pass, a count token by token, the benchmark's
and that of compile_for_tpu."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models.attention import self_attention
from dppo_jax.models.config import Lora, ModelConfig, config_from_hf
from dppo_jax.models.decoder import abstract_params, as_module, head_weight, scores, slides, unstack
from dppo_jax.models.flops import attention_flops, forward_flops, layer_weights, trained_flops
from experiments.benchmark import workloads
from experiments.benchmark.__main__ import flops as benchmark_flops
from experiments.compile_for_tpu.report import flops as compiled_flops
from experiments.compile_for_tpu.steps import Step
from tests.helpers.fixtures import MOE, TINY, small_config

SIZES = dict(hidden_size=256, intermediate_size=512, num_heads=8, num_kv_heads=4, head_dim=32, vocab_size=1024)
DENSE = dataclasses.replace(TINY, **SIZES, num_layers=3)
EVERY_EXPERT = dataclasses.replace(MOE, **SIZES | dict(intermediate_size=128), num_layers=3, experts_per_token=8)
SLIDING = dataclasses.replace(TINY, num_layers=3, window=4, sliding=(True, False, True))


def counted_by_xla(model: ModelConfig, length: int) -> float:
    """Of one sequence's logits, layer after layer."""

    def logits(params, tokens):
        def attend(q, k, v, cache, number):
            segments = jnp.ones_like(tokens)
            settings = dict(implementation="xla", sliding=slides(model, number), **scores(model))
            return self_attention(q, k, v, segments, **settings), cache, ()

        module = as_module(model, unstack(params), stacked=False)
        hidden, *_ = module(tokens, jnp.arange(length)[None], attend, [None] * model.num_layers)
        return hidden @ head_weight(params).T

    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.jit(logits).lower(abstract_params(model), tokens).cost_analysis()["flops"]


@pytest.mark.parametrize("model", [DENSE, EVERY_EXPERT], ids=["dense", "mixture"])
def test_it_is_what_xla_counts(model):
    """Within 4%, which norms, rotations and the like are. XLA's pass makes all scores, and we count causal ones; a
    mixture of few tokens computes every expert."""
    length = 128
    all_scores = 2 * length / (length + 1)
    expected = forward_flops(model, 0, length, length) + (all_scores - 1) * attention_flops(model, 0, length)
    assert counted_by_xla(model, length) == pytest.approx(expected, rel=0.04)


def test_attention_is_what_xla_counts():
    """The further operations of a token in a longer sequence, within 10%: the softmax is in XLA's."""
    short, long = 128, 256
    further = counted_by_xla(DENSE, long) / long - counted_by_xla(DENSE, short) / short
    expected = attention_flops(DENSE, long - 1, long) - attention_flops(DENSE, short - 1, short)
    assert further == pytest.approx(expected, rel=0.1)


def test_a_mixture_counts_the_experts_of_one_token():
    """Against the shapes of the model."""
    sizes = {name: int(np.prod(p.shape[1:])) for name, p in abstract_params(MOE)["layers"].items() if p.ndim >= 3}
    experts = {name for name in sizes if abstract_params(MOE)["layers"][name].ndim == 4}
    assert experts == {"gate", "up", "down"}
    share = MOE.experts_per_token / MOE.num_experts
    assert layer_weights(MOE) == sum(size * (share if name in experts else 1) for name, size in sizes.items())


@pytest.mark.parametrize("model", [TINY, SLIDING], ids=["full", "sliding"])
def test_a_token_attends_to_those_before_it_and_itself(model):
    start, stop = np.array([0, 3, 5, 7]), np.array([9, 3, 20, 8])
    windows = [model.window if sliding else 10**9 for sliding in model.sliding or [False] * model.num_layers]
    seen = sum(
        min(token + 1, window)
        for window in windows
        for a, b in zip(start, stop, strict=True)
        for token in range(a, b)
    )
    assert attention_flops(model, start, stop) == 4 * seen * model.num_heads * model.head_dim


def test_a_pass_in_parts_is_the_pass():
    lengths = np.array([3, 10, 1])
    parts = forward_flops(SLIDING, 0, np.minimum(lengths, 2), 0) + forward_flops(
        SLIDING, np.minimum(lengths, 2), lengths, 3
    )
    assert parts == forward_flops(SLIDING, 0, lengths, 3)


def test_weights_beside_adapters_have_no_gradient():
    lora = dataclasses.replace(DENSE, lora=Lora(2, 1.0, ("q", "k", "v", "o", "gate", "up", "down")))
    adapted, plain = (sum(p.size for p in jax.tree.leaves(abstract_params(model))) for model in (lora, DENSE))
    weights, attention = forward_flops(DENSE, 0, 5, 2) - attention_flops(DENSE, 0, 5), attention_flops(DENSE, 0, 5)
    assert trained_flops(DENSE, 5, 2) == 3 * (weights + attention)
    assert trained_flops(lora, 5, 2) == 2 * weights + 3 * (attention + 2 * 5 * (adapted - plain))


@pytest.mark.parametrize("name", ["S", "M", "G"])
def test_the_benchmark_counts_the_same_but_for_attention(name):
    w = workloads.WORKLOADS[name]
    model, length = config_from_hf(workloads.hf_config(w), "test"), w.train_length
    attention, ours = attention_flops(model, 0, length), forward_flops(model, 0, length, length)
    assert trained_flops(model, length, length) == 3 * ours
    for train, times in ((False, 1), (True, 3)):
        theirs = length * benchmark_flops(w, train=train)
        assert theirs == pytest.approx(times * (ours - attention), rel=1e-6) == pytest.approx(times * ours, rel=0.05)


@pytest.mark.parametrize("name", ["train", "prefill", "decode"])
def test_compile_for_tpu_counts_the_same(name, tmp_path):
    """Of its steps, in which every row is as long as it may be; within 5%."""
    config, rows, prompt, response = small_config(tmp_path), 12, 8, 6
    length = prompt + response
    tokens = {"train": rows * length, "prefill": rows * prompt, "decode": rows}[name]
    weights = 2 * DENSE.num_layers * layer_weights(DENSE)
    head, pair = 2 * DENSE.vocab_size * DENSE.hidden_size, 4 * DENSE.num_layers * DENSE.num_heads * DENSE.head_dim
    by_hand = {
        "train": 3 * rows * (length * weights + response * head + pair * length * (length + 1) / 2),
        "prefill": rows * (prompt * weights + head + pair * prompt * (prompt + 1) / 2),
        "decode": rows * (weights + head + pair * length),
    }[name]
    useful, executed = compiled_flops(config, DENSE, Step(name, lambda: None, 1, tokens, 0))
    assert useful == pytest.approx(by_hand, rel=1e-9) and executed >= useful
