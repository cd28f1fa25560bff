"""Judges checkpoints: whatever is damaged, a run goes on from a step to the bit, and names each that it passes over."""

import contextlib
import io
import random
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dppo_jax.storage.checkpoint import Checkpoints, restore_params
from experiments.chaos.inputs.checkpoint_files import DAMAGES, flip
from experiments.chaos.inputs.judge import Judge, Judged, Wrong, check_sentence
from experiments.chaos.inputs.states import abstract, state

STEPS = (2, 4, 6)
ALSO = 0.2  # of the cases have the step before damaged too


def prepare(folder: Path) -> Judge:
    """A run's folder with three checkpoints."""
    source = folder / "run"
    with Checkpoints(source, keep=len(STEPS)) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state(step), {"step": step})

    def judge(draw: random.Random, case: Path) -> Judged:
        shutil.copytree(source, case / "run")
        what = damaged(case / "run", draw, draw.choice(DAMAGES))
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                return Judged(going_on(case / "run") != STEPS[-1], what)
            except Exception as error:
                raise Wrong(f"{what}: {type(error).__name__}: {error}") from error

    return judge


def damaged(run: Path, draw: random.Random, damage: Any) -> str:
    """Damages the newest step, and now and then the one before; what was done."""
    damage(run / "checkpoints" / "6", draw)
    also = draw.random() < ALSO
    if also:
        flip(run / "checkpoints" / "4", draw)
    return f"{damage.__name__}{' and the step before' * also}"


def going_on(run: Path) -> int:
    """The step that a run goes on from, which is that of an evaluation, to the bit. Wrong."""
    params = restore_params(run, abstract()["params"])
    with Checkpoints(run, keep=3) as checkpoints:
        step, found, notes = checkpoints.resume(lambda step: abstract())
    if step not in STEPS:
        raise Wrong(f"goes on from step {step}")
    same(found, state(step))
    same(params, state(step)["params"])
    for note in notes:
        check_sentence(note, 500)
    for newer in (number for number in STEPS if number > step):
        if not any(re.match(rf"checkpoint {newer} is damaged \(.+\)", note) for note in notes):
            raise Wrong(f"passes over step {newer} with {notes}")
    return step


def same(found: Any, wanted: Any) -> None:
    """Wrong where two trees differ in a bit, or a dtype."""
    if jax.tree.structure(found) != jax.tree.structure(wanted):
        raise Wrong("has another structure")
    for one, two in zip(map(np.asarray, jax.tree.leaves(found)), map(np.asarray, jax.tree.leaves(wanted)), strict=True):
        if one.dtype != two.dtype or one.tobytes() != two.tobytes():
            raise Wrong("has other values")
