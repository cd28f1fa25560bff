"""What a model directory's config.json, its tokens that end a response and its weights can be, and should not."""

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from experiments.chaos.inputs.damage import (
    INDEX,
    SAME,
    WEIGHTS,
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
from experiments.chaos.inputs.tokenizer_files import (
    bad_settings,
    bad_tokenizer,
    no_vocabulary,
    other_class,
    sentencepiece_alone,
    sentencepiece_beside,
)

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "intermediate_size", "max_position_embeddings", "num_experts", "num_experts_per_tok", "sliding_window",
         "moe_intermediate_size", "query_pre_attn_scalar")  # fmt: skip
NO_SIZES = (32.0, "32", True, 0, -1, [32], {"a": 1}, 10**10, 2**64, 10**300, -(10**400), float("inf"), float("nan"), "")


def wrong_size(rng: random.Random, folder: Path) -> Outcome:
    fields = json.loads((folder / "config.json").read_text())
    unread = {"sliding_window"} if fields["model_type"] not in ("gemma2", "mistral") else set()
    name = rng.choice([size for size in SIZES if size in fields and size not in unread])
    if name == "intermediate_size" and "num_experts" in fields:
        name = "moe_intermediate_size"  # the other is not read
    put(folder / "config.json", **{name: rng.choice(NO_SIZES)})
    return refused("config.json", name)


def huge_size(rng: random.Random, folder: Path) -> Outcome:
    """What would take terabytes, or build names for ever."""
    fields = json.loads((folder / "config.json").read_text())
    all_sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
                 "intermediate_size", "num_experts", "moe_intermediate_size")  # fmt: skip
    sizes = [
        size for size in all_sizes if size in fields and (size, "num_experts" in fields) != ("intermediate_size", True)
    ]
    huge = (10**9, 2**31 - 2, 2**30, 998)
    put(folder / "config.json", **{name: rng.choice(huge) for name in rng.sample(sizes, rng.randint(1, len(sizes)))})
    return refused("config.json")


def missing_size(rng: random.Random, folder: Path) -> Outcome:
    name = rng.choice(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"))
    edit(folder / "config.json", lambda d: {key: value for key, value in d.items() if key != name})
    return refused("config.json", name)


BAD_ROPE = (7, "linear", [1], True, {"rope_type": 7}, {"rope_type": ["linear"]}, {"rope_type": "yarn", "factor": 0},
            {"rope_type": "yarn", "factor": 2.0, "beta_fast": 10**400}, {"rope_type": "yarn", "truncate": "no"},
            {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}, {"rope_type": "dynamic", "factor": "2"},
            {"rope_type": "longrope", "short_factor": 1, "long_factor": [2]},
            {"rope_type": "longrope", "short_factor": [[1]], "long_factor": {}}, {"rope_type": "mrope", "factor": 2.0},
            {"rope_type": "linear"}, {"rope_type": "linear", "factor": "2"}, {"rope_type": "linear", "factor": -1},
            {"rope_type": "linear", "factor": 10**400}, {"rope_type": "linear", "factor": float("nan")},
            {"rope_type": "default", "rope_theta": [1]}, {"rope_type": "default", "rope_theta": float("inf")},
            {"rope_type": "llama3", "factor": 8.0}, {"type": {"a": 1}},
            {"rope_type": "linear", "factor": 2.0, "extra": {"deep": [[[[[[1]]]]]]}})  # fmt: skip


def bad_rope(rng: random.Random, folder: Path) -> Outcome:
    name = rng.choice(("rope_scaling", "rope_parameters"))
    gone = {"rope_scaling", "rope_parameters", "rope_theta"}
    edit(folder / "config.json", lambda d: {k: v for k, v in d.items() if k not in gone} | {name: rng.choice(BAD_ROPE)})
    return refused("config.json", "rope")


BAD_FIELDS = {"tie_word_embeddings": (1, "true", None, []), "rms_norm_eps": (0, "1e-6", 10**400, [1], float("nan")),
              "architectures": ("LlamaForCausalLM", [], [7], {}, ["GPT2LMHeadModel"], [["a"]]),
              "model_type": (7, [], {}, "gpt2", "x" * 100_000), "hidden_act": ("gelu", 7, ["silu"]),
              "rope_theta": (0, "x", [1], {}, True, 10**400), "quantization_config": ({"bits": 4}, 7),
              "auto_map": ({"AutoConfig": "a.b"},), "attention_bias": ("no", 3),
              "layer_types": (["full_attention"] * 99, "full_attention", [7] * 2, [["full_attention"]] * 2),
              "unheard_of": (1,), "z" * 100_000: (1,)}  # fmt: skip


def bad_field(rng: random.Random, folder: Path) -> Outcome:
    name = rng.choice(sorted(BAD_FIELDS))
    put(folder / "config.json", **{name: rng.choice(BAD_FIELDS[name])})
    return refused("config.json", "architecture" if name in ("architectures", "model_type") else name[:50])


def inert_config(rng: random.Random, folder: Path) -> Outcome:
    """Order, spaces and fields that say nothing about the logits."""
    fields = list(json.loads((folder / "config.json").read_text()).items())
    rng.shuffle(fields)
    more: dict[str, Any] = {"transformers_version": "9", "initializer_range": 0.5, "id2label": {"0": "é東"}}
    chosen = {name: more[name] for name in rng.sample(sorted(more), 2)}
    (folder / "config.json").write_text(json.dumps(dict(fields) | chosen, indent=rng.choice([None, 7])) + "\n\n")
    return SAME


# --- tokens that end a response ---

BAD_EOS = ("</s>", "1", 1.0, True, False, -1, 10**6, 2**31, 2**70, {"id": 1}, [None], [1, None], [[1]], [1, "<eos>"],
           [1, 2.5], [True], [0, -1], [1, 10**9], "", float("nan"))  # fmt: skip


def bad_eos(rng: random.Random, folder: Path) -> Outcome:
    name = rng.choice(("config.json", "generation_config.json"))
    put(folder / name, eos_token_id=rng.choice(BAD_EOS))
    return refused(name, "eos_token_id")


def good_eos(rng: random.Random, folder: Path) -> Outcome:
    ids = rng.choice((None, [], 5, [5], [9, 5, 9], list(range(16))))
    put(folder / "config.json", eos_token_id=None)
    put(folder / "generation_config.json", eos_token_id=ids, temperature="odd", max_length=None)
    named = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return Outcome(eos=tuple(named))


# --- weights ---


def cut_weights(rng: random.Random, folder: Path) -> Outcome:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: rng.choice((0, 3, 8, 9, rng.randrange(len(data)), len(data) - 1))])
    return refused(WEIGHTS)


