"""How a run goes on from its checkpoints, and when and what it saves."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dppo_jax.devices import hosts, peers
from dppo_jax.errors import Stopped, UserError, WriteError
from dppo_jax.files import Path, make_folder
from dppo_jax.models.decoder import Params
from dppo_jax.models.hf import place_params
from dppo_jax.storage.checkpoint import (
    Checkpoints,
    Retention,
    compile_sums,
    differences,
    made_by,
    refuse_part_of_a_sweep,
)
from dppo_jax.storage.lock import locked
from dppo_jax.storage.run_config import read_config
from experiments.run import disk
from experiments.run.identity import compare, edits, rate_change, same_runs
from experiments.run.learner import Learner
from experiments.run.run_folder import RunFolder
from experiments.run.runs import Runs

AGAIN = "started again, the run goes on from its checkpoint"
BEGINS = "started again, the run begins anew"


class Drawn(Protocol):
    """What a checkpoint holds beside the learner's state: see `Sampler`."""

    def saved(self) -> dict[str, Any]: ...

    def shapes(
        self, step: int, params: Any, policy: Any, held: Callable[[str], Any] | None = None
    ) -> dict[str, Any]: ...

    def restore(self, saved: dict[str, Any], params: Params, frozen: Params, step: int) -> None: ...


