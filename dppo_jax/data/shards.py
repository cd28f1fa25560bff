"""The files that data.path names: one, those of a folder, or those of a pattern."""

import glob
import os
import re

from dppo_jax.data.shapes import shown
from dppo_jax.errors import UserError, reason
from dppo_jax.files import Path, files_in, filesystem, is_bucket, to_path, user_path

_SPLITS = {"train": "train", "training": "train", "test": "test", "eval": "eval"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def shards(kind: str, path: str) -> list[Path]:
    """The files of a data.path, sorted by name. kind: how their names end in a folder, jsonl or parquet.

    Of a folder its own files count, or, where it has none, those of all folders inside; hidden ones never do.
    Raises: UserError where there are none, or where a folder holds files of several splits.
    """
    place = user_path(path, "data.path", pattern=True)
    if _is("file", place):
        return [place]
    if _is("dir", place):
        files = _visible(place, kind)
        if not files:
            raise UserError(f"data.path: the folder {shown(path, 200)} holds no *.{kind}, and no folder inside does")
        _check_splits(place, files)
        return files
    if glob.has_magic(str(place)):
        try:
            found = _matching(place)
        except (OSError, re.error):
            found = []
        files = [file for file in found if _is("file", file)]
        if files:
            return files
    hint = ""
    if any(mark in path for mark in "*?[,"):
        hint = "; it names one file, a folder of them, or a pattern such as DIR/train-*." + kind
    raise UserError(f"data.path: there is no file {shown(path, 200)}{hint}")


def _is(what: str, path: Path) -> bool:
    try:
        return path.is_dir() if what == "dir" else path.is_file()
    except OSError:  # a name that is too long
        return False


def _matching(pattern: Path) -> list[Path]:
    """What a pattern matches, sorted."""
    if is_bucket(pattern):
        scheme = str(pattern).partition("://")[0]
        return sorted(to_path(f"{scheme}://{name}") for name in filesystem(pattern).glob(str(pattern)))
    return sorted(map(to_path, glob.glob(str(pattern), recursive=True)))


def _visible(folder: Path, kind: str) -> list[Path]:
    """A folder's own files of a kind or, where it has none, those of all folders inside."""
    try:
        files = [file for file in files_in(folder) if file.suffix == f".{kind}"]
    except OSError as error:
        raise UserError(f"data.path: {os.fspath(folder)!r:.200} cannot be read: {reason(error)}") from None
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return [file for file in files if file.parent == folder] or files


def _check_splits(folder: Path, files: list[Path]) -> None:
    """A run must not train on the test set that lies beside."""
    of_split: dict[str, str] = {}
    for file in files:
        name = str(file.relative_to(folder))
        split = next((_SPLITS[word] for word in re.split("[^a-z]+", name.lower()) if word in _SPLITS), None)
        if split:
            of_split.setdefault(split, name)
    if len(of_split) > 1:
        one, other = map(shown, list(of_split.values())[:2])
        raise UserError(
            f"data.path: the folder {shown(str(folder), 200)} holds several splits, such as {one} and {other}; name "
            "the files of one by a pattern"
        )
