"""Checkpoints on disk, read: the newest whole step, its state, the parameters alone.

A step is whole where every file is as it was written (`manifest`). What orbax logs is dropped: its errors are raised
here, each as one sentence.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dppo_jax.devices.hosts import everyones, is_writer
from dppo_jax.errors import UserError, first_line
from dppo_jax.files import Path, absolute, is_bucket, to_path
from dppo_jax.models.decoder import LOG_SIGMA
from dppo_jax.storage.checkpoint import manifest
from dppo_jax.storage.checkpoint.buckets import teach_orbax_s3
from dppo_jax.storage.checkpoint.sums import changed_leaf

T = TypeVar("T")

ITEM = "default"  # orbax's name of the one thing that a step holds


class Damaged(UserError):
    """A checkpoint that cannot be read. `what`: the file, and what is wrong with it; `everywhere`: every process has
    found the same."""

    def __init__(self, step: int, what: str, *, everywhere: bool = False):
        super().__init__(f"checkpoint {step} is damaged ({what})")
        self.what, self.everywhere = what, everywhere


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in flat}


def compare(step: int, in_checkpoint: dict[str, tuple[int, ...]], in_config: dict[str, tuple[int, ...]]) -> None:
    """UserError where a checkpoint's shapes are not those of the config."""
    for name in sorted(in_checkpoint.keys() | in_config.keys()):
        saved_shape, config_shape = in_checkpoint.get(name, "absent"), in_config.get(name, "absent")
        if saved_shape != config_shape:
            raise UserError(
                f"checkpoint {step} of this run does not fit the config's model: {name} is {saved_shape} there and "
                f"{config_shape} here"
            )


def agree(find: Callable[[], T]) -> T:
    """What process 0 finds, as JSON keeps it, on every process; its UserError too."""
    if jax.process_count() == 1:
        return find()
    text = ""
    if is_writer():
        try:
            text = json.dumps({"found": find()})
        except UserError as error:
            text = json.dumps({"refused": str(error)})
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))  # json.dumps writes ASCII
    letters = np.frombuffer(text.encode().ljust(size), np.uint8)
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(letters), np.uint8)))
    if "refused" in answer:
        raise UserError(answer["refused"])
    return answer["found"]


class Found(NamedTuple):
    """What a search for the newest whole checkpoint found."""

    step: int | None  # the newest whole one; None: the folder has no step
    damaged: list[tuple[int, str]]  # newer steps, and what is wrong with each
    others: list[str]  # names in the folder that are no step


def find_newest(folder: Path, unreadable: dict[int, str], *, mend: str) -> Found:
    """Reads every byte of the newest step, and of older ones until one is whole.

    unreadable: what is wrong with steps that could not be restored. UserError if there are steps and none is whole,
    which ends with `mend`: what can be done beside putting back a copy.
    """
    listed = manifest.entries(folder)
    damaged: list[tuple[int, str]] = []
    for step in reversed(listed.steps):
        fault = unreadable.get(step) or manifest.damage(folder / str(step), step) or _unlike_orbax(folder, step)
        if fault is None:
            return Found(step, damaged, listed.others)
        damaged.append((step, fault))
    if damaged:
        faults = "; ".join(f"checkpoint {step} is damaged ({fault})" for step, fault in damaged)
        raise UserError(f"no checkpoint in {str(folder)!r} is whole: {faults}. Put back a copy of one, or {mend}")
    return Found(None, damaged, listed.others)


def _unlike_orbax(folder: Path, step: int) -> str | None:
    """Without a manifest: orbax's error, if it cannot read the step's tree."""
    if manifest.sealed(folder / str(step)):
        return None
    try:
        saved_tree(folder, step)
    except Damaged as error:
        return error.what
    return None


def newest_by_size(folder: Path) -> int | None:
    """The newest step whose files are there with their sizes."""
    try:
        steps = manifest.entries(folder).steps
    except UserError:
        return None
    return next((s for s in reversed(steps) if manifest.damage(folder / str(s), s, read=False) is None), None)


def saved_tree(folder: Path, step: int) -> Any:
    """The tree of what a step holds: shapes and dtypes. UserError; Damaged."""
    try:
        return ocp.StandardCheckpointHandler().metadata(epath.Path(folder / str(step) / ITEM))
    except Exception as error:
        raise _fault(folder, step, error) from error


def restore_item(folder: Path, step: int, handler: Any, arguments: Any) -> Any:
    """What a step holds. UserError; Damaged."""
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(folder / str(step) / ITEM, args=arguments)
    except Exception as error:
        raise _fault(folder, step, error) from error


def check_sums(folder: Path, step: int, state: Any) -> None:
    """Damaged, by its first such leaf, where what was restored of a step is not what was saved. Steps of earlier
    versions say nothing."""
    wanted = agree(lambda: manifest.sums(folder / str(step)))
    for leaf in filter(None, everyones(changed_leaf(wanted, state))):
        what = f"{folder.name}/{step}/{ITEM}: what is restored of {leaf} is not what was saved"
        raise Damaged(step, what, everywhere=True)


def _fault(folder: Path, step: int, error: Exception) -> UserError:
    """Damaged, unless a manifest has shown that the bytes are right, or the devices are to blame."""
    if manifest.sealed(folder / str(step)) or isinstance(error, jax.errors.JaxRuntimeError | MemoryError):
        return UserError(f"checkpoint {step} could not be restored: {reason(error)}")
    return Damaged(step, f"{folder.name}/{step}/{ITEM}: {reason(error)}")


