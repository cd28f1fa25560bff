"""One decoder for Llama, Qwen2, Qwen3, Qwen3-MoE, Mistral and Gemma-2, in Flax NNX at the edges.

`Decoder` is split once: parameters are a plain nested dict from then on, and `as_module(config, params)` gives back the
module inside a jitted function. Training scans the layers (stacked parameters); rollout unrolls them (`unstack`), so
that every layer's cache is a buffer of its own. The block code is the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int32, Integer, Key, Shaped, UInt32

from dppo_jax import quantize
from dppo_jax.devices.sharding import constrain
from dppo_jax.models.adapters import ADAPTER, adapt, add_adapter
from dppo_jax.models.attention import self_attention
from dppo_jax.models.config import MATRICES, ModelConfig
from dppo_jax.models.embedding import embed
from dppo_jax.models.linear import linear
from dppo_jax.models.moe import mixture, route
from dppo_jax.models.rotary import positions, rotate, rotation
from dppo_jax.types import Rounding

Params = dict[str, Any]
# attend(q, k, v, cache, number of the layer) -> (mixed values, cache, output that is stacked over the layers)
Attend = Callable[[Array, Array, Array, Any, Any], tuple[Array, Any, Any]]

EXPERTS = ("gate", "up", "down")  # of a mixture, the weights of an expert
LOG_SIGMA = "log_sigma"  # f32[L], beside the model's parameters: log deviation of the noise that training adds


@struct.dataclass
class Routed:
    """Where each token went in a mixture of experts."""

    experts: Integer[Array, "*L B T k"]
    entropy: Float[Array, "*L B T"]  # of the router's softmax, in nats


# What the backward pass keeps: everything, the matrix products, or each layer's input alone.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@struct.dataclass
class Noise:
    """Gaussian noise for the input of each of L layers. The keys are stored, so that a recomputation in the backward
    pass draws the same noise."""

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


def rms_norm(x: Array, scale: Array, eps: float, offset: float = 0.0) -> Array:
    """x / rms(x) * (offset + scale) over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * (offset + scale.astype(jnp.float32))).astype(x.dtype)


