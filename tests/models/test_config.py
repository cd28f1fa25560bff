"""config.json, field by field, against what transformers itself makes of the same JSON."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from dppo_jax.errors import UserError
from dppo_jax.models.config import (
    DEFAULTS,
    FIXED,
    FIXED_GEMMA2,
    INERT,
    READ,
    READ_GEMMA2,
    READ_MOE,
    RopeConfig,
    config_from_hf,
    config_to_hf,
    fixed_fields,
)
from tests.helpers.places import GOLDEN

MODELS = GOLDEN / "models"
FAMILIES = ["llama", "llama_tied", "llama_linear", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma2_plain"]
CLASSES = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "gemma2": Gemma2Config,
}
NAMES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
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
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    rope = theirs.rope_parameters
    assert ours.rope == RopeConfig(
        theta=rope["rope_theta"],
        kind=rope["rope_type"],
        factor=rope.get("factor", 1.0),
        low_freq_factor=rope.get("low_freq_factor", 1.0),
        high_freq_factor=rope.get("high_freq_factor", 4.0),
        original_max_position=rope.get("original_max_position_embeddings", 8192),
    )
    attention_bias = getattr(theirs, "attention_bias", False)
    mixture, gemma = theirs.model_type == "qwen3_moe", theirs.model_type == "gemma2"
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
        "window": theirs.sliding_window if gemma else None,
        "sliding": tuple(kind == "sliding_attention" for kind in theirs.layer_types) if gemma else (),
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


@pytest.mark.parametrize("change", [
    {"logit_softcap": 30.0}, {"o_bias": True}, {"qk_norm": True}, {"query_scalar": 8}, {"attn_softcap": 50.0},
    {"window": 8, "sliding": (True, False)},
])  # fmt: skip
def test_export_refuses_what_the_architecture_cannot_say(change):
    config = dataclasses.replace(read(golden("qwen2")), **change)
    with pytest.raises(UserError, match=next(iter(change))):
        config_to_hf(config)


@pytest.mark.parametrize("change", [{"window": None}, {"query_scalar": None}, {"sliding": (True,)}])
def test_export_refuses_half_a_gemma2(change):
    with pytest.raises(UserError, match=next(iter(change))):
        config_to_hf(dataclasses.replace(read(golden("gemma2")), **change))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("block", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0},
                                   {"rope_type": "llama3", **LLAMA3}])  # fmt: skip
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


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "mrope", "proportional", 7, ["linear"]])
def test_other_rope_types_are_refused_by_name(name, kind):
    message = refusal(minimal("qwen2") | {name: {"rope_type": kind, "factor": 4.0}})
    assert repr(kind) in message and name in message and "default, linear, llama3" in message


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
    ({"rope_scaling": "linear"}, ["rope_scaling", "object"]),
    ({"rope_theta": 0}, ["rope_theta", "positive"]),
    ({"rope_theta": "1e6"}, ["rope_theta", "'1e6'"]),
])  # fmt: skip
def test_bad_rope_is_refused(change, words):
    message = refusal(minimal("llama") | change)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("model_type", DEFAULTS)
@pytest.mark.parametrize("name", sorted({**FIXED, **FIXED_GEMMA2}))
def test_fixed_fields_are_checked(model_type, name):
    """One that is listed as fixed is refused with any other value, and accepted with the supported ones."""
    fixed = fixed_fields(model_type)
    if name not in fixed:
        if model_type == "gemma2":
            assert name in READ_GEMMA2
        else:
            assert "unknown" in refusal(minimal(model_type) | {name: True})
        return
    for value in fixed[name]:
        read(minimal(model_type) | {name: value})
    for value in ("other", 0.5, True if name != "pretraining_tp" else 2):
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


def test_the_three_lists_of_fields_are_disjoint():
    assert not READ & FIXED.keys() and not READ & INERT and not INERT & FIXED.keys()
    for model_type in DEFAULTS:
        own = {"qwen3_moe": READ_MOE, "gemma2": READ_GEMMA2}.get(model_type, frozenset())
        assert not own & fixed_fields(model_type).keys() and not own & (READ | INERT)


@pytest.mark.parametrize("change, words", [
    ({"num_key_values_heads": 2}, ["'num_key_values_heads'", "nearest", "'num_key_value_heads'"]),
    ({"hiden_act": "silu"}, ["'hiden_act'", "'hidden_act'"]),
    ({"zzz": 1}, ["'zzz'"]),
    ({"architectures": ["MistralForCausalLM"]}, ["'MistralForCausalLM'", "LlamaForCausalLM, Qwen2ForCausalLM"]),
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
