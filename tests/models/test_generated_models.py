"""Generated model directories: each is loaded and right, or refused in a sentence that names what is wrong."""

import dataclasses
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dppo_jax.errors import UserError
from dppo_jax.models.config import Lora
from dppo_jax.models.hf import load_params
from dppo_jax.models.peft import load_adapters, save_adapters
from experiments.run.load import load_text
from tests.helpers.fixtures import MOE, TINY, once_a_session, random_params, tiny, tokenizer
from tests.helpers.mutations import ADAPTER_MUTATIONS, MODEL_MUTATIONS, Outcome
from tests.helpers.places import GOLDEN

MODELS = GOLDEN / "models"
FAMILIES = ("tiny", "llama", "llama_tied", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma2_plain", "mistral")
CASES, SEED = 320, 12
SECONDS, GIGABYTES = 10, 2
SAMPLE = "?1+2=a b"


class TooLong(KeyboardInterrupt):
    """No Exception: nothing may swallow it."""


@contextmanager
def limited() -> Iterator[None]:
    """At most this long, and this much more memory."""

    def stop(*_: Any) -> None:
        raise TooLong

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def load(folder: Path) -> dict[str, Any]:
    """All that a run takes from a model directory."""
    config, params = load_params(folder)
    text = load_text(folder, config)
    words = {
        "vocabulary": text.tokenizer.get_vocab(),
        "sample": text.tokenizer(SAMPLE)["input_ids"],
        "pad": text.pad_id,
        "template": text.tokenizer.chat_template,
    }
    return {"config": config, "params": params, "eos": text.eos_ids, **words}


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
    shutil.copytree(source, folder)
    outcomes = [MODEL_MUTATIONS[name][1](rng, folder) for name in names]
    capfd.readouterr()
    said, found = attempt(lambda: load(folder))
    check(said, outcomes, folder)
    if said is None:
        compare(found, right, outcomes)
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


def attempt(function: Callable[[], Any]) -> tuple[str | None, Any]:
    """The sentence of its UserError, or what it gives, within limits."""
    with limited():
        try:
            return None, function()
        except UserError as error:
            return str(error), None
        except TooLong:
            pytest.fail(f"not done after {SECONDS} s")


def check(said: str | None, outcomes: list[Outcome], folder: Path) -> None:
    """Refused where it must be, in one line that names the place and the thing; and nowhere else."""
    wanted = [outcome.refused for outcome in outcomes if outcome.refused is not None]
    if said is None:
        assert not wanted, f"loaded, without a word of {wanted}"
        return
    assert wanted, f"refused: {said}"
    assert "\n" not in said and len(said) < 700 + len(str(folder)), said[:2000]
    assert str(folder) in said, said
    assert any(all(word in said for word in words) for words in wanted), (said, wanted)


def compare(found: dict[str, Any], right: dict[str, Any], outcomes: list[Outcome]) -> None:
    eos = next((outcome.eos for outcome in outcomes if outcome.eos is not None), right["eos"])
    assert found["eos"] == eos
    for name in right.keys() - {"params", "eos"}:
        assert found[name] == right[name], name
    assert jax.tree.map(np.shape, found["params"]) == jax.tree.map(np.shape, right["params"])
    if all(outcome.same_parameters for outcome in outcomes):
        jax.tree.map(np.testing.assert_array_equal, found["params"], right["params"])
