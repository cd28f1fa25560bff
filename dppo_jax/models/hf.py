"""Hugging Face model directories in and out: config.json beside safetensors weights, whole or sharded. Never pickle.

A linear layer's weight is [out, in] there and [in, out] here, and layers are stacked here along a leading axis;
nothing else differs, so that save and load are inverse to the bit in float32.
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dppo_jax.errors import UserError, first_line, lookup, nearest
from dppo_jax.files import is_file, make_folder, read_json_object, shown, user_path
from dppo_jax.models import companions
from dppo_jax.models.companions import CONFIG
from dppo_jax.models.config import CLASSIFIERS, DTYPES, INERT, LARGEST, ModelConfig, config_from_hf, config_to_hf
from dppo_jax.models.decoder import Params, abstract_params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SCORE = "score.weight"  # [labels, D], of a sequence classifier

READABLE = {"F32", "BF16", "F16"}
POINTER = b"version https://git-lfs"  # what stands in a file that was not fetched

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


class Classifier(NamedTuple):
    """A reward model: a decoder with a score of its hidden states, [D], in place of the head."""

    config: ModelConfig
    params: Params  # {"body": as of a decoder with tied embeddings, "score": [D]}
    pad_id: int | None  # the token that is no end of a row, as its config.json says


def load_config(directory: str | Path) -> ModelConfig:
    """The `ModelConfig` of a model directory; UserError where there is none or it is not supported."""
    path = folder(directory) / CONFIG
    return config_from_hf(_config_fields(path.parent), source=str(path))


def load_params(directory: str | Path) -> tuple[ModelConfig, Params]:
    """Reads a model directory.

    Returns:
      its config, and its parameters as float32 numpy arrays in a nested dict, those of layers stacked [L, ...].

    Raises:
      UserError: no such directory, no config.json, an unsupported config, no safetensors weights, a damaged or
        missing shard, or a tensor that is missing, unexpected, or of the wrong shape or type. All of it is found
        before anything is allocated.
    """
    config = load_config(directory)
    directory = folder(directory)
    tied_head = HF_NAMES["head"] if config.tie_embeddings else None
    with ExitStack() as stack:
        tensors = _open_tensors(directory, stack)
        params = _read_params(tensors, config, directory)
        if tied_head in tensors:
            shape = params["embed"].shape
            head: np.ndarray = read_tensor(tied_head, tensors, shape, transpose=False).astype(np.float32)
            if not np.array_equal(head, params["embed"], equal_nan=True):
                raise UserError(
                    f"{directory} has tie_word_embeddings true, but {tied_head!r} differs from {HF_NAMES['embed']!r}"
                )
    return config, params


def load_classifier_config(directory: str | Path) -> ModelConfig:
    """Of a reward model's directory, without an output embedding. UserError where it is none, or not supported."""
    path = folder(directory) / CONFIG
    config = config_from_hf(_config_fields(path.parent), str(path), CLASSIFIERS)
    return dataclasses.replace(config, tie_embeddings=True, logit_softcap=None)


def load_classifier(directory: str | Path, dtype: str = "float32") -> Classifier:
    """Reads a reward model's directory, as `transformers` saves a ...ForSequenceClassification of one label.

    Its parameters are numpy arrays of `dtype`, a key of DTYPES. UserError as of `load_params`, and where there is no
    score, or one of several labels.
    """
    config, directory = load_classifier_config(directory), folder(directory)
    fields, source, numbers = _config_fields(directory), directory / CONFIG, np.dtype(lookup(DTYPES, dtype, "dtype"))
    pad_id = fields.get("pad_token_id")
    if pad_id is not None and (isinstance(pad_id, bool) or not isinstance(pad_id, int) or abs(pad_id) > LARGEST):
        raise UserError(f"{source}: pad_token_id must be a token's id or null, not {shown(pad_id)}")
    with ExitStack() as stack:
        tensors = _open_tensors(directory, stack)
        if SCORE not in tensors:
            raise UserError(f"tensor {SCORE!r} is missing from {directory}: a reward model has it in place of a head")
        if HF_NAMES["head"] in tensors:
            raise UserError(f"{directory} has a head, {HF_NAMES['head']!r}, beside its {SCORE!r}: leave one out")
        of_score = {SCORE: tensors.pop(SCORE)}
        rows = of_score[SCORE][1].get_slice(SCORE).get_shape()[:1]
        named = fields.get("id2label")
        for labels in (*rows, len(named) if isinstance(named, dict) else fields.get("num_labels", 1)):
            if labels != 1:
                sentence = f"{directory} has {shown(labels)} labels: a reward model has one, whose score is the reward"
                raise UserError(sentence)
        body = _read_params(tensors, config, directory, numbers)
        score = read_tensor(SCORE, of_score, (1, config.hidden_size), transpose=False).astype(numbers)[0]
    return Classifier(config, {"body": body, "score": score}, pad_id)


