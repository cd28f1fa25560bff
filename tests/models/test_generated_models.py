"""Generated model directories: each is loaded and right, or refused in a sentence that names what is wrong."""

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dppo_jax.models.config import Lora
from dppo_jax.models.peft import load_adapters, save_adapters
from experiments.chaos.inputs.adapter_files import ADAPTER_MUTATIONS
from experiments.chaos.inputs.model_files import MODEL_MUTATIONS
from experiments.chaos.inputs.models import attempt, check, judged, load
from tests.helpers.fixtures import MOE, TINY, once_a_session, random_params, tiny, tokenizer
from tests.helpers.places import GOLDEN

MODELS = GOLDEN / "models"
FAMILIES = ("tiny", "llama", "llama_tied", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma2_plain", "mistral")
CASES, SEED = 320, 12


@once_a_session
def good(tmp_path_factory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Directories with every file, and what is in them."""
    folder, found = tmp_path_factory.mktemp("good"), {}
    for name in FAMILIES:
        at = folder / name
        shutil.copytree(tiny(tmp_path_factory) / "model" if name == "tiny" else MODELS / name, at)
        tokenizer().save_pretrained(at)
        (at / "generation_config.json").write_text('{"eos_token_id": [1, 7], "top_p": 0.9}')
        found[name] = (at, load(at))
    return found


def drawn(case: int) -> tuple[str, list[str]]:
    """The family of a case and its mutations: every one alone at first, then in twos."""
    rng, names = random.Random(f"{SEED} {case}"), list(MODEL_MUTATIONS)
    family = FAMILIES[case % len(FAMILIES)]
    first = names[case % len(names)]
    if case < len(names) * 6:
        return family, [first]
    second = rng.choice(names)
    touched = [set(MODEL_MUTATIONS[name][0].split()) for name in (first, second)]
    return family, [first] if touched[0] & touched[1] else [first, second]


@pytest.mark.parametrize("case", range(CASES), ids=lambda case: " and ".join([str(case), *drawn(case)[1]]))
def test_a_model_directory_is_loaded_and_right_or_refused_in_a_sentence(case, tmp_path_factory, tmp_path, capfd):
    family, names = drawn(case)
    source, right = good(tmp_path_factory)[family]
    folder, rng = tmp_path / "model", random.Random(f"{SEED} {case} numbers")
    capfd.readouterr()
    judged(source, right, names, rng, folder)
    assert len(capfd.readouterr().err.splitlines()) <= 3


ADAPTED = {"qwen3": TINY, "qwen3_moe": MOE}
CHOSEN = Lora(rank=3, alpha=6.0, targets=("q", "v", "down"))


@once_a_session
def good_adapters(tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    """Adapters as we write them, and what is in them."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for name, model in ADAPTED.items():
        whole = dataclasses.replace(model, lora=CHOSEN)
        save_adapters(folder / name, whole, random_params(model=whole), "some/model")
        found[name] = (folder / name, load_adapters(folder / name, model))
        assert found[name][1][0] == CHOSEN
    return found


@pytest.mark.parametrize("case", range(6 * len(ADAPTER_MUTATIONS)))
def test_a_directory_of_adapters_is_loaded_and_right_or_refused_in_a_sentence(case, tmp_path_factory, tmp_path, capfd):
    name = list(ADAPTER_MUTATIONS)[case % len(ADAPTER_MUTATIONS)]
    family = list(ADAPTED)[case % len(ADAPTED)]
    source, right = good_adapters(tmp_path_factory)[family]
    folder = tmp_path / "adapter"
    shutil.copytree(source, folder)
    outcome = ADAPTER_MUTATIONS[name](random.Random(f"{SEED} {case} adapters"), folder)
    capfd.readouterr()
    said, found = attempt(lambda: load_adapters(folder, ADAPTED[family]))
    check(said, [outcome], folder)
    if said is None:
        assert found[0] == right[0]
        jax.tree.map(np.testing.assert_array_equal, found[1], right[1])
    assert not capfd.readouterr().err
