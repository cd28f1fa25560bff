"""What a decoder is, and the reading of config.json: every field is read, checked or known to be inert.

A field that is silently ignored is a model that is silently wrong (a rope theta or scaling read from the wrong
place gives fluent nonsense), so anything unknown is refused by name. Meanings and defaults are those of
`transformers`; both of its spellings of rope are read, `rope_theta` beside `rope_scaling` (4.x) and
`rope_parameters` with the theta inside (5.x).
"""

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp

from dppo_jax.errors import UserError
from dppo_jax.files import shown

# What a model computes in, and what its weights may be stored in.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

# The matrices of a layer: what adapters stand beside, and what is quantised. Of a mixture, of every expert.
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma2ForCausalLM": "gemma2",
}
# Of reward models, which have a score in place of the head.
CLASSIFIERS = {
    "LlamaForSequenceClassification": "llama",
    "Qwen3ForSequenceClassification": "qwen3",
    "Gemma2ForSequenceClassification": "gemma2",
}
Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "gemma2"]

# What transformers takes where config.json is silent. A kv_heads or head_dim of None follows from the other sizes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    "qwen2": {"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
}
DEFAULT_THETA = 10000.0
DEFAULT_EPS = 1e-6

LARGEST = 2**31 - 1  # largest size: what an index of 32 bits reaches
MOST_LAYERS = 1_000  # no published decoder has 200

READ = frozenset(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings attention_bias "
    "rope_theta rope_scaling rope_parameters layer_types".split()
)

# Read for a mixture of experts, and for no other model. transformers 5 writes num_local_experts for num_experts.
READ_MOE = frozenset("num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob".split())

# Read for Gemma-2, and for no other model. sliding_window_size, which some checkpoints have too, must not disagree.
READ_GEMMA2 = frozenset(
    "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping sliding_window sliding_window_size".split()
)

# Fields that would change the computation, with the values under which they do not.
FIXED: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "pretraining_tp": (1, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, None),
    "original_max_position_embeddings": (None,),  # belongs with the other rope settings
    "final_logit_softcapping": (None,),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "auto_map": (None,),  # code of the model's own
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "decoder_sparse_step": (1, None),  # every layer is a mixture
    "mlp_only_layers": ([], None),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0, None),
}

# Fields with no influence on the logits: token ids, storage, training, classification heads, generation, provenance.
INERT = frozenset(
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix "
    "dtype torch_dtype use_bfloat16 torchscript tf_legacy_loss transformers_version transformers.js_config "
    "_name_or_path name_or_path _commit_hash is_llama_config is_decoder unsloth_fixed unsloth_version "
    "use_cache cache_implementation initializer_range gradient_checkpointing max_window_layers "
    "max_sequence_length attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled "
    "output_hidden_states output_attentions return_dict return_dict_in_generate output_scores "
    "id2label label2id num_labels problem_type finetuning_task task_specific_params "
    "max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id "
    "router_aux_loss_coef output_router_logits "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens".split()
)

# Gemma-2's, where they differ. Whatever use_sliding_window says, transformers lets its windows slide.
FIXED_GEMMA2: dict[str, tuple] = {
    "hidden_act": ("gelu_pytorch_tanh", None),  # transformers reads hidden_activation
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False, None),
    "use_sliding_window": (None,),
}

QK_NORM = ("qwen3", "qwen3_moe")  # models that normalise queries and keys

