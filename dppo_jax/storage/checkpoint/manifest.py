"""Whether a checkpoint on disk is whole: every file's size and SHA-256, written into the step's folder with it.

`seal` runs before orbax renames the finished folder to its step, so that a step is there with its manifest or not at
all. What earlier versions wrote has none: a flipped bit in their arrays cannot be told. In a bucket (`buckets`) the
manifest has the bucket's own checksums. Nothing here imports jax.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dppo_jax.errors import UserError, of_files, reason
from dppo_jax.files import (
    Path,
    files_in,
    is_bucket,
    move_tree,
    names_in,
    read_json_object,
    remove_tree,
    size_of,
    to_path,
    write_text,
)
from dppo_jax.storage.checkpoint.buckets import COMMIT, stored_files

NAME = "manifest.json"
MARK = {"manifest": NAME}  # an entry of orbax's metadata of a step: says that the step has a manifest
THREADS = 8  # hashing frees the interpreter

_METADATA = "_CHECKPOINT_METADATA"  # orbax writes the time of the commit into it after the manifest
_COMMIT_TIME = "commit_timestamp_nsecs"
_ALL_READ = "default/array_metadatas/process_"  # orbax reads all that begin so; else it reads what it has listed
_STEP = re.compile("0|[1-9][0-9]{0,17}", re.ASCII)
_LEFT = re.compile(r"[0-9]+\.(orbax-checkpoint-tmp.*|deleted)|\.probe-.*", re.ASCII)  # names that a killed run leaves


class Entries(NamedTuple):
    """What the folder of all checkpoints holds."""

    steps: list[int]  # increasing
    left: list[str]  # half written or half deleted when a run was killed
    others: list[str]  # names that are neither


def entries(folder: Path) -> Entries:
    """By name alone; in a bucket a step that is not whole yet is left. UserError where the folder cannot be read."""
    try:
        names = names_in(folder)
    except Exception as error:
        if not of_files(error):
            raise
        raise UserError(f"the folder {str(folder)!r} cannot be read: {reason(error)}") from None
    steps = [name for name in names if _STEP.fullmatch(name)]
    left = [name for name in names if _LEFT.fullmatch(name)]
    others = [name for name in names if not _STEP.fullmatch(name) and not _LEFT.fullmatch(name)]
    if is_bucket(folder):
        part = [name for name in steps if not all((folder / name / last).exists() for last in (NAME, COMMIT))]
        steps, left = [name for name in steps if name not in part], left + part
    return Entries(sorted(map(int, steps)), left, others)


def is_step(name: str) -> bool:
    """Whether a name is a step's, without leading zeros."""
    return _STEP.fullmatch(name) is not None


def seal(folder: Path, step: int, about: dict[str, Any], sums: dict[str, str]) -> None:
    """Writes the manifest of a step's folder, whose files are all there, to disk; `sums` are those of its arrays.
    OSError."""
    metadata, files = _metadata(folder / _METADATA), _files(folder)
    body = {"step": step, "about": about, "sums": sums, "metadata": metadata, "files": files}
    text = json.dumps(body | {"sha256": _of_body(body)})
    if is_bucket(folder):
        write_text(folder / NAME, text)
        return
    with open(folder / NAME, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _files(folder: Path) -> dict[str, Sequence[Any]]:
    """Size and checksum of every file but those that are written after the others."""
    last = (NAME, _METADATA, COMMIT)
    if is_bucket(folder):
        return {name: about for name, about in sorted(stored_files(folder).items()) if name not in last}
    names = [name for name in (str(path.relative_to(folder)) for path in files_in(folder)) if name not in last]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name), names))
    return {name: (size_of(folder / name), digest) for name, digest in zip(names, digests, strict=True)}


def about(folder: Path) -> dict[str, Any]:
    """What was stored with a step; {} without a manifest. UserError where the manifest is damaged."""
    return _read(folder)["about"] if (folder / NAME).exists() else {}


def sums(folder: Path) -> dict[str, str]:
    """Those of a step's arrays; {} of a step of an earlier version. UserError where the manifest is damaged."""
    return _read(folder).get("sums", {}) if (folder / NAME).exists() else {}


def sealed(folder: Path) -> bool:
    """Whether a step's folder has a manifest."""
    return (folder / NAME).is_file()


def damage(folder: Path, step: int, *, read: bool = True, from_disk: bool = False) -> str | None:
    """What is wrong with a step's folder, its file named from the run's folder on; None: nothing is.

    Every byte is read, or with read=False the files' sizes alone; with from_disk=True what is in memory of the files is
    put on the disk and forgotten before, where the system can. In a bucket its own checksums tell. Without a manifest
    the arrays' bytes are not checked.
    """
    try:
        if not folder.is_dir():
            return f"{_shown_path(folder)} is no folder"
        if not any(folder.iterdir()):
            return f"{_shown_path(folder)} is empty"
        if not (folder / NAME).exists():
            return _without_manifest(folder)
        body = _read(folder)
        if body["step"] != step:
            return f"{_shown_path(folder / NAME)} is that of step {body['step']}"
        if body["metadata"] != _metadata(folder / _METADATA):
            return f"{_shown_path(folder / _METADATA)}: its entries are not those written"
        if from_disk and not is_bucket(folder):
            for name in body["files"]:
                _forget(folder / name)
        return _first_damaged(folder, body["files"], read)
    except OSError as error:
        return f"{_shown_path(to_path(error.filename or folder))} cannot be read: {reason(error)}"
    except UserError as error:
        return str(error)


