"""Floating-point operations of a model, from its config and the tokens that pass through it: what MFU counts.

A product of a weight and an input is two operations, and so is one of attention's. Norms, rotations and the softmax are
not counted, nor what a program computes again or for padding. A backward pass is two forward passes.
"""

import numpy as np

from dppo_jax.models.config import ModelConfig

Counts = int | float | np.ndarray  # of tokens; of several sequences i[n]


def layer_weights(model: ModelConfig) -> int:
    """Weights of a layer's products that a token meets: of a mixture, its router and the experts of one token."""
    d, mlp = model.hidden_size, 3 * model.hidden_size * model.intermediate_size
    attention = 2 * d * model.head_dim * (model.num_heads + model.num_kv_heads)
    return attention + (mlp * model.experts_per_token + d * model.num_experts if model.num_experts else mlp)


def weight_flops(model: ModelConfig, tokens: float, predicted: float) -> float:
    """Of products with weights, forward: `tokens` through all layers, `predicted` of them through the head."""
    head = model.vocab_size * model.hidden_size
    return 2.0 * (tokens * model.num_layers * layer_weights(model) + predicted * head)


def attention_flops(model: ModelConfig, start: Counts, stop: Counts) -> float:
    """Of scores and mixed values in all layers, forward: each token from number `start` to `stop` - 1 of a sequence
    sees those before it and itself, in a sliding layer the window's."""
    sliding = sum(model.sliding)
    seen = (model.num_layers - sliding) * _pairs(start, stop)
    if sliding:
        assert model.window is not None
        inside = np.minimum(stop, model.window)
        beyond = np.asarray(stop) - np.maximum(start, inside)
        seen += sliding * (_pairs(np.minimum(start, inside), inside) + float(np.sum(beyond)) * model.window)
    return 4.0 * seen * model.num_heads * model.head_dim


def forward_flops(model: ModelConfig, start: Counts, stop: Counts, predicted: float) -> float:
    """Of a forward pass of the tokens `start` to `stop` - 1 of each sequence, `predicted` of them through the head."""
    tokens = float(np.sum(np.asarray(stop) - start))
    return weight_flops(model, tokens, predicted) + attention_flops(model, start, stop)


def trained_flops(model: ModelConfig, lengths: Counts, predicted: float) -> float:
    """Of forward and backward passes of whole sequences. Weights beside adapters have no gradient of their own."""
    weights, attention = weight_flops(model, float(np.sum(lengths)), predicted), attention_flops(model, 0, lengths)
    if model.lora is None:
        return 3 * (weights + attention)
    adapters = 2.0 * float(np.sum(lengths)) * model.num_layers * _adapter_weights(model)
    return 2 * weights + 3 * (attention + adapters)


def _pairs(start: Counts, stop: Counts) -> float:
    """Of a token and one that it sees, without a window."""
    a, b = np.asarray(start, np.float64), np.asarray(stop, np.float64)
    return float(np.sum(b * (b + 1) - a * (a + 1))) / 2


def _adapter_weights(model: ModelConfig) -> int:
    """Of a layer's adapters, that a token meets."""
    assert model.lora is not None
    d, heads, kv = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    mlp = (d + model.intermediate_size) * max(model.experts_per_token, 1)
    sizes = {"q": d + heads, "k": d + kv, "v": d + kv, "o": heads + d, "gate": mlp, "up": mlp, "down": mlp}
    return model.lora.rank * sum(sizes[name] for name in model.lora.targets)
