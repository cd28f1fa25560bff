"""What a run saves: in the background, checksummed, the newest few kept."""

import contextlib
import json
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils
from orbax.checkpoint.metadata import metadata_store

from dppo_jax.devices.hosts import is_writer
from dppo_jax.errors import UserError, of_files
from dppo_jax.files import Path, absolute, is_bucket, make_folder, names_in, to_path
from dppo_jax.storage.checkpoint import manifest
from dppo_jax.storage.checkpoint.read import (
    ITEM,
    Damaged,
    agree,
    check_sums,
    compare,
    find_newest,
    newest_by_size,
    prepare,
    reason,
    restore_item,
    saved_tree,
    shapes,
)
from dppo_jax.storage.checkpoint.retention import Retention
from dppo_jax.storage.checkpoint.sums import sums

ASIDE = "damaged_checkpoints"  # beside WORKDIR/checkpoints

# orbax asks tensorstore at every save how much was written, for a metric of its own that nobody reads here; of each
# answer tensorstore (0.1.86) leaves some 25 lists in memory for good.
if hasattr(tensorstore_utils, "get_tensorstore_raw_bytes"):
    tensorstore_utils.get_tensorstore_raw_bytes = lambda *_, **__: 0


class Newest(NamedTuple):
    """The newest whole step, None where there is no checkpoint at all, and sentences about what is not as expected."""

    step: int | None
    notes: list[str]


class Resumed(NamedTuple):
    """The same, and the step's state (None without a step)."""

    step: int | None
    state: Any
    notes: list[str]


