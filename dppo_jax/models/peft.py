"""Adapters in and out, in the files and under the tensor names of PEFT."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dppo_jax.errors import UserError
from dppo_jax.lora import TARGETS
from dppo_jax.models.config import Lora, ModelConfig
from dppo_jax.models.decoder import ADAPTER, Params
from dppo_jax.models.hf import HF_NAMES, HF_NAMES_MOE

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, HALVES = "base_model.model.", ("lora_A", "lora_B")


def _modules(name: str, config: ModelConfig) -> Iterator[tuple[tuple[int, ...], str]]:
    """(place in the stacked weight, PEFT's module name) of every tensor that a weight of ours is made of."""
    template = (HF_NAMES | HF_NAMES_MOE if config.num_experts else HF_NAMES)[f"layers/{name}"].removesuffix(".weight")
    for place in np.ndindex(*(config.num_layers, config.num_experts)[: template.count("{}")]):
        yield place, PREFIX + template.format(*place)


def _last(name: str, config: ModelConfig) -> str:
    """What PEFT calls a weight, in any layer: "q_proj"."""
    return next(_modules(name, config))[1].rpartition(".")[2]


def save_adapters(directory: str | Path, config: ModelConfig, params: Params, base: str) -> None:
    """Writes the adapters among `params` as PEFT does; `base` is the directory or name of the model that they adapt."""
    assert config.lora is not None
    tensors = {}
    for name in config.lora.targets:
        for suffix, half in zip(ADAPTER, HALVES, strict=True):
            stacked = np.asarray(params["layers"][name + suffix], np.float32)
            for place, module in _modules(name, config):
                tensors[f"{module}.{half}.weight"] = np.ascontiguousarray(stacked[place].T)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "target_modules": [_last(name, config) for name in config.lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def load_adapters(directory: str | Path, config: ModelConfig) -> tuple[Lora, Params]:
    """What `save_adapters` wrote for a model of this shape: {"layers": {"q_lora_a": f32[L, I, r], ...}}. UserError."""
    directory = Path(directory)
    try:
        fields: dict[str, Any] = json.loads((directory / CONFIG).read_text())
        tensors = load_file(directory / WEIGHTS)
        rank, alpha, modules = int(fields["r"]), float(fields["lora_alpha"]), fields["target_modules"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{directory} holds no adapters that can be read: {error!r}") from error
    layers: dict[str, np.ndarray] = {}
    targets = tuple(n for n in TARGETS if _last(n, config) in modules)
    for name in targets:
        for suffix, half in zip(ADAPTER, HALVES, strict=True):
            found = {place: f"{module}.{half}.weight" for place, module in _modules(name, config)}
            if missing := [tensor for tensor in found.values() if tensor not in tensors]:
                raise UserError(f"{directory / WEIGHTS} has no {missing[0]!r}")
            first = tensors[next(iter(found.values()))]
            stacked = np.empty((*[n + 1 for n in max(found)], *first.T.shape), np.float32)
            for place, tensor in found.items():
                stacked[place] = tensors.pop(tensor).T
            layers[name + suffix] = stacked
    if tensors:
        raise UserError(f"{directory / WEIGHTS} has {min(tensors)!r}, which this model has no place for")
    return Lora(rank, alpha, targets), {"layers": layers}