def reason(error: BaseException) -> str:
    """What the system said, if it is behind another library's error, else that error's first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    match = re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))  # tensorstore's
    return os.strerror(int(match[1] or match[2])) if match else first_line(error)


def prepare(folder: Path) -> None:
    """Before orbax is used: it knows the kind of the folder, and keeps to itself what it logs and what late callbacks
    of a failed save say."""
    if str(folder).startswith("s3://"):
        teach_orbax_s3()
    logging.getLogger("absl").addFilter(_not_orbax)
    logging.getLogger("asyncio").addFilter(_retrieved)
    if sys.unraisablehook is not _unless_late:
        _hooks[:] = [sys.unraisablehook]
        sys.unraisablehook = _unless_late


_hooks: list[Callable[[Any], Any]] = []


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname.split(os.sep)


def _retrieved(record: logging.LogRecord) -> bool:
    """Of several writes that fail, orbax asks one for its error, which is told."""
    return "exception was never retrieved" not in record.getMessage()


def _unless_late(unraisable: Any) -> None:
    """Tensorstore's threads call event loops that orbax closed when the first of several writes failed."""
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        _hooks[0](unraisable)


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    """Where a leaf goes, whatever devices it was saved from."""
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype)


def restore_params(directory: str | Path, abstract_params: Any) -> Any:
    """The parameters alone of the newest whole checkpoint of a run, or of one step's folder WORKDIR/checkpoints/STEP.

    A leaf of `abstract_params` that names a sharding is laid out so; others come as NumPy arrays. What else a run
    trains beside its layers (the deviation of its noise) is left out. Nothing is moved or written; damaged steps that
    are passed over are told on stderr. UserError if none is whole, or they are of other shapes.
    """
    folder, chosen_step = _place(directory)
    prepare(folder)
    unreadable: dict[int, str] = {}
    while True:
        step = _choose(folder, chosen_step, unreadable)
        try:
            return _restore_params(folder, step, abstract_params)
        except Damaged as error:
            if chosen_step is not None or (jax.process_count() > 1 and not error.everywhere):
                raise
            unreadable[step] = error.what


def step_folder(directory: str | Path) -> Path:
    """The folder of the step whose parameters `restore_params` gives. UserError as there."""
    folder, chosen_step = _place(directory)
    return folder / str(_choose(folder, chosen_step, {}))


def _place(directory: str | Path) -> tuple[Path, int | None]:
    """The folder of checkpoints, and the step that is named. UserError."""
    directory = absolute(to_path(directory))
    if manifest.is_step(directory.name) and directory.parent.name == "checkpoints":
        folder, chosen_step = directory.parent, int(directory.name)
    else:
        folder, chosen_step = directory / "checkpoints", None
    if not folder.is_dir():
        refuse_part_of_a_sweep(directory)
        raise UserError(f"{directory} holds no checkpoints; give a run's folder, or its checkpoints/STEP")
    return folder, chosen_step


def refuse_part_of_a_sweep(workdir: Path) -> None:
    """UserError for the folder of one run of a sweep, whose checkpoints are further up. What stands there and cannot be
    read is no sweep's that this user could go on with."""
    workdir = absolute(to_path(workdir))
    for sweep in workdir.parents[:2]:
        if is_bucket(sweep) and len(sweep.parts) < 3:  # above the bucket
            break
        name = str(workdir.relative_to(sweep))
        if any(name in _runs_of(folder) for folder in sweep.glob("checkpoints/*") if manifest.is_step(folder.name)):
            raise UserError(
                f"{workdir} is a run of the sweep in {sweep}, which has its checkpoints: experiments.sweep goes on "
                "with it, and with checkpoint.export=True leaves a policy/ of every run"
            )


def _runs_of(folder: Path) -> list[str]:
    """The runs of a step's folder: "." for a single one, the folders of a sweep's; none where it does not say."""
    try:
        return list(manifest.about(folder).get("runs", {}))
    except (UserError, OSError):
        return []


def _choose(folder: Path, chosen_step: int | None, unreadable: dict[int, str]) -> int:
    """The step to read: the one that is named, or the newest whole one. UserError."""

    def find() -> int:
        steps = manifest.entries(folder).steps
        if not steps or (chosen_step is not None and chosen_step not in steps):
            which = "" if chosen_step is None else f" {chosen_step}"
            raise UserError(f"{folder} has no whole checkpoint{which}; steps: {steps}")
        if chosen_step is not None:
            if fault := manifest.damage(folder / str(chosen_step), chosen_step):
                raise Damaged(chosen_step, fault)
            return chosen_step
        newest = find_newest(folder, unreadable, mend="give another run's folder")
        assert newest.step is not None
        for number, fault in newest.damaged:
            print(f"checkpoint {number} is damaged ({fault}); taking checkpoint {newest.step}", file=sys.stderr)
        return newest.step

    return agree(find)


def _restore_params(folder: Path, step: int, abstract_params: Any) -> Any:
    if (runs := _runs_of(folder / str(step))) not in ([], ["."]):
        raise UserError(
            f"{folder} holds checkpoints of a sweep, all its runs in one; with checkpoint.export=True a sweep leaves a "
            f"policy/ of every run, such as {folder.parent / runs[0] / 'policy'}"
        )
    abstract = {"params": abstract_params}
    saved = dict(saved_tree(folder, step))["params"]
    saved = {name: value for name, value in saved.items() if name != LOG_SIGMA or name in abstract_params}
    compare(step, shapes(saved), shapes(abstract_params))
    leaf_arguments = jax.tree.map(_restore_args, abstract)
    arguments = ocp.args.PyTreeRestore(abstract, restore_args=leaf_arguments, partial_restore=True)
    state = restore_item(folder, step, ocp.PyTreeCheckpointHandler(), arguments)
    check_sums(folder, step, state)
    return state["params"]
