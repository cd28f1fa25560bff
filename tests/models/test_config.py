"""config.json, field by field, against what transformers itself makes of the same JSON."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    Gemma2Config,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dppo_jax.errors import UserError
from dppo_jax.models.config import (
    DEFAULTS,
    FIXED,
    INERT,
    RopeConfig,
    config_from_hf,
    config_to_hf,
    fixed_fields,
    read_fields,
)
from dppo_jax.models.families import FIXED_OF
from tests.helpers.places import GOLDEN
from tests.helpers.variants import VARIANTS, write_variant

MODELS = GOLDEN / "models"
FAMILIES = ["llama", "llama_tied", "llama_linear", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma2_plain", "mistral"]
CLASSES = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "gemma2": Gemma2Config,
    "mistral": MistralConfig,
    "ministral": MinistralConfig,
}
NAMES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
}

# The fields of published models' config.json, as far as they differ in kind.
PUBLISHED = {
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "transformers_version": "4.42.3",
        "use_cache": True, "vocab_size": 49152,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151646,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
        "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21, "model_type": "qwen2",
        "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.44.0", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-8B-Base": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151643, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 32768,
        "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen3-30B-A3B-Base": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151643, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 32768, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "gemma-2-9b-it": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
        "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
        "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000,
    },
    "DeepSeek-R1-Distill-Llama-8B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "Qwen3-Coder-30B-A3B-Instruct": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5472, "max_position_embeddings": 262144,
        "max_window_layers": 28, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "qkv_bias": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.0,
        "shared_expert_intermediate_size": 0, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.52.3", "use_cache": True, "use_qk_norm": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen3-30B-A3B-Thinking-2507": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 262144, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen3-8B with yarn, as its card says": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
        "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen2.5-7B-Instruct with yarn, as its card says": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "Mistral-7B-Instruct-v0.3": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 32768,
    },
    "Mistral-Nemo-Instruct-2407": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 131072,
    },
    "Ministral-8B-Instruct-2410": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 12288, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 100000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0.dev0", "use_cache": True, "vocab_size": 131072,
    },
}  # fmt: skip


def golden(family: str) -> dict:
    return json.loads((MODELS / family / "config.json").read_text())


def minimal(model_type: str) -> dict:
    """Required fields only; 32 heads, as Qwen's default of 32 key-value heads wants."""
    return {
        "architectures": [NAMES[model_type]], "model_type": model_type, "vocab_size": 96, "hidden_size": 64,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 32,
    }  # fmt: skip


def read(d: dict):
    return config_from_hf(d, source="config.json")


def refusal(d: dict) -> str:
    """The message that `d` is refused with: one line."""
    with pytest.raises(UserError) as caught:
        read(d)
    message = str(caught.value)
    assert message.startswith("config.json") and "\n" not in message
    return message


