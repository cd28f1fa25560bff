"""Judges model directories: each is loaded, and right, or refused in a sentence that names what is wrong."""

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dppo_jax.errors import UserError
from dppo_jax.models.hf import load_params
from experiments.chaos.inputs.damage import Outcome
from experiments.chaos.inputs.judge import Judge, Judged, Wrong, check_sentence, limited
from experiments.chaos.inputs.model_files import MODEL_MUTATIONS
from experiments.run.load import load_text

SOURCE = "assets/tiny"
SECONDS, GIGABYTES = 10.0, 2.0
SAMPLE = "?1+2=a b"
OFTEN_ALONE = 0.6


def prepare(folder: Path) -> Judge:
    """A copy of the embedded model."""
    source = folder / "model"
    shutil.copytree(SOURCE, source)
    right = load(source)

    def judge(draw: random.Random, case: Path) -> Judged:
        names = some(draw)
        what = " and ".join(names)
        try:
            return Judged(judged(source, right, names, draw, case / "model"), what)
        except Wrong as error:
            raise Wrong(f"{what}: {error}") from None

    return judge


def load(folder: Path) -> dict[str, Any]:
    """All that a run takes from a model directory."""
    config, params = load_params(folder)
    text = load_text(folder, config)
    words = {
        "vocabulary": text.tokenizer.get_vocab(),
        "sample": text.tokenizer(SAMPLE)["input_ids"],
        "pad": text.pad_id,
        "own eos": text.tokenizer.eos_token_id,
        "template": text.tokenizer.chat_template,
    }
    return {"config": config, "params": params, "eos": text.eos_ids, **words}


def some(draw: random.Random) -> list[str]:
    """One mutation, or two of different files."""
    first, second = draw.choice(list(MODEL_MUTATIONS)), draw.choice(list(MODEL_MUTATIONS))
    touched = [set(MODEL_MUTATIONS[name][0].split()) for name in (first, second)]
    return [first] if touched[0] & touched[1] or draw.random() < OFTEN_ALONE else [first, second]


def judged(
    source: Path, right: Mapping[str, Any], names: Sequence[str], draw: random.Random, folder: Path
) -> bool:
    """Whether a directory with these mutations is refused. Wrong."""
    shutil.copytree(source, folder)
    outcomes = [MODEL_MUTATIONS[name][1](draw, folder) for name in names]
    said, found = attempt(lambda: load(folder))
    check(said, outcomes, folder)
    if said is None:
        compare(found, right, outcomes)
    return said is not None


def attempt(function: Callable[[], Any]) -> tuple[str | None, Any]:
    """The sentence of its UserError, or what it gives, within limits."""
    with limited(SECONDS, GIGABYTES):
        try:
            return None, function()
        except UserError as error:
            return str(error), None


def check(said: str | None, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Refused where it must be, in one line that names the place and the thing; and nowhere else. Wrong."""
    wanted = [outcome.refused for outcome in outcomes if outcome.refused is not None]
    if said is None:
        if wanted:
            raise Wrong(f"loaded, without a word of {wanted}")
        return
    if not wanted:
        raise Wrong(f"refused: {said}")
    check_sentence(said, 700 + len(str(folder)))
    if str(folder) not in said or not any(all(word in said for word in words) for words in wanted):
        raise Wrong(f"{said}, and not {wanted}")


def compare(found: Mapping[str, Any], right: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Wrong where what was loaded is not what is there."""
    named = next((outcome.eos for outcome in outcomes if outcome.eos is not None), right["eos"])
    eos = tuple(sorted({*named, right["own eos"]}))
    for name in right.keys() - {"params"}:
        if found[name] != (eos if name == "eos" else right[name]):
            raise Wrong(f"loaded with another {name}")
    if jax.tree.map(np.shape, found["params"]) != jax.tree.map(np.shape, right["params"]):
        raise Wrong("loaded with parameters of other shapes")
    if all(outcome.same_parameters for outcome in outcomes):
        same = jax.tree.map(lambda x, y: np.array_equal(x, y), found["params"], right["params"])
        if not all(jax.tree.leaves(same)):
            raise Wrong("loaded with other parameters")
