"""The sinks of a run's log beside TensorBoard: lines of JSON, and W&B's own files, against TensorBoard's scalars."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import quickstart
from dppo_jax.errors import UserError
from dppo_jax.files import local_folder, to_path
from dppo_jax.storage.run_log import RunLog, read_scalars
from experiments.run import checks
from tests.helpers.bucket_servers import BUCKET, in_environment, serving
from tests.helpers.wandb_files import of_kind, offline, processes, rows


def open_log(folder: Path, resume_step: int = 0, **changes) -> RunLog:
    return RunLog(folder, hparams={"seed": 3, "clip": math.inf}, resume_step=resume_step, total_steps=9, **changes)


def write(folder: Path, steps: range, **changes) -> None:
    with open_log(folder, steps[0], **changes) as log:
        for step in steps:
            log.scalars(step, {"reward/mean": np.float32(step / 3), "grad_norm": math.nan if step == 1 else step})


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "scalars.jsonl").read_text().splitlines()]


def same_as_tensorboard(folder: Path, found: dict[str, dict[int, float]]) -> None:
    """`found`: value by step, by tag."""
    expected = read_scalars(folder)
    assert found.keys() == expected.keys()
    for tag, (steps, values) in expected.items():
        assert sorted(found[tag]) == steps.tolist()
        np.testing.assert_array_equal([np.float32(found[tag][step]) for step in steps.tolist()], np.float32(values))


# --- lines of JSON ---


def by_tag(rows: list[dict]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for tag, value in row.items():
            if tag != "step":
                found.setdefault(tag, {})[row["step"]] = math.nan if value is None else value
    return found


@pytest.mark.parametrize("resumed", [0, 2, 4])
@pytest.mark.parametrize("end", [0, 1, 7])
def test_each_step_has_one_line_however_often_the_run_was_killed(tmp_path, capfd, resumed, end):
    write(tmp_path, range(4))
    file = tmp_path / "scalars.jsonl"
    if end:  # a kill within the line of step 4, or right before its end
        file.write_bytes(file.read_bytes() + b'{"step": 4}\n'[:-end])
    write(tmp_path, range(resumed, 6))
    assert [row["step"] for row in lines(tmp_path)] == list(range(6))
    same_as_tensorboard(tmp_path, by_tag(lines(tmp_path)))
    assert "NaN" not in file.read_text() and capfd.readouterr().err == ""


def test_lines_that_are_broken_are_taken_out_and_told(tmp_path, capfd):
    write(tmp_path, range(2))
    file = tmp_path / "scalars.jsonl"
    file.write_bytes(b'{"step": 0, \xff\n[1]\n{"a": 1}\n' + file.read_bytes())
    write(tmp_path, range(2, 3))
    assert [row["step"] for row in lines(tmp_path)] == [0, 1, 2]
    assert "scalars.jsonl: 3 lines that are no JSON objects with a step are taken out" in capfd.readouterr().err


def test_a_line_is_there_as_soon_as_it_is_written_and_a_folder_that_goes_is_told(tmp_path):
    with open_log(tmp_path / "run") as log:
        log.scalars(0, {"reward/mean": 0.5})
        assert lines(tmp_path / "run") == [{"step": 0, "reward/mean": 0.5}]
        (tmp_path / "run" / "tb").rename(tmp_path / "tb")
        with pytest.raises(UserError, match="cannot write to"):
            log.scalars(1, {"reward/mean": 0.5})


# --- W&B ---


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)


def test_wandb_has_what_tensorboard_has_and_a_resumed_run_goes_on_in_its_run(tmp_path, wandb):
    folder = tmp_path / "runs" / "a"
    with open_log(folder, wandb="regions") as log, open_log(tmp_path / "runs" / "b", wandb="regions") as beside:
        for step in range(3):
            log.histogram(step, "ratio", [1, 0, 2], [-np.inf, 0, 1, np.inf])
            log.text(step, "samples", "| prompt |\n|---|\n| 1+1 |")
            log.scalars(step, {"reward/mean": step / 3, "grad_norm": math.nan if step == 1 else step})
            beside.scalars(step, {"reward/mean": -1.0})
    with pytest.raises(RuntimeError), open_log(folder, resume_step=3, wandb="regions") as log:
        log.scalars(3, {"reward/mean": 1.0, "grad_norm": 3})
        raise RuntimeError
    first, second = processes(folder)
    (run,), (resumed,) = of_kind(first, "run"), of_kind(second, "run")
    assert run.project == "regions" and run.display_name == "runs/a"
    assert resumed.run_id == run.run_id == (folder / "wandb_id").read_text().strip()
    assert {"seed": "3", "clip": '"inf"'}.items() <= {c.key: c.value_json for c in run.config.update}.items()
    assert [exit.exit_code for found in (first, second) for exit in of_kind(found, "exit")] == [0, 1]

    history = rows(first) + rows(second)
    assert [row["_step"] for row in history] == [0, 1, 2, 3]
    tags = read_scalars(folder)
    same_as_tensorboard(folder, {tag: {row["_step"]: row[tag] for row in history} for tag in tags})
    assert history[0]["ratio/values"] == [1, 0, 2] and history[0]["ratio/bins"] == [-1, 0, 1, 2]
    (page,) = folder.glob(f"wandb/offline-run-*/files/{history[0]['samples/path']}")
    assert "<td>1+1</td>" in page.read_text()
    ((other,),) = (of_kind(found, "run") for found in processes(tmp_path / "runs" / "b"))
    assert other.run_id != run.run_id and rows(processes(tmp_path / "runs" / "b")[0])[2]["reward/mean"] == -1


def test_a_run_that_begins_anew_is_another_one_of_wandb(tmp_path, wandb):
    write(tmp_path, range(2), wandb="p")
    write(tmp_path, range(2), wandb="p")
    ids = [run.run_id for found in processes(tmp_path) for run in of_kind(found, "run")]
    assert len(set(ids)) == 2


def test_what_wandb_cannot_take_is_told_and_counted_and_the_rest_goes_on(tmp_path, wandb, capfd):
    with open_log(tmp_path, wandb="p") as log:
        for step in range(2):
            log.histogram(step, "wide", np.ones(600), np.arange(601))  # W&B takes 512 bins
            log.scalars(step, {"reward/mean": step})
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("W&B")]
    assert len(said) == 2 and "512" in said[0] and said[1].startswith("W&B failed 2 times")
    assert [row["reward/mean"] for row in rows(processes(tmp_path)[0])] == [0, 1]


def test_a_run_goes_on_where_wandb_does_not_start(tmp_path, wandb, capfd):
    write(tmp_path, range(2), wandb="no/name")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("W&B")]
    assert len(said) == 2 and "the run goes on without it" in said[0] and "failed 3 times" in said[1]
    assert len(lines(tmp_path)) == 2


def test_a_missing_package_and_a_wrong_name_are_refused_before_anything_runs(monkeypatch):
    config = quickstart.get_config()
    for name in ("no/name", "x" * 129):
        config.log.wandb = name
        with pytest.raises(UserError, match="is no name of a project"):
            checks.check(config)
    config.log.wandb = "p"
    checks.check(config)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="log.wandb = 'p' needs the package wandb.*pip install wandb"):
        checks.check(config)


def test_the_files_of_wandb_get_into_a_bucket_when_a_run_ends(tmp_path, wandb):
    with serving("gs") as environment, in_environment(environment):
        folder = to_path(f"gs://{BUCKET}/run")
        write(folder, range(2), wandb="p")
        with local_folder(folder) as local:
            assert [row["_step"] for row in rows(processes(local)[0])] == [0, 1]
            same_as_tensorboard(folder, by_tag(lines(local)))