def check_against_transformers(d: dict, tmp_path: Path) -> None:
    """Every number that we read, as transformers reads it from the same file."""
    (tmp_path / "config.json").write_text(json.dumps(d))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), read(d)
    theirs.standardize_rope_params()  # as every model does before it reads them
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    rope = theirs.rope_parameters
    kind, original = rope["rope_type"], rope.get("original_max_position_embeddings", 8192)
    assert dataclasses.replace(ours.rope, attention_factor=1.0) == RopeConfig(  # which the golden values have
        theta=rope["rope_theta"],
        kind=kind,
        factor=rope.get("factor", theirs.max_position_embeddings / original if kind == "longrope" else 1.0),
        low_freq_factor=rope.get("low_freq_factor", 1.0),
        high_freq_factor=rope.get("high_freq_factor", 4.0),
        original_max_position=theirs.max_position_embeddings if kind == "dynamic" else original,
        beta_fast=rope.get("beta_fast") or 32,
        beta_slow=rope.get("beta_slow") or 1,
        truncate=rope.get("truncate", True),
        short_factor=tuple(rope.get("short_factor", ())),
        long_factor=tuple(rope.get("long_factor", ())),
        long=kind == "longrope" and theirs.max_position_embeddings > original,
    )
    attention_bias = getattr(theirs, "attention_bias", False)
    mixture, gemma = theirs.model_type == "qwen3_moe", theirs.model_type == "gemma2"
    window = getattr(theirs, "sliding_window", None)
    every = ["sliding_attention" if theirs.model_type == "mistral" and window else ""] * theirs.num_hidden_layers
    kinds = getattr(theirs, "layer_types", None) or every
    slides = gemma or "sliding_attention" in kinds
    assert dataclasses.asdict(ours) | {"rope": None} == {
        "model_type": theirs.model_type,
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.moe_intermediate_size if mixture else theirs.intermediate_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": head_dim,
        "rms_norm_eps": theirs.rms_norm_eps,
        "rope": None,
        "max_position": theirs.max_position_embeddings,
        "tie_embeddings": theirs.tie_word_embeddings,
        "qkv_bias": attention_bias or theirs.model_type == "qwen2",
        "o_bias": attention_bias,
        "qk_norm": theirs.model_type in ("qwen3", "qwen3_moe"),
        "logit_softcap": theirs.final_logit_softcapping if gemma else None,
        "num_experts": theirs.num_experts if mixture else 0,
        "experts_per_token": theirs.num_experts_per_tok if mixture else 0,
        "norm_topk": mixture and theirs.norm_topk_prob,
        "query_scalar": theirs.query_pre_attn_scalar if gemma else None,
        "attn_softcap": theirs.attn_logit_softcapping if gemma else None,
        "window": window if slides else None,
        "sliding": tuple(kind == "sliding_attention" for kind in kinds) if slides else (),
        "lora": None,  # these two are set by our configs, not by a model's files
        "quantization": None,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_configs_are_read_as_transformers_reads_them(family, tmp_path):
    check_against_transformers(golden(family), tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_as_transformers_reads_them(name, tmp_path):
    check_against_transformers(PUBLISHED[name], tmp_path)


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_absent_fields_get_transformers_defaults(model_type, tmp_path):
    check_against_transformers(minimal(model_type), tmp_path)


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_everything_transformers_writes_is_known(model_type, tmp_path):
    CLASSES[model_type](**minimal(model_type)).save_pretrained(tmp_path / "theirs")
    check_against_transformers(json.loads((tmp_path / "theirs" / "config.json").read_text()), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_then_import_is_identity(family, tmp_path):
    config = read(golden(family))
    written = json.loads(json.dumps(config_to_hf(config)))
    assert read(written) == config and hash(read(written)) == hash(config)
    check_against_transformers(written, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_read_and_written_as_transformers_reads_them(name, tmp_path):
    write_variant(name, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    written = json.loads(json.dumps(config_to_hf(read(fields))))
    assert read(written) == read(fields) and hash(read(written)) == hash(read(fields))
    for d in (fields, written):
        check_against_transformers(d, tmp_path)


@pytest.mark.parametrize(("family", "change"), [
    ("qwen2", {"logit_softcap": 30.0}), ("qwen2", {"o_bias": True}), ("qwen2", {"qk_norm": True}),
    ("qwen2", {"query_scalar": 8}), ("qwen2", {"attn_softcap": 50.0}), ("qwen2", {"window": 8}),
    ("qwen2", {"num_experts": 4, "experts_per_token": 2}), ("llama", {"window": 8, "sliding": (True, False)}),
    ("llama", {"qkv_bias": False}), ("mistral", {"sliding": (True, False)}),
    ("mistral", {"qkv_bias": True}), ("mistral", {"head_dim": 7}),
    ("llama", {"rope": RopeConfig(1e4, factor=2.0)}), ("qwen3_moe", {"window": 8, "sliding": (True, True)}),
])  # fmt: skip
def test_export_refuses_what_the_architecture_cannot_say(family, change):
    config = dataclasses.replace(read(golden(family)), **change)
    with pytest.raises(UserError, match=next(iter(change))):
        config_to_hf(config)


@pytest.mark.parametrize("change", [{"window": None}, {"query_scalar": None}, {"sliding": (True,)}])
def test_export_refuses_half_a_gemma2(change):
    with pytest.raises(UserError, match=next(iter(change))):
        config_to_hf(dataclasses.replace(read(golden("gemma2")), **change))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
YARN_ALL = YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False}


@pytest.mark.parametrize("block", [
    {"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}, {"rope_type": "llama3", **LLAMA3}, YARN, YARN_ALL,
    YARN | {"attention_factor": 0.5}, {"rope_type": "dynamic", "factor": 2.0}
])  # fmt: skip
def test_both_spellings_of_rope_are_the_same(block, tmp_path):
    for model_type in DEFAULTS:
        inside = minimal(model_type) | {"rope_parameters": {**block, "rope_theta": 5e5}}
        beside = minimal(model_type) | {"rope_scaling": block, "rope_theta": 5e5}
        oldest = {name if name != "rope_type" else "type": value for name, value in block.items()}
        oldest = minimal(model_type) | {"rope_scaling": oldest, "rope_theta": 5e5}
        assert read(inside) == read(beside) == read(oldest) == read(inside | beside)
        assert read(inside).rope.theta == 5e5 and read(inside).rope.kind == block["rope_type"]
        check_against_transformers(inside, tmp_path)
        check_against_transformers(beside, tmp_path)


def test_every_rope_number_is_read_from_either_place():
    """Theta or scaling ignored without an error is how others went wrong."""
    block = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    base = read(minimal("llama") | {"rope_parameters": block}).rope
    for name, value in {"rope_theta": 7e5, **{name: 2 * value for name, value in LLAMA3.items()}}.items():
        changed = {**block, name: value}
        inside = read(minimal("llama") | {"rope_parameters": changed}).rope
        theta = changed.pop("rope_theta")
        beside = read(minimal("llama") | {"rope_scaling": changed, "rope_theta": theta}).rope
        assert inside == beside != base


def test_llama3_original_length_falls_back_as_in_transformers(tmp_path):
    block = {"rope_type": "llama3", **LLAMA3}
    del block["original_max_position_embeddings"]
    d = minimal("llama") | {"rope_scaling": block, "max_position_embeddings": 4096}
    assert read(d).rope.original_max_position == 4096
    check_against_transformers(d, tmp_path)


def longrope(pairs: int, **fields) -> dict:
    """A block with factors for so many frequencies."""
    factors = {"short_factor": [1.0 + i / 9 for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    return {"rope_type": "longrope", **factors, "original_max_position_embeddings": 512, **fields}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_longrope_is_read_in_every_spelling(model_type, tmp_path):
    """The original length in the block, beside it or in both."""
    d = minimal(model_type) | {"head_dim": 8, "max_position_embeddings": 2048}
    block = longrope(4)
    inside = d | {"rope_parameters": block | {"rope_theta": 5e5}}
    both = d | {"rope_scaling": block, "rope_theta": 5e5, "original_max_position_embeddings": 512}
    beside = {**both, "rope_scaling": {k: v for k, v in block.items() if k != "original_max_position_embeddings"}}
    assert read(inside) == read(both) == read(beside) == read(inside | both)
    assert read(inside).rope.long and not read(inside | {"max_position_embeddings": 512}).rope.long
    for fields in (inside, both, beside, json.loads(json.dumps(config_to_hf(read(inside))))):
        check_against_transformers(fields, tmp_path)


def test_the_longest_row_chooses_the_factors_of_longrope():
    config = read(minimal("llama") | {"hidden_size": 256, "rope_scaling": longrope(4)})
    assert config.rope.long and config.for_rows(513) == config
    short = config.for_rows(512)
    assert not short.rope.long and short.for_rows(2048) == config and config_to_hf(short) == config_to_hf(config)
    other = read(minimal("llama"))
    assert other.for_rows(9) == other


def test_what_follows_from_other_numbers_of_rope():
    """The attention factor as in the papers; what vLLM calls attn_factor multiplies it."""

    def attention(**block) -> float:
        return read(minimal("llama") | {"rope_scaling": YARN | block}).rope.attention_factor

    assert attention() == pytest.approx(0.1 * math.log(4) + 1)
    assert attention(mscale=1.5, mscale_all_dim=0.5) == pytest.approx(
        (0.15 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    )
    assert attention(mscale=1.5) == attention(mscale=1.5, mscale_all_dim=0) == attention()
    assert attention(attn_factor=0.8782488562869419) == pytest.approx(1.0)
    assert attention(attention_factor=0.7) == 0.7 and attention(factor=0.5) == 1.0
    d = minimal("llama") | {"hidden_size": 256}
    assert read(d | {"rope_scaling": longrope(4)}).rope.attention_factor == pytest.approx(
        math.sqrt(1 + math.log(4) / math.log(512))
    )
    assert read(d | {"rope_scaling": longrope(4, factor=8)}).rope.attention_factor == pytest.approx(
        math.sqrt(1 + math.log(8) / math.log(512))
    )


def test_yarn_has_positions_for_what_it_stretches_to():
    """max_position_embeddings is often left as it was."""
    assert read(PUBLISHED["Qwen3-8B with yarn, as its card says"]).longest_row == 131072
    assert read(minimal("llama") | {"rope_scaling": YARN | {"factor": 1.0}}).longest_row == 2048
    assert read(minimal("llama") | {"rope_scaling": {"type": "linear", "factor": 4.0}}).longest_row == 2048
    assert read(minimal("llama") | {"rope_scaling": YARN | {"factor": 1e308}}).longest_row == 2**31 - 1


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["su", "mrope", "proportional", 7, ["linear"]])
def test_other_rope_types_are_refused_by_name(name, kind):
    message = refusal(minimal("qwen2") | {name: {"rope_type": kind, "factor": 4.0}})
    assert repr(kind) in message and name in message
    assert message.endswith("supported: default, linear, llama3, yarn, longrope, dynamic")


@pytest.mark.parametrize("change, words", [
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, ["rope_theta", "10000.0", "1000000.0"]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}}, ["disagree"]),
    ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, ["'linear'", "'default'"]),
    ({"rope_scaling": {"type": "linear"}}, ["linear", "lacks", "'factor'"]),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, ["factor", "positive"]),
    ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, ["'factor'", "rope_theta"]),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ["'full_attention'"]),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, ["high_freq_factor"]),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 9}, ["9", "leave it"]),
    ({"rope_scaling": YARN, "original_max_position_embeddings": 9}, ["9", "'yarn'", "leave it"]),
    ({"original_max_position_embeddings": 9}, ["9", "'default'", "leave it"]),
    ({"rope_scaling": "linear"}, ["rope_scaling", "object"]),
    ({"rope_scaling": {"rope_type": "yarn"}}, ["yarn", "lacks", "'factor'"]),
    ({"rope_scaling": YARN | {"factr": 2.0}}, ["'factr'", "attention_factor, attn_factor, beta_fast"]),
    ({"rope_scaling": YARN | {"beta_fast": 0.5}}, ["rope_scaling.beta_fast 0.5", "beta_slow 1.0"]),
    ({"rope_scaling": YARN | {"beta_slow": 1e-300}}, ["beta_slow 1e-300", "0.001 and 1000000"]),
    ({"rope_scaling": YARN | {"truncate": 1}}, ["rope_scaling.truncate", "true or false"]),
    ({"rope_scaling": YARN | {"mscale": -1.0, "mscale_all_dim": 1.0}}, ["rope_scaling.mscale", "-1.0"]),
    ({"rope_scaling": YARN | {"attention_factor": 0}}, ["rope_scaling.attention_factor", "positive"]),
    ({"rope_scaling": YARN | {"attention_factor": 1.0, "attn_factor": 1.0}}, ["attn_factor", "leave one out"]),
    ({"rope_scaling": YARN, "rope_theta": 1}, ["'yarn'", "rope_theta above 1"]),
    ({"rope_scaling": {"rope_type": "dynamic"}}, ["dynamic", "lacks", "'factor'"]),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}}, ["512", "2048"]),
    ({"rope_scaling": longrope(1, original_max_position_embeddings=1)}, ["original_max_position", "2, not 1"]),
    ({"rope_scaling": longrope(2)}, ["rope_scaling.short_factor", "head_dim / 2 = 1", "[1.0, 1.1"]),
    ({"rope_scaling": longrope(1, long_factor=[0])}, ["rope_scaling.long_factor[0]", "positive"]),
    ({"rope_scaling": longrope(1, long_factor=None)}, ["rope_scaling.long_factor", "missing"]),
    ({"rope_scaling": longrope(1), "original_max_position_embeddings": 9}, ["512 in rope_scaling", "9 beside it"]),
    ({"rope_theta": 0}, ["rope_theta", "positive"]),
    ({"rope_theta": "1e6"}, ["rope_theta", "'1e6'"]),
])  # fmt: skip
def test_bad_rope_is_refused(change, words):
    message = refusal(minimal("llama") | change)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("model_type", DEFAULTS)