# The fields each kind of rope takes, besides the theta.
ROPE_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: inverse frequency theta^(-2i/head_dim) for i in 0 .. head_dim/2 - 1.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) keeps wavelengths below
    original_max_position / high_freq_factor, divides the frequencies of those above
    original_max_position / low_freq_factor by `factor`, and interpolates between. Positions are in tokens.
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (2106.09685): x W + (alpha / rank) (x A) B for x W, in every layer."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # names of a layer's weights

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Quantization:
    """The layers' matrices held in a narrower format (dppo_jax.quantize), for inference."""

    format: str  # int8 | float8
    activations: bool  # what they are multiplied by is quantised too


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; hashable, so that it can be a static argument of a jitted function."""

    model_type: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # in a mixture: that of each expert
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position: int
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    logit_softcap: float | None = None
    num_experts: int = 0  # 0: no mixture
    experts_per_token: int = 0
    norm_topk: bool = False  # the chosen experts' weights sum to 1
    query_scalar: int | None = None  # scores are divided by its square root; None: head_dim
    attn_softcap: float | None = None
    window: int | None = None  # how many tokens a sliding layer's query sees, its own among them
    sliding: tuple[bool, ...] = ()  # whether each layer sees only the window; empty without one

    lora: Lora | None = None  # adapters among the parameters
    quantization: Quantization | None = None  # scales among the parameters

    @property
    def gemma(self) -> bool:
        """Norms behind attention and MLP too, embeddings times sqrt(hidden_size), GELU in place of SiLU."""
        return self.model_type == "gemma2"

    @property
    def norm_offset(self) -> float:
        """What is added to the weight of every norm."""
        return 1.0 if self.gemma else 0.0

    @property
    def attn_scale(self) -> float:
        return (self.query_scalar or self.head_dim) ** -0.5


def config_from_hf(
    d: Mapping[str, Any], source: str, architectures: Mapping[str, Any] = MappingProxyType(ARCHITECTURES)
) -> ModelConfig:
    """The parsed config.json `d` as a `ModelConfig`.

    Args:
      d: the JSON object.
      source: where it came from, for messages.
      architectures: those that may be, by family.

    Raises:
      UserError: an unsupported architecture, an unknown field, a field with an unsupported value, a missing or
        ill-typed one, or two spellings of rope that disagree.
    """
    model_type: Family = _model_type(d, source, architectures)
    defaults = DEFAULTS[model_type]
    _check_fields(d, model_type, source)

    def size(name: str) -> int:
        if name not in d and name not in defaults:
            raise UserError(f"{source} lacks the required field {name!r}")
        return _positive_int(d.get(name, defaults.get(name)), name, source)

    num_heads = size("num_attention_heads")
    hidden_size = size("hidden_size")
    num_kv_heads = num_heads if _absent(d, defaults, "num_key_value_heads") else size("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise UserError(
            f"{source}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if _absent(d, defaults, "head_dim"):
        if hidden_size % num_heads:
            raise UserError(f"{source}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
        head_dim = hidden_size // num_heads
    else:
        head_dim = size("head_dim")
    if head_dim % 2:
        raise UserError(f"{source}: head_dim must be even for rotary embeddings, not {head_dim}")

    num_layers = size("num_hidden_layers")
    if num_layers > MOST_LAYERS:
        raise UserError(f"{source}: num_hidden_layers must be at most {MOST_LAYERS}, not {shown(num_layers)}")
    layer_types = d.get("layer_types")
    if model_type != "gemma2" and layer_types is not None and not _all_full(layer_types, num_layers):
        raise UserError(
            f"{source}: layer_types {shown(layer_types)} is not supported; it must be 'full_attention' for each of the "
            f"{num_layers} layers"
        )
    max_position = size("max_position_embeddings")
    attention_bias = _boolean(d, "attention_bias", source)
    mixture: dict[str, Any] = {}
    if model_type == "qwen3_moe":
        mixture = _mixture(d, size, source)
    gemma2 = _gemma2(d, num_layers, source) if model_type == "gemma2" else {}
    return ModelConfig(
        model_type=model_type,
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("moe_intermediate_size" if mixture else "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive(d.get("rms_norm_eps", DEFAULT_EPS), "rms_norm_eps", source),
        rope=_rope(d, max_position, source),
        max_position=max_position,
        tie_embeddings=_boolean({**defaults, **d}, "tie_word_embeddings", source),
        qkv_bias=model_type == "qwen2" or attention_bias,
        o_bias=model_type != "qwen2" and attention_bias,
        qk_norm=model_type in QK_NORM,
        **mixture,
        **gemma2,
    )


def _mixture(d: Mapping[str, Any], size: Callable[[str], int], source: str) -> dict[str, Any]:
    """The fields of a mixture of experts."""
    counts = [size(name) for name in ("num_experts", "num_local_experts") if name in d]
    if len(set(counts)) > 1:
        raise UserError(f"{source}: num_experts {counts[0]} and num_local_experts {counts[1]} disagree")
    experts = counts[0] if counts else size("num_experts")
    chosen = size("num_experts_per_tok")
    if chosen > experts:
        raise UserError(f"{source}: num_experts_per_tok {chosen} is more than the {experts} experts")
    return dict(num_experts=experts, experts_per_token=chosen, norm_topk=_boolean(d, "norm_topk_prob", source))


def _gemma2(d: Mapping[str, Any], num_layers: int, source: str) -> dict[str, Any]:
    """Soft caps, the scale of queries, and which layers slide: every second one, the first included."""
    d = {**DEFAULTS["gemma2"], **d}
    window = _positive_int(d["sliding_window"], "sliding_window", source)
    if d.get("sliding_window_size", window) != window:
        size = d["sliding_window_size"]
        raise UserError(f"{source}: sliding_window {window} and sliding_window_size {shown(size)} disagree")
    types = d.get("layer_types")
    if types is None:
        types = ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in kinds for kind in types):
        raise UserError(
            f"{source}: layer_types {shown(types)} is not supported; it must be {' or '.join(map(repr, kinds))} for "
            f"each of the {num_layers} layers"
        )
    caps = {
        name: None if d[field] is None else _positive(d[field], field, source)
        for name, field in (("attn_softcap", "attn_logit_softcapping"), ("logit_softcap", "final_logit_softcapping"))
    }
    return caps | dict(
        query_scalar=_positive_int(d["query_pre_attn_scalar"], "query_pre_attn_scalar", source),
        window=window,
        sliding=tuple(kind == "sliding_attention" for kind in types),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of `config`, such that config_from_hf gives it back.

    Rope is written in the 4.x spelling, which every version of transformers reads: 4.x takes `rope_parameters` for an
    unknown field and would fall back on the default theta without a word.

    Raises:
      UserError: the config has a feature that its architecture cannot say.
    """
    if not config.gemma:
        for name in ("logit_softcap", "attn_softcap", "query_scalar", "window"):
            if (value := getattr(config, name)) is not None:
                raise UserError(f"{name} {value} cannot be written for model_type {config.model_type!r}")
    elif config.window is None or config.query_scalar is None or len(config.sliding) != config.num_layers:
        raise UserError("a gemma2 has a query_scalar, a window, and says of each layer whether it is sliding")
    attention_bias = config.qkv_bias and config.model_type != "qwen2"
    if bool(config.num_experts) != (config.model_type == "qwen3_moe"):
        raise UserError(f"num_experts = {config.num_experts} cannot be written for model_type {config.model_type!r}")
    biases = (config.qkv_bias, config.o_bias)
    if biases != ((True, False) if config.model_type == "qwen2" else (attention_bias, attention_bias)):
        raise UserError(f"qkv_bias, o_bias = {biases} cannot be written for model_type {config.model_type!r}")
    if config.qk_norm != (config.model_type in QK_NORM):
        raise UserError(f"qk_norm = {config.qk_norm} cannot be written for model_type {config.model_type!r}")
    d: dict[str, Any] = {
        "architectures": [name for name, kind in ARCHITECTURES.items() if kind == config.model_type],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "gelu_pytorch_tanh" if config.gemma else "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
    }
    if config.model_type == "llama":
        d["mlp_bias"] = False
    elif config.gemma:
        d |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": config.query_scalar,
            "attn_logit_softcapping": config.attn_softcap,
            "final_logit_softcapping": config.logit_softcap,
            "sliding_window": config.window,
            "layer_types": ["sliding_attention" if slides else "full_attention" for slides in config.sliding],
        }
    else:
        d["use_sliding_window"] = False
    if config.model_type != "qwen2":
        d["attention_bias"] = attention_bias
    if config.num_experts:
        d |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.intermediate_size,
            "norm_topk_prob": config.norm_topk,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return d