def _read_params(tensors: "Tensors", config: ModelConfig, directory: Path, dtype: Any = np.float32) -> Params:
    """The parameters of a config from its tensors, which are checked before anything is allocated."""
    shapes = _shapes(config)
    _check_tensors(tensors, shapes, config, directory)
    params: Params = {"layers": {}}
    for path, shape in shapes.items():
        names = list(_hf_names(path, config))
        if path.startswith("layers/"):
            stacked: np.ndarray = np.empty(shape, dtype)
            tensor_shape = shape[_stacked_axes(path, config) :]
            for target, name in zip(stacked.reshape(len(names), *tensor_shape), names, strict=True):
                target[...] = read_tensor(name, tensors, tensor_shape, transpose=len(tensor_shape) == 2)
            params["layers"][path.removeprefix("layers/")] = stacked
        else:
            params[path] = read_tensor(names[0], tensors, shape, transpose=False).astype(dtype)
    return params


def save_hf(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Any = None,
    dtype: str = "float32",
    *,
    eos_ids: Sequence[int] = (),
    source: str | Path | None = None,
) -> None:
    """Writes a model directory that `transformers` loads to the same logits, and that stops where this one stops.

    All is written under a temporary name inside `directory` and moved over at the end, config.json last, and an old
    one is removed first if anything but the weights changes: a kill leaves a whole model, or one without config.json,
    which nothing loads.

    Args:
      directory: made if need be; a model in it is replaced, with its generation_config.json, and with its tokenizer
        where there is a new one.
      params: nested dict of arrays, as load_params returns them.
      tokenizer: a transformers tokenizer; it is saved beside the weights, and its bos, eos and pad ids go
        into config.json and generation_config.json, where they are otherwise null and left out.
      dtype: of the stored weights, "float32", "bfloat16" or "float16".
      eos_ids: all tokens that end a response, where these are more than the tokenizer's one.
      source: the model directory that the policy began as. Its tokenizer's files and its generation_config.json are
        copied as they are, the latter with those of `eos_ids` that it lacks, and what its config.json says besides
        the shape goes into the new one; `tokenizer` then only completes its token ids.

    Raises:
      UserError: an unknown dtype, a config that its architecture cannot say, or params that do not fit the config.
    """
    _save(directory, config_to_hf(config), _unstack(config, params), tokenizer, dtype, eos_ids=eos_ids, source=source)


def classifier_architecture(config: ModelConfig) -> str:
    """As config.json names it, of a reward model of this shape. UserError where there is none of the family."""
    architectures = {family: architecture for architecture, family in CLASSIFIERS.items()}
    if config.model_type not in architectures:
        raise UserError(f"there are no reward models of {config.model_type}, only of {', '.join(architectures)}")
    return architectures[config.model_type]