@pytest.mark.parametrize("name", sorted({*FIXED, *(name for fields in FIXED_OF.values() for name in fields)}))
def test_fixed_fields_are_checked(model_type, name):
    """One that is listed as fixed is refused with any other value, and accepted with the supported ones."""
    fixed = fixed_fields(model_type)
    if name not in fixed:
        if name not in read_fields(model_type) and name not in INERT:
            assert "unknown" in refusal(minimal(model_type) | {name: True})
        return
    for value in fixed[name]:
        read(minimal(model_type) | {name: value})
    for value in ("other", 0.5, 2 if name == "pretraining_tp" else fixed[name][0] is not True):
        message = refusal(minimal(model_type) | {name: value})
        assert name in message and repr(value) in message


def test_fixed_fields_that_depend_on_the_family():
    assert read(minimal("qwen2") | {"attention_bias": True}) == read(minimal("qwen2"))
    assert "attention_bias" in refusal(minimal("qwen2") | {"attention_bias": False})
    assert read(minimal("qwen3") | {"sliding_window": 4096}) == read(minimal("qwen3"))
    assert "sliding_window" in refusal(minimal("llama") | {"sliding_window": 4096})
    for model_type in ("llama", "qwen3"):
        config = read(minimal(model_type) | {"attention_bias": True})
        assert config.qkv_bias and config.o_bias


