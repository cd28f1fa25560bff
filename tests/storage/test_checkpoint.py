"""Checkpoints that are damaged, bad, old, in the way, or cannot be written."""

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dppo_jax.errors import UserError
from dppo_jax.storage.checkpoint import Checkpoints, manifest, restore_params
from experiments.chaos.inputs.states import abstract, state
from tests.helpers.checkpoints import NOBODY, equal, limit, save_on, write
from tests.helpers.places import ROOT

STEPS = (2, 4, 6)
TIME_LIMIT_S = 120


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("written") / "run", STEPS)


@pytest.fixture
def run(written, tmp_path) -> Path:
    """A copy."""
    return shutil.copytree(written, tmp_path / "run")


def steps(run: Path, folder: str = "checkpoints") -> list[str]:
    return sorted(path.name for path in (run / folder).iterdir()) if (run / folder).is_dir() else []


def array_file(step: Path) -> Path:
    """The largest: array data."""
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: (path.stat().st_size, path.name))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def damage(step: Path) -> Path:
    """Flips a bit in the array data of a step; the file."""
    path = array_file(step)
    flip(path)
    return path


def resumed(run: Path, wanted=lambda step: abstract()):
    with limit(60), Checkpoints(run, keep=3) as checkpoints:
        return checkpoints.resume(wanted)


def test_a_whole_checkpoint_is_restored_to_the_bit(run):
    found = resumed(run)
    assert (found.step, found.notes) == (6, [])
    equal(found.state, state(6))


def test_a_flipped_bit_is_told_and_the_older_step_used(run):
    path = damage(run / "checkpoints" / "6")
    found = resumed(run)
    assert found.step == 4
    equal(found.state, state(4))
    assert found.notes == [
        f"checkpoint 6 is damaged ({path.relative_to(run)}: its bytes are not those written) and now lies in "
        "damaged_checkpoints/6; going on from checkpoint 4"
    ]
    assert steps(run) == ["2", "4"] and steps(run, "damaged_checkpoints") == ["6"]


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def file_instead(step: Path) -> None:
    shutil.rmtree(step)
    step.write_text("x")


# What is done to the newest step, and what the sentence says of it.
DAMAGES = {
    "an empty folder": (empty, r"checkpoints/6 is empty"),
    "a file for the folder": (file_instead, r"checkpoints/6 is no folder"),
    "no arrays": (lambda step: shutil.rmtree(step / "default"), r"checkpoints/6/default/\S+ is missing"),
    "a missing file": (lambda step: array_file(step).unlink(), r"checkpoints/6/default/\S+ is missing"),
    "a cut file": (lambda step: os.truncate(array_file(step), 100), r"default/\S+ has 100 bytes, not the \d+ written"),
    "a pipe for a file": (lambda step: pipe(array_file(step)), r"checkpoints/6/default/\S+ is no file"),
    "a folder for a file": (lambda step: folder_instead(step / "default/_METADATA"), r"default/_METADATA is no file"),
    "garbage for metadata": (
        lambda step: (step / "default" / "_METADATA").write_text("{]"),
        r"checkpoints/6/default/_METADATA has 2 bytes, not the \d+ written",
    ),
    "garbage for orbax's metadata": (
        lambda step: (step / "_CHECKPOINT_METADATA").write_text("{]"),
        r"checkpoints/6/_CHECKPOINT_METADATA: broken JSON: .*",
    ),
    "garbage for the manifest": (
        lambda step: (step / "manifest.json").write_text("[]"),
        r"checkpoints/6/manifest.json must hold a JSON object, not a list",
    ),
    "a manifest with other numbers": (
        lambda step: (step / "manifest.json").write_text((step / "manifest.json").read_text().replace("6", "7", 1)),
        r"checkpoints/6/manifest.json: its bytes are not those written",
    ),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), r"checkpoints/6/manifest.json is missing"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_every_kind_of_damage_is_told(run, what):
    change, sentence = DAMAGES[what]
    change(run / "checkpoints" / "6")
    found = resumed(run)
    assert found.step == 4
    equal(found.state, state(4))
    assert len(found.notes) == 1 and re.search(rf"checkpoint 6 is damaged \(\S*{sentence}\)", found.notes[0])


def test_a_copy_under_another_step_s_name_is_damaged(run):
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "9")
    found = resumed(run)
    assert found.step == 6
    assert "checkpoint 9 is damaged (checkpoints/9/manifest.json is that of step 4)" in found.notes[0]


