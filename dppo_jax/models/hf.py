"""Hugging Face model directories in and out: config.json beside safetensors weights, whole or sharded. Never pickle.

A linear layer's weight is [out, in] there and [in, out] here, and layers are stacked here along a leading axis;
nothing else differs, so that save and load are inverse to the bit in float32.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from dppo_jax.errors import UserError, lookup
from dppo_jax.files import Path, has_file, is_bucket, is_file, read_json_object, shown, user_path
from dppo_jax.models import companions
from dppo_jax.models.companions import CONFIG
from dppo_jax.models.config import CLASSIFIERS, DTYPES, INERT, LARGEST, ModelConfig, config_from_hf, config_to_hf
from dppo_jax.models.decoder import Params, abstract_params
from dppo_jax.models.layout import LAYERS, Leaf, flat, nested
from dppo_jax.models.read_weights import (
    INDEX,
    WEIGHTS,
    check_tensor,
    check_tensors,
    open_directory,
    place_leaf,
    read_leaf,
    refuse,
    same_values,
)
from dppo_jax.models.tensor_files import READABLE, Stored, Tensors
from dppo_jax.models.write_weights import SHARDS, OfLayer, Outgoing, check_leaves, write_weights

SCORE = "score.weight"  # [labels, D], of a sequence classifier

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


# --- in ---


def load_config(directory: str | Path) -> ModelConfig:
    """The `ModelConfig` of a model directory; UserError where there is none or it is not supported."""
    path = folder(directory) / CONFIG
    return config_from_hf(_config_fields(path.parent), source=str(path))


def load_params(directory: str | Path) -> tuple[ModelConfig, Params]:
    """Reads a model directory, whole.

    Returns:
      its config, and its parameters as float32 numpy arrays in a nested dict, those of layers stacked [L, ...].

    Raises:
      UserError: no such directory, no config.json, an unsupported config, no safetensors weights, a damaged or
        missing shard, or a tensor that is missing, unexpected, or of the wrong shape or type. All of it is found
        before anything is allocated.
    """
    config = load_config(directory)
    with _opened(folder(directory), config) as tensors:
        return config, nested({leaf.path: read_leaf(leaf, tensors, np.float32) for leaf in layout_of(config)})


def place_params(
    directory: str | Path, shardings: Params | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, Params]:
    """The same, on devices: as `shardings`, a tree of NamedShardings (None: the default device), in `dtype`, a key of
    DTYPES. A process reads what its own devices hold, a block at a time. All processes must call this."""
    config, numbers = load_config(directory), lookup(DTYPES, dtype, "dtype")
    with _opened(folder(directory), config) as tensors:
        return config, _placed(layout_of(config), tensors, numbers, shardings)


def _placed(layout: Sequence[Leaf], tensors: Tensors, dtype: Any, shardings: Params | None) -> Params:
    places = {} if shardings is None else flat(shardings)
    return nested({leaf.path: place_leaf(leaf, tensors, dtype, places.get(leaf.path)) for leaf in layout})


def stored_dtype(directory: str | Path) -> str:
    """A key of DTYPES: what most of a model directory's weights are stored in. UserError as of `load_params`."""
    with ExitStack() as stack:
        sizes: Counter[str] = Counter()
        for tensor in open_directory(folder(directory), stack).values():
            sizes[tensor.dtype] += int(np.prod(tensor.shape, dtype=np.float64))
    readable = [name for name, _ in sizes.most_common() if name in READABLE]
    return READABLE[readable[0]].name if readable else "float32"


@contextmanager
def _opened(directory: Path, config: ModelConfig) -> Iterator[Tensors]:
    """The tensors of a policy, checked."""
    with ExitStack() as stack:
        tensors = open_directory(directory, stack)
        _check(tensors, config, directory)
        tied_head = tensors.get(HF_NAMES["head"]) if config.tie_embeddings else None
        if tied_head and not same_values(tied_head, tensors[HF_NAMES["embed"]]):
            raise UserError(
                f"{directory} has tie_word_embeddings true, but {tied_head.name!r} differs from {HF_NAMES['embed']!r}"
            )
        yield tensors


