"""Checkpoints of a run: orbax, asynchronous, the newest few kept. Step s means: s steps are done."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dppo_jax.errors import UserError
from dppo_jax.files import make_folder
from dppo_jax.models.decoder import LOG_SIGMA


def abstract_state(state: Any, shardings: Any) -> Any:
    """Shapes, dtypes and places, for `restore`."""
    place = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, state, shardings)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in flat}


def _compare(step: int, saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """UserError where a checkpoint's shapes are not those of the config."""
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            raise UserError(
                f"checkpoint {step} of this run does not fit the config's model: {name} is {there} there and "
                f"{here} here"
            )


class Checkpoints:
    """The folder WORKDIR/checkpoints. Close it, or use it in a `with`: saving goes on in the background.

    UserError where the folder cannot be made.
    """

    def __init__(self, workdir: str | Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        folder = (Path(workdir) / "checkpoints").absolute()
        make_folder(folder)
        self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=ocp.StandardCheckpointHandler())

    def latest(self) -> int | None:
        """The newest step saved whole, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Copies the state and writes it in the background. A step that is there already stays."""
        if step != self.latest():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def holds(self, step: int, name: str) -> bool:
        """Whether a step's state has something of this name."""
        return name in dict(self._manager.item_metadata(step))

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of a step, laid out as `abstract` says. UserError if it is of another shape."""
        _compare(step, _shapes(self._manager.item_metadata(step)), _shapes(abstract))
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Waits until all is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _place(leaf: Any) -> ocp.RestoreArgs:
    """Where a leaf goes, whatever devices it was saved from."""
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype)


def restore_params(directory: str | Path, abstract_params: Any) -> Any:
    """The parameters alone of the newest checkpoint of a run, or of one step's folder WORKDIR/checkpoints/STEP.

    A leaf of `abstract_params` that names a sharding is laid out so; others come as NumPy arrays. What else a run
    trains beside its layers (the deviation of its noise) is left out. UserError if they are of other shapes.
    """
    directory = Path(directory).absolute()
    if directory.name.isdigit() and directory.parent.name == "checkpoints":
        folder, step = directory.parent, int(directory.name)
    else:
        folder, step = directory / "checkpoints", None
    if not folder.is_dir():
        raise UserError(f"{directory} holds no checkpoints; give a run's folder, or its checkpoints/STEP")
    reading = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    with ocp.CheckpointManager(folder, options=reading, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        steps = manager.all_steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(
                f"{folder} has no whole checkpoint{'' if step is None else f' {step}'}; steps: {sorted(steps)}"
            )
        step = max(steps) if step is None else step
        wanted = {"params": abstract_params}
        saved = dict(manager.item_metadata(step))["params"]
        saved = {name: value for name, value in saved.items() if name != LOG_SIGMA or name in abstract_params}
        _compare(step, _shapes(saved), _shapes(abstract_params))
        restore = ocp.args.PyTreeRestore(wanted, restore_args=jax.tree.map(_place, wanted), partial_restore=True)
        return manager.restore(step, args=restore)["params"]
