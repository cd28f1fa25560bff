"""One decoder for Llama, Qwen2, Qwen3 and Qwen3-MoE, in Flax NNX at the edges.

`Decoder` is split once: parameters are a plain nested dict from then on, and `bind(config, params)` gives back the
module inside a jitted function. Training scans the layers (stacked parameters); rollout unrolls them (`unstack`), so
that every layer's cache is a buffer of its own. The block code is the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int32, Integer, Key, Shaped, UInt32

from dppo_jax import quantize
from dppo_jax.models.attention import self_attention
from dppo_jax.models.config import ModelConfig
from dppo_jax.models.moe import mixture, route
from dppo_jax.models.rotary import positions, rotate, rotation
from dppo_jax.sharding import constrain

Params = dict[str, Any]
# attend(q, k, v, cache of this layer) -> (mixed values, cache of this layer)
Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
Rounding = Callable[[Array], Array]

ADAPTER = ("_lora_a", "_lora_b")  # after a weight's name: those of its adapter
LOG_SIGMA = "log_sigma"  # beside the model's parameters: of the noise that training adds, f32[L]

# What the backward pass keeps: everything, the matrix products, or each layer's input alone.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@struct.dataclass
class Noise:
    """Gaussian noise for the input of each of L layers. Its keys are data: what the backward pass recomputes, it draws
    again."""

    sigma: Float[Array, "*L"]
    key_data: UInt32[Array, "*L k"]

    def added(self, x: Array) -> Array:
        """x with one layer's noise."""
        draw = jax.random.normal(jax.random.wrap_key_data(self.key_data), x.shape, x.dtype)
        return x + self.sigma.astype(x.dtype) * draw


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], *axes: str) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape), axes=axes)


def _filled(value: float, size: int, axis: str) -> nnx.Param:
    return nnx.Param(jnp.full((size,), value, jnp.float32), axes=(axis,))


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / rms(x) * scale over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def linear(x: Float[Array, "B T I"], w: Float[Array, "I O"]) -> Float[Array, "B T O"]:
    """x w. Its backward pass says x^T g for the weight's gradient, where JAX says (g^T x)^T: XLA's CPU backend copies
    what it transposes, and x is already at hand in the layout that it wants (1.2 x a layer's training)."""
    return x @ w


def _linear_forward(x: Array, w: Array):
    return x @ w, (x, w)


def _linear_backward(kept: tuple[Array, Array], g: Array):
    x, w = kept
    return jnp.einsum("bto,io->bti", g, w), jax.lax.dot_general(x, g, (((0, 1), (0, 1)), ((), ())))


linear.defvjp(_linear_forward, _linear_backward)


def adapt(layer: nnx.Module, name: str, rank: int, rngs: nnx.Rngs) -> None:
    """Gives a layer's weight W [..., I, O] an adapter: A [..., I, rank], uniform within 1 / sqrt(I) as in PEFT, and
    B [..., rank, O] of zeros."""
    weight = getattr(layer, name)
    *several, inner, outer = weight.shape
    *stacked, inner_axis, outer_axis = weight.get_metadata()["axes"]
    bound = inner**-0.5
    a = jax.random.uniform(rngs.params(), (*several, inner, rank), minval=-bound, maxval=bound)
    setattr(layer, name + ADAPTER[0], nnx.Param(a, axes=(*stacked, inner_axis, "rank")))
    b = jnp.zeros((*several, rank, outer))
    setattr(layer, name + ADAPTER[1], nnx.Param(b, axes=(*stacked, "rank", outer_axis)))


def add_adapter(
    w: Float[Array, "*n I O"], a: Float[Array, "*n I r"], b: Float[Array, "*n r O"], scale: float
) -> Float[Array, "*n I O"]:
    """W + scale A B, in float32, as W's dtype."""
    delta = jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return (w.astype(jnp.float32) + scale * delta).astype(w.dtype)