def test_other_names_are_left_alone_and_told(run):
    folder = run / "checkpoints"
    (folder / "abc").mkdir()
    (folder / "007").mkdir()
    (folder / "12.orbax-checkpoint-tmp-17").mkdir()  # by a kill
    found = resumed(run)
    equal(found.state, state(6))
    assert found.notes == [f"checkpoints/{name} is no checkpoint: left alone" for name in ("007", "abc")]
    assert steps(run) == ["007", "2", "4", "6", "abc"]


def test_a_file_named_like_a_step_is_not_in_the_way(run):
    (run / "checkpoints" / "7").write_text("x")
    with Checkpoints(run, keep=3) as checkpoints:
        assert checkpoints.newest_whole().step == 6
        checkpoints.save(7, state(7))
    equal(resumed(run).state, state(7))


def test_without_a_whole_checkpoint_nothing_begins_and_nothing_is_moved(run):
    for step in STEPS:
        damage(run / "checkpoints" / str(step))
    with pytest.raises(UserError, match="is whole: checkpoint 6 is damaged .*checkpoint 4 .*checkpoint 2 .*start over"):
        resumed(run)
    with pytest.raises(UserError, match="is whole"), Checkpoints(run, keep=3) as checkpoints:
        checkpoints.save(8, state(8))
    assert steps(run) == ["2", "4", "6"] and not steps(run, "damaged_checkpoints")


def test_a_step_that_was_set_aside_can_be_saved_again(run):
    for names in (["6"], ["6", "6.1"]):
        damage(run / "checkpoints" / "6")
        with Checkpoints(run, keep=3) as checkpoints:
            assert checkpoints.resume(lambda step: abstract()).step == 4
            checkpoints.save(6, state(6))
        assert steps(run, "damaged_checkpoints") == names
        equal(resumed(run).state, state(6))


def test_a_rejected_step_is_never_the_newest(run):
    with Checkpoints(run, keep=3) as checkpoints:
        checkpoints.save(8, state(8))
        assert checkpoints.reject(8) == 6 and checkpoints.latest() == 6
        for step in (6, 4, 2):
            checkpoints.reject(step)
        assert checkpoints.latest() is None
    found = resumed(run)
    assert found.step is None
    assert found.notes == ["no checkpoint is left, only damaged_checkpoints/8: starting at step 0"]


def test_a_checkpoint_of_other_shapes_is_refused_not_damaged(run):
    with pytest.raises(UserError, match="checkpoint 6 of this run does not fit the config's model: ahead"):
        resumed(run, lambda step: abstract(ahead=False))
    assert steps(run) == ["2", "4", "6"]


def test_what_is_stored_with_a_step_is_read_even_if_its_arrays_are_damaged(run):
    damage(run / "checkpoints" / "6")
    with Checkpoints(run, keep=3) as checkpoints:
        assert [checkpoints.about(step) for step in STEPS] == [{"step": step} for step in STEPS]
        assert checkpoints.held(4, "ahead")["tokens"].shape == (4, 6) and checkpoints.held(4, "critic") is None


# --- how many are kept ---


def test_the_step_before_is_kept_until_the_newest_has_been_trained_on(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step))
            checkpoints.wait()
        assert steps(tmp_path) == ["2", "3"]
        assert checkpoints.reject(3) == 2
        checkpoints.save(4, state(4))
        checkpoints.wait()
        assert steps(tmp_path) == ["2", "4"]
    assert steps(tmp_path) == ["4"]


def test_a_whole_checkpoint_is_not_deleted_for_damaged_newer_ones(run):
    with Checkpoints(run, keep=1) as checkpoints:
        assert checkpoints.latest() == 6
        os.truncate(array_file(run / "checkpoints" / "6"), 0)
        checkpoints.save(8, state(8))
        checkpoints.wait()
        assert steps(run) == ["4", "6", "8"]  # 4 is the newest whole one before
    assert steps(run) == ["8"]


# --- checkpoints of earlier versions, without a manifest ---


@pytest.fixture(scope="module")
def written_before(tmp_path_factory) -> Path:
    """As the version before manifests wrote it."""
    run = tmp_path_factory.mktemp("before")
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(run / "checkpoints", options=options, item_handlers=handler) as manager:
        for step in (2, 4):
            manager.save(step, args=ocp.args.StandardSave(state(step)))
    return run


@pytest.fixture
def old(written_before, tmp_path) -> Path:
    return shutil.copytree(written_before, tmp_path / "old")


def test_an_old_checkpoint_is_restored_and_a_sentence_says_what_was_not_checked(old):
    found = resumed(old)
    equal(found.state, state(4))
    assert found.notes == ["checkpoint 4 has no checksums, so its bytes were not checked"]
    equal(restore_params(old, abstract()["params"]), state(4)["params"])
    with Checkpoints(old, keep=2) as checkpoints:
        assert checkpoints.about(4) == {}


