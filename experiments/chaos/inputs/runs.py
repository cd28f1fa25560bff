"""Judges a run's folder: its log gives the values that were written, and tells where it gives fewer; its config.json is
read or refused."""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dppo_jax.errors import UserError
from dppo_jax.storage.run_config import plain, read_config, write_config
from dppo_jax.storage.run_log import RunLog, Scalars, event_files, read_scalars
from experiments.chaos.inputs.damage import broken_json, no_file
from experiments.chaos.inputs.judge import Judge, Judged, Wrong, check_sentence
from experiments.run.cli import load_config

STEPS, AGAIN = 12, 8  # and from where the run went on once
CONFIG = "configs/quickstart.py"


def write(folder: Path) -> None:
    """A run of two processes, with several event files each."""
    for start in (0, AGAIN):
        log = RunLog(folder, hparams={"seed": 1}, resume_step=start, total_steps=STEPS, events_bytes=500)
        with contextlib.redirect_stderr(io.StringIO()), log:
            for step in range(start, STEPS):
                log.histogram(step, "ratio", [1, 2], [0, 1, 2])
                log.text(step, "samples", "some text of step")
                log.scalars(step, {"reward/mean": start + step / 4, "policy/entropy": -step})


def flip(file: Path, draw: random.Random) -> bool:
    """Any bit."""
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return True


def overwrite(file: Path, draw: random.Random) -> bool:
    """Zeros or noise over some bytes."""
    data = bytearray(file.read_bytes())
    first = draw.randrange(len(data))
    count = min(draw.randint(1, 64), len(data) - first)
    before = bytes(data)
    data[first : first + count] = draw.choice([bytes(count), draw.randbytes(count)])
    file.write_bytes(data)
    return bytes(data) != before


def lengthen(file: Path, draw: random.Random) -> bool:
    """Bytes after the last record."""
    with open(file, "ab") as opened:
        opened.write(draw.randbytes(draw.randint(16, 99)))
    return True


def cut(file: Path, draw: random.Random) -> bool:
    """As a kill does, within a record: nothing needs to be told."""
    os.truncate(file, draw.randrange(file.stat().st_size))
    return False


def delete(file: Path, draw: random.Random) -> bool:
    """As a user does."""
    file.unlink()
    return False


DAMAGES: tuple[Callable[[Path, random.Random], bool], ...] = (flip, flip, overwrite, lengthen, cut, delete)


def prepare(folder: Path) -> Judge:
    """A run's log and config.json."""
    source = folder / "run"
    write(source)
    write_config(source, load_config(CONFIG, []).to_dict())
    right = read_scalars(source)

    def judge(draw: random.Random, case: Path) -> Judged:
        run = case / "run"
        shutil.copytree(source, run)
        return of_config(draw, run) if draw.random() < 0.3 else of_log(draw, run, right)

    return judge


def of_config(draw: random.Random, run: Path) -> Judged:
    """config.json: broken, no file, or another value, which is the user's to set."""
    kind, wanted = draw.choice(["broken", "no file", "value"]), None
    if kind == "value":
        wanted = json.loads((run / "config.json").read_text())
        wanted[draw.choice(sorted(wanted))] = draw.choice([None, 7, "x", [1], {}, plain(float("nan"))])
        (run / "config.json").write_text(json.dumps(wanted))
    else:
        {"broken": broken_json, "no file": no_file}[kind]("config.json")(draw, run)
    what = f"config.json: {kind}"
    try:
        found = read_config(run)
    except UserError as error:
        check_sentence(str(error))
        if kind == "value" or "config.json" not in str(error):
            raise Wrong(f"{what}: refused: {error}") from None
        return Judged(True, what)
    if found != wanted:
        raise Wrong(f"{what}: read as {found!r:.300}")
    return Judged(False, what)


def of_log(draw: random.Random, run: Path, right: Scalars) -> Judged:
    """One event file damaged."""
    file, damage = draw.choice(event_files(run)), draw.choice(DAMAGES)
    told = damage(Path(file), draw)
    what = f"{file.name}: {damage.__name__}"
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            found = read_scalars(run)
        except UserError as error:
            check_sentence(str(error))
            return Judged(True, what)
    if told and "warning: " not in said.getvalue():
        raise Wrong(f"{what}: read without a word")
    for tag, (steps, values) in found.items():
        for step, value in zip(steps.tolist(), values.tolist(), strict=True):
            if tag not in right or value not in written(tag, step):
                raise Wrong(f"{what}: {tag} at step {step} is read as {value}")
    whole = all(tag in found and np.array_equal(found[tag][1], right[tag][1]) for tag in right)
    if not whole and not told and damage is not delete and "warning: " in said.getvalue():
        raise Wrong(f"{what}: what a kill does is told as damage: {said.getvalue()}")
    return Judged("warning: " in said.getvalue(), what)


def written(tag: str, step: int) -> set[float]:
    """What was written at a step, by either process: where the second one's start is lost, the first one's counts."""
    starts = [start for start in (0, AGAIN) if start <= step]
    return {float(start + step / 4) for start in starts} if tag == "reward/mean" else {float(-step)}
