"""Model directories: what is written is read back to the bit, and every way one can be broken gets its sentence."""

import contextlib
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dppo_jax.errors import UserError
from dppo_jax.models.hf import load_params, save_hf
from tests.helpers.places import GOLDEN

MODELS = GOLDEN / "models"
FAMILIES = ["llama", "llama_tied", "llama_linear", "qwen2", "qwen3", "gemma2", "gemma2_plain", "mistral"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path) -> Path:
    """A copy of the golden qwen2 model (tied, with biases), to break."""
    return Path(shutil.copytree(MODELS / "qwen2", tmp_path / "qwen2"))


def refusal(directory: Path) -> str:
    """The message that a directory is refused with: one line."""
    with pytest.raises(UserError) as caught:
        load_params(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(directory: Path, **fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(directory: Path, **tensors) -> None:
    """Replaces tensors by name, dots written as __; None removes one."""
    changed = load_file(directory / WEIGHTS)
    for name, tensor in tensors.items():
        changed.pop(name.replace("__", "."), None)
        if tensor is not None:
            changed[name.replace("__", ".")] = tensor
    save_file(changed, directory / WEIGHTS)


def shard(directory: Path, count: int = 3) -> list[str]:
    """Splits the weights of a directory over `count` files and an index; returns the files' names."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    shards = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: shards[i % count] for i, name in enumerate(sorted(tensors))}
    for file in shards:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(held, directory / file, metadata={"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shards


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, path
        assert np.array_equal(x.view(np.uint32), y.view(np.uint32)), path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_read_once_and_in_its_place(family):
    """Against the stored tensors by their Hugging Face names, which are written out here on purpose."""
    _, params = load_params(MODELS / family)
    stored = load_file(MODELS / family / WEIGHTS)
    ours = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["final_norm"]}
    if "head" in params:
        ours["lm_head.weight"] = params["head"]
    layers = params["layers"]
    for i in range(len(layers["q"])):
        prefix = f"model.layers.{i}."
        ours[prefix + "input_layernorm.weight"] = layers["attn_norm"][i]
        if family.startswith("gemma2"):
            ours[prefix + "post_attention_layernorm.weight"] = layers["attn_post_norm"][i]
            ours[prefix + "pre_feedforward_layernorm.weight"] = layers["mlp_norm"][i]
            ours[prefix + "post_feedforward_layernorm.weight"] = layers["mlp_post_norm"][i]
        else:
            ours[prefix + "post_attention_layernorm.weight"] = layers["mlp_norm"][i]
        for name in ("q", "k", "v", "o"):
            ours[f"{prefix}self_attn.{name}_proj.weight"] = layers[name][i].T
            if f"{name}_bias" in layers:
                ours[f"{prefix}self_attn.{name}_proj.bias"] = layers[f"{name}_bias"][i]
            if f"{name}_norm" in layers:
                ours[f"{prefix}self_attn.{name}_norm.weight"] = layers[f"{name}_norm"][i]
        for name in ("gate", "up", "down"):
            ours[f"{prefix}mlp.{name}_proj.weight"] = layers[name][i].T
    assert ours.keys() == stored.keys()
    for name, tensor in stored.items():
        assert np.array_equal(ours[name], tensor), name
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(tensor.size for tensor in stored.values())
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("family", FAMILIES)
def test_import_of_export_is_identity(family, tmp_path):
    config, params = load_params(MODELS / family)
    save_hf(tmp_path / "copy", config, jax.tree.map(jax.numpy.asarray, params))
    again, reloaded = load_params(tmp_path / "copy")
    assert again == config
    assert_same(reloaded, params)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["config.json", WEIGHTS]
    with safe_open(tmp_path / "copy" / WEIGHTS, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype, tmp_path):
    config, params = load_params(MODELS / "qwen3")
    save_hf(tmp_path, config, params, dtype=dtype)
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {stored}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    _, reloaded = load_params(tmp_path)
    assert_same(reloaded, jax.tree.map(lambda p: p.astype(stored).astype(np.float32), params))


def test_shards_are_the_same_as_one_file(directory):
    whole = load_params(directory)
    shard(directory)
    config, params = load_params(directory)
    assert config == whole[0]
    assert_same(params, whole[1])


def test_save_with_a_tokenizer(tmp_path):
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
    save_hf(tmp_path, *load_params(MODELS / "qwen3"), tokenizer)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["pad_token_id"], fields["bos_token_id"], fields["eos_token_id"]) == (0, 1, 2)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.eos_token_id == 2 and again.chat_template == tokenizer.chat_template
    load_params(tmp_path)


def test_save_replaces_a_model(tmp_path):
    for family in ("qwen2", "llama"):
        save_hf(tmp_path, *load_params(MODELS / family))
    assert_same(load_params(tmp_path)[1], load_params(MODELS / "llama")[1])


def test_a_save_that_fails_leaves_the_model_before_it(directory):
    class Broken:
        bos_token_id = eos_token_id = pad_token_id = 0

        def save_pretrained(self, directory):
            raise OSError("disk full")

    before = load_params(directory)
    with pytest.raises(OSError, match="disk full"):
        save_hf(directory, *load_params(MODELS / "llama"), Broken())
    assert load_params(directory)[0] == before[0]
    assert_same(load_params(directory)[1], before[1])
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", WEIGHTS]


def test_save_refuses_params_that_do_not_fit(tmp_path):
    config, params = load_params(MODELS / "qwen2")
    layers = params["layers"]
    without = {name: value for name, value in layers.items() if name != "k_bias"}
    for bad, words in [
        (params | {"layers": without}, "'layers/k_bias' is missing"),
        (params | {"head": params["embed"]}, "'head' is not in this model"),
        (params | {"layers": layers | {"gate": layers["gate"][:1]}}, r"'layers/gate' has shape \[1, 32, 48\]"),
    ]:
        with pytest.raises(UserError, match=words):
            save_hf(tmp_path, config, bad)
    with pytest.raises(UserError, match="unknown dtype 'bfloat61'; the nearest is 'bfloat16'"):
        save_hf(tmp_path, config, params, dtype="bfloat61")
    assert list(tmp_path.iterdir()) == []


def test_missing_directory(tmp_path):
    assert refusal(tmp_path / "nowhere") == f"model directory {tmp_path / 'nowhere'} does not exist"
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "file").endswith("is not a directory")


def test_missing_or_damaged_config(directory):
    (directory / "config.json").write_text('{"model_type": ')
    assert "config.json: broken JSON" in refusal(directory)
    (directory / "config.json").write_text("[1]")
    assert "must hold a JSON object, not a list" in refusal(directory)
    (directory / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json is not UTF-8 text" in refusal(directory)
    (directory / "config.json").unlink()
    assert "has no config.json" in refusal(directory)


def test_unsupported_config_names_the_file(directory):
    edit_config(directory, architectures=["GPT2LMHeadModel"])
    message = refusal(directory)
    assert str(directory / "config.json") in message and "'GPT2LMHeadModel'" in message


def test_pickles_are_never_read(directory):
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")
    message = refusal(directory)
    assert "pytorch_model.bin" in message and "pickle" in message
    (directory / "pytorch_model.bin").unlink()
    assert f"neither {WEIGHTS} nor {INDEX}" in refusal(directory)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(directory, keep):
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[:keep])
    assert f"{directory / WEIGHTS} is truncated or damaged" in refusal(directory)


def test_truncated_or_missing_shard(directory):
    second = directory / shard(directory)[1]
    data = second.read_bytes()
    second.write_bytes(data[:-7])
    assert f"{second} is truncated or damaged" in refusal(directory)
    second.unlink()
    message = refusal(directory)
    assert second.name in message and INDEX in message and "does not exist" in message


def test_bad_index(directory):
    shards = shard(directory)
    index = json.loads((directory / INDEX).read_text())
    moved = index["weight_map"] | {"model.norm.weight": next(s for s in shards if s != index["weight_map"][
        "model.norm.weight"])}  # fmt: skip
    for content, words in [
        ("{", "broken JSON"),
        ("{}", "has no weight_map"),
        (json.dumps({"weight_map": moved}), "tensor 'model.norm.weight' is not in"),
        (json.dumps({"weight_map": {"model.norm.weight": f"../{shards[0]}"}}), "does not exist"),
    ]:
        (directory / INDEX).write_text(content)
        assert words in refusal(directory)


@contextlib.contextmanager
def a_gigabyte_more() -> Iterator[None]:
    """What is allocated beyond that fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gemma2"])
@pytest.mark.parametrize("size", [10**9, 2**31 - 2, 998])
@pytest.mark.parametrize("name, words", [
    ("vocab_size", ["'model.embed_tokens.weight'"]), ("hidden_size", ["'model.", "hidden_size"]),
    ("num_hidden_layers", ["layers.2.", "layers.3.", "num_hidden_layers"]), ("intermediate_size", ["proj.weight'"]),
    ("num_attention_heads", ["proj.", "num_attention_heads"]), ("num_experts", ["experts.5.", "gate.weight"]),
    ("moe_intermediate_size", ["proj.weight'"]),
])  # fmt: skip
def test_a_size_that_would_fill_the_memory_is_compared_with_the_tensors_first(tmp_path, family, size, name, words):
    """Of each the tensor is named; nothing of that size is made: no array, no list of names."""
    directory = Path(shutil.copytree(MODELS / family, tmp_path / family))
    mixture = family == "qwen3_moe"
    if name in ("num_experts", "moe_intermediate_size") and not mixture or name == "intermediate_size" and mixture:
        return
    edit_config(directory, **{name: size, "layer_types": None})
    with a_gigabyte_more():
        message = refusal(directory)
    assert str(directory) in message and any(word in message for word in words), message


def test_one_tensor_in_two_shards(directory):
    shards = shard(directory)
    first = load_file(directory / shards[0])
    name = min(first)
    save_file(load_file(directory / shards[1]) | {name: first[name] + 1}, directory / shards[1])
    assert refusal(directory) == f"tensor {name!r} is in {directory / shards[0]} and in {directory / shards[1]}"


def test_weights_that_git_did_not_fetch(directory):
    (directory / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert refusal(directory).endswith("is a pointer of Git LFS, not the weights; fetch them with git lfs pull")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["folder", "loop", "nowhere", "pipe"])
def test_names_of_no_file(directory, name, kind):
    path = directory / name
    path.unlink()
    {
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path.name),
        "nowhere": lambda: path.symlink_to("nowhere"),
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    assert refusal(directory) == f"{path} is neither a file nor a link to one"


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "."])
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_files_that_may_not_be_read(name, mode):
    """By a user who is not root."""
    if name != "." and mode:
        return
    with tempfile.TemporaryDirectory() as around:
        os.chmod(around, 0o755)
        directory = Path(shutil.copytree(MODELS / "qwen2", Path(around) / "qwen2"))
        os.chmod(directory / name, mode)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            message = refusal(directory)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(directory / name, 0o755)
    assert str(directory if name == "." else directory / name) in message
    assert message.endswith("cannot be read: Permission denied")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_read_as_they_are(directory, value):
    """A tied head with them is still the embedding."""
    whole = load_params(directory)[1]
    whole["embed"][3, 4] = value
    edit_tensors(directory, model__embed_tokens__weight=whole["embed"], lm_head__weight=whole["embed"])
    assert_same(load_params(directory)[1], whole)


