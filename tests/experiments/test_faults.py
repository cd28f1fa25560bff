"""What disturbs a run from outside: signals, full disks, folders that vanish, a second run, a changed config or model.

Each is the real command in a process of its own: it must end with one sentence, or go on.
"""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from dppo_jax.errors import Stopped, UserError
from dppo_jax.storage.checkpoint import Checkpoints
from dppo_jax.storage.run_config import read_config
from dppo_jax.storage.run_log import read_scalars
from tests.helpers.fixtures import (
    config_file,
    contents,
    finished_run,
    hurried,
    hurried_environment,
    run,
    run_config,
    same,
    small_config,
    tiny,
)
from tests.helpers.kills import newest_step
from tests.helpers.places import ROOT

TIME_LIMIT_S = 200
ENDLESS = dict(steps=100_000, log__histograms=0, log__samples=0)


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


@pytest.fixture
def start(folder, tmp_path, tmp_path_factory):
    """start(workdir, **changes) begins a run in a process of its own; its output goes to WORKDIR.log."""
    begun: list[subprocess.Popen] = []

    def one(workdir: Path, *flags: str, before: Callable[[], None] | None = None, **changes) -> subprocess.Popen:
        config = config_file(tmp_path / f"{workdir.name}.py", folder, **(ENDLESS | changes))
        command = [sys.executable, "-m", "experiments.train", f"--config={config}", f"--workdir={workdir}", *flags]
        with open(log_of(workdir), "wb") as log:
            environment = hurried_environment(tmp_path_factory)
            begun.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, preexec_fn=before)
            )
        return begun[-1]

    yield one
    for process in begun:
        process.kill()
        process.wait()


def log_of(workdir: Path) -> Path:
    return workdir.with_name(workdir.name + ".log")


def said(workdir: Path) -> list[str]:
    return log_of(workdir).read_text(errors="replace").splitlines()


def steps_of(workdir: Path) -> list[int]:
    """Of the checkpoints that are there."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def until(condition: Callable[[], object], process: subprocess.Popen, workdir: Path) -> None:
    end = time.monotonic() + TIME_LIMIT_S
    while not condition():
        assert process.poll() is None and time.monotonic() < end, said(workdir)
        time.sleep(0.01)


def hears(process: subprocess.Popen, number: int) -> bool:
    """Whether it has a handler for this signal."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)


def one_sentence(workdir: Path, process: subprocess.Popen, status: int = 2) -> str:
    """How a run ended: nothing but lines of progress and one sentence."""
    assert process.wait(TIME_LIMIT_S) == status, said(workdir)
    lines = [line for line in said(workdir) if not line.startswith("[transformers]")]
    assert "Traceback" not in "\n".join(lines) and len(lines) < 30, lines
    assert lines[-1].startswith("error: "), lines
    return lines[-1]


# --- signals ---


def test_sigterm_finishes_the_step_and_saves(start, folder, tmp_path):
    """Resumed, the run is the one that was never stopped."""
    workdir = tmp_path / "run"
    process = start(workdir, checkpoint__every=0)
    until(lambda: any("compiled" in line for line in said(workdir)), process, workdir)
    process.send_signal(signal.SIGTERM)
    sentence = one_sentence(workdir, process, Stopped.status)
    [step] = steps_of(workdir)
    assert sentence == f"error: asked to stop, after step {step}; started again, the run goes on from its checkpoint"
    changes = ENDLESS | dict(steps=step + 2, checkpoint__every=0)
    run(small_config(folder, **changes), workdir)
    run(small_config(folder, **changes), tmp_path / "whole")
    same(workdir, tmp_path / "whole")


def test_a_second_signal_ends_at_once(start, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, before=hear_ctrl_c, rollout__prompts=64, train__epochs=400)
    until(lambda: hears(process, signal.SIGTERM), process, workdir)
    process.send_signal(signal.SIGINT)
    until(lambda: any("a second signal ends at once" in line for line in said(workdir)), process, workdir)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIME_LIMIT_S) == -signal.SIGTERM


