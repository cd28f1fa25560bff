"""Hugging Face model directories in and out: config.json beside safetensors weights, whole or sharded. Never pickle.

A linear layer's weight is [out, in] there and [in, out] here, and layers are stacked here along a leading axis;
nothing else differs, so that save and load are inverse to the bit in float32.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dppo_jax.errors import UserError, lookup, nearest
from dppo_jax.models.config import ModelConfig, config_from_hf, config_to_hf
from dppo_jax.models.decoder import Params, abstract_params

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
READABLE = {"F32", "BF16", "F16"}

# Constants that older exports stored beside the weights.
NOT_WEIGHTS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers/attn_norm": "model.layers.{}.input_layernorm.weight",
    "layers/q": "model.layers.{}.self_attn.q_proj.weight",
    "layers/k": "model.layers.{}.self_attn.k_proj.weight",
    "layers/v": "model.layers.{}.self_attn.v_proj.weight",
    "layers/o": "model.layers.{}.self_attn.o_proj.weight",
    "layers/q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/o_bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers/q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers/k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/down": "model.layers.{}.mlp.down_proj.weight",
}
# Where they differ in a mixture: an expert has a tensor of its own.
HF_NAMES_MOE = {
    "layers/router": "model.layers.{}.mlp.gate.weight",
    "layers/gate": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "layers/up": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "layers/down": "model.layers.{}.mlp.experts.{}.down_proj.weight",
}
# Where they differ in Gemma-2: post_attention_layernorm is what it says.
HF_NAMES_GEMMA = {
    "layers/attn_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}


def load_config(directory: str | Path) -> ModelConfig:
    """The `ModelConfig` of a model directory; UserError where there is none or it is not supported."""
    path = _directory(directory) / CONFIG
    if not path.is_file():
        raise UserError(f"model directory {directory} has no {CONFIG}")
    return config_from_hf(_json_object(path), source=str(path))


def load_params(directory: str | Path) -> tuple[ModelConfig, Params]:
    """Reads a model directory.

    Returns:
      its config, and its parameters as float32 numpy arrays in a nested dict, those of layers stacked [L, ...].

    Raises:
      UserError: no such directory, no config.json, an unsupported config, no safetensors weights, a damaged or
        missing shard, or a tensor that is missing, unexpected, or of the wrong shape or type.
    """
    config = load_config(directory)
    shapes = _shapes(config)
    with ExitStack() as stack:
        tensors = _open_tensors(_directory(directory), stack)
        expected = {hf_name for path in shapes for hf_name in _hf_names(path, config)}
        for name in sorted(expected - tensors.keys()):
            raise UserError(f"tensor {name!r} is missing from {directory}")
        tied_head = HF_NAMES["head"] if config.tie_embeddings else None
        for name in sorted(tensors.keys() - expected):
            if name != tied_head and not NOT_WEIGHTS.search(name):
                raise UserError(f"unexpected tensor {name!r} in {tensors[name][0]}{nearest(name, expected)}")
        params: Params = {"layers": {}}
        for path, shape in shapes.items():
            names = list(_hf_names(path, config))
            if path.startswith("layers/"):
                stacked: np.ndarray = np.empty(shape, np.float32)
                one = shape[_stacked_axes(path, config) :]
                for place, name in zip(stacked.reshape(len(names), *one), names, strict=True):
                    place[...] = _read(name, tensors, one, transpose=len(one) == 2)
                params["layers"][path.removeprefix("layers/")] = stacked
            else:
                params[path] = _read(names[0], tensors, shape, transpose=False).astype(np.float32)
        if tied_head in tensors:
            head: np.ndarray = _read(tied_head, tensors, shapes["embed"], transpose=False).astype(np.float32)
            if not np.array_equal(head, params["embed"]):
                raise UserError(
                    f"{directory} has tie_word_embeddings true, but {tied_head!r} differs from {HF_NAMES['embed']!r}"
                )
    return config, params


def save_hf(
    directory: str | Path, config: ModelConfig, params: Params, tokenizer: Any = None, dtype: str = "float32"
) -> None:
    """Writes a model directory that `transformers` loads to the same logits.

    All is written under a temporary name inside `directory` and moved over at the end, config.json last, and an old
    one that differs is removed first: a kill leaves a whole model, or one without config.json, which nothing loads.

    Args:
      directory: made if need be; a model in it is replaced.
      params: nested dict of arrays, as load_params returns them.
      tokenizer: a transformers tokenizer; it is saved beside the weights, and its bos, eos and pad ids go
        into config.json, where they are otherwise null.
      dtype: of the stored weights, "float32", "bfloat16" or "float16".

    Raises:
      UserError: an unknown dtype, a config that its architecture cannot say, or params that do not fit the config.
    """
    stored = lookup(DTYPES, dtype, "dtype")
    fields = config_to_hf(config) | {"torch_dtype": dtype, "use_cache": True}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields[name] = None if tokenizer is None else getattr(tokenizer, name)
    tensors = {name: np.ascontiguousarray(array, stored) for name, array in _unstack(config, params)}

    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"cannot save a model to {directory}: it is a file")
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        written_config = json.dumps(fields, indent=2) + "\n"
        (staging / CONFIG).write_text(written_config)
        old_config = directory / CONFIG
        if old_config.is_file() and old_config.read_text() != written_config:
            old_config.unlink()
        written = sorted((path for path in staging.rglob("*") if path.is_file()), key=lambda path: path.name == CONFIG)
        for path in written:
            target = directory / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _directory(directory: str | Path) -> Path:
    path = Path(directory)
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise UserError(f"model directory {directory} {what}")
    return path


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _flat(params: Params) -> dict[str, Any]:
    """Leaves by path: "embed", "layers/q"."""
    flat = {name: value for name, value in params.items() if name != "layers"}
    return flat | {f"layers/{name}": value for name, value in params.get("layers", {}).items()}


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in _flat(abstract_params(config)).items()}


def _template(path: str, config: ModelConfig) -> str:
    names = HF_NAMES | (HF_NAMES_MOE if config.num_experts else {}) | (HF_NAMES_GEMMA if config.gemma else {})
    return names[path]


def _hf_names(path: str, config: ModelConfig) -> Iterator[str]:
    """In the order of the stacked tensor's leading axes: layers, and experts within them."""
    template = _template(path, config)
    sizes = (config.num_layers, config.num_experts)[: template.count("{}")]
    return (template.format(*index) for index in np.ndindex(*sizes))