def _model_type(d: Mapping[str, Any], source: str, architectures: Mapping[str, Any]) -> Any:
    """The Family."""
    supported, families = ", ".join(architectures), dict.fromkeys(architectures.values())
    names, model_type = d.get("architectures"), d.get("model_type")
    if names is None and model_type is None:
        raise UserError(f"{source} names no architecture; supported: {supported}")
    if names is not None:
        if not isinstance(names, list) or len(names) != 1 or names[0] not in list(architectures):
            name = names[0] if isinstance(names, list) and len(names) == 1 else names
            raise UserError(f"{source}: unsupported architecture {shown(name)}; supported: {supported}")
        if model_type is not None and model_type != architectures[names[0]]:
            raise UserError(f"{source}: architecture {names[0]!r} and model_type {shown(model_type)} disagree")
        model_type = architectures[names[0]]
    if model_type not in list(families):
        raise UserError(f"{source}: unsupported model_type {shown(model_type)}; supported: {', '.join(families)}")
    return model_type


def fixed_fields(model_type: str) -> dict[str, tuple]:
    """FIXED, as it is for this model."""
    fixed = dict(FIXED)
    if model_type == "qwen2":
        fixed["attention_bias"] = (True, None)  # Qwen2 has q, k and v biases whatever is said
    if model_type == "llama":
        fixed["sliding_window"] = (None,)
    if model_type == "gemma2":
        fixed |= FIXED_GEMMA2
        del fixed["final_logit_softcapping"]
    return fixed