OLD_DAMAGES = {
    "an empty folder": empty,
    "a file for the folder": file_instead,
    "a missing file": lambda step: array_file(step).unlink(),
    "a cut file": lambda step: os.truncate(array_file(step), 100),
    "a pipe for a file": lambda step: pipe(array_file(step)),
    "garbage for metadata": lambda step: (step / "default" / "_METADATA").write_text("{]"),
}


@pytest.mark.parametrize("what", OLD_DAMAGES)
def test_an_old_checkpoint_that_cannot_be_restored_is_passed_over(old, what):
    OLD_DAMAGES[what](old / "checkpoints" / "4")
    params = restore_params(old, abstract()["params"])  # the file may hold other arrays of step 4 than these
    whole = 4 if params["embed"].tobytes() == state(4)["params"]["embed"].tobytes() else 2
    equal(params, state(whole)["params"])
    found = resumed(old)
    equal(found.state, state(2))
    assert "checkpoint 4 is damaged (" in found.notes[0] and "going on from checkpoint 2" in found.notes[0]
    assert found.notes[1:] == ["checkpoint 2 has no checksums, so its bytes were not checked"]
    assert steps(old) == ["2"] and steps(old, "damaged_checkpoints") == ["4"]


def test_the_manager_of_orbax_reads_what_is_written(run):
    with ocp.CheckpointManager(run / "checkpoints") as manager:
        assert manager.latest_step() == 6
        np.testing.assert_array_equal(manager.restore(6)["params"]["embed"], state(6)["params"]["embed"])


# --- reading without a run ---


def test_an_evaluation_passes_over_a_damaged_step_and_moves_nothing(run, capsys):
    path = damage(run / "checkpoints" / "6")
    equal(restore_params(run, abstract()["params"]), state(4)["params"])
    what = f"checkpoint 6 is damaged ({path.relative_to(run)}: its bytes are not those written)"
    assert capsys.readouterr().err == f"{what}; taking checkpoint 4\n"
    with pytest.raises(UserError, match=re.escape(what)):
        restore_params(run / "checkpoints" / "6", abstract()["params"])
    equal(restore_params(run / "checkpoints" / "2", abstract()["params"]), state(2)["params"])
    assert steps(run) == ["2", "4", "6"]


# --- saves that fail ---


