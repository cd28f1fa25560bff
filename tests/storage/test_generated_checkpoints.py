"""Damaged checkpoints, drawn from a seed: what is restored is a step to the bit, and a sentence names what is not."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dppo_jax.errors import UserError
from dppo_jax.storage.checkpoint import Checkpoints, restore_params
from tests.helpers.checkpoints import abstract, equal, limit, state, write

STEPS = (2, 4, 6)
CASES = 120
ALL_CASES = 12  # where no step is left whole
LIMIT_S = 30.0
GARBAGE = (
    "",
    "{",
    "null",
    "[]",
    "{}",
    "7",
    '"x"',
    '{"step": 6}',
    "\x00\x01",
    "[" * 3000,
    '{"step": ' + "9" * 5000 + "}",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("written") / "run", STEPS)


def files(step: Path) -> list[Path]:
    """Array data and metadata alike."""
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(step: Path, draw: random.Random) -> None:
    path = draw.choice([path for path in files(step) if path.stat().st_size])
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def overwrite(step: Path, draw: random.Random) -> None:
    path = draw.choice([path for path in files(step) if path.stat().st_size])
    data = bytearray(path.read_bytes())
    first = draw.randrange(len(data))
    part = data[first : first + draw.randint(1, 64)]
    data[first : first + len(part)] = draw.choice([bytes(len(part)), draw.randbytes(len(part))])
    path.write_bytes(data)


def cut(step: Path, draw: random.Random) -> None:
    path = draw.choice(files(step))
    os.truncate(path, draw.randrange(path.stat().st_size + 1))


def lengthen(step: Path, draw: random.Random) -> None:
    with open(draw.choice(files(step)), "ab") as file:
        file.write(draw.randbytes(draw.randint(1, 9)))


def delete(step: Path, draw: random.Random) -> None:
    for path in draw.sample(files(step), draw.randint(1, 3)):
        path.unlink()


def empty_folder(step: Path, draw: random.Random) -> None:
    folder = draw.choice([step, *sorted(path for path in step.rglob("*") if path.is_dir())])
    shutil.rmtree(folder)
    folder.mkdir()


def no_folder(step: Path, draw: random.Random) -> None:
    folder = draw.choice([step / "default", *sorted(path for path in (step / "default").rglob("*") if path.is_dir())])
    shutil.rmtree(folder)


def folder_instead(step: Path, draw: random.Random) -> None:
    path = draw.choice(files(step))
    path.unlink()
    path.mkdir()


def file_instead(step: Path, draw: random.Random) -> None:
    folder = draw.choice([step, *sorted(path for path in step.rglob("*") if path.is_dir())])
    shutil.rmtree(folder)
    folder.write_text("x")


def link_instead(step: Path, draw: random.Random) -> None:
    path = draw.choice(files(step))
    path.unlink()
    path.symlink_to(draw.choice(["nowhere", path.name, "/dev/full", "/dev/null"]))


def pipe_instead(step: Path, draw: random.Random) -> None:
    path = draw.choice(files(step))
    path.unlink()
    os.mkfifo(path)


def garbage(step: Path, draw: random.Random) -> None:
    path = draw.choice(
        [path for path in files(step) if path.name in ("_METADATA", "_CHECKPOINT_METADATA", "manifest.json")]
    )
    path.write_text(draw.choice(GARBAGE))


def change_value(step: Path, draw: random.Random) -> None:
    """JSON that stays JSON."""
    path = draw.choice([step / "_CHECKPOINT_METADATA", step / "default" / "_METADATA", step / "manifest.json"])
    found = json.loads(path.read_text())
    key = draw.choice(sorted(found))
    found[key] = draw.choice([None, 0, -1, "x", [], {}, 1e300])
    path.write_text(json.dumps(found))


def exchange(step: Path, draw: random.Random) -> None:
    """Of two files, or with the same file of another step."""
    one, two = draw.sample(files(step), 2)
    if draw.random() < 0.5:
        other = step.parent / "4" / one.relative_to(step)
        two = other if other.is_file() else two
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    if two.is_relative_to(step):
        two.write_bytes(first)


def duplicate(step: Path, draw: random.Random) -> None:
    path = draw.choice(files(step))
    shutil.copy(path, path.with_name(draw.choice(["copy", "0", path.name + "~", "manifest.ocdbt.1"])))


def duplicate_step(step: Path, draw: random.Random) -> None:
    shutil.copytree(step.parent / draw.choice("24"), step.parent / str(draw.randint(7, 10**17)))


def other_names(step: Path, draw: random.Random) -> None:
    for name in draw.sample(["7", "99", "abc", "-3", "8.5", "٧", "1e3", "08", ".hidden", "9" * 30, "manifest.json"], 4):
        draw.choice([Path.mkdir, Path.touch])(step.parent / name)
    (step.parent / f"8.orbax-checkpoint-tmp{draw.choice(['', '-17'])}").mkdir()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    flip, flip, flip, overwrite, cut, lengthen, delete, empty_folder, no_folder, folder_instead, file_instead,
    link_instead, pipe_instead, garbage, change_value, exchange, duplicate, duplicate_step, other_names,
)  # fmt: skip


def going_on(run: Path) -> int:
    """What an evaluation reads and what a run goes on from is one step, to the bit; it."""
    with limit(LIMIT_S):
        params = restore_params(run, abstract()["params"])
        with Checkpoints(run, keep=3) as checkpoints:
            step, found, notes = checkpoints.resume(lambda step: abstract())
            assert step in STEPS
            equal(found, state(step))
            equal(params, state(step)["params"])
            for newer in (number for number in STEPS if number > step):
                assert any(re.match(rf"checkpoint {newer} is damaged \(.+\)", note) for note in notes), notes
            for note in notes:
                assert "\n" not in note and "Traceback" not in note and len(note) < 500
            checkpoints.save(6, state(6), {"step": 6})  # nothing is in the way
        with Checkpoints(run, keep=3) as checkpoints:
            again = checkpoints.resume(lambda step: abstract())
            assert again.step == 6
            equal(again.state, state(6))
    return step


def test_a_damaged_newest_checkpoint(written, tmp_path, capfd):
    used = {step: 0 for step in STEPS}
    for case in range(CASES):
        draw, run = random.Random(case), tmp_path / str(case)
        shutil.copytree(written, run)
        damage = DAMAGES[case % len(DAMAGES)]
        damage(run / "checkpoints" / "6", draw)
        if draw.random() < 0.2:
            flip(run / "checkpoints" / "4", draw)
        try:
            used[going_on(run)] += 1
        except BaseException as error:
            error.add_note(f"case {case}: {damage.__name__}")
            raise
        shutil.rmtree(run)
    assert used[2] > 5 and used[4] > 50 and used[6] > 10, used  # 6: nothing but what does no harm
    assert "Traceback" not in capfd.readouterr().err


def test_no_whole_checkpoint(written, tmp_path):
    for case in range(ALL_CASES):
        draw, run = random.Random(case), tmp_path / str(case)
        shutil.copytree(written, run)
        for step in STEPS:
            draw.choice([flip, cut, empty_folder, file_instead, garbage])(run / "checkpoints" / str(step), draw)
        before = sorted(str(path) for path in run.rglob("*"))
        harmless = False
        with limit(LIMIT_S):
            try:
                restore_params(run, abstract()["params"])
                harmless = True  # a cut of nothing, a digit of the commit's time
            except UserError as error:
                assert re.search(
                    r"no checkpoint in .* is whole: checkpoint 6 is damaged \(.*checkpoint 2 is", str(error)
                )
            if not harmless:
                with pytest.raises(UserError, match="is whole: checkpoint 6"), Checkpoints(run, keep=3) as checkpoints:
                    checkpoints.resume(lambda step: abstract())
                assert sorted(str(path) for path in run.rglob("*")) == before
        shutil.rmtree(run)