def _check_fields(d: Mapping[str, Any], model_type: str, source: str) -> None:
    fixed = fixed_fields(model_type)
    inert = set(INERT)
    if model_type.startswith("qwen"):
        inert.add("sliding_window")  # without use_sliding_window
    read = READ | {"qwen3_moe": READ_MOE, "gemma2": READ_GEMMA2}.get(model_type, frozenset())
    for name, value in d.items():
        if name in fixed:
            if not any(_same(value, allowed) for allowed in fixed[name]):
                supported = fixed[name][0]
                only = "leave it out" if supported is None else f"supported: {supported!r}"
                raise UserError(f"{source}: {name} = {shown(value)} is not supported for {model_type}; {only}")
        elif name not in read and name not in inert:
            close = difflib.get_close_matches(name, [*read, *fixed], n=1, cutoff=0.5)
            hint = f"; the nearest known is {close[0]!r}" if close else ", and it might change the model"
            raise UserError(f"{source} has the unknown field {shown(name)}{hint}")


def _rope(d: Mapping[str, Any], max_position: int, source: str) -> RopeConfig:
    spelled = {name: d[name] for name in ("rope_parameters", "rope_scaling") if d.get(name) not in (None, {})}
    if not spelled:
        return RopeConfig(theta=_theta(d, {}, "rope_theta", source))
    configs = [_rope_block(d, block, name, max_position, source) for name, block in spelled.items()]
    if len(set(configs)) > 1:
        raise UserError(f"{source}: rope_parameters and rope_scaling disagree; leave one out")
    return configs[0]


def _rope_block(d: Mapping[str, Any], block: Any, where: str, max_position: int, source: str) -> RopeConfig:
    if not isinstance(block, Mapping):
        raise UserError(f"{source}: {where} must be an object, not {shown(block)}")
    block = {name: value for name, value in block.items() if value is not None}
    kinds = {block[name] for name in ("rope_type", "type") if isinstance(block.get(name), str)}
    if len(kinds) > 1:
        raise UserError(f"{source}: {where} has rope_type {shown(block['rope_type'])} but type {shown(block['type'])}")
    kind: Any = next(iter(kinds), block.get("rope_type", block.get("type", "default")))
    if kind not in list(ROPE_FIELDS):
        raise UserError(
            f"{source}: unsupported rope type {shown(kind)} in {where}; supported: {', '.join(ROPE_FIELDS)}"
        )
    fields = ROPE_FIELDS[kind]
    for name in block:
        if name not in fields | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
            takes = ", ".join(sorted({"rope_theta"} | fields))
            raise UserError(f"{source}: {where} of type {kind!r} has the unknown field {shown(name)}; it takes {takes}")
    if block.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{source}: {where}.partial_rotary_factor = {shown(block['partial_rotary_factor'])} is not supported; "
            "supported: 1.0"
        )
    theta = _theta(d, block, where, source)
    if kind == "default":
        return RopeConfig(theta=theta)

    def number(name: str) -> float:
        if name not in block:
            raise UserError(f"{source}: {where} of type {kind!r} lacks the field {name!r}")
        return _positive(block[name], f"{where}.{name}", source)

    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=number("factor"))
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if high <= low:
        raise UserError(f"{source}: {where}.high_freq_factor {high} must be above low_freq_factor {low}")
    original = block.get("original_max_position_embeddings", max_position)
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=_positive_int(original, f"{where}.original_max_position_embeddings", source),
    )


def _theta(d: Mapping[str, Any], block: Mapping[str, Any], where: str, source: str) -> float:
    thetas = [_positive(p["rope_theta"], "rope_theta", source) for p in (block, d) if p.get("rope_theta") is not None]
    if len(set(thetas)) > 1:
        raise UserError(f"{source}: rope_theta is {thetas[0]!r} in {where} but {thetas[1]!r} beside it")
    return thetas[0] if thetas else DEFAULT_THETA


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    if rope.kind == "linear":
        return {"rope_type": "linear", "factor": rope.factor}
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position,
    }


def _all_full(layer_types: Any, num_layers: int) -> bool:
    return (
        isinstance(layer_types, list)
        and len(layer_types) == num_layers
        and all(isinstance(kind, str) and kind == "full_attention" for kind in layer_types)
    )


def _absent(d: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> bool:
    """Whether the field is to follow from the other sizes: null, or left out of a family without a default."""
    if name in d:
        return d[name] is None and (name == "num_key_value_heads" or defaults[name] is None)
    return defaults[name] is None


def _same(value: Any, allowed: Any) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _positive_int(value: Any, name: str, source: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UserError(f"{source}: {name} must be a positive integer, not {shown(value)}")
    if value > LARGEST:
        raise UserError(f"{source}: {name} must be at most {LARGEST}, not {shown(value)}")
    return value


def _positive(value: Any, name: str, source: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{source}: {name} must be a positive number, not {shown(value)}")
    return float(value)


def _boolean(d: Mapping[str, Any], name: str, source: str) -> bool:
    value = d.get(name, False)
    if value is None and name == "attention_bias":
        return False
    if not isinstance(value, bool):
        raise UserError(f"{source}: {name} must be true or false, not {shown(value)}")
    return value
