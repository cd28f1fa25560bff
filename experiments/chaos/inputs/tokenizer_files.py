"""What the files of a model directory's tokenizer can be other than they should."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.chaos.inputs.damage import SAME, Outcome, edit, put, refused

BAD_SETTINGS = {"tokenizer_class": (7, ["a"], {}), "chat_template": (7, {"default": 7}, [7], True),
                "model_max_length": ("long", [], {}), "padding_side": ("up", 7),
                "eos_token": (7, ["<eos>"], "<nowhere>"), "pad_token": (7, [1]),
                "added_tokens_decoder": ([1], {"x": {"content": "a"}}, {"5": 7}, {"999": {"content": "zz"}},
                                         {"-1": {"content": "zz"}}, "a")}  # fmt: skip


def bad_settings(rng: random.Random, folder: Path) -> Outcome:
    name = rng.choice(sorted(BAD_SETTINGS))
    put(folder / "tokenizer_config.json", **{name: rng.choice(BAD_SETTINGS[name])})
    return refused("tokenizer")


def other_class(rng: random.Random, folder: Path) -> Outcome:
    """A class that is not known, one that needs code of its own, one that splits text otherwise."""
    kind = rng.choice(("FooTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizerFast", "remote"))
    if kind == "remote":
        put(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
        (folder / "own.py").write_text("raise SystemExit('code of a model directory was run')\n")
    else:
        put(folder / "tokenizer_config.json", tokenizer_class=kind)
    return SAME


BAD_TOKENIZERS: tuple[Callable[[dict[str, Any]], Any], ...] = (
    lambda d: {"version": "1.0"},
    lambda d: d | {"model": {"type": "Nope"}},
    lambda d: d | {"model": None},
    lambda d: d | {"model": d["model"] | {"vocab": {}}, "added_tokens": []},
    lambda d: d | {"model": d["model"] | {"vocab": d["model"]["vocab"] | {"beyond": 10**6}}},
    lambda d: d | {"model": d["model"] | {"vocab": d["model"]["vocab"] | {"beyond": -1}}},
    lambda d: d | {"model": d["model"] | {"vocab": d["model"]["vocab"] | {"beyond": 2.5}}},
    lambda d: d | {"model": d["model"] | {"vocab": d["model"]["vocab"] | {"beyond": "7"}}},
    lambda d: d | {"model": d["model"] | {"vocab": d["model"]["vocab"] | {"beyond": 2**32 - 1}}},
    lambda d: d | {"model": d["model"] | {"vocab": d["model"]["vocab"] | {"beyond": 2**40}}},
    lambda d: d | {"model": d["model"] | {"merges": [["no", "such"]]}},
    lambda d: d | {"model": d["model"] | {"merges": 7}},
    lambda d: d | {"added_tokens": [7]},
    lambda d: d | {"added_tokens": [{"id": 3}]},
    lambda d: d | {"added_tokens": "x"},
    lambda d: d | {"decoder": {"type": "Nope"}},
    lambda d: d | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                   "invert": False}},
    lambda d: d | {"post_processor": {"type": "TemplateProcessing", "pair": [],
                   "single": [{"SpecialToken": {"id": "<b>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                   "special_tokens": {"<b>": {"id": "<b>", "ids": [9999], "tokens": ["<b>"]}}}},
    lambda d: [d],
)  # fmt: skip


def bad_tokenizer(rng: random.Random, folder: Path) -> Outcome:
    change = rng.choice(BAD_TOKENIZERS)
    edit(folder / "tokenizer.json", change)
    return refused("tokenizer")


def sentencepiece_alone(rng: random.Random, folder: Path) -> Outcome:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    if rng.random() < 0.5:
        (folder / "tokenizer_config.json").unlink()
    return refused("tokenizer.model", "sentencepiece", "tokenizer.json")


def sentencepiece_beside(rng: random.Random, folder: Path) -> Outcome:
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    return SAME


def no_vocabulary(rng: random.Random, folder: Path) -> Outcome:
    (folder / "tokenizer.json").unlink()
    if rng.random() < 0.5:
        (folder / "tokenizer_config.json").unlink()
    return refused("tokenizer.json")
