"""What a run left: its checkpoints, its log, and in what it is not the undisturbed one."""

from collections.abc import Iterator

import numpy as np

from dppo_jax.errors import UserError
from dppo_jax.files import Path, files_in, names_in
from dppo_jax.storage.run_log import MACHINE, read_scalars


def steps_of(folder: Path) -> list[int]:
    """Of the checkpoints, by name."""
    saved = folder / "checkpoints"
    return sorted(int(name) for name in names_in(saved) if name.isdigit()) if saved.is_dir() else []


def logged(folder: Path) -> int:
    """Steps that the log has."""
    try:
        return len(read_scalars(folder)["reward/mean"][0])
    except (UserError, KeyError, OSError):
        return 0


def bytes_of(folder: Path) -> list[int]:
    """Of every file in it."""
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


def differences(one: Path, two: Path) -> list[str]:
    """What is not the same in two runs, bit for bit: their logs, but for the machine's tags, and exported models."""
    return [*_of_logs(one, two), *_of_exports(one, two)]


def _of_logs(one: Path, two: Path) -> Iterator[str]:
    first, second = read_scalars(one), read_scalars(two)
    if first.keys() != second.keys():
        yield f"other tags are logged: {sorted(first.keys() ^ second.keys())[:5]}"
    for tag in sorted(first.keys() & second.keys()):
        if tag.startswith(MACHINE):
            continue
        (steps, values), (other_steps, others) = first[tag], second[tag]
        if list(steps) != list(other_steps):
            yield f"{tag} is logged at other steps"
        elif not np.array_equal(values, others, equal_nan=True):
            same = (values == others) | (np.isnan(values) & np.isnan(others))
            yield f"{tag} differs from step {steps[int(np.argmin(same))]} on"


def _of_exports(one: Path, two: Path) -> Iterator[str]:
    for name in ("policy", "adapter"):
        first, second = (
            {path.name: path.read_bytes() for path in files_in(folder / name)} if (folder / name).is_dir() else {}
            for folder in (one, two)
        )
        for file in sorted(first.keys() | second.keys()):
            if first.get(file) != second.get(file):
                yield f"{name}/{file} is another"