def _check(tensors: Tensors, config: ModelConfig, directory: Path) -> None:
    """That they are those of the config, all and no others: by what the files' headers say."""
    layout = layout_of(config)
    others = check_tensors(tensors, layout, directory)
    if config.tie_embeddings and HF_NAMES["head"] in others:
        check_tensor(tensors[HF_NAMES["head"]], (config.vocab_size, config.hidden_size))
        others.remove(HF_NAMES["head"])
    refuse(tensors, [name for name in others if not NOT_WEIGHTS.search(name)])


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
    numbers = np.dtype(lookup(DTYPES, dtype, "dtype"))
    with _opened_classifier(directory) as (config, tensors, score, pad_id):
        body = nested({leaf.path: read_leaf(leaf, tensors, numbers) for leaf in layout_of(config)})
        return Classifier(config, {"body": body, "score": score.read()[0].astype(numbers)}, pad_id)


def place_classifier(directory: str | Path, shardings: Params | None = None, dtype: str = "float32") -> Classifier:
    """The same, on devices, as `place_params`: `shardings` are those of `reward_model.score_axes`."""
    numbers = np.dtype(lookup(DTYPES, dtype, "dtype"))
    with _opened_classifier(directory) as (config, tensors, score, pad_id):
        body = _placed(layout_of(config), tensors, numbers, shardings and shardings["body"])
        row = score.read()[0].astype(numbers)
        if shardings is None:
            return Classifier(config, {"body": body, "score": jax.numpy.asarray(row)}, pad_id)
        of_score: NamedSharding = shardings["score"]
        placed = jax.make_array_from_callback(row.shape, of_score, lambda index: row[index])
        return Classifier(config, {"body": body, "score": placed}, pad_id)


@contextmanager
def _opened_classifier(directory: str | Path) -> Iterator[tuple[ModelConfig, Tensors, Stored, int | None]]:
    """Config, the tensors of the body, the score's [1, D], and the padding token; all of it checked."""
    config, directory = load_classifier_config(directory), folder(directory)
    fields, source = _config_fields(directory), directory / CONFIG
    pad_id = fields.get("pad_token_id")
    if pad_id is not None and (isinstance(pad_id, bool) or not isinstance(pad_id, int) or abs(pad_id) > LARGEST):
        raise UserError(f"{source}: pad_token_id must be a token's id or null, not {shown(pad_id)}")
    with ExitStack() as stack:
        tensors = open_directory(directory, stack)
        if SCORE not in tensors:
            raise UserError(f"tensor {SCORE!r} is missing from {directory}: a reward model has it in place of a head")
        if HF_NAMES["head"] in tensors:
            raise UserError(f"{directory} has a head, {HF_NAMES['head']!r}, beside its {SCORE!r}: leave one out")
        score = tensors.pop(SCORE)
        named = fields.get("id2label")
        for labels in (*score.shape[:1], len(named) if isinstance(named, dict) else fields.get("num_labels", 1)):
            if labels != 1:
                sentence = f"{directory} has {shown(labels)} labels: a reward model has one, whose score is the reward"
                raise UserError(sentence)
        _check(tensors, config, directory)
        check_tensor(score, (1, config.hidden_size))
        yield config, tensors, score, pad_id


# --- out ---


def save_hf(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Any = None,
    dtype: str = "float32",
    *,
    eos_ids: Sequence[int] = (),
    source: str | Path | None = None,
    of_layer: OfLayer | None = None,
) -> None:
    """Writes a model directory that `transformers` loads to the same logits, and that stops where this one stops.

    All is written under a temporary name inside `directory` and moved over at the end, config.json last, and an old
    one is removed first if anything but the weights of one file changes: a kill leaves a whole model, or one without
    config.json, which nothing loads. Weights of more than 5 GB are several files and an index. A tensor is gathered at
    a time; all processes must call this, and the first writes.

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
      of_layer: (params["layers"], name, number) -> that parameter of that layer, where it is not what `params` says:
        with adapters merged. Compiled.

    Raises:
      UserError: an unknown dtype, a config that its architecture cannot say, or params that do not fit the config.
    """
    fields, outgoing = config_to_hf(config), _outgoing(config, params, dtype, of_layer)
    _save(directory, fields, outgoing, tokenizer, dtype, eos_ids=eos_ids, source=source)


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
    params = {**classifier.params["body"], SCORE: np.asarray(classifier.params["score"])[None]}
    score = Leaf(SCORE, params[SCORE].shape, SCORE, transposed=False)
    outgoing = _outgoing(classifier.config, params, dtype, also=(score,))
    _save(directory, fields, outgoing, tokenizer, dtype, tokens={"pad_token_id": classifier.pad_id})


