"""What a decoder is, and the reading of config.json: every field is read, checked or known to be inert.

A field that is silently ignored is a model that is silently wrong (a rope theta or scaling read from the wrong
place gives fluent nonsense), so anything unknown is refused by name. Meanings and defaults are those of
`transformers`. What is said of families stands in families.py, of rope in rope.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp

from dppo_jax.errors import UserError
from dppo_jax.files import shown
from dppo_jax.models.families import (
    ARCHITECTURES,
    CLASSIFIERS,
    COMMON_DEFAULTS,
    DEFAULTS,
    FIXED,
    INERT,
    MAY_SLIDE,
    QK_NORM,
    WINDOWS,
    Family,
    check_fields,
    family_of,
    fixed_fields,
)
from dppo_jax.models.rope import ROPE_FIELDS, RopeConfig, read_rope, write_rope
from dppo_jax.models.values import (
    LARGEST,
    boolean,
    boolean_or_null,
    int_or_null,
    positive,
    positive_int,
    positive_or_null,
)

__all__ = [
    "ARCHITECTURES", "CLASSIFIERS", "DEFAULTS", "DTYPES", "FIXED", "INERT", "LARGEST", "MATRICES", "ROPE_FIELDS",
    "Family", "Lora", "ModelConfig", "Quantization", "RopeConfig", "config_from_hf", "config_to_hf", "fixed_fields",
]  # fmt: skip

# What a model computes in, and what its weights may be stored in.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

# The matrices of a layer: what adapters stand beside, and what is quantised. Of a mixture, of every expert.
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")

MOST_LAYERS = 1_000  # no published decoder has 200


class Field(NamedTuple):
    """A field of config.json, read and written: its attribute of ModelConfig, what checks it, whose it is."""

    name: str
    attribute: str
    check: Callable[[Any, str, str], Any]  # (value, name, source) -> value
    families: Any = frozenset(DEFAULTS)


MIXTURES, GEMMA2 = frozenset({"qwen3_moe"}), frozenset({"gemma2"})
FIXED_BIASES = frozenset({"qwen2", "mistral", "ministral"})
FIELDS = (
    Field("vocab_size", "vocab_size", positive_int),
    Field("hidden_size", "hidden_size", positive_int),
    Field("intermediate_size", "intermediate_size", positive_int, DEFAULTS.keys() - MIXTURES),
    Field("moe_intermediate_size", "intermediate_size", positive_int, MIXTURES),
    Field("num_hidden_layers", "num_layers", positive_int),
    Field("num_attention_heads", "num_heads", positive_int),
    Field("num_key_value_heads", "num_kv_heads", int_or_null),
    Field("head_dim", "head_dim", positive_int),
    Field("rms_norm_eps", "rms_norm_eps", positive),
    Field("max_position_embeddings", "max_position", positive_int),
    Field("tie_word_embeddings", "tie_embeddings", boolean),
    Field("attention_bias", "o_bias", boolean_or_null, DEFAULTS.keys() - FIXED_BIASES),
    Field("num_experts", "num_experts", positive_int, MIXTURES),
    Field("num_experts_per_tok", "experts_per_token", positive_int, MIXTURES),
    Field("norm_topk_prob", "norm_topk", boolean, MIXTURES),
    Field("query_pre_attn_scalar", "query_scalar", positive_int, GEMMA2),
    Field("attn_logit_softcapping", "attn_softcap", positive_or_null, GEMMA2),
    Field("final_logit_softcapping", "logit_softcap", positive_or_null, GEMMA2),
)
# Read besides: what several attributes follow from. transformers 5 writes num_local_experts for num_experts;
# sliding_window_size, which some Gemma-2 have too, must not disagree.
READ = "architectures model_type layer_types rope_theta rope_scaling rope_parameters original_max_position_embeddings"
READ_OF = {
    "gemma2": "sliding_window sliding_window_size",
    "mistral": "sliding_window",
    "ministral": "sliding_window",
    "qwen2": "use_sliding_window sliding_window",
    "qwen3": "use_sliding_window sliding_window",
    "qwen3_moe": "use_sliding_window sliding_window num_local_experts intermediate_size",  # the last: of no layer here
}


def read_fields(model_type: str) -> frozenset[str]:
    """The fields of config.json that are read for a family."""
    of_table = (field.name for field in FIELDS if model_type in field.families)
    return frozenset([*of_table, *READ.split(), *READ_OF.get(model_type, "").split()])


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

    @property
    def longest_row(self) -> int:
        """How many tokens a row may have: `max_position`, or what yarn says that it stretches to."""
        stretched = self.rope.factor * self.rope.original_max_position if self.rope.kind == "yarn" else 0
        return max(self.max_position, int(min(stretched, LARGEST)))

    def for_rows(self, longest: int) -> "ModelConfig":
        """The model of a run whose rows have at most `longest` tokens; see `RopeConfig.long`."""
        return dataclasses.replace(self, rope=self.rope.for_rows(longest))


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
    family: Family = family_of(d, source, architectures)
    check_fields(d, family, read_fields(family), source)
    said: dict[str, Any] = {**COMMON_DEFAULTS, **DEFAULTS[family], **d}
    if "num_local_experts" in d and family in MIXTURES:
        said["num_experts"] = _agree(d, "num_experts", "num_local_experts", source)
    values: dict[str, Any] = {}
    for field in FIELDS:
        if family in field.families:
            if field.name not in said:
                raise UserError(f"{source} lacks the required field {field.name!r}")
            follows = field.name == "head_dim" and said["head_dim"] is DEFAULTS[family]["head_dim"] is None
            values[field.attribute] = None if follows else field.check(said[field.name], field.name, source)
    _complete_heads(values, source)
    if values["num_layers"] > MOST_LAYERS:
        layers = shown(values["num_layers"])
        raise UserError(f"{source}: num_hidden_layers must be at most {MOST_LAYERS}, not {layers}")
    if values.get("num_experts", 0) < (chosen := values.get("experts_per_token", 0)):
        raise UserError(f"{source}: num_experts_per_tok {chosen} is more than the {values['num_experts']} experts")
    bias = values.setdefault("o_bias", False)
    window = _window(said, d, family, source)
    sliding = _sliding(said, family, window, values["num_layers"], source)
    if not any(sliding) and family not in GEMMA2:
        window, sliding = None, ()
    return ModelConfig(
        model_type=family,
        **values,
        rope=read_rope(d, values["max_position"], values["head_dim"], source),
        qkv_bias=family == "qwen2" or bias,
        qk_norm=family in QK_NORM,
        window=window,
        sliding=sliding,
    )


def _agree(d: Mapping[str, Any], name: str, other: str, source: str) -> Any:
    """The value of a field that may stand under another name, or under both."""
    if d.get(name, d[other]) != d[other]:
        raise UserError(f"{source}: {name} {shown(d[name])} and {other} {shown(d[other])} disagree")
    return d[other]


def _complete_heads(values: dict[str, Any], source: str) -> None:
    """num_kv_heads and head_dim where they are None, from the other sizes."""
    heads, hidden = values["num_heads"], values["hidden_size"]
    kv_heads = values["num_kv_heads"] = values["num_kv_heads"] or heads
    if heads % kv_heads:
        raise UserError(f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if values["head_dim"] is None:
        if hidden % heads:
            raise UserError(f"{source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        values["head_dim"] = hidden // heads
    if values["head_dim"] % 2:
        raise UserError(f"{source}: head_dim must be even for rotary embeddings, not {values['head_dim']}")


def _window(said: Mapping[str, Any], d: Mapping[str, Any], family: str, source: str) -> int | None:
    """How many tokens a sliding layer sees; None where none can slide."""
    if family in MAY_SLIDE and not boolean_or_null(d.get("use_sliding_window"), "use_sliding_window", source):
        return None
    if family not in WINDOWS + MAY_SLIDE:
        return None
    window = (positive_int if family in GEMMA2 else int_or_null)(said["sliding_window"], "sliding_window", source)
    if family in GEMMA2 and "sliding_window_size" in d:
        _agree(said, "sliding_window", "sliding_window_size", source)
    if family in MIXTURES and window is not None:
        raise UserError(
            f"{source}: use_sliding_window = True with sliding_window = {window} is not supported for {family}; "
            "supported: False"
        )
    return window


def _sliding(
    said: Mapping[str, Any], family: str, window: int | None, num_layers: int, source: str
) -> tuple[bool, ...]:
    """Whether each layer slides."""
    slides, full = "sliding_attention", "full_attention"
    first = 0
    if window is not None and family in MAY_SLIDE:
        first = said["max_window_layers"]
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise UserError(f"{source}: max_window_layers must be an integer of at least 0, not {shown(first)}")
    types = said.get("layer_types")
    if types is None:  # Gemma-2's slide by turns
        return tuple(window is not None and i >= first and not (family in GEMMA2 and i % 2) for i in range(num_layers))
    kinds = [full] if window is None else [slides] if family == "mistral" else [full, slides]
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in kinds for kind in types):
        raise UserError(
            f"{source}: layer_types {shown(types)} is not supported; it must be {' or '.join(map(repr, kinds))} for "
            f"each of the {num_layers} layers"
        )
    return tuple(kind == slides for kind in types)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of `config`, such that config_from_hf gives it back, but for what a run adds: adapters,
    quantisation, and how long its rows are.

    Raises:
      UserError: the config has a feature that its architecture cannot say.
    """
    family = config.model_type
    if config.gemma and (config.window is None or config.query_scalar is None):
        raise UserError("a gemma2 has a query_scalar, a window, and says of each layer whether it is sliding")
    if config.window is not None and len(config.sliding) != config.num_layers:
        raise UserError(f"a {family} with a window says of each layer whether it is sliding")
    d: dict[str, Any] = {
        "architectures": [name for name, kind in ARCHITECTURES.items() if kind == family],
        "model_type": family,
        "intermediate_size": config.intermediate_size,
        **{field.name: getattr(config, field.attribute) for field in FIELDS if family in field.families},
        "hidden_act": "gelu_pytorch_tanh" if config.gemma else "silu",
        "attention_dropout": 0.0,
        **write_rope(config.rope),
    }
    if family == "llama":
        d["mlp_bias"] = False
    if config.gemma:
        d["hidden_activation"] = d["hidden_act"]
    if family in MIXTURES:
        d |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    if family in WINDOWS:
        d["sliding_window"] = config.window
    if family in MAY_SLIDE:
        d["use_sliding_window"] = config.window is not None
        d |= {} if config.window is None else {"sliding_window": config.window}
    if config.window is not None and family in (*GEMMA2, "ministral", *MAY_SLIDE):
        d["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in config.sliding]
    try:
        again = config_from_hf(d, "config.json")
    except UserError as error:
        raise UserError(f"this {family} cannot be written: {error}") from None
    rope = dataclasses.replace(again.rope, long=config.rope.long)
    again = dataclasses.replace(again, rope=rope, lora=config.lora, quantization=config.quantization)
    for name in (field.name for field in dataclasses.fields(config)):
        if getattr(again, name) != (value := getattr(config, name)):
            raise UserError(f"{name} = {shown(value)} cannot be written for model_type {family!r}")
    return d