def _without_manifest(folder: Path) -> str | None:
    """Earlier versions wrote none; the mark in orbax's metadata says that there was one."""
    for path in folder.rglob("*"):
        if not path.is_file() and not path.is_dir():  # such as a pipe, which would be waited for
            return f"{_shown_path(path)} is no file"
    try:
        marked = (_metadata(folder / _METADATA).get("custom_metadata") or {}).get("manifest") == NAME
    except (OSError, UserError, AttributeError):
        marked = False
    return f"{_shown_path(folder / NAME)} is missing" if marked else None


def _first_damaged(folder: Path, files: dict[str, list[Any]], read: bool) -> str | None:
    """The first file that is not as it was written."""
    if is_bucket(folder):
        return _first_replaced(folder, files)
    if added := _added(folder, files, (str(path.relative_to(folder)) for path in folder.glob(f"{_ALL_READ}*"))):
        return added
    for name, (size, _) in files.items():
        path = folder / name
        if not path.exists():
            return f"{_shown_path(path)} is missing"
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{_shown_path(path)} is no file"
        if status.st_size != size:
            return f"{_shown_path(path)} has {status.st_size} bytes, not the {size} written"
    if not read:
        return None
    with ThreadPoolExecutor(THREADS) as pool:
        digests: Iterable[str] = pool.map(lambda name: _digest(folder / name), files)
        for (name, (_, digest)), found_digest in zip(files.items(), digests, strict=True):
            if digest != found_digest:
                pool.shutdown(cancel_futures=True)
                return f"{_shown_path(folder / name)}: its bytes are not those written"
    return None


def _added(folder: Path, files: Iterable[str], there: Iterable[str]) -> str | None:
    """The first of the files `there` that orbax would read beside those that were written."""
    added = sorted(name for name in set(there).difference(files) if name.startswith(_ALL_READ))
    return f"{_shown_path(folder / added[0])} is there, and was not written with the step" if added else None


def _first_replaced(folder: Path, files: dict[str, list[Any]]) -> str | None:
    """The same in a bucket."""
    stored = stored_files(folder)
    for name, (size, checksum) in files.items():
        if name not in stored:
            return f"{_shown_path(folder / name)} is missing"
        if stored[name][0] != size:
            return f"{_shown_path(folder / name)} has {stored[name][0]} bytes, not the {size} written"
        if stored[name][1] != checksum:
            return f"{_shown_path(folder / name)}: its bytes are not those written"
    return _added(folder, files, stored)


def _read(folder: Path) -> dict[str, Any]:
    """UserError where the manifest is not as it was written."""
    path = folder / NAME
    if not path.is_file():
        raise UserError(f"{_shown_path(path)} is no file")
    try:
        body = read_json_object(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), _shown_path(path))) from None
    if body.pop("sha256", None) != _of_body(body):
        raise UserError(f"{_shown_path(path)}: its bytes are not those written")
    return body


def _metadata(path: Path) -> dict[str, Any]:
    """Orbax's metadata of a step, but for the time of the commit. OSError, UserError."""
    if path.exists() and not path.is_file():
        raise UserError(f"{_shown_path(path)} is no file")
    try:
        metadata = read_json_object(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), _shown_path(path))) from None
    return {name: value for name, value in metadata.items() if name != _COMMIT_TIME}


def _of_body(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _forget(path: Path) -> None:
    """Has the next reader of a file read the disk. Nothing where it is none, or the system cannot. OSError."""
    if not path.is_file() or not hasattr(os, "posix_fadvise"):
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shown_path(path: Path) -> str:
    """A path inside WORKDIR/checkpoints, from there on."""
    parts = path.parts
    if "checkpoints" not in parts:
        return str(path)
    return "/".join(parts[len(parts) - 1 - parts[::-1].index("checkpoints") :])


def remove(path: Path) -> None:
    """A file, a link, or a folder with all that it holds; by another name first, lest a kill leave half. In a bucket
    what makes a step whole goes first. OSError."""
    if is_bucket(path):
        for name in (COMMIT, NAME):
            (path / name).unlink(missing_ok=True)
        remove_tree(path)
    elif path.is_dir() and not path.is_symlink():
        if not _LEFT.fullmatch(path.name):
            path = path.rename(path.with_name(f"{path.name}.deleted"))
        remove_tree(path)
    else:
        path.unlink()


def set_aside(folder: Path, destination: Path) -> Path:
    """Moves a step's folder into `destination`, under its name or the next free one; returns the new path. OSError."""
    if not is_bucket(destination):
        destination.mkdir(exist_ok=True)
    target, number = destination / folder.name, 1
    while target.exists() or (not is_bucket(target) and os.path.lexists(target)):
        target, number = destination / f"{folder.name}.{number}", number + 1
    move_tree(folder, target)
    return target
