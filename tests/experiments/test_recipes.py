"""The commands of every recipe's page, as they stand there: two steps of each run, on few prompts.

A random model with a tokenizer of bytes is in SmolLM2's place. Later commands of a page read what earlier ones leave.
"""

import dataclasses
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dppo_jax.models import save_hf
from dppo_jax.models.decoder import init_params
from dppo_jax.models.hf import load_classifier
from dppo_jax.storage.results import read_table
from dppo_jax.storage.run_log import read_scalars
from tests.helpers.fixtures import TINY, hurried, hurried_environment
from tests.helpers.hub_server import HubServer
from tests.helpers.places import ROOT

RECIPES = ROOT / "experiments" / "recipes"
PAGES = {path.parent.name: path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*/README.md"))}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"

# What makes a command small.
RUN = {"steps": 2, "rollout.prompts": 2, "rollout.group_size": 2, "train.minibatches": 1, "train.epochs": 1}
RUN |= {"eval.every": 0, "compile_cache": "", "label_cache": ""}
SMALL = {
    "train": RUN,
    "sweep": RUN,
    "eval": {"eval.samples": 1, "eval.prompts": 4, "eval.max_new_tokens": 8, "compile_cache": "", "label_cache": ""},
    "build_sanity_set": {"data.size": 64, "eval.prompts": 64, "compile_cache": "", "label_cache": ""},
}
LONGER = {  # prompts, of a token a byte
    "gsm8k": {"data.max_prompt_len": 1000, "eval.sets.held_out.max_prompt_len": 1000},
    "smollm2": {"data.max_prompt_len": 200},
    "calculator": {"data.max_prompt_len": 400, "rollout.max_new_tokens": 400},
}
READS_THE_HUB = "configs/gsm8k.py"


def commands(page: str) -> list[list[str]]:
    """[module, arguments...] of a page's commands, but for the figures, and for blocks that say `bash`: what these show
    needs a model that is right now and then."""
    blocks = re.findall(r"```\n(.*?)```", PAGES[page], re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("python -m experiments.")]
    found = [[module.removeprefix("experiments."), *rest] for _, _, module, *rest in words]
    return [command for command in found if command[0] != "plot"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as the repository's root, with a model under SmolLM2's name."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "assets").symlink_to(ROOT / "assets")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(["<pad>", "<eos>"])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = CHAT
    model = dataclasses.replace(TINY, vocab_size=len(vocabulary), max_position=4096)
    path = folder / "models" / "SmolLM2-135M-Instruct"
    save_hf(path, model, init_params(model, jax.random.key(0)), tokenizer)
    before = os.getcwd()
    os.chdir(folder)
    try:
        with hurried(tmp_path_factory):
            yield folder
    finally:
        os.chdir(before)


def gsm8k() -> bytes:
    """Rows as they are published."""
    rows = [{"question": f"Tom has {n} pens and gets 2. How many?", "answer": f"{n}+2\n#### {n + 2}"} for n in range(8)]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def call(page: str, module: str, arguments: list[str], place: Path, tmp_path_factory, monkeypatch) -> None:
    """The command in this process, made small; in another one where it asks the hub."""
    keys = SMALL.get(module, {}) | (LONGER.get(page, {}) if module in ("train", "eval") else {})
    small = [f"--config.{key}={value}" for key, value in keys.items()]
    if READS_THE_HUB in arguments:
        command, home = [sys.executable, "-m", f"experiments.{module}", *arguments, *small], place / "hub"
        with HubServer() as server:
            files = {f"main/{split}-00000-of-00001.parquet": gsm8k() for split in ("train", "test")}
            server.push("dataset", "openai/gsm8k", files)
            own = {key: value for key, value in server.environment(home).items() if key.startswith("HF_")}
            environment = hurried_environment(tmp_path_factory) | own | {"PYTHONPATH": str(ROOT)}
            ran = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stderr
        return
    monkeypatch.setattr(sys, "argv", [module, *arguments, *small])
    importlib.import_module(f"experiments.{module}").main()


def value_of(flag: str, arguments: list[str]) -> Path:
    return Path(arguments[arguments.index(flag) + 1])


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_recipe_says_can_be_done(page, place, tmp_path_factory, monkeypatch):
    for module, *arguments in commands(page):
        call(page, module, arguments, place, tmp_path_factory, monkeypatch)
        if module == "train":
            scalars = read_scalars(value_of("--workdir", arguments))
            assert scalars["reward/mean"][0].tolist() == [0, 1] and np.isfinite(scalars["grad_norm"][1]).all()
        elif module == "build_sanity_set":
            assert read_table(value_of("--out", arguments)).num_rows
        elif module == "recipes.reward_model.make":
            assert np.abs(load_classifier(value_of("--out", arguments)).params["score"]).max() > 0


def test_every_recipe_has_a_command():
    for page in PAGES:
        assert commands(page), page
    assert any(READS_THE_HUB in command for command in commands("gsm8k"))
