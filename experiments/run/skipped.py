"""Updates that were skipped, since a number of theirs was not finite: told, kept for experiments.replay, and too many
in a row end the run."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from dppo_jax.devices import hosts
from dppo_jax.errors import UserError, reason
from dppo_jax.files import Path, make_folder, names_in, written_whole
from dppo_jax.metrics import Metrics
from dppo_jax.packing import Plan
from dppo_jax.skipping import FAULTS
from dppo_jax.storage.run_config import write_config
from dppo_jax.train_step import TrainState
from dppo_jax.types import TrainBatch
from experiments.run.ranges import is_own
from experiments.run.runs import Runs

MOST_KEPT = 3  # of one run's folder; each is as large as the parameters
FILE = "update.safetensors"  # beside the run's config.json
WHO = {"update/skipped": "", "critic/skipped": "the critic's "}


class Update(NamedTuple):
    """What went into an optimizer step, and what it measured."""

    batch: TrainBatch
    plan: Plan
    behavior_params: Any
    metrics: Metrics


class TooMany(UserError):
    """So many updates in a row were skipped that the run ends; those after the first `moved` steps moved nothing."""

    def __init__(self, sentence: str, moved: int):
        super().__init__(sentence)
        self.moved = moved


class Skipped:
    """Of a run, or of several that are trained together; `folders` are theirs, by the name that a sentence gives them,
    "" for a single one."""

    def __init__(self, runs: Runs, folders: Mapping[str, Path]):
        self._runs, self._folders = runs, folders
        self._most = runs.base.config.train.max_skipped
        self._at = (-1, -1)  # the step, and the update's number in it, from 0
        self._in_row = [dict.fromkeys(WHO, 0) for _ in folders]
        self._moved = [0 for _ in folders]  # how many steps had done something when those in a row began
        self._kept = ["" for _ in folders]  # where the first of them is

    def look(self, step: int, update: Update, state: TrainState) -> list[str]:
        """Waits for the update, so that none follows a skipped one before it is kept: sentences on those skipped.

        `state` is the one after it, which of a skipped one has the parameters before it. UserError where a run has
        train.max_skipped in a row.
        """
        self._at = step, self._at[1] + 1 if step == self._at[0] else 0
        told = []
        faults = {tag: update.metrics.histograms.get(f"not_finite/{tag}") for tag in WHO}
        by_run = self._runs.apart(jax.device_get({tag: x for tag, x in faults.items() if x is not None}))
        for number, of_run in enumerate(by_run):
            for tag, not_finite in of_run.items():
                if not not_finite.any():
                    self._in_row[number][tag] = 0
                    continue
                told.append(self._skip(update, state, number, tag, not_finite))
                if self._in_row[number][tag] >= self._most:
                    raise TooMany(self._sentence(number, tag), self._moved[number])
        return told

    def _skip(self, update: Update, state: TrainState, number: int, tag: str, not_finite: np.ndarray) -> str:
        """Counts one, and keeps it. A sentence."""
        kept = self._keep(update, state, number) if tag == "update/skipped" else ""
        if self._in_row[number][tag] == 0:
            step, minibatch = self._at
            self._moved[number], self._kept[number] = step + (minibatch > 0), kept
        self._in_row[number][tag] += 1
        which = FAULTS[int(np.argmax(not_finite))]  # what comes after it is not finite either
        where = f"{self._where(number)}: {WHO[tag]}update {self._at[1]}"
        return f"{where} is skipped, since its {which} is not finite{kept and f'; its minibatch is {kept}'}"

    def _sentence(self, number: int, tag: str) -> str:
        count, kept = self._in_row[number][tag], self._kept[number]
        who = WHO[tag] or "the "
        skipped = f"{who}last {count} updates were" if count > 1 else f"{who}update {self._at[1]} was"
        first = "the first one's" if count > 1 else "its"
        return (
            f"{self._where(number)}: {skipped} skipped, since not all numbers were finite, so training stops"
            f"{kept and f'; {first} minibatch is {kept}'}"
        )

    def _where(self, number: int) -> str:
        name = list(self._folders)[number]
        return f"step {self._at[0]}{name and f', {name}'}"

    def _keep(self, update: Update, state: TrainState, number: int) -> str:
        """What experiments.replay reads, written by process 0; all hosts must call this. Where it lies, in words."""
        setup = self._runs.setups[number]
        folder = list(self._folders.values())[number] / "skipped"
        try:
            held = [name for name in names_in(folder) if "_" in name] if folder.is_dir() else []
        except OSError:
            held = []
        folder /= "_".join(map(str, self._at))
        full = len(held) >= MOST_KEPT and folder.name not in held
        if hosts.everyones(full)[0]:  # process 0 knows what is there
            return f"not kept, since {folder.parent} has {len(held)} already"
        behavior = update.behavior_params if self._runs.needs_exact else {}
        tree = {"params": state.params, "behavior_params": behavior, "batch": _fields(update.batch)}
        arrays = named(self._runs.alone(tree | {"plan": _fields(update.plan)}, number))
        whole = {key: _whole(array) for key, array in arrays.items()}
        about = {
            "step": self._at[0],
            "update": self._at[1],
            "updates": int(self._runs.alone(jax.device_get(state.updates), number)) - 1,
            "shape": update.plan.shape,
            "setup": type(setup).__name__,
        }
        if not hosts.is_writer():
            return f"kept in {folder}"
        try:
            write_config(folder, setup.config.to_dict())
            make_folder(folder)
            with written_whole(folder / FILE) as path:
                save_file(whole, path, metadata={"about": json.dumps(about)})
        except (UserError, OSError) as error:
            return f"not kept: {reason(error)}"
        more = "" if is_own(setup.config.loss.name) else " --config FILE"
        return f"kept in {folder} (python -m experiments.replay {folder}{more})"


def _fields(tree: Any) -> dict[str, Any]:
    """The arrays of a batch or a plan by name."""
    return {name: value for name, value in vars(tree).items() if value is not None and name != "shape"}


def named(tree: Any) -> dict[str, Any]:
    """The leaves of nested dictionaries by their keys, such as params/layers/q_proj."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _whole(array: Any) -> np.ndarray:
    """In NumPy, of all hosts, which must all call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(jax.device_get(array), order="C")
