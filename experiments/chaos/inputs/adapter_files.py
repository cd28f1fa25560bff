"""What a directory of adapters, as PEFT keeps them, can be other than it should."""

import random
from pathlib import Path

import ml_dtypes
import numpy as np

from experiments.chaos.inputs.damage import (
    SAME,
    Mutation,
    Outcome,
    broken_json,
    edit,
    no_file,
    put,
    refused,
    tensors_of,
    without,
)

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
BAD_ADAPTER_FIELDS = {
    "r": (0, -1, 2.0, "3", True, None, [3], 10**9, 2**40, 4), "peft_type": ("IA3", None, 7, ["LORA"]),
    "lora_alpha": (0, -1, "6", None, True, 10**400, float("nan"), float("inf"), [6]),
    "target_modules": ("q_proj", [], [7], None, ["q_proj", "qproj"], ["q_proj"], {"q_proj": 1}, "all-linear"),
    "use_rslora": (True,), "use_dora": (True,), "bias": ("all", "lora_only", 7), "fan_in_fan_out": (True,),
    "rank_pattern": ({"q_proj": 1},), "alpha_pattern": ({"q_proj": 1},), "modules_to_save": (["lm_head"],),
    "layers_to_transform": ([0], 0.5), "unheard_of": (1, "x" * 100_000, [[[1]]]),
}  # fmt: skip


def bad_adapter_field(rng: random.Random, folder: Path) -> Outcome:
    name = rng.choice(sorted(BAD_ADAPTER_FIELDS))
    value = rng.choice(BAD_ADAPTER_FIELDS[name])
    put(folder / ADAPTER_CONFIG, **{name: value})
    by_tensors = value in (10**9, 4) if name == "r" else value == ["q_proj"]
    return refused(ADAPTER) if by_tensors else refused(ADAPTER_CONFIG, name)


def missing_adapter_field(rng: random.Random, folder: Path) -> Outcome:
    name = rng.choice(("r", "lora_alpha", "target_modules", "peft_type"))
    edit(folder / ADAPTER_CONFIG, lambda d: {key: value for key, value in d.items() if key != name})
    return refused(ADAPTER_CONFIG, name)


def inert_adapter_fields(rng: random.Random, folder: Path) -> Outcome:
    more = {"auto_mapping": {"a": "b"}, "revision": "main", "lora_dropout": 0.1, "use_dora": False, "rank_pattern": {},
            "eva_config": None, "megatron_core": "megatron.core", "qalora_group_size": 16, "task_type": None,
            "base_model_name_or_path": 7, "init_lora_weights": "gaussian"}  # fmt: skip
    put(folder / ADAPTER_CONFIG, **{name: more[name] for name in rng.sample(sorted(more), 4)})
    return SAME


def odd_adapter(rng: random.Random, folder: Path) -> Outcome:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = rng.choice(sorted(tensors))
        tensor, kind = tensors[name], rng.randrange(6)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[name.replace("layers.1", "layers.7").replace("layers.0", "layers.8")] = tensor.copy()
        elif kind == 2:
            tensors[name] = np.ascontiguousarray(tensor[:, :-1])
        elif kind == 3:
            tensors[name] = tensor[:0].copy()
        elif kind == 4:
            tensors[name] = np.ascontiguousarray(tensor.T)
        else:
            tensors[name] = tensor.astype(rng.choice((np.int32, bool, np.float64, ml_dtypes.float8_e4m3fn)))

    tensors_of(folder, change, ADAPTER)
    return refused(ADAPTER)


def cut_adapter(rng: random.Random, folder: Path) -> Outcome:
    data = (folder / ADAPTER).read_bytes()
    (folder / ADAPTER).write_bytes(data[: rng.choice((0, 7, 8, rng.randrange(len(data)), len(data) - 1))])
    return refused(ADAPTER)


ADAPTER_MUTATIONS: dict[str, Mutation] = {
    "broken config": broken_json(ADAPTER_CONFIG),
    "config is no file": no_file(ADAPTER_CONFIG),
    "weights are no file": no_file(ADAPTER),
    "no config": without(ADAPTER_CONFIG),
    "no weights": without(ADAPTER),
    "bad field": bad_adapter_field,
    "another bad field": bad_adapter_field,
    "missing field": missing_adapter_field,
    "inert fields": inert_adapter_fields,
    "odd tensor": odd_adapter,
    "cut weights": cut_adapter,
}
