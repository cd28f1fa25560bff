"""Ways in which the folder of a step can be damaged; each takes the folder, whose neighbour is that of step 4."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

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
        made = step.parent / name
        if draw.random() < 0.5:
            made.mkdir()
        else:
            made.touch()
    (step.parent / f"8.orbax-checkpoint-tmp{draw.choice(['', '-17'])}").mkdir()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    flip, flip, flip, overwrite, cut, lengthen, delete, empty_folder, no_folder, folder_instead, file_instead,
    link_instead, pipe_instead, garbage, change_value, exchange, duplicate, duplicate_step, other_names,
)  # fmt: skip