@pytest.mark.parametrize("name", sorted(INERT))
def test_inert_fields_change_nothing(name):
    assert read(minimal("qwen3") | {name: 3}) == read(minimal("qwen3"))


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_the_three_lists_of_fields_are_disjoint(model_type):
    known = read_fields(model_type)
    assert not known & fixed_fields(model_type).keys() and not known & INERT and not INERT & FIXED.keys()
    assert DEFAULTS[model_type].keys() <= known


@pytest.mark.parametrize("change, words", [
    ({"num_key_values_heads": 2}, ["'num_key_values_heads'", "nearest", "'num_key_value_heads'"]),
    ({"hiden_act": "silu"}, ["'hiden_act'", "'hidden_act'"]),
    ({"zzz": 1}, ["'zzz'"]),
    ({"architectures": ["Phi3ForCausalLM"]}, ["'Phi3ForCausalLM'", "LlamaForCausalLM, Qwen2ForCausalLM"]),
    ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
    ({"architectures": []}, ["architecture []"]),
    ({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, ["LlamaForCausalLM", "'mistral'", "disagree"]),
    ({"architectures": None, "model_type": "gpt2"}, ["'gpt2'", "llama, qwen2, qwen3"]),
    ({"architectures": None, "model_type": None}, ["no architecture"]),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
    ({"layer_types": ["full_attention"]}, ["layer_types", "2 layers"]),
    ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "leave it out"]),
    ({"vocab_size": 96.0}, ["vocab_size", "96.0"]),
    ({"hidden_size": True}, ["hidden_size", "True"]),
    ({"intermediate_size": None}, ["intermediate_size", "None"]),
    ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", "'1e-5'"]),
    ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "1"]),
    ({"num_key_value_heads": 5}, ["num_attention_heads 32", "num_key_value_heads 5"]),
    ({"hidden_size": 65, "head_dim": None}, ["hidden_size 65", "num_attention_heads 32"]),
    ({"head_dim": 7}, ["head_dim", "7"]),
    ({"num_experts": 4}, ["unknown field 'num_experts'"]),
])  # fmt: skip
def test_bad_fields_are_refused(change, words):
    message = refusal(minimal("llama") | change)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("model_type", DEFAULTS)
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                  "num_attention_heads"])  # fmt: skip
def test_missing_fields_are_named(model_type, name):
    d = minimal(model_type)
    if (model_type, name) == ("qwen3_moe", "intermediate_size"):
        return  # of layers that are no mixture, which are refused
    del d[name]
    assert f"lacks the required field {name!r}" in refusal(d)


