"""Adapters in and out, in the files and under the tensor names of PEFT."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dppo_jax.errors import UserError, nearest
from dppo_jax.files import Path, is_file, read_json_object, shown, user_path
from dppo_jax.models.adapters import ADAPTER
from dppo_jax.models.companions import publish, staged
from dppo_jax.models.config import LARGEST, MATRICES, Lora, ModelConfig
from dppo_jax.models.decoder import Params, abstract_params
from dppo_jax.models.hf import HF_NAMES, HF_NAMES_MOE, folder
from dppo_jax.models.layout import leading_indices
from dppo_jax.models.read_weights import check_tensor
from dppo_jax.models.tensor_files import open_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, HALVES = "base_model.model.", ("lora_A", "lora_B")

READ = ("peft_type", "r", "lora_alpha", "target_modules")
# Fields that say nothing of what the adapters compute, and those that do, with the values under which they do not.
INERT = frozenset(
    "task_type base_model_name_or_path revision auto_mapping inference_mode lora_dropout init_lora_weights "
    "peft_version megatron_core qalora_group_size".split()
)
FIXED: dict[str, tuple] = {"bias": ("none",)}
UNSET: tuple = (None, False, {}, [])  # values under which any other field changes nothing


def _modules(name: str, config: ModelConfig) -> Iterator[tuple[tuple[int, ...], str]]:
    """(index into the stacked weight, PEFT's module name) of every tensor that a weight of ours is made of."""
    template = (HF_NAMES | HF_NAMES_MOE if config.num_experts else HF_NAMES)[f"layers/{name}"].removesuffix(".weight")
    for index in leading_indices((config.num_layers, config.num_experts)[: template.count("{}")]):
        yield index, PREFIX + template.format(*index)


def _module_name(name: str, config: ModelConfig) -> str:
    """What PEFT calls a weight, in any layer: "q_proj"."""
    return next(_modules(name, config))[1].rpartition(".")[2]


def save_adapters(
    directory: str | Path, config: ModelConfig, params: Params, base: str, revision: str | None = None
) -> None:
    """Writes the adapters among `params` as PEFT does; `base` is the directory or name of the model that they adapt,
    `revision` the commit of a name."""
    assert config.lora is not None
    tensors = {}
    for name in config.lora.targets:
        for suffix, half in zip(ADAPTER, HALVES, strict=True):
            stacked = np.asarray(params["layers"][name + suffix], np.float32)
            for index, module in _modules(name, config):
                tensors[f"{module}.{half}.weight"] = np.ascontiguousarray(stacked[index].T)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "target_modules": [_module_name(name, config) for name in config.lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    if revision:
        fields["revision"] = revision
    directory = user_path(directory, "adapter directory")
    with staged(directory) as staging:
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        (staging / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        publish(staging, directory, WEIGHTS, config=CONFIG)


def load_adapters(directory: str | Path, config: ModelConfig) -> tuple[Lora, Params]:
    """What `save_adapters` wrote for a model of this shape: {"layers": {"q_lora_a": f32[L, I, r], ...}}.

    Raises: UserError for files that are missing or damaged, a field under which the adapters would compute something
    else, and tensors that are missing, unexpected, or of the wrong shape or type.
    """
    directory = folder(directory, "adapter directory")
    for name in (CONFIG, WEIGHTS):
        if not is_file(directory / name):
            raise UserError(f"{directory} holds no adapters that can be read: it has no {name}")
    chosen = _lora(read_json_object(directory / CONFIG), config, str(directory / CONFIG))
    shapes = abstract_params(dataclasses.replace(config, lora=chosen))["layers"]
    tensor_names = {
        target + suffix: {index: f"{module}.{half}.weight" for index, module in _modules(target, config)}
        for target in chosen.targets
        for suffix, half in zip(ADAPTER, HALVES, strict=True)
    }
    with ExitStack() as stack:
        tensors = open_tensors(directory / WEIGHTS, stack)
        for leaf, names in tensor_names.items():
            for index, name in names.items():
                if name not in tensors:
                    raise UserError(f"{directory / WEIGHTS} has no {name!r}")
                check_tensor(tensors[name], shapes[leaf].shape[len(index) :][::-1])
        expected = {name for names in tensor_names.values() for name in names.values()}
        for name in sorted(tensors.keys() - expected):
            raise UserError(f"{directory / WEIGHTS} has {shown(name)}, which this model has no place for")
        layers: dict[str, np.ndarray] = {}
        for leaf, names in tensor_names.items():
            layers[leaf] = np.empty(shapes[leaf].shape, np.float32)
            for index, name in names.items():
                layers[leaf][index] = tensors[name].read().T
    return chosen, {"layers": layers}


def _lora(fields: dict[str, Any], config: ModelConfig, source: str) -> Lora:
    """What adapter_config.json says, all of it read, checked or known to be inert."""
    for name in READ:
        if name not in fields:
            raise UserError(f"{source} lacks the required field {name!r}")
    if fields["peft_type"] != "LORA":
        raise UserError(f"{source}: peft_type = {shown(fields['peft_type'])} is not supported; supported: 'LORA'")
    for name, value in fields.items():
        if name not in READ and name not in INERT and value not in FIXED.get(name, UNSET):
            raise UserError(f"{source}: {shown(name)} = {shown(value)} is not supported; leave it out")
    rank, alpha, modules = fields["r"], fields["lora_alpha"], fields["target_modules"]
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= LARGEST:
        raise UserError(f"{source}: r must be a positive integer, not {shown(rank)}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= sys.float_info.max:
        raise UserError(f"{source}: lora_alpha must be a positive number, not {shown(alpha)}")
    if not isinstance(modules, list) or not modules or not all(isinstance(name, str) for name in modules):
        raise UserError(f"{source}: target_modules must be a list of names, not {shown(modules)}")
    ours = {_module_name(name, config): name for name in MATRICES}
    for name in modules:
        if name not in ours:
            raise UserError(f"{source}: unknown name {shown(name)} in target_modules{nearest(name, ours)}")
    return Lora(rank, float(alpha), tuple(name for module, name in ours.items() if module in modules))