class Layer(nnx.Module):
    """Pre-norm attention and gated MLP, or a mixture of those: each weight's shape, axes and initialisation.

    Gemma's have a norm behind them too, before the residual stream.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = self.config = config
        d, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.attn_norm = _filled(1.0 - c.norm_offset, d, "norm")
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
        self.mlp_norm = _filled(1.0 - c.norm_offset, d, "norm")
        if c.gemma:
            self.attn_post_norm = _filled(1.0 - c.norm_offset, d, "norm")
            self.mlp_post_norm = _filled(1.0 - c.norm_offset, d, "norm")
        several: tuple[int, ...] = ()
        into: tuple[str, ...] = ("embed", "mlp")
        out_of: tuple[str, ...] = ("mlp", "embed")
        if c.num_experts:
            several = (c.num_experts,)
            into, out_of = ("expert", "expert_embed", "expert_mlp"), ("expert", "expert_mlp", "expert_embed")
            self.router = _normal(rngs, (d, c.num_experts), "embed", "norm")
        self.gate = _normal(rngs, (*several, d, c.intermediate_size), *into)
        self.up = _normal(rngs, (*several, d, c.intermediate_size), *into)
        self.down = _normal(rngs, (*several, c.intermediate_size, d), *out_of)
        if c.lora:
            for name in c.lora.targets:
                adapt(self, name, c.lora.rank, rngs)
        if c.quantization:
            for name in MATRICES:
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
        number: Any,
        round_inputs: Rounding | None,
        experts: Integer[Array, "B T k"] | None,
        stacks: tuple[Array, ...] | None = None,
    ):
        """(x, cache, output of `attend` to stack, routes). `experts`: the experts to take; None: the router's choice.
        `stacks`: the weights of all layers' experts, to be read in place of this layer's own.

        The routes are None without a mixture.
        """
        c, round_inputs = self.config, (lambda x: x) if round_inputs is None else round_inputs
        h = constrain(round_inputs(self._norm("attn_norm", x)), "batch", "length", "residual")
        q = self._product("q", h, c.num_heads)
        k, v = (self._product(name, h, c.num_kv_heads) for name in ("k", "v"))
        if c.qkv_bias:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            q, k, v = (a + bias[...].reshape(-1, c.head_dim) for a, bias in zip((q, k, v), biases, strict=True))
        q = constrain(q, "batch", "length", "heads", None)
        k, v = (constrain(a, "batch", "length", "kv_heads", None) for a in (k, v))
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], c.rms_norm_eps)
        mixed, cache, attend_output = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, cache, number)
        mixed = round_inputs(mixed.reshape(*x.shape[:2], -1)).reshape(*x.shape[:2], c.num_heads, -1)
        mixed = constrain(mixed, "batch", "length", "heads", None)
        mixed = constrain(self._product("o", mixed), "batch", "stream", "residual")
        mixed = mixed + self.o_bias[...] if c.o_bias else mixed
        x = x + (self._norm("attn_post_norm", mixed) if c.gemma else mixed)
        h = round_inputs(self._norm("mlp_norm", x))
        if c.num_experts:
            h, routed = self._mixture(h, round_inputs, experts, stacks, number)
        else:
            h, routed = self._mlp(h, round_inputs), None
        h = constrain(h, "batch", "stream", "residual")
        h = self._norm("mlp_post_norm", h) if c.gemma else h
        return x + h, cache, attend_output, routed

    def _norm(self, name: str, x: Array) -> Array:
        """x through the norm of that name."""
        return rms_norm(x, getattr(self, name)[...], self.config.rms_norm_eps, self.config.norm_offset)

    def _product(self, name: str, x: Array, heads: int | None = None) -> Array:
        """x times the weight of that name, plus its adapter's product; shapes as in `linear`."""
        if how := self.config.quantization:
            w, scales = getattr(self, name)[...], getattr(self, name + quantize.SCALE)[...]
            y = quantize.product(x.reshape(*x.shape[:2], -1), w, scales, how.format, activations=how.activations)
            return y if heads is None else y.reshape(*y.shape[:2], heads, -1)

        def times(x: Array, name: str, heads: int | None = None) -> Array:
            weight = getattr(self, name)
            return linear(x, weight[...], weight.get_metadata()["axes"], heads)

        y = times(x, name, heads)
        if (lora := self.config.lora) is None or name not in lora.targets:
            return y
        a, b = (name + suffix for suffix in ADAPTER)
        return y + lora.scale * times(times(x, a), b, heads)

    def _merged_weight(self, name: str, dtype: Any) -> Array:
        """The weight of that name, with its adapter added or dequantised: grouped products of experts take it so."""
        w = getattr(self, name)[...]
        if self.config.quantization:
            return quantize.dequantized(w, getattr(self, name + quantize.SCALE)[...], dtype)
        if (lora := self.config.lora) is None or name not in lora.targets:
            return w
        a, b = (getattr(self, name + suffix)[...] for suffix in ADAPTER)
        return add_adapter(w, a, b, lora.scale)

    def _mlp(self, h: Array, round_inputs: Rounding) -> Array:
        activation = jax.nn.gelu if self.config.gemma else jax.nn.silu  # gelu's tanh approximation
        h = constrain(h, "batch", "length", "residual")
        h = round_inputs(activation(self._product("gate", h)) * self._product("up", h))
        return self._product("down", constrain(h, "batch", "length", "mlp"))

    def _mixture(
        self, h: Array, round_inputs: Rounding, experts: Array | None, stacks: tuple[Array, ...] | None, number: Any
    ) -> tuple[Array, "Routed"]:
        c = self.config
        replayed = None if experts is None else experts.astype(jnp.int32)
        weights, chosen, entropy = route(h, self.router[...], k=c.experts_per_token, norm=c.norm_topk, chosen=replayed)
        if stacks is not None:
            return mixture(h, weights, chosen, stacks, round_inputs, number), Routed(chosen, entropy)
        matrices = tuple(self._merged_weight(name, h.dtype) for name in EXPERTS)
        return mixture(h, weights, chosen, matrices, round_inputs), Routed(chosen, entropy)


