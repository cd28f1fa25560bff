"""experiments.recipes.smollm2.convert on a tiny GGUF file written here."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from dppo_jax.errors import UserError
from dppo_jax.models.config import config_from_hf
from experiments.recipes.smollm2.convert import convert

D, F, LAYERS, HEADS, KV, HEAD_DIM = 64, 96, 2, 4, 2, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The 256 byte characters of byte-level BPE, then merges.
BYTES = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
MERGES = [("Ġ", "Ġ"), ("Ġ", "t"), ("1", "2"), ("ĠĠ", "1")]
TOKENS = SPECIAL + BYTES + [a + b for a, b in MERGES]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_gguf(path: Path, tensors: dict[str, np.ndarray], arch: str = "llama", **extra: int) -> None:
    """A GGUF file with the metadata of a SmolLM2, matrices quantised to Q8_0."""
    w = gguf.GGUFWriter(path, arch)
    w.add_context_length(128)
    w.add_embedding_length(D)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(F)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV)
    w.add_rope_dimension_count(HEAD_DIM)
    w.add_rope_freq_base(100000.0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(TOKENS)
    w.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL)))
    w.add_token_merges([f"{a} {b}" for a, b in MERGES])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(2)
    w.add_unk_token_id(0)
    w.add_chat_template(TEMPLATE)
    for key, value in extra.items():
        w.add_uint32(key, value)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, value in tensors.items():
        if value.ndim == 2:
            w.add_tensor(name, gguf.quantize(value, q8), raw_dtype=q8)
        else:
            w.add_tensor(name, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), D), "output_norm": (D,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.{name}": shape
            for name, shape in {
                "attn_norm": (D,),
                "attn_q": (HEADS * HEAD_DIM, D),
                "attn_k": (KV * HEAD_DIM, D),
                "attn_v": (KV * HEAD_DIM, D),
                "attn_output": (D, HEADS * HEAD_DIM),
                "ffn_norm": (D,),
                "ffn_gate": (F, D),
                "ffn_up": (F, D),
                "ffn_down": (D, F),
            }.items()
        }
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tensors) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    write_gguf(folder / "tiny.gguf", tensors)
    convert(folder / "tiny.gguf", folder / "hf")
    return folder / "hf"


def dequantised(value: np.ndarray) -> np.ndarray:
    """Q8_0 by its definition: per 32 weights a float16 scale, max/127, and signed bytes."""
    blocks = value.reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    return (np.round(blocks / scale) * scale.astype(np.float16).astype(np.float32)).reshape(value.shape)


def test_weights(converted, tensors):
    weights = load_file(converted / "model.safetensors")
    assert len(weights) == len(tensors) and all(w.dtype == np.float32 for w in weights.values())
    for theirs, ours in [
        ("token_embd", "embed_tokens"),
        ("output_norm", "norm"),
        ("blk.1.attn_norm", "layers.1.input_layernorm"),
        ("blk.1.attn_v", "layers.1.self_attn.v_proj"),
        ("blk.1.attn_output", "layers.1.self_attn.o_proj"),
        ("blk.1.ffn_norm", "layers.1.post_attention_layernorm"),
        ("blk.1.ffn_gate", "layers.1.mlp.gate_proj"),
        ("blk.1.ffn_up", "layers.1.mlp.up_proj"),
        ("blk.1.ffn_down", "layers.1.mlp.down_proj"),
    ]:
        value = tensors[f"{theirs}.weight"]
        expected = dequantised(value) if value.ndim == 2 else value
        np.testing.assert_allclose(weights[f"model.{ours}.weight"], expected, rtol=1e-6, atol=1e-7, err_msg=theirs)


def rotate(x: np.ndarray, position: int, neighbours: bool) -> np.ndarray:
    """Rope on [heads, hd]: pairs (2j, 2j+1) as llama.cpp has them, or (j, j + hd/2) as Hugging Face does."""
    angle = position * 100000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    first, second = (x[:, 0::2], x[:, 1::2]) if neighbours else (x[:, : HEAD_DIM // 2], x[:, HEAD_DIM // 2 :])
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
    )


def test_attention_scores_survive_the_change_of_rope_order(converted, tensors):
    weights = load_file(converted / "model.safetensors")
    x, y = np.random.default_rng(1).normal(size=(2, D))

    def scores(q: np.ndarray, k: np.ndarray, neighbours: bool) -> np.ndarray:
        q_rows = rotate((q @ x).reshape(HEADS, HEAD_DIM), 9, neighbours)
        k_rows = rotate((k @ y).reshape(KV, HEAD_DIM), 4, neighbours).repeat(HEADS // KV, 0)
        return (q_rows * k_rows).sum(-1)

    theirs = scores(dequantised(tensors["blk.0.attn_q.weight"]), dequantised(tensors["blk.0.attn_k.weight"]), True)
    attention = "model.layers.0.self_attn"
    ours = scores(weights[f"{attention}.q_proj.weight"], weights[f"{attention}.k_proj.weight"], False)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_config(converted):
    config = config_from_hf(json.loads((converted / "config.json").read_text()), "config.json")
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (LAYERS, HEADS, KV, HEAD_DIM)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (len(TOKENS), D, F)
    assert (config.rms_norm_eps, config.rope.theta, config.max_position) == (1e-5, 1e5, 128)
    assert config.tie_embeddings and not config.qkv_bias
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_keeps_digits_apart(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    # The merges (1, 2) and (ĠĠ, 1) exist and must never apply: the digit splitter comes first.
    assert tokenizer.tokenize("  12 t") == ["ĠĠ", "1", "2", "Ġt"]
    assert tokenizer("<|im_end|>").input_ids == [2] == [tokenizer.eos_token_id] == [tokenizer.pad_token_id]
    text = "x² naïve 東京\n 7"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "1 * 2"}], tokenize=False)
    assert chat == "<|im_start|>user\n1 * 2<|im_end|>\n"


def test_bad_files_name_the_fault(converted, tensors, tmp_path):
    good = (converted.parent / "tiny.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    with pytest.raises(UserError, match="no GGUF file at"):
        convert(bad, tmp_path / "out")
    for content in (b"", b"PK\x03\x04 a zip file"):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="is not a GGUF file"):
            convert(bad, tmp_path / "out")
    for size in (4, 40, 2000, len(good) // 2, len(good) - 32):
        bad.write_bytes(good[:size])
        with pytest.raises(UserError, match="is truncated or damaged"):
            convert(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    less = {name: value for name, value in tensors.items() if name != "blk.1.attn_k.weight"}
    more = tensors | {"rope_freqs.weight": np.ones(8, np.float32)}
    wrong = tensors | {"blk.0.ffn_up.weight": np.ones((32, D), np.float32)}
    for contents, arch, extra, message in [
        (less, "llama", {}, "no tensor 'blk.1.attn_k.weight'"),
        (more, "llama", {}, "'rope_freqs.weight'"),
        (wrong, "llama", {}, "'blk.0.ffn_up.weight' has shape"),
        (tensors, "gemma", {}, "not 'gemma'"),
        (tensors, "llama", {"llama.rope.scaling.factor": 2}, "'llama.rope.scaling.factor'"),
    ]:
        write_gguf(bad, contents, arch, **extra)
        with pytest.raises(UserError, match=message):
            convert(bad, tmp_path / "out")
