"""Makes tiny random models in Hugging Face format, and the logits that PyTorch `transformers` gives for them.

    python tests/golden/models/make_models.py            writes <family>/ and golden.npz beside this file
    python tests/golden/models/make_models.py --check    compares them with what it would write; exits 1 on a difference

Needs torch and transformers. No norm, bias or rope setting has a value at which it could be forgotten unnoticed, nor
has an epsilon: without it, a norm hides the scale of what it is given. The configs use both of transformers' spellings
of rope, and transformers itself reads them. Logits are computed in float64 (what transformers keeps in float32 aside:
norms, rotations, softmax) with eager attention, each row by itself without its padding, and stored in float32; they
are zero on padding.

golden.npz: tokens i32[3, 40], mask bool[3, 40] (rows without, with some and with much padding on the left), and
for each family f32[3, 40, 96] logits under its name and its rotary inverse frequencies under <family>_inv_freq.

VARIANTS are other configs for the weights of a family: what stands in variants.json under "changes", of which null
takes a field away, in place of the family's own. golden.npz has f32[20, 96] logits of the last positions of the row
without padding for each, its inverse frequencies, and under <variant>_attention_factor what multiplies cos and sin.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

HERE = Path(__file__).parent
VOCAB, LENGTH, PADDING = 96, 40, (0, 9, 29)
LAST = 20  # positions that are kept of a variant
TOLERANCE = 1e-6  # of the largest value
VARIANTS = json.loads((HERE / "variants.json").read_text())

COMMON = {
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
    "use_cache": True,
}

CONFIGS = {
    # Llama 3.1: its rope scaling, made to bite within 40 positions; biases on q, k, v and o; 4.x spelling.
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 0.01,
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "attention_bias": True,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
    },
    # Linear scaling in its oldest spelling; num_key_value_heads and the epsilon left to their defaults.
    "llama_linear": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "rope_theta": 300.0,
        "rope_scaling": {"type": "linear", "factor": 2.5},
        "tie_word_embeddings": False,
    },
    # As SmolLM2: tied, plain rope, heads that are not a power of two; 5.x spelling.
    "llama_tied": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        "tie_word_embeddings": True,
    },
    # As DeepSeek-R1-Distill-Qwen, but tied; 4.x spelling.
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "max_window_layers": 1,
        "sliding_window": 8,
        "use_sliding_window": False,
        "rms_norm_eps": 0.03,
        "rope_theta": 200.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    },
    # heads * head_dim is twice the hidden size; 5.x spelling.
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 400.0},
        "layer_types": ["full_attention", "full_attention"],
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    # Five experts, two a token, an odd width; 4.x spelling.
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 20,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 0.04,
        "rope_theta": 600.0,
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    # Windows, caps and a scale that all bite within 40 positions; layers slide by default: the first and third; 4.x
    # spelling, with both names of the activation.
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 128,
        "rms_norm_eps": 0.02,
        "rope_theta": 500.0,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "cache_implementation": "hybrid",
    },
    # Untied, biased, uncapped; the last two layers slide; 5.x spelling.
    "gemma2_plain": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 128,
        "rms_norm_eps": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 800.0},
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    # All layers slide, in a window that bites; heads * head_dim is twice the hidden size; 4.x spelling.
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 0.03,
        "rope_theta": 500.0,
        "sliding_window": 7,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    },
}


def draw(name: str, shape: tuple[int, ...], one: float, random: np.random.RandomState) -> np.ndarray:
    """Uniform weights, the same to the bit everywhere; q and k large enough for attention that is far from flat.

    `one` is the norm weight that changes nothing.
    """
    if name.endswith("norm.weight"):
        low, high = one - 0.5, one + 0.5
    elif name.endswith("bias"):
        low, high = -0.7, 0.7
    else:
        high = (3.0 / shape[-1]) ** 0.5 * (2.0 if "q_proj" in name or "k_proj" in name else 1.0)
        low = -high
    return random.uniform(low, high, shape).astype(np.float32)


def apart(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """With a tensor for every expert, as published checkpoints have them; transformers 5 holds them stacked."""
    single = {}
    for name, shape in shapes.items():
        stem, _, kind = name.rpartition(".experts.")
        if not stem:
            single[name] = shape
            continue
        count, rows, columns = shape
        kinds = {"gate_proj": rows // 2, "up_proj": rows // 2} if kind == "gate_up_proj" else {"down_proj": rows}
        for expert in range(count):
            single |= {f"{stem}.experts.{expert}.{k}.weight": (r, columns) for k, r in kinds.items()}
    return single


def write_model(directory: Path, family: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[family] | COMMON | CONFIGS[family], indent=2) + "\n")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    shapes = apart(shapes)
    random = np.random.RandomState(list(CONFIGS).index(family))  # a new family goes to the end
    one = 0.0 if model.config.model_type == "gemma2" else 1.0
    weights = {name: draw(name, shapes[name], one, random) for name in sorted(shapes)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def write_variant(directory: Path, source: Path, changes: dict) -> None:
    """The model of `source` with another config."""
    shutil.copytree(source, directory)
    fields = json.loads((source / "config.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not None or name == "sliding_window"}
    (directory / "config.json").write_text(json.dumps(fields))


def transformers_values(
    directory: Path, tokens: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits f32[B, T, V], each row run alone without its padding, zero there; of rope's last forward pass the inverse
    frequencies f32[D/2], and what cos and sin are multiplied by, f32[]."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise SystemExit(f"error: transformers does not load {directory} as it is: {wrong}")
    logits = np.zeros((*tokens.shape, VOCAB), np.float32)
    with torch.no_grad():
        for row in range(len(tokens)):
            ids = torch.tensor(tokens[row][mask[row]], dtype=torch.long)
            logits[row, mask[row]] = model.eval()(input_ids=ids[None]).logits[0].numpy()
    if not np.isfinite(logits).all():
        raise SystemExit(f"error: transformers gives logits for {directory} that are not finite")
    rope = model.model.rotary_emb
    return logits, rope.inv_freq.to(torch.float32).numpy(), np.float32(rope.attention_scaling)


def make(root: Path) -> None:
    random = np.random.RandomState(1234)
    tokens = random.randint(0, VOCAB, (len(PADDING), LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH)[None, :] >= np.array(PADDING)[:, None]
    tokens[~mask] = COMMON["pad_token_id"]
    golden = {"tokens": tokens, "mask": mask}
    for family in CONFIGS:
        write_model(root / family, family)
        golden[family], golden[f"{family}_inv_freq"], _ = transformers_values(root / family, tokens, mask)
    for name, variant in VARIANTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            write_variant(Path(scratch) / name, root / variant["family"], variant["changes"])
            logits, inv_freq, attention = transformers_values(Path(scratch) / name, tokens[:1], mask[:1])
        golden |= {name: logits[0, -LAST:], f"{name}_inv_freq": inv_freq, f"{name}_attention_factor": attention}
    np.savez(root / "golden.npz", **golden)


def differences(made: Path, stored: Path) -> list[str]:
    """What differs between two roots, a line each."""
    found = []
    for family in CONFIGS:
        for name in ("config.json", "model.safetensors"):
            if not (stored / family / name).is_file():
                return [f"{family}/{name} is missing"]
        if (made / family / "config.json").read_text() != (stored / family / "config.json").read_text():
            found.append(f"{family}/config.json differs")
        ours, theirs = (load_file(root / family / "model.safetensors") for root in (made, stored))
        if ours.keys() != theirs.keys():
            found.append(f"{family}/model.safetensors has other tensors: {sorted(ours.keys() ^ theirs.keys())}")
        found += [
            f"{family}/model.safetensors: {name} differs"
            for name in sorted(ours.keys() & theirs.keys())
            if not np.array_equal(ours[name], theirs[name])
        ]
    if not (stored / "golden.npz").is_file():
        return [*found, "golden.npz is missing"]
    with np.load(made / "golden.npz") as ours, np.load(stored / "golden.npz") as theirs:
        if set(ours) != set(theirs):
            return [*found, f"golden.npz has other arrays: {sorted(set(ours) ^ set(theirs))}"]
        for name in ours:
            a, b = ours[name], theirs[name]
            if a.shape != b.shape or a.dtype != b.dtype:
                found.append(f"golden.npz: {name} has another shape or dtype")
            elif a.dtype == np.float32:
                error = np.abs(a - b).max() / np.abs(a).max()
                print(f"{name:22} worst error {error:.1e} of the largest value")
                if not error <= TOLERANCE:
                    found.append(f"golden.npz: {name} differs by {error:.1e} of the largest value")
            elif not np.array_equal(a, b):
                found.append(f"golden.npz: {name} differs")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the stored data differ")
    check = parser.parse_args().check
    logging.disable_progress_bar()
    if not check:
        make(HERE)
        return
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        found = differences(Path(scratch), HERE)
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