def hear_ctrl_c() -> None:
    """Tests may run where nobody hears it: in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("after_s", [0.3, 0.8, 1.5])
def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(start, tmp_path, after_s):
    process = start(tmp_path / "run", before=hear_ctrl_c)
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIME_LIMIT_S) in (-signal.SIGINT, 130)
    assert "Traceback" not in "\n".join(said(tmp_path / "run"))


def test_ctrl_c_finishes_the_step_and_saves(start, tmp_path):
    process = start(tmp_path / "run", before=hear_ctrl_c, checkpoint__every=0)
    until(lambda: any("compiled" in line for line in said(tmp_path / "run")), process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    sentence = one_sentence(tmp_path / "run", process, Stopped.status)
    [step] = steps_of(tmp_path / "run")
    assert f"after step {step};" in sentence


@pytest.mark.parametrize("seconds, steps", [(1e-6, [1, 2, 3]), (1e6, [3])])
def test_a_step_is_saved_when_so_much_time_has_passed(folder, tmp_path, seconds, steps):
    run(small_config(folder, steps=3, checkpoint__every=0, checkpoint__every_s=seconds), tmp_path / "run")
    assert steps_of(tmp_path / "run") == steps


# --- readers that go away ---


def test_a_reader_who_goes_away_stops_nothing(folder, tmp_path, tmp_path_factory):
    """2>&1 | head -1"""
    config = config_file(tmp_path / "config.py", folder, "run_config", log__samples=1)
    command = f"{sys.executable} -m experiments.train --config={config} --workdir={tmp_path / 'run'} 2>&1"
    environment = hurried_environment(tmp_path_factory)
    script = f"set -o pipefail; {command} | head -1 >&2; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, timeout=TIME_LIMIT_S)
    assert done.returncode == 0
    assert read_scalars(tmp_path / "run")["reward/mean"][0].tolist() == [0, 1, 2, 3]
    assert (tmp_path / "run" / "policy" / "config.json").is_file()


def test_without_any_stream_a_run_goes_on(folder, tmp_path, tmp_path_factory):
    config = config_file(tmp_path / "config.py", folder, steps=2)
    command = f"{sys.executable} -m experiments.train --config={config} --workdir={tmp_path / 'run'} >&- 2>&- <&-"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=hurried_environment(tmp_path_factory), timeout=TIME_LIMIT_S
    )
    assert done.returncode == 0
    assert steps_of(tmp_path / "run") == [2]


# --- two runs in one folder ---


def test_a_second_run_in_one_folder_is_refused(start, tmp_path):
    workdir = tmp_path / "run"
    first = start(workdir)
    until(lambda: steps_of(workdir), first, workdir)
    before = read_config(workdir)
    log_of(workdir).rename(tmp_path / "first.log")
    second = start(workdir, seed=3)
    sentence = one_sentence(workdir, second)
    assert f"is in use by another run, process {first.pid} on " in sentence
    assert read_config(workdir) == before
    at = newest_step(workdir)
    until(lambda: newest_step(workdir) > at, first, tmp_path / "first")  # unharmed
    first.kill()
    first.wait()
    third = start(workdir)
    until(lambda: any("going on from the checkpoint" in line for line in said(workdir)), third, workdir)


# --- disks ---


def test_a_limit_on_the_size_of_files_is_one_sentence(start, tmp_path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    process = start(tmp_path / "run", before=limited, checkpoint__every=0)
    sentence = one_sentence(tmp_path / "run", process)
    assert "File too large" in sentence and str(tmp_path / "run") in sentence


def test_a_folder_that_is_deleted_during_the_run(start, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, checkpoint__every=3)
    until(lambda: steps_of(workdir), process, workdir)
    shutil.rmtree(workdir, ignore_errors=True)
    sentence = one_sentence(workdir, process)
    assert re.search("No such file or directory|deleted or moved", sentence) and str(workdir) in sentence


# --- what must not change under a run ---


def go_on(finished, copied: Path, **changes) -> str:
    """What a resumed run says; UserError where it is refused."""
    return run(run_config(Path(finished.config.policy.path).parent, **({"steps": 6} | changes)), copied).said


def test_a_config_json_that_was_edited_or_lost_does_not_count(finished, copied):
    stored = read_config(copied)
    (copied / "config.json").write_text(json.dumps(stored | {"seed": 3}))
    before = contents(copied)
    with pytest.raises(UserError, match="seed was 0 and is now 3"):
        go_on(finished, copied, seed=3)
    assert contents(copied) == before
    assert "config.json was edited: seed" in go_on(finished, copied)
    assert read_config(copied) == stored | {"steps": 6}


def test_a_config_json_that_is_lost_is_written_again(finished, copied):
    stored = read_config(copied)
    (copied / "config.json").unlink()
    go_on(finished, copied)
    assert read_config(copied) == stored | {"steps": 6}


def test_other_rows_in_the_data_file_are_refused(finished, copied, tmp_path):
    rows = Path(finished.config.data.path).read_text()
    (tmp_path / "questions.jsonl").write_text(rows)
    said = go_on(finished, copied, data__path=str(tmp_path / "questions.jsonl"))  # the same rows at another place
    assert "going on from the checkpoint at step 4" in said
    (tmp_path / "questions.jsonl").write_text(rows.replace('"answer": 2', '"answer": 1', 1))
    with pytest.raises(UserError, match="the prompts or answers of data are not those that this run began with"):
        go_on(finished, copied, steps=8, data__path=str(tmp_path / "questions.jsonl"))


def changed_model(finished, tmp_path: Path) -> Path:
    model = Path(shutil.copytree(finished.config.policy.path, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] *= np.float32(1.5)
    save_file(tensors, model / "model.safetensors")
    return model


def test_other_base_weights_are_told_where_the_run_has_its_own(finished, copied, tmp_path):
    model = changed_model(finished, tmp_path)
    assert f"the weights in {model} are not those that this run began with" in go_on(
        finished, copied, policy__path=str(model)
    )


@pytest.mark.parametrize("uses", [dict(lora__rank=2), dict(reference__coef=0.1)], ids=["lora", "reference"])
def test_other_base_weights_are_refused_where_the_run_needs_them(finished, folder, tmp_path, uses):
    workdir = tmp_path / "run"
    run(run_config(folder, steps=2, **uses), workdir)
    with pytest.raises(UserError, match="the weights in .* are not those that this run began with; put them back"):
        run(run_config(folder, steps=3, policy__path=str(changed_model(finished, tmp_path)), **uses), workdir)


def test_a_schedule_that_ends_elsewhere_is_told(folder, tmp_path):
    linear = dict(optimizer__schedule="linear", checkpoint__every=0, steps=2)
    run(small_config(folder, **linear), tmp_path / "run")
    said = run(small_config(folder, **(linear | dict(steps=4))), tmp_path / "run").said
    assert "the learning rate goes on at 0.01 in place of 0" in said
    again = run(small_config(folder, **(linear | dict(steps=4, checkpoint__every=0))), tmp_path / "other").said
    assert "in place of" not in again


def test_new_keys_of_later_versions_do_not_stop_an_old_run(finished, copied, monkeypatch):
    """A checkpoint that knows nothing of a key whose value is the default's."""
    stored = read_config(copied)
    del stored["rollout"]["router_replay"], stored["eval"]["sets"]["sums"]["chat"]
    (copied / "config.json").write_text(json.dumps(stored))
    for about in copied.glob("checkpoints/*/about.json"):
        about.unlink()
    assert "going on from the checkpoint at step 4" in go_on(finished, copied)


