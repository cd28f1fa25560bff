"""Damaged checkpoints, drawn from a seed: what is restored is a step to the bit, and a sentence names what is not."""

import random
import re
import shutil
from pathlib import Path

import pytest

from dppo_jax.errors import UserError
from dppo_jax.storage.checkpoint import Checkpoints, restore_params
from experiments.chaos.inputs.checkpoint_files import DAMAGES, cut, empty_folder, file_instead, flip, garbage
from experiments.chaos.inputs.checkpoints import going_on
from experiments.chaos.inputs.states import abstract, state
from tests.helpers.checkpoints import equal, limit, write

STEPS = (2, 4, 6)
CASES = 120
ALL_CASES = 12  # where no step is left whole
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("written") / "run", STEPS)


def then_saves(run: Path) -> int:
    """The step that a run goes on from; nothing is in the way of what it saves then."""
    with limit(LIMIT_S):
        step = going_on(run)
        with Checkpoints(run, keep=3) as checkpoints:
            checkpoints.save(6, state(6), {"step": 6})
        with Checkpoints(run, keep=3) as checkpoints:
            again = checkpoints.resume(lambda step: abstract())
            assert again.step == 6
            equal(again.state, state(6))
    return step


def test_a_damaged_newest_checkpoint(written, tmp_path, capfd):
    used = {step: 0 for step in STEPS}
    for case in range(CASES):
        draw, run = random.Random(case), tmp_path / str(case)
        shutil.copytree(written, run)
        damage = DAMAGES[case % len(DAMAGES)]
        damage(run / "checkpoints" / "6", draw)
        if draw.random() < 0.2:
            flip(run / "checkpoints" / "4", draw)
        try:
            used[then_saves(run)] += 1
        except BaseException as error:
            error.add_note(f"case {case}: {damage.__name__}")
            raise
        shutil.rmtree(run)
    assert used[2] > 5 and used[4] > 50 and used[6] > 10, used  # 6: nothing but what does no harm
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_or_folder_too_many(written, tmp_path):
    """Wherever it lies: the step is read, or passed over by name."""
    newest, used = written / "checkpoints" / "6", set()
    folders = [path.relative_to(written) for path in (newest, *newest.rglob("*")) if path.is_dir()]
    for folder in folders:
        for name in ("process_0~", "process_7", "manifest.ocdbt.1", ".DS_Store", "copy"):
            run = shutil.copytree(written, tmp_path / "run")
            if name == "copy":
                (run / folder / name).mkdir()
            else:
                (run / folder / name).write_bytes(b"\0" * 64)
            step = going_on(run)
            used.add((step, f"{folder.name}/{name}"))
            shutil.rmtree(run)
    passed_over = {name for step, name in used if step != 6}
    assert len(used) > 20 and passed_over == {"array_metadatas/process_0~", "array_metadatas/process_7"}


def test_no_whole_checkpoint(written, tmp_path):
    for case in range(ALL_CASES):
        draw, run = random.Random(case), tmp_path / str(case)
        shutil.copytree(written, run)
        for step in STEPS:
            draw.choice([flip, cut, empty_folder, file_instead, garbage])(run / "checkpoints" / str(step), draw)
        before = sorted(str(path) for path in run.rglob("*"))
        harmless = False
        with limit(LIMIT_S):
            try:
                restore_params(run, abstract()["params"])
                harmless = True  # a cut of nothing, a digit of the commit's time
            except UserError as error:
                assert re.search(r"is whole: checkpoint 6 is damaged \(.*checkpoint 2 is", str(error))
                assert str(error).endswith("give another run's folder")
            if not harmless:
                with pytest.raises(UserError, match="start over at step 0$"), Checkpoints(run, keep=3) as checkpoints:
                    checkpoints.resume(lambda step: abstract())
                assert sorted(str(path) for path in run.rglob("*")) == before
        shutil.rmtree(run)
