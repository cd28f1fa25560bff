"""Judges rows of data: a file loads as an independent reading of it, or is refused by its name and row."""

import random
from pathlib import Path

from dppo_jax.data.tasks import load_task
from dppo_jax.errors import UserError
from experiments.chaos.inputs.judge import Judge, Judged, Wrong, check_sentence
from experiments.chaos.inputs.row_texts import REFUSED, broken_lines, mutated_line, reading, values

PLACES = ("prompt", "messages", "answer", "source", "twice", "\u00e9")
BROKEN = 0.4  # of the lines are damaged as bytes
GOOD = b'{"prompt": "0+1=", "answer": "1"}'


def prepare(_: Path) -> Judge:
    """Needs no files."""
    return judge


def judge(draw: random.Random, case: Path) -> Judged:
    """One line between good ones."""
    file, place = case / "rows.jsonl", draw.choice(PLACES)
    broken = draw.random() < BROKEN
    line = draw.choice(broken_lines(draw)) if broken else mutated_line(draw, draw.choice(values(draw)), place)
    end, blank = draw.choice([b"\n", b"\r\n"]), draw.choice([0, 1, 2])
    file.write_bytes(end.join([GOOD, *[b" "] * blank, line, GOOD]) + draw.choice([b"", end]))
    expected, what = reading(line), f"{'bytes' if broken else place}: {line[:200]!r}"
    if not line.strip():
        return Judged(False, what)
    try:
        task = load_task("jsonl", path=str(file), verifier="exact_match")
    except UserError as error:
        said, row = str(error), 2 + blank
        check_sentence(said, 500)
        if expected is not REFUSED:
            raise Wrong(f"{what}: refused: {said}") from None
        if not said.startswith(tuple(f"{file}, row {row}{mark}" for mark in (":", " ", ","))):
            raise Wrong(f"{what}: refused without its row {row}: {said}") from None
        return Judged(True, what)
    found = task.examples[1].prompt, task.examples[1].answer
    if expected is REFUSED or found != expected:
        raise Wrong(f"{what}: taken as {found!r:.300}, and is {expected!r:.300}")
    return Judged(False, what)