@pytest.mark.parametrize("change, words", [
    ({"num_experts_per_tok": 129}, ["num_experts_per_tok 129", "128 experts"]),
    ({"num_experts": 4, "num_local_experts": 5}, ["disagree"]),
    ({"mlp_only_layers": [1]}, ["mlp_only_layers", "[1]"]),
    ({"decoder_sparse_step": 2}, ["decoder_sparse_step", "2"]),
])  # fmt: skip
def test_a_bad_mixture_is_refused(change, words):
    message = refusal(minimal("qwen3_moe") | change)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("change, words", [
    ({"hidden_activation": "gelu"}, ["hidden_activation", "'gelu'", "'gelu_pytorch_tanh'"]),
    ({"hidden_act": "silu"}, ["hidden_act", "'silu'", "'gelu_pytorch_tanh'"]),
    ({"use_bidirectional_attention": True}, ["use_bidirectional_attention", "True"]),
    ({"use_sliding_window": False}, ["use_sliding_window", "leave it out"]),
    ({"sliding_window": None}, ["sliding_window", "None"]),
    ({"sliding_window": 0}, ["sliding_window", "0"]),
    ({"sliding_window": 8, "sliding_window_size": 9}, ["sliding_window 8", "sliding_window_size 9", "disagree"]),
    ({"layer_types": ["full_attention"]}, ["layer_types", "2 layers"]),
    ({"layer_types": ["full_attention", "chunked_attention"]}, ["layer_types", "chunked_attention"]),
    ({"layer_types": "full_attention"}, ["layer_types", "full_attention"]),
    ({"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar", "0"]),
    ({"query_pre_attn_scalar": None}, ["query_pre_attn_scalar", "None"]),
    ({"attn_logit_softcapping": 0.0}, ["attn_logit_softcapping", "0.0"]),
    ({"final_logit_softcapping": "30"}, ["final_logit_softcapping", "'30'"]),
    ({"final_logit_softcaping": 30.0}, ["'final_logit_softcaping'", "'final_logit_softcapping'"]),
])  # fmt: skip
def test_a_bad_gemma2_is_refused(change, words):
    message = refusal(minimal("gemma2") | change)
    assert all(word in message for word in words), message