# --- a state that diverged ---


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_state_that_diverged_is_neither_saved_nor_exported(folder, tmp_path, minibatches):
    """Its gradient is still finite at a rate of 1e30, which would leave parameters that are finite and useless."""
    changes = dict(train__minibatches=minibatches, optimizer__learning_rate=1e30, checkpoint__every=1)
    changes |= dict(train__max_skipped=1)
    with pytest.raises(UserError, match="so training stops.*; there is no checkpoint") as error:
        run(run_config(folder, **changes), tmp_path / "run")
    assert str(error.value).startswith("step 0: ")
    assert steps_of(tmp_path / "run") == [] and not (tmp_path / "run" / "policy").exists()


def left_by_another(copied: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """A checkpoint of step 5 like that of step 4, its parameters changed."""
    with ocp.CheckpointManager(copied / "checkpoints") as manager:
        state = manager.restore(4, args=ocp.args.StandardRestore())
    state["params"] = jax.tree.map(change, state["params"])
    with Checkpoints(copied, keep=10) as checkpoints:
        checkpoints.save(5, state, checkpoints.about(4))


def test_a_checkpoint_whose_parameters_are_not_finite_is_set_aside(finished, copied):
    left_by_another(copied, lambda x: x * np.float32(np.inf))
    with pytest.raises(UserError, match="checkpoint of step 5, which is set aside, has parameters that are not finite"):
        go_on(finished, copied)
    assert steps_of(copied) == [2, 4]
    assert "going on from the checkpoint at step 4" in go_on(finished, copied)


def test_a_checkpoint_that_turns_out_bad_is_set_aside(finished, copied):
    """Its parameters of 1e15 have a finite norm, and no finite gradient."""
    left_by_another(copied, lambda x: x * np.float32(1e16))
    with pytest.raises(UserError, match="step 5: the update 0 was skipped, .*, so training stops") as error:
        go_on(finished, copied, train__max_skipped=1)
    assert "the last good checkpoint is that of step 4" in str(error.value)
    assert steps_of(copied) == [2, 4]


def test_weights_that_are_not_finite_are_refused_at_the_start(finished, folder, tmp_path):
    model = changed_model(finished, tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(UserError, match=f"the model in {model} has parameters that are not finite"):
        run(run_config(folder, policy__path=str(model)), tmp_path / "run")


# --- clocks ---


def test_a_clock_an_hour_behind_loses_no_step(finished, copied, monkeypatch):
    """TensorBoard's own reader shows every step, each once, in the order of the steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    go_on(finished, copied)
    events = EventAccumulator(str(copied / "tb"), size_guidance={"scalars": 0}).Reload().Scalars("reward/mean")
    assert [event.step for event in events] == list(range(6))
    assert read_scalars(copied)["reward/mean"][0].tolist() == list(range(6))


# --- the model's description ---


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"rms_norm_eps": 0.5}),
        ("config.json", {"rope_theta": 7.0}),
        ("generation_config.json", {"eos_token_id": [1, 2, 3]}),
    ],
)
def test_a_model_that_is_described_otherwise_is_refused(finished, copied, tmp_path, file, fields):
    """The weights are the same; what they compute, or where responses end, is not."""
    model = Path(shutil.copytree(finished.config.policy.path, tmp_path / "model"))
    stored = json.loads((model / file).read_text()) if (model / file).is_file() else {}
    (model / file).write_text(json.dumps(stored | fields))
    with pytest.raises(UserError, match="say another model, or other ends of a response"):
        go_on(finished, copied, policy__path=str(model))


def test_a_run_without_its_checkpoints_says_that_it_starts_over(finished, copied):
    shutil.rmtree(copied / "checkpoints")
    assert "holds no checkpoint: starting at step 0" in go_on(finished, copied)


def test_a_transcript_that_cannot_be_written_is_a_sentence(folder, tmp_path):
    (tmp_path / "run" / "samples" / "step_000000.jsonl").mkdir(parents=True)  # in the way
    with pytest.raises(UserError, match="cannot write to .*samples.*Is a directory.*; the last good checkpoint is"):
        run(run_config(folder), tmp_path / "run")


def test_a_warm_up_longer_than_the_run_is_told(folder, tmp_path):
    said = run(small_config(folder, steps=1, optimizer__warmup=1000), tmp_path / "run").said
    assert "optimizer.warmup = 1000: all 2 updates of the run are part of it" in said