class Decoder(nnx.Module):
    """Embedding, layers, final norm. The head is a weight here; `token_head` applies it."""

    def __init__(self, config: ModelConfig, *, stacked: bool, rngs: nnx.Rngs):
        self.config, self.stacked = config, stacked
        self.embed = _normal(rngs, (config.vocab_size, config.hidden_size), "vocab", "embed")
        if not config.tie_embeddings:
            self.head = _normal(rngs, (config.vocab_size, config.hidden_size), "vocab", "embed")
        self.final_norm = _filled(1.0 - config.norm_offset, config.hidden_size, "norm")
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
        round_inputs: Rounding | None = None,
        noise: Noise | None = None,
        experts: Integer[Array, "L B T k"] | None = None,
        in_place: bool = False,
    ) -> tuple[Float[Array, "B T E"], Any, Any, Routed | None]:
        """Hidden states after the final norm, the cache, `attend`'s outputs stacked over the layers, and the routes.

        Stacked layers hand one cache of all layers on from each to the next; unstacked ones take a list, a cache each.
        Given `experts`, every token goes through those (a replay of the rollout's; stacked layers only).
        `round_inputs` rounds the input of every linear layer, the head's included. `noise` is added to the hidden state
        that enters each layer (stacked layers only). `in_place`: the experts of stacked layers are read where they
        are, without a copy of each layer's, and no gradient flows through them.
        """
        x = self.entering(tokens)
        cos, sin = rotation(self.config.rope, self.config.head_dim, position)
        if self.stacked:
            stacks = self._stacks() if in_place else None

            def block(layer, carried, number, noise, experts):
                x, cache = carried
                x = x if noise is None else noise.added(x)
                x, cache, *outputs = layer(x, cos, sin, attend, cache, number, round_inputs, experts, stacks)
                return (x, cache), tuple(outputs)

            if remat != "none":
                block = nnx.remat(block, prevent_cse=False, policy=REMAT[remat])
            scan = nnx.scan(block, in_axes=(0, nnx.Carry, 0, 0, 0), out_axes=(nnx.Carry, 0))
            numbers = jnp.arange(self.config.num_layers)
            (x, cache), (attend_outputs, routed) = scan(self.layers, (x, cache), numbers, noise, experts)
        else:
            caches, outputs = [], []
            for number, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
                x, layer_cache, *output = layer(x, cos, sin, attend, layer_cache, number, round_inputs, None)
                caches.append(layer_cache)
                outputs.append(tuple(output))
            cache, (attend_outputs, routed) = caches, jax.tree.map(lambda *x: jnp.stack(x), *outputs)
        return self.leaving(x, round_inputs), cache, attend_outputs, routed

    def entering(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T E"]:
        """What enters the first layer: the embeddings."""
        x = constrain(embed(self.embed[...], tokens), "batch", "stream", "residual")
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype) if self.config.gemma else x

    def leaving(self, x: Float[Array, "B T E"], round_inputs: Rounding | None) -> Float[Array, "B T E"]:
        """The hidden states after the final norm, of what left the last layer."""
        x = rms_norm(x, self.final_norm[...], self.config.rms_norm_eps, self.config.norm_offset)
        x = constrain(x, "batch", "length", "residual")
        return x if round_inputs is None else round_inputs(x)

    def _stacks(self) -> tuple[Array, ...] | None:
        """The experts' weights of all layers; None where a layer's own are made of more than these."""
        c = self.config
        if not c.num_experts or c.quantization or (c.lora is not None and set(EXPERTS) & set(c.lora.targets)):
            return None
        return tuple(getattr(self.layers, name)[...] for name in EXPERTS)


@functools.cache
def _abstract(config: ModelConfig, stacked: bool):
    module = nnx.eval_shape(lambda: Decoder(config, stacked=stacked, rngs=nnx.Rngs(0)))
    graph, params, _ = nnx.split(module, nnx.Param, ...)
    return graph, params