def _stacked_axes(path: str, config: ModelConfig) -> int:
    """How many leading axes of a parameter are tensors of their own there."""
    return _template(path, config).count("{}")


def _open_tensors(directory: Path, stack: ExitStack) -> dict[str, tuple[Path, Any]]:
    """Tensor name -> (its file, the open file). A single file goes before an index, as in transformers."""
    if (directory / WEIGHTS).is_file():
        path = directory / WEIGHTS
        handle = _open(path, stack)
        return {name: (path, handle) for name in handle.keys()}
    index = directory / INDEX
    if not index.is_file():
        if pickles := sorted(path.name for path in directory.glob("*.bin")):
            raise UserError(
                f"{directory} holds its weights as a pickle ({pickles[0]}), which is never opened; "
                f"save them as {WEIGHTS}"
            )
        raise UserError(f"model directory {directory} has neither {WEIGHTS} nor {INDEX}")
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensor names to shards")
    tensors: dict[str, tuple[Path, Any]] = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if path.name != shard or not path.is_file():
            raise UserError(f"shard {shard!r}, listed in {index}, does not exist")
        handle = _open(path, stack)
        tensors |= {name: (path, handle) for name in handle.keys()}
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name][0].name != shard:
            raise UserError(f"tensor {name!r} is not in {shard!r}, where {index} puts it")
    return tensors


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged: {error}") from error


def _read(name: str, tensors: dict[str, tuple[Path, Any]], shape: tuple[int, ...], transpose: bool) -> np.ndarray:
    """One tensor in our orientation and its stored dtype; `shape` is ours."""
    path, handle = tensors[name]
    entry = handle.get_slice(name)
    found, wanted = tuple(entry.get_shape()), shape[::-1] if transpose else shape
    if found != wanted:
        raise UserError(f"tensor {name!r} in {path} has shape {list(found)}; {CONFIG} says {list(wanted)}")
    if entry.get_dtype() not in READABLE:
        raise UserError(
            f"tensor {name!r} in {path} has dtype {entry.get_dtype()}; supported: {', '.join(sorted(READABLE))}"
        )
    array = handle.get_tensor(name)
    return array.T if transpose else array


def _unstack(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, tensor in its orientation) for every tensor; checks params against the config."""
    given, shapes = _flat(params), _shapes(config)
    for path in sorted(shapes.keys() ^ given.keys()):
        raise UserError(f"parameter {path!r} is {'missing' if path in shapes else 'not in this model'}")
    for path, shape in shapes.items():
        array = np.asarray(given[path])
        if array.shape != shape:
            raise UserError(f"parameter {path!r} has shape {list(array.shape)}; the config says {list(shape)}")
        stacked = _stacked_axes(path, config)
        tensors = array.reshape(-1, *shape[stacked:])
        for name, tensor in zip(_hf_names(path, config), tensors, strict=True):
            yield name, tensor.T if stacked and tensor.ndim == 2 else tensor