def _outgoing(
    config: ModelConfig, params: Params, dtype: str, of_layer: OfLayer | None = None, also: Sequence[Leaf] = ()
) -> Outgoing:
    """The tensors of params, which are checked against the config."""
    layout, leaves = [*layout_of(config), *also], flat(params)
    paths = {leaf.path for leaf in layout}
    merged = lambda path: of_layer is not None and path.startswith(LAYERS) and path not in paths  # noqa: E731
    check_leaves(layout, {path: x for path, x in leaves.items() if not merged(path)})
    return Outgoing(layout, leaves, np.dtype(lookup(DTYPES, dtype, "dtype")), of_layer)


def _save(
    directory: str | Path,
    fields: dict[str, Any],
    outgoing: Outgoing,
    tokenizer: Any,
    dtype: str,
    *,
    eos_ids: Sequence[int] = (),
    source: str | Path | None = None,
    tokens: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes config.json's fields, the tensors, and the files beside them; `tokens` are config.json's alone."""
    if jax.process_index() != 0:
        for _ in outgoing.blocks():
            pass
        return
    origin = None if source is None else folder(source)
    source_fields = {} if origin is None else _config_fields(origin)
    ids = companions.token_fields(tokenizer, source_fields, [int(token) for token in eos_ids])
    kept_fields = {name: value for name, value in source_fields.items() if name in INERT - companions.OF_THE_FILE}
    fields = kept_fields | fields | {"torch_dtype": dtype, "use_cache": True} | ids | dict(tokens)

    directory = user_path(directory, "model directory")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"cannot save a model to {directory}: it is a file")
    with companions.staged(directory) as staging:
        place: Path = staging
        old_weights = [WEIGHTS, INDEX, *_shards(directory)]
        if is_bucket(directory):  # where nothing is moved: the weights go to their place at once
            companions.remove(directory, [CONFIG, *old_weights])
            place, old_weights = directory, []
        write_weights(place, outgoing, np.dtype(DTYPES[dtype]))
        companions.write_tokenizer(staging, origin, tokenizer)
        companions.write_generation_config(staging, origin, ids)
        (staging / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        new_tokenizer = tokenizer is not None or origin is not None
        replaces = (companions.TEMPLATES, *companions.TOKENIZER) if new_tokenizer else ()
        companions.publish(staging, directory, WEIGHTS, [*old_weights, companions.GENERATION, *replaces])


def _shards(directory: Path) -> list[str]:
    """The files of weights in several, by their names or by the index."""
    found = {path.name for path in directory.glob(SHARDS)}
    if has_file(directory / INDEX):
        with contextlib.suppress(UserError):
            listed = read_json_object(directory / INDEX).get("weight_map")
            names = listed.values() if isinstance(listed, dict) else ()
            found |= {name for name in names if isinstance(name, str) and "/" not in name}
    return sorted(found)


def folder(directory: str | Path, kind: str = "model directory") -> Path:
    """The path of a directory that is there and can be read. UserError."""
    path = user_path(directory, kind)
    if not path.is_dir():
        there = path.exists() or (not is_bucket(path) and os.path.lexists(path))
        raise UserError(f"{kind} {directory} {'is not a directory' if there else 'does not exist'}")
    if is_bucket(path):
        return path
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


def layout_of(config: ModelConfig) -> list[Leaf]:
    """Every parameter of a decoder, and the tensors that it is made of."""
    return [_leaf(path, leaf.shape, config) for path, leaf in flat(abstract_params(config)).items()]


def _leaf(path: str, shape: tuple[int, ...], config: ModelConfig) -> Leaf:
    names = HF_NAMES | (HF_NAMES_MOE if config.num_experts else {}) | (HF_NAMES_GEMMA if config.gemma else {})
    several = names[path].count("{}")
    return Leaf(path, shape, names[path], transposed=path.startswith(LAYERS) and len(shape) - several == 2)