FULL, SLIDES = "full_attention", "sliding_attention"


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_layers_of_a_qwen_slide_where_it_says_so(model_type, tmp_path):
    """Of use_sliding_window alone nothing follows: there must be a window, and a layer from max_window_layers on."""
    d = minimal(model_type) | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8}
    full = read(minimal(model_type) | {"num_hidden_layers": 4})
    for change in ({}, {"max_window_layers": 4}, {"sliding_window": None, "max_window_layers": 0},
                   {"layer_types": [FULL] * 4, "max_window_layers": 0},
                   {"use_sliding_window": False, "max_window_layers": 0},
                   {"use_sliding_window": None, "max_window_layers": 0}):  # fmt: skip
        assert read(d | change) == full, change
    config = read(d | {"max_window_layers": 1})
    assert config == dataclasses.replace(full, window=8, sliding=(False, True, True, True))
    mixed = d | {"layer_types": [SLIDES, FULL, FULL, SLIDES]}
    assert read(mixed).sliding == (True, False, False, True)
    for fields in (d, d | {"max_window_layers": 1}, mixed):
        check_against_transformers(fields, tmp_path)
        written = json.loads(json.dumps(config_to_hf(read(fields))))
        assert read(written) == read(fields)
        check_against_transformers(written, tmp_path)