class Saving:
    """The checkpoints of a run, or of several that are trained together; `folders` are theirs, inside the workdir.

    Use it in a `with`. UserError where the workdir is in use, is part of a sweep, or cannot be written.
    """

    def __init__(self, runs: Runs, workdir: Path, folders: Sequence[RunFolder]):
        self._runs, self._workdir, self._folders = runs, workdir, folders
        self._config = runs.base.config
        c = self._config.checkpoint
        self._retention = Retention(every=c.keep_every, best=c.best, best_of=c.best_of)
        self._saved_at = time.monotonic()  # the last checkpoint, or since when there is none
        self._longest_s: float | None = None  # until a stop is heard; None before the second step
        self._told_late = False
        refuse_part_of_a_sweep(workdir)
        make_folder(workdir)
        with contextlib.ExitStack() as stack:
            if hosts.is_writer():
                stack.enter_context(locked(workdir))
            checkpoints = Checkpoints(workdir, keep=c.keep, retention=self._retention)
            self._checkpoints = stack.enter_context(checkpoints)
            self._stack = stack.pop_all()

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # --- going on ---

    def resume(self, sampler: Drawn, learner: Learner) -> tuple[int, list[str]]:
        """Begins, or goes on from the newest whole checkpoint: the step to do next, and sentences for the log.

        UserError where that is another run's, or its parameters are not finite.
        """
        changes: list[str] = []

        def shapes(step: int, held: Callable[[str], Any] | None = None) -> dict[str, Any]:
            saved, policy = learner.shapes()
            return saved | sampler.shapes(step, saved["params"], policy, held)

        def wanted(step: int) -> dict[str, Any]:
            changes[:] = self._changes(step)
            return shapes(step, functools.partial(self._checkpoints.held, step))

        step, found, notes = self._checkpoints.resume(wanted)
        start = step or 0
        if step is None:
            if any((folder.path / "config.json").exists() for folder in self._folders):
                notes = [*notes, f"{self._workdir} holds no checkpoint: starting at step 0, in place of what ran there"]
            learner.begin(self._load_params())
        else:
            self._retention.resume(step, self._checkpoints.about(step))
            learner.restore(found, self._load_params)
            notes = [*notes, f"going on from the checkpoint at step {step}", *changes]
        sampler.restore(found or {}, learner.params, learner.frozen, start)
        learner.keep_reference(self._load_params)
        self._refuse_unless_sound(learner, step)
        compile_sums(shapes(start))  # else the first checkpoint would
        if self._config.checkpoint.every_s:
            hosts.first_says(False)  # of several processes it compiles at its first use
        return start, notes

    def _load_params(self) -> Params:
        return place_params(self._runs.base.directory, self._runs.base.model_shardings)[1]

    def _changes(self, step: int) -> list[str]:
        """What is not as the checkpoint has it, in sentences."""
        about = self._checkpoints.about(step)
        saved_runs, changes = about.get("runs"), dict.fromkeys(differences(about.get("made_by", {})))
        if saved_runs is not None:
            same_runs(list(saved_runs), [folder.name(self._workdir) for folder in self._folders], self._workdir)
        for folder, setup in zip(self._folders, self._runs.setups, strict=True):
            saved = saved_runs[folder.name(self._workdir)] if saved_runs else {"config": read_config(folder.path)}
            found = compare(saved, folder.identity, folder.path) + rate_change(saved, setup, step)
            changes |= dict.fromkeys([*found, *edits(saved, folder.path)])
        return list(changes)

    def _refuse_unless_sound(self, learner: Learner, step: int | None) -> None:
        if learner.is_finite():
            return
        where = f"the model in {self._config.policy.path}"
        if step is not None:
            self._checkpoints.reject(step)
            where = f"the checkpoint of step {step}, which is set aside,"
        raise UserError(f"{where} has parameters that are not finite, or too large")

    def disk(self, sampler: Drawn, learner: Learner) -> list[str]:
        """Sentences on what the run will have on its disk."""
        c = self._config
        state, policy = learner.shapes()
        drawn = sampler.shapes(c.steps, state["params"], policy)
        paths = [folder.path for folder in self._folders]
        return [*disk.sentences(c, self._workdir, paths, disk.tree_bytes((state, drawn)), disk.tree_bytes(policy))]

    # --- saving ---

    def measured(self, step: int, logged: Sequence[Mapping[str, float]]) -> None:
        """Takes what was logged at a step, by run, for `checkpoint.best`. UserError where that has no such tag."""
        self._retention.measured(step, logged)

    def save_if_due(
        self, done: int, sampler: Drawn, learner: Learner, write: Callable[[], None], unwritten: WriteError | None
    ) -> None:
        """A checkpoint of the state after `done` steps, where one is due, or the run was asked to stop; `write` writes
        the step's log before it.

        `Stopped` where it was asked, and UserError where the log (`unwritten`) or the checkpoint could not be written.
        """
        c = self._config
        due = done == c.steps or (c.checkpoint.every and done % c.checkpoint.every == 0) or self._time_is_up()
        stopping = peers.asked_to_stop()
        self._checkpoints.check()
        if unwritten:
            with contextlib.suppress(UserError):
                self._save(done, sampler, learner)
                self._checkpoints.wait()
            raise UserError(f"step {done - 1}: {unwritten}; {self.last_good()}")
        if due or stopping:
            write()
            self._save(done, sampler, learner)
        if stopping and done < c.steps:
            raise Stopped(f"asked to stop, after step {done}; {AGAIN}")

    def stop(self, done: int, sampler: Drawn, learner: Learner, write: Callable[[], None]) -> None:
        """Asked to stop before step `done + 1` was whole: the state after `done` steps is saved, where it is not yet.

        `Stopped`, or UserError as of `save_if_due`.
        """
        if not done:
            raise Stopped(f"asked to stop, before the first step was whole; {BEGINS}")
        write()
        self._save(done, sampler, learner)
        raise Stopped(f"asked to stop, after step {done}; what was being drawn will be drawn again; {AGAIN}")

    def wait(self) -> None:
        """Until all that was saved is on the disk, and was read from there again. UserError."""
        self._checkpoints.wait()

    def late_stop(self) -> str:
        """After every step: once, when the first save is whole, a sentence where a stop takes longer than
        checkpoint.grace_s, by what was measured since the first step; else "". On process 0."""
        grace_s, save_s, longest_s = self._config.checkpoint.grace_s, self._checkpoints.seconds, self._longest_s
        now_s = peers.longest_unheard_s()
        self._longest_s = 0.0 if longest_s is None else max(longest_s, now_s)  # the first step compiles
        if not grace_s or save_s is None or self._told_late or self._longest_s + save_s <= grace_s:
            return ""
        self._told_late = True
        return (
            f"asked to stop, this run takes up to {self._longest_s + save_s:.1f} s, more than checkpoint.grace_s = "
            f"{grace_s:g}: {self._longest_s:.1f} s until it hears it, in a step or a chunk of a rollout, and "
            f"{save_s:.1f} s to save. Lower rollout.chunk where rollouts are what takes long; and set "
            "checkpoint.every_s to what may be lost where a machine goes sooner"
        )

    def _time_is_up(self) -> bool:
        """Whether checkpoint.every_s seconds have passed since the last checkpoint, by the clock of process 0."""
        every_s = self._config.checkpoint.every_s
        return every_s > 0 and hosts.first_says(time.monotonic() - self._saved_at >= every_s)

    def _save(self, done: int, sampler: Drawn, learner: Learner) -> None:
        if not learner.is_finite():
            raise UserError(
                f"step {done - 1}: the parameters are not finite after it, or too large, so training stops and they "
                f"are not saved; {self.last_good()}"
            )
        about = {"runs": {folder.name(self._workdir): folder.identity.saved() for folder in self._folders}}
        about |= self._retention.saving(done) | {"made_by": made_by()}
        self._checkpoints.save(done, learner.saved() | sampler.saved(), about)
        self._saved_at = time.monotonic()

    def reject_newest(self, step: int) -> None:
        """Sets aside the newest checkpoint, where it is of this step: whoever goes on from it arrives here again."""
        if self._checkpoints.latest() == step:
            self._checkpoints.reject(step)

    def last_good(self) -> str:
        """What a run that stops can go on from, in words."""
        kept = self._checkpoints.latest()
        return "there is no checkpoint" if kept is None else f"the last good checkpoint is that of step {kept}"
