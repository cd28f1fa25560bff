"""The families of models: their names in config.json, its fields' defaults, and the fields that are not read.

A field that is silently ignored is a model that is silently wrong, so anything that is neither read nor known to be
inert is refused by name.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, Literal

from dppo_jax.errors import UserError
from dppo_jax.files import shown

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma2ForCausalLM": "gemma2",
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "ministral",
}
# Of reward models, which have a score in place of the head.
CLASSIFIERS = {
    "LlamaForSequenceClassification": "llama",
    "Qwen3ForSequenceClassification": "qwen3",
    "Gemma2ForSequenceClassification": "gemma2",
    "MistralForSequenceClassification": "mistral",
}
Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "mistral", "ministral"]

QK_NORM = ("qwen3", "qwen3_moe")  # normalise queries and keys
WINDOWS = ("gemma2", "mistral", "ministral")  # have a window, unless it is null
MAY_SLIDE = ("qwen2", "qwen3", "qwen3_moe")  # have one where use_sliding_window is true

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
    },
    "mistral": {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072},
    "ministral": {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072},
}
# Of every family that has the field and does not say otherwise.
COMMON_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "norm_topk_prob": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

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
    "shared_expert_intermediate_size": (0, None),
    "dual_chunk_attention_config": (None,),
    "qkv_bias": (False, None),
    "use_qk_norm": (False, None),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0, None),
}

# Where a family's differ; ABSENT: read, or as unknown as any other.
ABSENT: tuple = ()
FIXED_OF: dict[str, dict[str, tuple]] = {
    "llama": {"sliding_window": (None,)},
    # q, k and v have biases whatever is said.
    "qwen2": {"attention_bias": (True, None), "qkv_bias": (True, None), "use_sliding_window": ABSENT},
    "qwen3": {"use_qk_norm": (True, None), "use_sliding_window": ABSENT},
    "qwen3_moe": {"use_qk_norm": (True, None), "use_sliding_window": ABSENT},
    # Whatever use_sliding_window says, transformers lets these windows slide.
    "gemma2": {
        "hidden_act": ("gelu_pytorch_tanh", None),  # transformers reads hidden_activation
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False, None),
        "use_sliding_window": (None,),
        "final_logit_softcapping": ABSENT,
    },
    "mistral": {"attention_bias": (False, None), "use_sliding_window": (None,)},
    "ministral": {"attention_bias": (False, None), "use_sliding_window": (None,)},
}

# Fields with no influence on the logits: token ids, storage, training, classification heads, generation, provenance.
# max_window_layers has one with use_sliding_window alone.
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


def family_of(d: Mapping[str, Any], source: str, architectures: Mapping[str, Any]) -> Any:
    """The Family that config.json names. UserError for none, one that is not among these, or two that disagree."""
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
    """FIXED, as it is for this family."""
    fixed = FIXED | FIXED_OF.get(model_type, {})
    return {name: values for name, values in fixed.items() if values != ABSENT}


def check_fields(d: Mapping[str, Any], model_type: str, read: Collection[str], source: str) -> None:
    """UserError for a field that is neither read nor inert, or has a value that is not supported."""
    fixed = fixed_fields(model_type)
    for name, value in d.items():
        if name in fixed:
            if not any(_same(value, allowed) for allowed in fixed[name]):
                supported = fixed[name][0]
                only = "leave it out" if supported is None else f"supported: {supported!r}"
                raise UserError(f"{source}: {name} = {shown(value)} is not supported for {model_type}; {only}")
        elif name not in read and name not in INERT:
            close = difflib.get_close_matches(name, [*read, *fixed], n=1, cutoff=0.5)
            hint = f"; the nearest known is {close[0]!r}" if close else ", and it might change the model"
            raise UserError(f"{source} has the unknown field {shown(name)}{hint}")


def _same(value: Any, allowed: Any) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