class Layer(nnx.Module):
    """Pre-norm attention and gated MLP, or a mixture of those: each weight's shape, axes and initialisation."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = self.config = config
        d, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.attn_norm = _filled(1.0, d, "norm")
        self.q = _normal(rngs, (d, q), "embed", "heads")
        self.k = _normal(rngs, (d, kv), "embed", "kv_heads")
        self.v = _normal(rngs, (d, kv), "embed", "kv_heads")
        self.o = _normal(rngs, (q, d), "heads", "embed")
        if c.qkv_bias:
            self.q_bias = _filled(0.0, q, "heads")
            self.k_bias = _filled(0.0, kv, "kv_heads")
            self.v_bias = _filled(0.0, kv, "kv_heads")
        if c.o_bias:
            self.o_bias = _filled(0.0, d, "norm")
        if c.qk_norm:
            self.q_norm = _filled(1.0, c.head_dim, "norm")
            self.k_norm = _filled(1.0, c.head_dim, "norm")
        self.mlp_norm = _filled(1.0, d, "norm")
        several, expert = ((c.num_experts,), ("expert",)) if c.num_experts else ((), ())
        if c.num_experts:
            self.router = _normal(rngs, (d, c.num_experts), "embed", "norm")
        self.gate = _normal(rngs, (*several, d, c.intermediate_size), *expert, "embed", "mlp")
        self.up = _normal(rngs, (*several, d, c.intermediate_size), *expert, "embed", "mlp")
        self.down = _normal(rngs, (*several, c.intermediate_size, d), *expert, "mlp", "embed")
        if c.lora:
            for name in c.lora.targets:
                adapt(self, name, c.lora.rank, rngs)
        if c.quantization:
            for name in quantize.MATRICES:
                w = getattr(self, name)
                axes = (*w.get_metadata()["axes"][:-2], "norm", w.get_metadata()["axes"][-1])
                scales = jnp.ones((*w.shape[:-2], 1, w.shape[-1]))
                setattr(self, name + quantize.SCALE, nnx.Param(scales, axes=axes))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        cos: Array,
        sin: Array,
        attend: Attend,
        cache: Any,
        narrow: Rounding | None,
        experts: Integer[Array, "B T k"] | None,
    ):
        """(x, cache, experts): those chosen, or those given; None without a mixture."""
        c, narrow = self.config, (lambda x: x) if narrow is None else narrow
        batch, length, _ = x.shape
        h = narrow(rms_norm(x, self.attn_norm[...], c.rms_norm_eps))
        q, k, v = self._product("q", h), self._product("k", h), self._product("v", h)
        if c.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        q = q.reshape(batch, length, c.num_heads, c.head_dim)
        k, v = (a.reshape(batch, length, c.num_kv_heads, c.head_dim) for a in (k, v))
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], c.rms_norm_eps)
        mixed, cache = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, cache)
        mixed = self._product("o", narrow(mixed.reshape(batch, length, -1)))
        x = x + (mixed + self.o_bias[...] if c.o_bias else mixed)
        h = narrow(rms_norm(x, self.mlp_norm[...], c.rms_norm_eps))
        if c.num_experts:
            h, experts = self._mixture(h, narrow, experts)
        else:
            h, experts = self._mlp(h, narrow), None
        return constrain(x + h, "batch", "length", "residual"), cache, experts

    def _product(self, name: str, x: Array) -> Array:
        """x times the weight of that name, and its adapter."""
        if how := self.config.quantization:
            w, scales = getattr(self, name)[...], getattr(self, name + quantize.SCALE)[...]
            return quantize.product(x, w, scales, how.format, activations=how.activations)
        y = linear(x, getattr(self, name)[...])
        if (lora := self.config.lora) is None or name not in lora.targets:
            return y
        a, b = (getattr(self, name + suffix)[...] for suffix in ADAPTER)
        return y + lora.scale * linear(linear(x, a), b)

    def _whole(self, name: str, dtype: Any) -> Array:
        """The weight of that name with its adapter added, or dequantised: of experts, whose products are grouped."""
        w = getattr(self, name)[...]
        if self.config.quantization:
            return quantize.dequantized(w, getattr(self, name + quantize.SCALE)[...], dtype)
        if (lora := self.config.lora) is None or name not in lora.targets:
            return w
        a, b = (getattr(self, name + suffix)[...] for suffix in ADAPTER)
        return add_adapter(w, a, b, lora.scale)

    def _mlp(self, h: Array, narrow: Rounding) -> Array:
        h = narrow(jax.nn.silu(self._product("gate", h)) * self._product("up", h))
        return self._product("down", h)

    def _mixture(self, h: Array, narrow: Rounding, experts: Array | None) -> tuple[Array, Array]:
        c, tokens = self.config, h.reshape(-1, h.shape[-1])
        given = None if experts is None else experts.reshape(-1, c.experts_per_token).astype(jnp.int32)
        weights, chosen = route(tokens, self.router[...], k=c.experts_per_token, norm=c.norm_topk, chosen=given)
        gate, up, down = (self._whole(name, tokens.dtype) for name in ("gate", "up", "down"))
        mixed = mixture(tokens, weights, chosen, gate, up, down, narrow)
        return mixed.reshape(h.shape), chosen.reshape(*h.shape[:-1], c.experts_per_token)


class Decoder(nnx.Module):
    """Embedding, layers, final norm. The head is a weight here; `token_head` applies it."""

    def __init__(self, config: ModelConfig, *, stacked: bool, rngs: nnx.Rngs):
        self.config, self.stacked = config, stacked
        self.embed = _normal(rngs, (config.vocab_size, config.hidden_size), "vocab", "embed")
        if not config.tie_embeddings:
            self.head = _normal(rngs, (config.vocab_size, config.hidden_size), "vocab", "embed")
        self.final_norm = _filled(1.0, config.hidden_size, "norm")
        if stacked:
            make = nnx.vmap(lambda rngs: Layer(config, rngs), in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=config.num_layers)(make)(rngs)
        else:
            self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_layers)])

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        position: Int32[Array, "B T"],
        attend: Attend,
        cache: Any,
        remat: str = "none",
        narrow: Rounding | None = None,
        noise: Noise | None = None,
        experts: Integer[Array, "L B T k"] | None = None,
    ) -> tuple[Float[Array, "B T E"], Any, Integer[Array, "L B T k"] | None]:
        """Hidden states after the final norm, the layers' caches, and the experts of a mixture.

        Given `experts`, every token goes through those (a replay of the rollout's; stacked layers only).
        `narrow` rounds the input of every linear layer, the head's included. `noise` is added to the hidden state that
        enters each layer (stacked layers only).
        """
        table = constrain(self.embed[...], "vocab", None)
        x = constrain(table[tokens], "batch", "length", "residual")
        cos, sin = rotation(self.config.rope, self.config.head_dim, position)
        if self.stacked:

            def block(layer, x, cache, noise, experts):
                x = x if noise is None else noise.added(x)
                x, cache, experts = layer(x, cos, sin, attend, cache, narrow, experts)
                return x, (cache, experts)

            if remat != "none":
                block = nnx.remat(block, prevent_cse=False, policy=REMAT[remat])
            scan = nnx.scan(block, in_axes=(0, nnx.Carry, 0, 0, 0), out_axes=(nnx.Carry, 0))
            x, (caches, experts) = scan(self.layers, x, cache, noise, experts)
        else:
            caches, chosen = [], []
            for layer, layer_cache in zip(self.layers, cache, strict=True):
                x, layer_cache, layer_experts = layer(x, cos, sin, attend, layer_cache, narrow, None)
                caches.append(layer_cache)
                chosen.append(layer_experts)
            experts = jnp.stack(chosen) if self.config.num_experts else None
        x = rms_norm(x, self.final_norm[...], self.config.rms_norm_eps)
        return x if narrow is None else narrow(x), caches, experts


@functools.cache
def _abstract(config: ModelConfig, stacked: bool):
    module = nnx.eval_shape(lambda: Decoder(config, stacked=stacked, rngs=nnx.Rngs(0)))
    graph, params, _ = nnx.split(module, nnx.Param, ...)
    return graph, params


def bind(config: ModelConfig, params: Params, *, stacked: bool = True, dtype: Any = None) -> Decoder:
    """The module that holds these parameters, cast to `dtype` if one is given; call it inside jit, once."""
    params = {key: value for key, value in params.items() if key != LOG_SIGMA}
    if dtype is not None:
        params = in_dtype(params, dtype)
    return nnx.merge(_abstract(config, stacked)[0], params)


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random float32 parameters: normal with deviation 0.02, norms 1, biases 0."""
    module = Decoder(config, stacked=True, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, nothing allocated."""
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), nnx.to_pure_dict(_abstract(config, stacked=True)[1])
    )


def param_axes(config: ModelConfig) -> Params:
    """Logical axis names of every parameter, as tuples."""
    flat = {path: leaf.get_metadata()["axes"] for path, leaf in nnx.to_flat_state(_abstract(config, True)[1])}
    axes: Params = {"layers": {}}
    for path, names in flat.items():
        if path[0] == "layers":
            axes["layers"][path[1]] = ("layers", *names)
        else:
            axes[path[0]] = tuple(names)
    return axes


def in_dtype(params: Params, dtype: Any) -> Params:
    """Parameters in a dtype; what is quantised stays so, with its scales."""
    layers = params["layers"]
    kept = {name for name in layers if name.endswith(quantize.SCALE) or name + quantize.SCALE in layers}
    cast = jax.tree.map(lambda p: p.astype(dtype), {name: p for name, p in params.items() if name != "layers"})
    return cast | {"layers": {name: p if name in kept else p.astype(dtype) for name, p in layers.items()}}


def unstack(params: Params, dtype: Any) -> Params:
    """The same parameters layer by layer, in the rollout's dtype."""
    cast = in_dtype(params, dtype)
    count = jax.tree.leaves(cast["layers"])[0].shape[0]
    return {**cast, "layers": {i: jax.tree.map(lambda p, i=i: p[i], cast["layers"]) for i in range(count)}}


def head_weight(params: Params) -> Float[Array, "V E"]:
    """The output embedding; the input's where they are tied."""
    return params["head"] if "head" in params else params["embed"]


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int32[Array, "B T"],
    segments: Shaped[Array, "B T"],
    position: Int32[Array, "B T"] | None = None,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "xla",
    narrow: Rounding | None = None,
    noise_key: Key[Array, ""] | None = None,
    experts: Integer[Array, "B T L k"] | None = None,
) -> Float[Array, "B T E"]:
    """Teacher-forced hidden states after the final norm: causal, within equal `segments`, of which 0 is padding.

    With a `noise_key`, each layer's input is perturbed with deviation exp(params["log_sigma"]). Given the `experts` of
    every layer, tokens go through those.

    A mask will do for segments where each row holds one sample; `position` is then counted from its first token.
    """
    position = positions(segments > 0) if position is None else position
    segments = segments.astype(jnp.int32)

    def attend(q, k, v, cache):
        return self_attention(q, k, v, segments, implementation=attention), cache

    noise = None
    if noise_key is not None:
        keys = jax.random.split(noise_key, config.num_layers)
        noise = Noise(jnp.exp(params[LOG_SIGMA]), jax.random.key_data(keys))
    experts = None if experts is None else jnp.moveaxis(experts, 2, 0)
    hidden, _, _ = bind(config, params, dtype=dtype)(tokens, position, attend, None, remat, narrow, noise, experts)
    return hidden
