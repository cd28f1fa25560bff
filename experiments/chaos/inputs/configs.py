"""Judges configs: one that holds what no key may is refused by name, one of good values is taken."""

import random
from pathlib import Path

from experiments.chaos.inputs.config_keys import BASES, mutation, refusal
from experiments.chaos.inputs.judge import Judge, Judged, Wrong, check_sentence
from experiments.run import checks
from experiments.run.cli import load_config

TRACED = 0.02  # of the cases are traced to shapes too, which takes seconds


def prepare(_: Path) -> Judge:
    """Needs no files but the project's."""
    return judge


def judge(draw: random.Random, _: Path) -> Judged:
    """A config with one to three keys changed."""
    path, by_text = draw.choice(BASES), draw.random() < 0.5
    config, found = load_config(path, []), {}
    for _number in range(draw.choice([1, 1, 2, 3])):
        key, value, verdict = mutation(draw, config, by_text)
        found[key] = value, verdict
    values = {key: value for key, (value, _) in found.items()}
    listed = ", ".join(f"{key} = {checks.shown(value)}" for key, value in values.items())
    what = f"{path}, {'by text' if by_text else 'by attribute'}: {listed}"
    overrides = [f"--config.{key}={value}" for key, value in values.items()] if by_text else []
    said = refusal(path, overrides, {} if by_text else values, traced=draw.random() < TRACED)
    verdicts = {verdict for _, verdict in found.values()}
    if said is None and "refused" in verdicts:
        raise Wrong(f"{what}: taken")
    if said is not None:
        check_sentence(said)
        if verdicts == {"taken"} and len(found) == 1:
            raise Wrong(f"{what}: refused: {said}")
        if not any(part in said for key in found for part in key.split(".")):
            raise Wrong(f"{what}: refused without its name: {said}")
    return Judged(said is not None, what)