def bad_header(rng: random.Random, folder: Path) -> Outcome:
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.randrange(7)
    if kind == 0:
        data = struct.pack("<Q", rng.choice((0, 1, 10**8, 2**31, 2**63, 2**64 - 1))) + data[8:]
    elif kind == 1:
        data = data + b"more"
    elif kind == 2:
        data = data[:8] + b"[" + data[9:]
    else:
        header[name] |= (
            {"shape": [10**9, 10**9]}, {"data_offsets": [0, 2**40]}, {"shape": [-1]}, {"dtype": "Q7"},
        )[kind - 3]  # fmt: skip
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + data[8 + size :]
    (folder / WEIGHTS).write_bytes(data)
    return refused(WEIGHTS)


def odd_tensor(rng: random.Random, folder: Path) -> Outcome:
    """Missing, more, misnamed, of no size, of another shape or type."""
    chosen = []

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = rng.choice(sorted(tensors))
        chosen.append(name)
        tensor = tensors[name]
        types = (np.int64, np.int8, bool, np.float64, np.uint16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
        kind = rng.randrange(7)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[name + ".more"] = tensor.copy()
        elif kind == 2:
            tensors["x" * rng.choice((1, 100_000))] = tensor.copy()
        elif kind == 3:
            tensors[name] = np.zeros((0, *tensor.shape[1:]), np.float32)
        elif kind == 4:
            tensors[name] = np.ascontiguousarray(tensor[None])
        elif kind == 5:
            tensors[name] = np.concatenate([tensor, tensor])
        else:
            tensors[name] = tensor.astype(rng.choice(types))

    tensors_of(folder, change)
    return refused("tensor")


def other_values(rng: random.Random, folder: Path) -> Outcome:
    """NaN, infinity, another float type: weights as good as any here."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = rng.choice(sorted(tensors))
        kind = rng.randrange(3)
        if kind == 2:
            tensors[name] = tensors[name].astype(rng.choice((np.float16, ml_dtypes.bfloat16)))
        else:
            tensors[name] = np.full_like(tensors[name], (np.nan, np.inf)[kind])
        tensors.pop("lm_head.weight" if name == "model.embed_tokens.weight" else "", None)

    before = set(load_file(folder / WEIGHTS))
    tensors_of(folder, change)
    return Outcome(same_parameters=False) if set(load_file(folder / WEIGHTS)) == before else refused("lm_head.weight")


def shards(rng: random.Random, folder: Path) -> tuple[list[str], dict[str, str]]:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
    weight_map = {name: names[i % 3] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names, weight_map


def sharded(rng: random.Random, folder: Path) -> Outcome:
    shards(rng, folder)
    return SAME


def bad_shards(rng: random.Random, folder: Path) -> Outcome:
    names, weight_map = shards(rng, folder)
    name = rng.choice(sorted(weight_map))
    kind = rng.randrange(7)
    if kind == 0:
        (folder / names[1]).unlink()
    elif kind == 1:
        (folder / names[1]).unlink()
        (folder / names[1]).mkdir()
    elif kind == 2:
        (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-3])
    elif kind == 3:  # one tensor in two files
        copied = {name: load_file(folder / weight_map[name])[name]}
        other = next(file for file in names if file != weight_map[name])
        save_file(load_file(folder / other) | copied, folder / other)
    elif kind == 4:
        shutil.move(folder / names[0], folder.parent / names[0])
        put(folder / INDEX, weight_map={n: f"../{f}" if f == names[0] else f for n, f in weight_map.items()})
    else:
        wrong = ("..", ".", "", "/", "/etc/passwd", names[0] + "\0", "x" * 5000, "sub/" + names[0], 7, None, [names[0]])
        put(folder / INDEX, weight_map=weight_map | {name: rng.choice(wrong)})
    return refused(str(folder))


def bad_index(rng: random.Random, folder: Path) -> Outcome:
    shards(rng, folder)
    if rng.random() < 0.5:
        return broken_json(INDEX)(rng, folder)
    edit(folder / INDEX, lambda d: rng.choice(({}, {"weight_map": []}, {"weight_map": None}, {"weight_map": "x"})))
    return refused(INDEX)


def unread_files(rng: random.Random, folder: Path) -> Outcome:
    """Beside what is read: pickles, notes, an index that a whole file goes before."""
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "README.md").write_bytes(b"\xff")
    (folder / INDEX).write_text("{")
    return SAME


def pickled(rng: random.Random, folder: Path) -> Outcome:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    return refused("pytorch_model.bin")


EOS_FILES, TOKENIZER_FILES = "config.json generation_config.json", "tokenizer.json tokenizer_config.json"

MODEL_MUTATIONS: dict[str, tuple[str, Mutation]] = {
    # name: the files that it touches, so that two do not undo each other; and how
    **{f"broken {name}": (name, broken_json(name)) for name in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")},
    **{f"{name} is no file": (name, no_file(name)) for name in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)},
    "no config.json": ("config.json", without("config.json")),
    "no weights": (WEIGHTS, without(WEIGHTS)),
    "wrong size": ("config.json", wrong_size),
    "huge size": ("config.json", huge_size),
    "missing size": ("config.json", missing_size),
    "bad rope": ("config.json", bad_rope),
    "bad field": ("config.json", bad_field),
    "inert config": ("config.json", inert_config),
    "bad eos": (EOS_FILES, bad_eos),
    "good eos": (EOS_FILES, good_eos),
    "cut weights": (WEIGHTS, cut_weights),
    "bad header": (WEIGHTS, bad_header),
    "odd tensor": (WEIGHTS, odd_tensor),
    "other values": (WEIGHTS, other_values),
    "sharded": (WEIGHTS, sharded),
    "bad shards": (WEIGHTS, bad_shards),
    "bad index": (WEIGHTS, bad_index),
    "unread files": (WEIGHTS, unread_files),
    "pickled": (WEIGHTS, pickled),
    "bad settings": ("tokenizer_config.json", bad_settings),
    "other class": ("tokenizer_config.json", other_class),
    "bad tokenizer": ("tokenizer.json", bad_tokenizer),
    "sentencepiece alone": (TOKENIZER_FILES, sentencepiece_alone),
    "sentencepiece beside": (TOKENIZER_FILES, sentencepiece_beside),
    "no vocabulary": (TOKENIZER_FILES, no_vocabulary),
}  # fmt: skip