def ended(how: str, workdir: Path) -> list[str]:
    """What `python -m tests.helpers.checkpoints` says; it ends with status 2."""
    command = [sys.executable, "-m", "tests.helpers.checkpoints", how, str(workdir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert done.returncode == 2 and done.stdout == ""
    return done.stderr.splitlines()


def goes_on(run: Path) -> None:
    """A later start finds step 2, and saves."""
    with limit(60), Checkpoints(run, keep=2) as checkpoints:
        found = checkpoints.resume(lambda step: abstract())
        assert (found.step, found.notes) == (2, [])
        equal(found.state, state(2))
        checkpoints.save(4, state(4))
    assert steps(run) == ["2", "4"]


def failed(run: Path, reason: str) -> str:
    folder = run / "checkpoints"
    return f"checkpoint 4 could not be written to {str(folder)!r}: {reason}; the newest whole one is of step 2"


def test_a_limit_on_the_size_of_files(tmp_path):
    assert ended("small_files", tmp_path) == [f"error: {failed(tmp_path, 'File too large')}"]
    goes_on(tmp_path)


def open_to_all(path: Path) -> None:
    """Every folder above, so that nobody's process finds it."""
    for folder in (path, *path.parents):
        if folder.stat().st_uid == os.getuid() and folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o055)


def test_a_folder_that_becomes_read_only(tmp_path):
    open_to_all(tmp_path)
    if os.getuid() == 0:
        os.chown(tmp_path, NOBODY, NOBODY)
    assert ended("read_only", tmp_path) == [f"error: {failed(tmp_path, 'Permission denied')}"]
    (tmp_path / "checkpoints").chmod(0o755)
    goes_on(tmp_path)


def test_a_folder_of_another_owner_is_found_at_the_start(tmp_path):
    open_to_all(tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    folder.chmod(0o555)
    said = f"error: the folder {str(folder)!r} cannot be written to: Permission denied"
    assert ended("other_owner", tmp_path) == [said]


def save_on_after(run: Path, sabotage) -> str:
    """The sentence of saves that go on after `sabotage()`."""
    with pytest.raises(UserError) as error, limit(60), Checkpoints(run, keep=2) as checkpoints:
        checkpoints.save(2, state(2))
        checkpoints.wait()
        sabotage()
        save_on(checkpoints)
    return str(error.value)


def test_a_folder_that_is_immutable(tmp_path, capfd):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    if subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        pytest.skip("chattr +i is not permitted here")
    subprocess.run(["chattr", "-i", folder], check=True)
    try:
        said = save_on_after(tmp_path, lambda: subprocess.run(["chattr", "+i", folder], check=True))
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    assert said == failed(tmp_path, "Operation not permitted") and capfd.readouterr() == ("", "")
    goes_on(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("room", [0, 1, 3, 7])
def test_a_full_disk(small_disk, room, capfd):
    """Pages of 4096 bytes left: it ends in another file each time."""
    filling = small_disk / "filling"

    def fill() -> None:
        with pytest.raises(OSError), open(filling, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(filling, filling.stat().st_size - 4096 * room)

    said = save_on_after(small_disk, fill)
    assert said == failed(small_disk, "No space left on device") and capfd.readouterr() == ("", "")
    filling.unlink()
    goes_on(small_disk)


def test_a_full_disk_is_found_at_the_start(small_disk):
    with pytest.raises(OSError), open(small_disk / "filling", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(UserError, match=r"cannot (be written to|make the folder).*No space left on device"):
        Checkpoints(small_disk, keep=2)


def test_a_run_s_folder_that_is_deleted_keeps_the_state(tmp_path, capfd):
    run = tmp_path / "run"
    said = save_on_after(run, lambda: shutil.rmtree(run))
    assert said == (
        f"the folder {str(run / 'checkpoints')!r} was deleted or moved during the run; checkpoint 4 was written there "
        "again, and what else the run had written is no longer there"
    )
    assert capfd.readouterr() == ("", "")
    equal(resumed(run).state, state(4))


def test_a_file_in_place_of_the_temporary_folder_is_removed(tmp_path):
    write(tmp_path, (2,))
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").write_text("x")
    (tmp_path / "checkpoints" / "2.deleted").mkdir()  # by a kill
    goes_on(tmp_path)


def test_a_save_that_fails_behind_another_error_is_told_too(tmp_path, capsys):
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(KeyError, match="other"), limit(60), Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(2, state(2))
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            checkpoints.save(4, state(4))
            raise KeyError("other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert capsys.readouterr().err == f"warning: {failed(tmp_path, 'File too large')}\n"


def test_a_diverged_state_is_saved_as_it_is(tmp_path):
    """To check it is the caller's: infinities and NaNs come back to the bit."""
    bad = {"params": {"w": jnp.asarray([np.inf, np.nan, -0.0, 1e-40], jnp.float32)}}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, bad)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), bad)
    equal(resumed(tmp_path, lambda step: shapes).state, bad)


# --- read from the disk again ---


def damaged_before_it_is_read(monkeypatch, which: int) -> None:
    """From now on a bit of this step's arrays is another when its bytes are read back: a disk that lies."""
    real = manifest.damage

    def damage_first(folder: Path, step: int, **how: bool) -> str | None:
        if how.get("from_disk") and step == which:
            damage(folder)
        return real(folder, step, **how)

    monkeypatch.setattr(manifest, "damage", damage_first)


def test_a_step_that_is_another_on_the_disk_is_told_and_set_aside_and_saved_again(tmp_path, monkeypatch, capsys):
    damaged_before_it_is_read(monkeypatch, 4)
    with limit(60), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state(2))
        checkpoints.save(4, state(4))
        assert checkpoints.latest() == 2
        said = capsys.readouterr().err
        assert said.startswith("warning: checkpoint 4 is not on the disk as it was written (checkpoints/4/default/")
        assert "and lies in damaged_checkpoints/4; the newest that is left is of step 2" in said
        monkeypatch.undo()
        checkpoints.save(4, state(4))
        assert checkpoints.latest() == 4
    assert steps(tmp_path) == ["4"] and steps(tmp_path, "damaged_checkpoints") == ["4"]
    equal(resumed(tmp_path).state, state(4))
    assert capsys.readouterr().err == ""


def test_a_step_whose_metadata_are_written_late_is_whole(tmp_path, capsys):
    """Its manifest had those of before, and the step was set aside: 3 of 29 in a run that saved twice a second."""
    with limit(60), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state(2))
        checkpoints._metadata._single_thread_executor.submit(time.sleep, 2)
        assert checkpoints.latest() == 2
        checkpoints.save(4, state(4))
        checkpoints._metadata._single_thread_executor.submit(time.sleep, 2)
        assert checkpoints.latest() == 4
    assert capsys.readouterr().err == "" and steps(tmp_path) == ["4"] and steps(tmp_path, "damaged_checkpoints") == []
