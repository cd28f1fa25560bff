"""What several tests train on: a tiny random model directory, a few questions, a config that uses them."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from configs import base
from dppo_jax.models import save_hf
from dppo_jax.models.config import ModelConfig, RopeConfig
from dppo_jax.models.decoder import abstract_params, init_params

# Few digits among few characters: a model that knows nothing is right now and then.
CHARACTERS = "012+-= ?abcdef"
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
PAD, EOS = 0, 1

TINY = ModelConfig(
    model_type="qwen3",
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
    max_position=64,
    tie_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    qk_norm=True,
)

# XLA's switches that make a compilation for the CPU several times shorter, and what it gives slower. For jax.jit:
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
if jax.default_backend() != "cpu":
    COMPILER_OPTIONS = {}


def random_params(seed: int = 0):
    """Parameters of TINY in NumPy, large enough that the policy is far from uniform."""
    draw = np.random.default_rng(seed).normal
    params = jax.tree.map(lambda s: (0.2 * draw(size=s.shape)).astype(np.float32), abstract_params(TINY))
    return params | {"final_norm": 5 * params["final_norm"]}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    backend = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    backend.add_special_tokens(["<pad>", "<eos>"])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def write_questions(path: Path) -> Path:
    """Sums with answers from 0 to 2."""
    sums = [(a, b) for a in range(3) for b in range(3) if a + b < 3]
    rows = [{"prompt": f"{pad}{a}+{b}=", "answer": a + b} for pad in ("", "?", "ab ") for a, b in sums]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@functools.cache
def tiny(tmp_path_factory) -> Path:
    """A folder with model/ (Hugging Face) and questions.jsonl, made once a session; copy it before you break it."""
    folder = tmp_path_factory.mktemp("tiny")
    save_hf(folder / "model", TINY, init_params(TINY, jax.random.key(7)), tokenizer())
    write_questions(folder / "questions.jsonl")
    return folder


def small_config(folder: Path, **changes) -> ConfigDict:
    """configs/base.py with small numbers; changes are values by dotted name, dots written as __."""
    c = base.get_config()
    numbers = {
        "steps": 4,
        "policy.path": str(folder / "model"),
        "data.kind": "jsonl",
        "data.path": str(folder / "questions.jsonl"),
        "data.verifier": "last_number",
        "data.max_prompt_len": 8,
        "rollout.prompts": 8,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 6,
        "train.minibatches": 2,
        "optimizer.learning_rate": 0.02,  # large, so that four updates on one rollout move the policy
        "loss.delta_low": 0.01,
        "loss.delta_high": 0.01,
        "checkpoint.every": 2,
        "checkpoint.keep": 10,
        "log.histograms": 2,
        "log.samples": 2,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    for name, value in numbers.items():
        section, _, key = name.rpartition(".")
        at = functools.reduce(lambda at, part: at[part], section.split("."), c) if section else c
        at[key] = value
    return c


def config_file(path: Path, folder: Path, **changes) -> Path:
    """A config file whose get_config() is `small_config(folder, **changes)`."""
    path.write_text(
        "from pathlib import Path\n\nfrom tests.fixtures import small_config\n\n\n"
        f"def get_config():\n    return small_config(Path({str(folder)!r}), **{changes!r})\n"
    )
    return path