def test_layers_of_a_mistral_slide(tmp_path):
    """All of them, or none; a Ministral's may differ."""
    d = minimal("mistral") | {"num_hidden_layers": 3}
    assert (read(d).window, read(d).sliding) == (4096, (True, True, True))
    assert read(d | {"layer_types": [SLIDES] * 3}) == read(d)
    full = read(d | {"sliding_window": None})
    assert (full.window, full.sliding) == (None, ()) and read(config_to_hf(full)) == full
    d = minimal("ministral") | {"num_hidden_layers": 3, "sliding_window": 8}
    assert (read(d).window, read(d).sliding) == (8, (True, True, True))
    assert read(d | {"layer_types": [FULL, SLIDES, FULL]}).sliding == (False, True, False)
    assert read(d | {"layer_types": [FULL] * 3}) == read(d | {"sliding_window": None})
    for change in ({}, {"sliding_window": None}, {"layer_types": [FULL, SLIDES, FULL]}):
        check_against_transformers(d | change, tmp_path)
        check_against_transformers(json.loads(json.dumps(config_to_hf(read(d | change)))), tmp_path)


@pytest.mark.parametrize("model_type, change, words", [
    ("qwen2", {"use_sliding_window": 1}, ["use_sliding_window", "true or false"]),
    ("qwen2", {"use_sliding_window": True, "sliding_window": "8"}, ["sliding_window", "'8'"]),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0.5}, ["max_window_layers", "0.5"]),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": -1}, ["max_window_layers", "-1"]),
    ("qwen3", {"layer_types": [FULL, SLIDES]}, ["layer_types", "'full_attention' for each"]),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, ["use_sliding_window", "8", "supported: False"]),
    ("llama", {"use_sliding_window": True}, ["use_sliding_window", "supported: False"]),
    ("mistral", {"layer_types": [FULL, SLIDES]}, ["layer_types", "'sliding_attention' for each"]),
    ("mistral", {"layer_types": [SLIDES] * 2, "sliding_window": None}, ["layer_types", "'full_attention' for each"]),
    ("ministral", {"layer_types": [SLIDES] * 3}, ["layer_types", "2 layers"]),
    ("mistral", {"sliding_window": 0}, ["sliding_window", "0"]),
    ("mistral", {"use_sliding_window": False}, ["use_sliding_window", "leave it out"]),
    ("mistral", {"attention_bias": True}, ["attention_bias", "supported: False"]),
    ("qwen3_moe", {"shared_expert_intermediate_size": 512}, ["shared_expert_intermediate_size", "supported: 0"]),
    ("qwen3_moe", {"use_qk_norm": False}, ["use_qk_norm", "supported: True"]),
    ("qwen3_moe", {"qkv_bias": True}, ["qkv_bias", "supported: False"]),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192,
               "original_max_position_embeddings": 262144}}, ["dual_chunk_attention_config", "leave it out"]),
])  # fmt: skip
def test_bad_windows_and_fields_of_one_family_are_refused(model_type, change, words):
    message = refusal(minimal(model_type) | change)
    assert all(word in message for word in words), message


def test_layers_of_a_gemma2_slide_by_turns(tmp_path):
    """The first does; where layer_types says something else, that."""
    d = minimal("gemma2") | {"num_hidden_layers": 5}
    assert read(d).sliding == (True, False, True, False, True)
    assert read(d | {"layer_types": None}) == read(d)
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert read(d | {"layer_types": kinds}).sliding == (False, False, True, False, True)
    for change in ({}, {"layer_types": None}, {"layer_types": kinds}):
        check_against_transformers(d | change, tmp_path)


def test_either_name_of_the_architecture_will_do():
    d = minimal("qwen3")
    assert read({**d, "architectures": None}) == read({**d, "model_type": None}) == read(d)