def test_missing_tensor(directory):
    edit_tensors(directory, model__layers__1__self_attn__k_proj__bias=None)
    assert "tensor 'model.layers.1.self_attn.k_proj.bias' is missing" in refusal(directory)


def test_unexpected_tensor(directory):
    edit_tensors(directory, model__layers__1__self_attn__q_norm__weight=np.ones(8, np.float32))
    message = refusal(directory)
    assert "unexpected tensor 'model.layers.1.self_attn.q_norm.weight'" in message and WEIGHTS in message
    edit_config(directory, num_hidden_layers=1)
    assert "unexpected tensor 'model.layers.1." in refusal(directory)
    edit_config(directory, num_hidden_layers=2)
    edit_tensors(directory, model__layers__1__self_attn__q_norm__weight=None, x=np.ones(8, np.float32))
    assert refusal(directory) == f"unexpected tensor 'x' in {directory / WEIGHTS}"  # not the names of all others


def test_wrong_shape(directory):
    edit_tensors(directory, model__layers__0__mlp__up_proj__weight=np.ones((32, 48), np.float32))
    message = refusal(directory)
    assert "'model.layers.0.mlp.up_proj.weight'" in message and "[32, 48]" in message and "[48, 32]" in message


def test_wrong_dtype(directory):
    edit_tensors(directory, model__norm__weight=np.ones(32, np.int8))
    message = refusal(directory)
    assert "'model.norm.weight'" in message and "I8" in message and "BF16, F16, F32" in message


def test_constants_beside_the_weights_are_passed_over(directory):
    whole = load_params(directory)[1]
    edit_tensors(
        directory,
        model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32),
        model__rotary_emb__inv_freq=np.ones(4, np.float32),
    )
    assert_same(load_params(directory)[1], whole)


def test_a_tied_head_must_be_the_embedding(directory):
    whole = load_params(directory)[1]
    edit_tensors(directory, lm_head__weight=whole["embed"])
    assert_same(load_params(directory)[1], whole)
    edit_tensors(directory, lm_head__weight=whole["embed"] + np.float32(1e-3))
    message = refusal(directory)
    assert "tie_word_embeddings" in message and "lm_head.weight" in message


def test_an_untied_head_must_be_there(directory):
    edit_config(directory, tie_word_embeddings=False)
    assert "tensor 'lm_head.weight' is missing" in refusal(directory)