class Checkpoints:
    """The folder WORKDIR/checkpoints. Close it, or use it in a `with`: saving goes on in the background.

    Of several processes all must call the same methods; process 0 decides which step is whole, and moves and deletes.
    UserError where the folder cannot be made or written.
    """

    def __init__(self, workdir: str | Path, *, keep: int, retention: Retention | None = None):
        self._folder = absolute(to_path(workdir) / "checkpoints")
        self._keep, self._retention = keep, retention or Retention()
        prepare(self._folder)
        make_folder(self._folder)
        _check_writable(self._folder)
        self._newest: Newest | None = None  # None: not looked for yet
        self._unreadable: dict[int, str] = {}  # steps without a manifest that could not be restored
        self._saving: tuple[int, dict[str, Any], dict[str, str]] | None = None  # in the background: see `manifest.seal`
        self._read_back: Future[str | None] | None = None  # what is wrong with the step that was saved last
        self._began = 0.0  # when the last save did
        self.seconds: float | None = None  # that the last whole save took, on process 0; None where there is none yet
        # Made in the background, a folder that cannot be made would be waited for.
        options = ocp.AsyncOptions(post_finalization_callback=self._seal, create_directories_asynchronously=False)
        handlers = {ITEM: ocp.StandardCheckpointHandler()}
        composite = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=options), **handlers
        )
        self._metadata = metadata_store(enable_write=True)
        self._saver = ocp.AsyncCheckpointer(
            composite, async_options=options, checkpoint_metadata_store=self._metadata
        )

    def newest_whole(self) -> Newest:
        """Reads every byte of the newest step, and of older ones until one is whole.

        The damaged ones are moved to WORKDIR/damaged_checkpoints. UserError if there are steps and none is whole: they
        stay where they are.
        """
        self.wait()
        self._newest = Newest(*agree(self._look))
        return self._newest

    def _look(self) -> Newest:
        mend = "move the folder away to start over at step 0"
        step, damaged, strange = find_newest(self._folder, self._unreadable, mend=mend)
        notes = [f"{self._folder.name}/{name} is no checkpoint: left alone" for name in strange]
        aside = self._folder.parent / ASIDE
        for number, fault in damaged:
            to = f"{ASIDE}/{self._set_aside(number).name}"
            told = f"checkpoint {number} is damaged ({fault}) and now lies in {to}"
            notes.append(f"{told}; going on from checkpoint {step}")
        if step is None and aside.is_dir() and (names := names_in(aside)):
            notes.append(f"no checkpoint is left, only {ASIDE}/{names[-1]}: starting at step 0")
        return Newest(step, notes)

    def resume(self, abstract_at: Callable[[int], Any]) -> Resumed:
        """The newest whole step, restored as `abstract_at(step)` says. Errors as of `newest_whole` and `restore`.

        A step without a manifest, of an earlier version, is passed over too where it cannot be restored.
        """
        step, notes = self._newest or self.newest_whole()
        while True:
            if step is None:
                return Resumed(None, None, notes)
            try:
                state = self.restore(step, abstract_at(step))
            except Damaged as error:
                if jax.process_count() > 1 and not error.everywhere:
                    raise
                self._unreadable[step] = error.what
                step, more = self.newest_whole()
                notes = notes + more
                continue
            if not manifest.sealed(self._folder / str(step)):
                notes.append(f"checkpoint {step} has no checksums, so its bytes were not checked")
            return Resumed(step, state, notes)

    def latest(self) -> int | None:
        """The newest whole step, or None. Waits for the one that is being saved."""
        self.wait()
        return (self._newest or self.newest_whole()).step

    def about(self, step: int) -> dict[str, Any]:
        """What `save` stored with a step; {} for a step of an earlier version. UserError if its manifest is damaged."""
        return manifest.about(self._folder / str(step))

    def save(self, step: int, state: Any, about: dict[str, Any] | None = None) -> None:
        """Copies the state and writes it in the background, with `about`, a small JSON object.

        A step that is there already stays. Before, older steps than the newest `keep` are deleted, but for what
        `retention` keeps: the newest counts only when the next one is saved, or all is closed without an error.
        UserError if the last save failed, or this one cannot begin.
        """
        if step == self.latest():
            return
        self._began = time.monotonic()
        self._saving = step, json.loads(json.dumps(about or {})), sums(state)
        try:
            gone = not (is_bucket(self._folder) or self._folder.is_dir())
            if is_writer() and not gone:
                self._delete_old()
            self._saver.save(
                self._folder / str(step),
                args=ocp.args.Composite(**{ITEM: ocp.args.StandardSave(state)}),
                custom_metadata=manifest.MARK,
            )
        except Exception as error:
            raise self._failed(error) from error
        if gone:
            self.wait()
            raise UserError(
                f"the folder {str(self._folder)!r} was deleted or moved during the run; checkpoint {step} was written "
                "there again, and what else the run had written is no longer there"
            )

    def check(self) -> None:
        """UserError if saving in the background has failed. Does not wait."""
        try:
            self._saver.check_for_errors()
        except Exception as error:
            if self._saving:
                raise self._failed(error) from error

    def wait(self) -> None:
        """Until all is on disk, and was read from there again. A step that is not there as it was written is set aside,
        and told. UserError as in `check`."""
        try:
            self._saver.wait_until_finished()
        except Exception as error:
            if self._saving:  # else it is more of a failure that was told
                raise self._failed(error) from error
        if self._saving:
            step, self._saving = self._saving[0], None
            if lost := agree(lambda: self._lost(step)):
                self._newest = Newest(lost[0], [])
                if is_writer():
                    print(f"warning: {lost[1]}", file=sys.stderr)
            else:
                self._newest = Newest(step, [])

    def _lost(self, step: int) -> tuple[int | None, str] | None:
        """On process 0: None where the step's bytes were found on the disk; else it is set aside, and this is the
        newest step that is left, and a sentence."""
        fault = self._read_back.result() if self._read_back else None
        if fault is None or not (self._folder / str(step)).is_dir():  # deleted or moved, which the next save tells
            return None
        name, newest = self._set_aside(step).name, newest_by_size(self._folder)
        left = "none is left" if newest is None else f"the newest that is left is of step {newest}"
        told = f"checkpoint {step} is not on the disk as it was written ({fault})"
        return newest, f"{told} and lies in {ASIDE}/{name}; {left}"

    def reject(self, step: int) -> int | None:
        """Sets aside a step that is whole and yet bad, so that no run goes on from it; the newest one left."""
        self.wait()

        def move() -> int | None:
            self._set_aside(step)
            return newest_by_size(self._folder)

        self._newest = Newest(agree(move), [])
        return self._newest.step

    def held(self, step: int, name: str) -> Any:
        """The tree of shapes and dtypes that a step's state has under a name; None where it has nothing. Damaged."""
        return dict(saved_tree(self._folder, step)).get(name)

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of a step, laid out as `abstract` says. UserError if it is of another shape; Damaged."""
        self.wait()
        if self._newest is None or step != self._newest.step:
            fault = agree(lambda: manifest.damage(self._folder / str(step), step))
            if fault:
                raise Damaged(step, fault)
        compare(step, shapes(saved_tree(self._folder, step)), shapes(abstract))
        state = restore_item(self._folder, step, ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(abstract))
        check_sums(self._folder, step, state)
        return state

    def close(self) -> None:
        """Waits until all is on disk, and deletes older steps than the newest `keep`. UserError as in `check`."""
        try:
            self.wait()
            if is_writer() and (is_bucket(self._folder) or self._folder.is_dir()):
                self._delete_old()
        finally:
            self._shut()

    def _shut(self) -> None:
        for end in (self._saver.wait_until_finished, self._saver.close):
            with contextlib.suppress(Exception):  # more of a failure that was told
                end()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
            return
        try:  # the error that ended the `with` is the one to raise
            self.wait()
        except UserError as second:
            print(f"warning: {second}", file=sys.stderr)
        self._shut()

    def _seal(self) -> None:
        """In the background, on process 0, when all files of the step are written, before its folder has its name."""
        assert self._saving is not None
        step, about, of_arrays = self._saving
        self._metadata.wait_until_finished()  # a thread of its own writes what orbax has to say of the step
        folder = self._folder / str(step)
        if not is_bucket(folder):
            (name,) = (name for name in names_in(self._folder) if name.startswith(f"{step}.orbax-checkpoint-tmp"))
            folder = self._folder / name
        manifest.seal(folder, step, about, of_arrays)
        self._read_back = None
        if not is_bucket(folder):  # a bucket checks what it stores
            self._read_back = Future()
            Thread(target=self._read, args=(folder, step, self._read_back), daemon=True).start()
        else:
            self.seconds = time.monotonic() - self._began

    def _read(self, unnamed: Path, step: int, found: "Future[str | None]") -> None:
        """What is wrong with a step on the disk, once its folder has its name; None where it never has."""
        named = self._folder / str(step)
        while unnamed.is_dir() and not named.is_dir():
            time.sleep(0.01)
        try:
            fault = manifest.damage(named, step, from_disk=True) if named.is_dir() else None
            self.seconds = time.monotonic() - self._began
            found.set_result(fault)
        except Exception as error:  # `wait` raises it
            found.set_exception(error)

    def _failed(self, error: Exception) -> UserError:
        """What to raise when a save failed; what it had written is deleted, since it may fill the disk."""
        assert self._saving is not None
        step, self._saving = self._saving[0], None
        if is_writer():
            _delete_left(self._folder, told=False)  # threads may still be writing into it
        there = is_bucket(self._folder) or self._folder.is_dir()
        why = reason(error) if there else "the folder was deleted or moved"
        newest = newest_by_size(self._folder)
        self._newest = Newest(newest, [])
        rest = "there is no whole one" if newest is None else f"the newest whole one is of step {newest}"
        return UserError(f"checkpoint {step} could not be written to {str(self._folder)!r}: {why}; {rest}")

    def _set_aside(self, step: int) -> Path:
        try:
            return manifest.set_aside(self._folder / str(step), self._folder.parent / ASIDE)
        except OSError as error:
            raise UserError(
                f"checkpoint {step} cannot be moved to {str(self._folder.parent / ASIDE)!r}: {reason(error)}; move it "
                "there by hand"
            ) from error

    def _delete_old(self) -> None:
        """All but the newest `keep` whole steps and what `retention` keeps, and what a kill left half written. On
        process 0."""
        _delete_left(self._folder)
        steps = manifest.entries(self._folder).steps
        whole = [step for step in steps if manifest.damage(self._folder / str(step), step, read=False) is None]
        if len(whole) <= self._keep:
            return
        stays = self._retention.stays(whole)
        for step in steps:
            if step < whole[-self._keep] and step not in stays:
                _delete(self._folder / str(step))


def _check_writable(folder: Path) -> None:
    """UserError where no folder with a file can be made and removed: better now than after hours."""
    try:
        if is_bucket(folder):
            probe = folder / f".probe-{uuid.uuid4().hex}"
            probe.write_text("x")
            probe.unlink()
            return
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=folder) as made:
            to_path(f"{made}/file").write_text("x")
    except Exception as error:
        if not of_files(error):
            raise
        raise UserError(f"the folder {str(folder)!r} cannot be written to: {reason(error)}") from None


def _delete(path: Path, *, told: bool = True) -> None:
    try:
        manifest.remove(path)
    except OSError as error:
        if told:
            print(f"warning: {path} could not be deleted: {reason(error)}", file=sys.stderr)


def _delete_left(folder: Path, *, told: bool = True) -> None:
    """What a kill or a failed save left half written."""
    if is_bucket(folder) or folder.is_dir():
        for name in manifest.entries(folder).left:
            _delete(folder / name, told=told)