def save_classifier(
    directory: str | Path, classifier: Classifier, tokenizer: Any = None, dtype: str = "float32"
) -> None:
    """Writes a reward model's directory, which `load_classifier` and `transformers` read; as `save_hf` does.

    UserError as there, and for a family of which there are no reward models.
    """
    architecture = classifier_architecture(classifier.config)
    fields = config_to_hf(classifier.config)
    fields |= {"architectures": [architecture], "id2label": {"0": "score"}, "label2id": {"score": 0}}
    score = (SCORE, np.asarray(classifier.params["score"])[None])
    body = _unstack(classifier.config, classifier.params["body"])
    _save(directory, fields, [*body, score], tokenizer, dtype, tokens={"pad_token_id": classifier.pad_id})


def _save(
    directory: str | Path,
    fields: dict[str, Any],
    arrays: Iterable[tuple[str, np.ndarray]],
    tokenizer: Any,
    dtype: str,
    *,
    eos_ids: Sequence[int] = (),
    source: str | Path | None = None,
    tokens: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes config.json's fields, tensors by name, and the files beside them; `tokens` are config.json's alone."""
    weight_dtype = np.dtype(lookup(DTYPES, dtype, "dtype"))
    origin = None if source is None else folder(source)
    source_fields = {} if origin is None else _config_fields(origin)
    ids = companions.token_fields(tokenizer, source_fields, [int(token) for token in eos_ids])
    kept_fields = {name: value for name, value in source_fields.items() if name in INERT - companions.OF_THE_FILE}
    fields = kept_fields | fields | {"torch_dtype": dtype, "use_cache": True} | ids | dict(tokens)
    tensors = {name: np.ascontiguousarray(array, weight_dtype) for name, array in arrays}

    directory = user_path(directory, "model directory")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"cannot save a model to {directory}: it is a file")
    make_folder(directory)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        companions.write_tokenizer(staging, origin, tokenizer)
        companions.write_generation_config(staging, origin, ids)
        (staging / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        new_tokenizer = tokenizer is not None or origin is not None
        replaces = (companions.TEMPLATES, *companions.TOKENIZER) if new_tokenizer else ()
        companions.publish(staging, directory, WEIGHTS, (companions.GENERATION, *replaces))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def folder(directory: str | Path, kind: str = "model directory") -> Path:
    """The path of a directory that is there and can be read. UserError."""
    path = user_path(directory, kind)
    if not os.path.isdir(path):
        raise UserError(f"{kind} {directory} {'is not a directory' if os.path.lexists(path) else 'does not exist'}")
    try:
        os.listdir(path)
        os.stat(os.path.join(path, "."))
    except OSError as error:
        raise UserError(f"{kind} {directory} cannot be read: {error.strerror}") from None
    return path


def _config_fields(directory: Path) -> dict[str, Any]:
    if not is_file(directory / CONFIG):
        raise UserError(f"model directory {directory} has no {CONFIG}")
    return read_json_object(directory / CONFIG)


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
    return (template.format(*index) for index in leading_indices(config, template.count("{}")))


def leading_indices(config: ModelConfig, axes: int) -> Iterator[tuple[int, ...]]:
    """All indices of a parameter's leading axes, of which the first is the layer and the second the expert. One by
    one: a config may claim any number of them."""
    if axes == 0:
        yield ()
    for layer in range(config.num_layers if axes else 0):
        if axes == 1:
            yield (layer,)
        for expert in range(config.num_experts if axes == 2 else 0):
            yield layer, expert


def _stacked_axes(path: str, config: ModelConfig) -> int:
    """How many leading axes of a parameter are tensors of their own there."""
    return _template(path, config).count("{}")


Tensors = dict[str, tuple[Path, Any]]  # by tensor name: the file, and the open handle


def _open_tensors(directory: Path, stack: ExitStack) -> Tensors:
    """A single file goes before an index, as in transformers."""
    if is_file(directory / WEIGHTS):
        return open_tensors(directory / WEIGHTS, stack)
    index = directory / INDEX
    if not is_file(index):
        if pickles := sorted(path.name for path in directory.glob("*.bin")):
            raise UserError(
                f"{directory} holds its weights as a pickle ({pickles[0]}), which is never opened; "
                f"save them as {WEIGHTS}"
            )
        raise UserError(f"model directory {directory} has neither {WEIGHTS} nor {INDEX}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensor names to shards")
    tensors: Tensors = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if path.name != shard or not os.path.isfile(path):
            raise UserError(f"shard {shown(shard)}, listed in {index}, does not exist in {directory}")
        in_shard = open_tensors(path, stack)
        for name in sorted(in_shard.keys() & tensors.keys()):
            raise UserError(f"tensor {shown(name)} is in {tensors[name][0]} and in {path}")
        tensors |= in_shard
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name][0].name != shard:
            raise UserError(f"tensor {shown(name)} is not in {shown(shard)}, where {index} puts it")
    return tensors


def open_tensors(path: Path, stack: ExitStack) -> Tensors:
    """The tensors of one file, their values not read yet; `stack` closes it. UserError for a damaged file."""
    try:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(f"{path} is a pointer of Git LFS, not the weights; fetch them with git lfs pull")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        handle = stack.enter_context(safe_open(path, framework="numpy"))
        return {name: (path, handle) for name in handle.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged: {first_line(error)}") from error


def _check_tensors(tensors: Tensors, shapes: dict[str, tuple[int, ...]], config: ModelConfig, directory: Path) -> None:
    """That they are those of the config, all and no others: by what the files' headers say."""
    expected = set()
    for path, shape in shapes.items():
        tensor_shape = shape[_stacked_axes(path, config) :]
        for name in _hf_names(path, config):
            if name not in tensors:
                raise UserError(f"tensor {name!r} is missing from {directory}; its {CONFIG} asks for it")
            check_tensor(name, tensors, tensor_shape, transpose=len(tensor_shape) == 2 and path.startswith("layers/"))
            expected.add(name)
    for name in sorted(tensors.keys() - expected):
        if config.tie_embeddings and name == HF_NAMES["head"]:
            check_tensor(name, tensors, shapes["embed"], transpose=False)
        elif not NOT_WEIGHTS.search(name):
            hint = nearest(name, expected)  # or, where none is near, a list of all
            raise UserError(f"unexpected tensor {shown(name)} in {tensors[name][0]}{hint if len(hint) < 200 else ''}")


def check_tensor(name: str, tensors: Tensors, shape: tuple[int, ...], transpose: bool) -> None:
    """UserError for a tensor that is not of this shape, which is ours, or of a type that is not read."""
    path, handle = tensors[name]
    entry = handle.get_slice(name)
    actual, expected = tuple(entry.get_shape()), shape[::-1] if transpose else shape
    if actual != expected:
        raise UserError(f"tensor {name!r} in {path} has shape {shown(list(actual))}; {CONFIG} says {list(expected)}")
    if entry.get_dtype() not in READABLE:
        raise UserError(
            f"tensor {name!r} in {path} has dtype {entry.get_dtype()}; supported: {', '.join(sorted(READABLE))}"
        )


def read_tensor(name: str, tensors: Tensors, shape: tuple[int, ...], transpose: bool) -> np.ndarray:
    """One tensor in our orientation and its stored dtype; `shape` is ours. UserError as of `check_tensor`."""
    check_tensor(name, tensors, shape, transpose)
    array = tensors[name][1].get_tensor(name)
    return array.T if transpose else array


def _unstack(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, tensor in its orientation) for every tensor; checks params against the config."""
    leaves, shapes = _flat(params), _shapes(config)
    for path in sorted(shapes.keys() ^ leaves.keys()):
        raise UserError(f"parameter {path!r} is {'missing' if path in shapes else 'not in this model'}")
    for path, shape in shapes.items():
        array = np.asarray(leaves[path])
        if array.shape != shape:
            raise UserError(f"parameter {path!r} has shape {list(array.shape)}; the config says {list(shape)}")
        stacked = _stacked_axes(path, config)
        tensors = array.reshape(-1, *shape[stacked:])
        for name, tensor in zip(_hf_names(path, config), tensors, strict=True):
            yield name, tensor.T if stacked and tensor.ndim == 2 else tensor
