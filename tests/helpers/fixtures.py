"""What several tests train on: a tiny random model directory, a few questions, a config that uses them."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from configs import base
from dppo_jax.models import save_hf
from dppo_jax.models.config import ModelConfig, RopeConfig
from dppo_jax.models.decoder import abstract_params, init_params
from dppo_jax.storage.run_log import MACHINE, read_scalars
from experiments.train import loop, train

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


def once_a_session(make):
    """Calls make(tmp_path_factory) once: modules share what it made."""
    made: dict[Path, Any] = {}

    @functools.wraps(make)
    def get(tmp_path_factory):
        folder = tmp_path_factory.getbasetemp()
        if folder not in made:
            made[folder] = make(tmp_path_factory)
        return made[folder]

    return get


# What makes a compilation for the CPU several times shorter, and its result slower: for jax.jit, and for XLA_FLAGS
# beside JAX_DISABLE_MOST_OPTIMIZATIONS. The second switch is gone from later versions of XLA.
COMPILER_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 0}
HURRIED_FLAGS = ""
if jax.__version_info__ < (0, 11):
    COMPILER_OPTIONS |= {"xla_cpu_use_fusion_emitters": False}
    HURRIED_FLAGS = "--xla_cpu_use_fusion_emitters=false"
if jax.config.values["jax_platforms"] != "cpu":  # as asked for: to ask the devices would start them, in configs too
    COMPILER_OPTIONS = {}


MOE = dataclasses.replace(
    TINY, model_type="qwen3_moe", intermediate_size=16, num_experts=8, experts_per_token=3, norm_topk=True,
    qk_norm=True, qkv_bias=False,
)  # fmt: skip


def random_params(seed: int = 0, model: ModelConfig = TINY):
    """Parameters of TINY in NumPy, large enough that the policy is far from uniform."""
    draw = np.random.default_rng(seed).normal
    params = jax.tree.map(lambda s: (0.2 * draw(size=s.shape)).astype(np.float32), abstract_params(model))
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


@once_a_session
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
        "loss_defaults.dppo_binary_tv.delta_low": 0.01,
        "loss_defaults.dppo_binary_tv.delta_high": 0.01,
        "checkpoint.every": 2,
        "checkpoint.keep": 10,
        "log.histograms": 2,
        "log.samples": 2,
        "compile_cache": "",  # what a test compiles is no later run's
        "label_cache": "",
    } | {name.replace("__", "."): value for name, value in changes.items()}
    for name, value in numbers.items():
        section, _, key = name.rpartition(".")
        at = functools.reduce(lambda at, part: at[part], section.split("."), c) if section else c
        at[key] = value
    return c


def config_file(path: Path, folder: Path, function: str = "small_config", **changes) -> Path:
    """A config file whose get_config() is `small_config(folder, **changes)`, or another function of this file."""
    path.write_text(
        f"from pathlib import Path\n\nfrom tests.helpers.fixtures import {function}\n\n\n"
        f"def get_config():\n    return {function}(Path({str(folder)!r}), **{changes!r})\n"
    )
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Runs of the loop. Their compilations are hurried, and equal programs are compiled once a session.


@once_a_session
def _cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def hurried_environment(tmp_path_factory) -> dict[str, str]:
    """For a process of its own; it shares what `hurried` compiled."""
    return os.environ | {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(_cache_folder(tmp_path_factory)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def unhurried_environment() -> dict[str, str]:
    """For a process that compiles as users do."""
    return {
        key: value for key, value in os.environ.items() if key not in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    }


def hurried(tmp_path_factory) -> contextlib.AbstractContextManager[None]:
    """In this process, until the `with` ends."""
    return jax_settings(
        jax_disable_most_optimizations=True,
        jax_compilation_cache_dir=str(_cache_folder(tmp_path_factory)),
        jax_persistent_cache_min_compile_time_secs=0.0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )


def no_cache() -> contextlib.AbstractContextManager[None]:
    """As it is where nobody has named a compilation cache: compile_cache decides. `hurried` may be in force around."""
    return jax_settings(jax_compilation_cache_dir=None, jax_persistent_cache_min_compile_time_secs=1.0)


@contextlib.contextmanager
def jax_settings(**settings: Any) -> Iterator[None]:
    """These, and an empty memory of the compilation cache, until the `with` ends."""
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@dataclass(frozen=True)
class Run:
    """Of a finished run. A compilation is (function, step), or (function, None) before the first step."""

    folder: Path
    config: ConfigDict
    printed: str
    said: str  # on stderr
    compilations: tuple[tuple[str, int | None], ...]


def run_config(folder: Path, **changes) -> ConfigDict:
    """`small_config` with an evaluation set and the trained policy exported."""
    numbers = dict(eval__every=2, eval__samples=2, eval__prompts=8, checkpoint__export=True)
    c = small_config(folder, **(numbers | changes))
    c.eval.sets.sums = base.data_section(
        kind="jsonl", path=c.data.path, verifier="last_number", max_prompt_len=c.data.max_prompt_len
    )
    return c


def run(config: ConfigDict, folder: Path) -> Run:
    """experiments.train in this process."""
    compilations: list[tuple[str, int | None]] = []

    def listen(event: str, _: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            frame, step = sys._getframe(), None
            while frame is not None:
                if frame.f_code is loop.__code__:
                    step = frame.f_locals.get("step")
                frame = frame.f_back
            compilations.append((about["fun_name"], step))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as said:
            train(config, folder)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return Run(folder, config, printed.getvalue(), said.getvalue(), tuple(compilations))


def same(first: Path, second: Path, but: tuple[str, ...] = ()) -> None:
    """Bit-identical scalars of two runs, but for the clock's, and tags that begin as `but` says."""
    one, two = ({tag: x for tag, x in read_scalars(at).items() if not tag.startswith(but)} for at in (first, second))
    assert one.keys() == two.keys()
    for tag in one:
        np.testing.assert_array_equal(one[tag][0], two[tag][0], err_msg=tag)
        if not tag.startswith(MACHINE):
            np.testing.assert_array_equal(one[tag][1], two[tag][1], err_msg=tag)


@once_a_session
def finished_run(tmp_path_factory) -> Run:
    """`run_config`, run once a session; copy its folder before you touch it. Call it inside `hurried`."""
    jax.clear_caches()  # a function that an earlier test compiled would not be among this run's compilations
    return run(run_config(tiny(tmp_path_factory)), tmp_path_factory.mktemp("finished") / "run")