def as_module(config: ModelConfig, params: Params, *, stacked: bool = True, dtype: Any = None) -> Decoder:
    """The module that holds these parameters, cast to `dtype` if one is given; call it inside jit, once."""
    params = {key: value for key, value in params.items() if key != LOG_SIGMA}
    if dtype is not None:
        params = in_dtype(params, dtype)
    return nnx.merge(_abstract(config, stacked)[0], params)


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random float32 parameters: normal with deviation 0.02, norms 1 (stored as 0 in Gemma), biases 0."""
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
    """Parameters cast to a dtype, except quantised matrices and their scales."""
    layers = params["layers"]
    quantized = {name for name in layers if name.endswith(quantize.SCALE) or name + quantize.SCALE in layers}
    cast = jax.tree.map(lambda p: p.astype(dtype), {name: p for name, p in params.items() if name != "layers"})
    return cast | {"layers": {name: p if name in quantized else p.astype(dtype) for name, p in layers.items()}}


def unstack(params: Params) -> Params:
    """The same parameters layer by layer."""
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**params, "layers": {i: jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(count)}}


def head_weight(params: Params) -> Float[Array, "V E"]:
    """The output embedding; the input's where they are tied."""
    return params["head"] if "head" in params else params["embed"]


def scores(config: ModelConfig) -> dict[str, Any]:
    """Scale, cap and window of attention's scores, as keyword arguments of `self_attention`."""
    return dict(scale=config.attn_scale, softcap=config.attn_softcap, window=config.window)


def slides(config: ModelConfig, number: Any) -> Bool[Array, ""] | None:
    """Whether the layer of that number sees a window only; None for a model without."""
    return None if config.window is None else jnp.asarray(config.sliding)[number]


def attend_within(config: ModelConfig, segments: Int32[Array, "B T"], attention: str) -> Attend:
    """Causal attention among tokens with equal `segments`, without a cache; `attention` as in `forward_routed`."""

    def attend(q, k, v, cache, number):
        sliding = slides(config, number)
        mixed = self_attention(q, k, v, segments, implementation=attention, sliding=sliding, **scores(config))
        return mixed, cache, None

    return attend


def forward(
    config: ModelConfig, params: Params, tokens: Array, *segments_and_position: Array, **settings: Any
) -> Array:
    """The hidden states f[B, T, E] of `forward_routed`, whose arguments it takes."""
    return forward_routed(config, params, tokens, *segments_and_position, **settings)[0]


def forward_routed(
    config: ModelConfig,
    params: Params,
    tokens: Int32[Array, "B T"],
    segments: Shaped[Array, "B T"],
    position: Int32[Array, "B T"] | None = None,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "xla",
    round_inputs: Rounding | None = None,
    noise_key: Key[Array, ""] | None = None,
    experts: Integer[Array, "B T Lk"] | None = None,
) -> tuple[Float[Array, "B T E"], Routed | None]:
    """Hidden states after the final norm, by a teacher-forced pass, and the routes of a mixture (None without experts).

    Attention is causal and stays among tokens with equal `segments`; 0 is padding. Where each row holds one sample,
    `segments` may be a mask. `position` None counts from the first token of each row that is not padding.
    `dtype` is what parameters are cast to; `remat` a key of `REMAT`; `attention` one of `attention.KERNELS`, UserError
    for another; `round_inputs` as in `Decoder`.
    With a `noise_key`, Gaussian noise of deviation exp(params["log_sigma"]) is added to the input of each layer.
    Given `experts`, tokens go through those in place of the router's choice.
    """
    position = positions(segments > 0) if position is None else position
    attend = attend_within(config, segments.astype(jnp.int32), attention)
    noise = None
    if noise_key is not None:
        keys = jax.random.split(noise_key, config.num_layers)
        noise = Noise(jnp.exp(params[LOG_SIGMA]), jax.random.key_data(keys))
    if experts is not None:
        experts = jnp.moveaxis(experts.reshape(*tokens.shape, config.num_layers, -1), 2, 0)
    model = as_module(config, params, dtype=dtype)
    hidden, _, _, routed = model(tokens, position, attend, None, remat, round_inputs, noise, experts)
    return hidden, routed
