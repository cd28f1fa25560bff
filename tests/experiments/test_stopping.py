"""Runs that are asked to stop: within a rollout, in one process, and in two of which one is asked."""

import contextlib
import functools
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dppo_jax.devices import peers
from dppo_jax.errors import Stopped
from experiments import train
from experiments.run import export
from experiments.run.evaluation import Evaluation
from experiments.run.saving import AGAIN, Saving
from tests.devices.test_hosts import environment, free_port
from tests.experiments.test_conversing import TALKS
from tests.helpers.fixtures import Run, hurried, run, run_config, same, small_config, tiny
from tests.helpers.kills import newest_step
from tests.helpers.places import ROOT

TIME_LIMIT_S = 400
WITHIN_S = 10  # from the signal to the end, of the quickstart


# --- within a rollout ---

# Chunks are of two decode steps, so that every rollout asks several times.
SHORT = dict(steps=4, checkpoint__every=0)
CASES = {
    "batches": (run_config, dict(rollout__slots=8, checkpoint__export=False)),
    "rows in flight": (small_config, dict(rollout__slots=8, rollout__in_flight=1)),
    "conversations": (small_config, TALKS | dict(rollout__in_flight=1)),
}
# Where the run is when it asks whether to stop, and after how many whole steps.
PLACES = [
    ("batches", "rollout", 0),
    ("batches", "rollout", 2),
    ("batches", "evaluation", 2),
    ("rows in flight", "rollout", 2),
    ("conversations", "rollout", 2),
]


class Asks(list):
    """Where a run asked, each time: (rollout | evaluation | step, after so many whole steps). SIGTERM comes just before
    it asks for the first time at `stop_at`."""

    def __init__(self, patch: pytest.MonkeyPatch, stop_at: tuple[str, int] | None = None):
        self._stop_at, self._real = stop_at, peers.asked_to_stop
        patch.setattr(peers, "asked_to_stop", self._ask)

    def _ask(self) -> bool:
        codes, frame = set(), sys._getframe()
        while frame is not None:
            codes, frame = codes | {frame.f_code}, frame.f_back
        place = "evaluation" if Evaluation.at.__code__ in codes else "rollout"
        place = "step" if Saving.save_if_due.__code__ in codes else place
        self.append((place, sum(at == "step" for at, _ in self)))
        if self[-1] == self._stop_at and self.count(self._stop_at) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return self._real()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(name) -> a case's run that nobody asks to stop, whose rollouts are one call each."""

    @functools.cache
    def one(name: str) -> Run:
        make, changes = CASES[name]
        config = make(tiny(tmp_path_factory), **(changes | SHORT | dict(checkpoint__every=1, rollout__chunk=0)))
        with hurried(tmp_path_factory):
            return run(config, tmp_path_factory.mktemp("whole") / "run")

    return one


@pytest.mark.parametrize(("name", "place", "done"), PLACES)
def test_within_a_rollout_the_last_whole_step_is_saved(name, place, done, undisturbed, tmp_path, tmp_path_factory):
    """The run ends where it is asked, though no step was due to be saved, and goes on as if it had not been; in chunks
    all the while, which changes no bit."""
    whole, workdir, (make, changes) = undisturbed(name), tmp_path / "run", CASES[name]
    config = make(tiny(tmp_path_factory), **(changes | SHORT | dict(rollout__chunk=2)))
    with hurried(tmp_path_factory), pytest.MonkeyPatch.context() as patch:
        asks = Asks(patch, stop_at=(place, done))
        with pytest.raises(Stopped) as error:
            run(config, workdir)
        assert asks[-1] == (place, done) and asks.count(asks[-1]) == 1
        assert newest_step(workdir) == done
        assert str(error.value).startswith(f"asked to stop, after step {done}; " if done else "asked to stop, before")
        patch.undo()
        asks = Asks(patch)
        run(config, workdir)
        assert asks.count((place, 0)) > 1  # what was abandoned was under way
    same(whole.folder, workdir)


# --- after the last step ---


@pytest.mark.parametrize("under_way", [False, True], ids=["before the export", "within the export"])
def test_after_the_last_step_nothing_is_lost(under_way, undisturbed, tmp_path, tmp_path_factory, monkeypatch):
    """A terminal that goes, twice, where no step asks any more. An export that has begun is finished."""
    workdir, config = tmp_path / "run", run_config(tiny(tmp_path_factory), **SHORT, rollout__slots=8)
    module, name = (export, "save_hf") if under_way else (train, "export")
    real = getattr(module, name)

    def signalled(*arguments, **settings):
        monkeypatch.undo()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        return real(*arguments, **settings)

    monkeypatch.setattr(module, name, signalled)
    before = signal.signal(signal.SIGHUP, lambda *_: None)  # tests may run where it is ignored
    with hurried(tmp_path_factory):
        if not under_way:
            with pytest.raises(Stopped, match=f"before {workdir} has its model; {AGAIN} and writes that"):
                run(config, workdir)
            assert newest_step(workdir) == config.steps and not (workdir / "policy").exists()
        run(config, workdir)
    signal.signal(signal.SIGHUP, before)
    assert (workdir / "policy" / "config.json").exists() and newest_step(workdir) == config.steps
    same(undisturbed("batches").folder, workdir)


# --- the grace time ---


def test_a_stop_that_takes_longer_than_the_grace_time_is_told_once(undisturbed, tmp_path, tmp_path_factory):
    whole = undisturbed("batches")
    assert "grace_s" not in whole.said  # 30 s are enough
    config = run_config(tiny(tmp_path_factory), **(CASES["batches"][1] | dict(checkpoint__every=1)))
    config.checkpoint.grace_s = 1e-3
    with hurried(tmp_path_factory):
        [told] = [line for line in run(config, tmp_path / "run").said.splitlines() if "grace_s" in line]
    total, hears, saves = (float(x) for x in re.findall(r"([0-9.]+) s[ ,]", told))
    assert "more than checkpoint.grace_s = 0.001: " in told and abs(total - hears - saves) < 0.11 and total > 0


# --- the quickstart, in processes of its own ---


def hear_ctrl_c() -> None:
    """Tests may run where nobody hears it: in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def cpu_seconds(process: subprocess.Popen) -> float:
    """That a process has had so far, of its own code: what it spends in the system is mostly waiting."""
    fields = (Path("/proc") / str(process.pid) / "stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def of_ended_children() -> float:
    """The same of all processes that this one has started, and that have ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


@pytest.mark.parametrize(("count", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)], ids=["one", "two"])
def test_the_quickstart_saves_and_ends_within_ten_seconds(count, number, tmp_path, tmp_path_factory):
    """The last process is asked; of two, both save the same step. Seconds are those of a processor to each process,
    since other tests may run beside this one."""
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    command += ["--config.steps=100000", "--config.checkpoint.every_s=1.0", "--config.eval.every=0"]
    meeting = ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", str(count)] if count > 1 else []
    settings = dict(cwd=ROOT, env=environment(tmp_path_factory, 1), preexec_fn=hear_ctrl_c)
    logs = [tmp_path / f"{process}.log" for process in range(count)]
    with contextlib.ExitStack() as stack:
        processes = []
        for process, log in enumerate(logs):
            flags = [*meeting, "--process_id", str(process)] if meeting else []
            out = stack.enter_context(open(log, "wb"))
            processes.append(subprocess.Popen([*command, *flags], stdout=out, stderr=out, **settings))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        end = time.monotonic() + TIME_LIMIT_S
        while len(list(workdir.glob("checkpoints/[0-9]*/manifest.json"))) < 2:
            assert all(p.poll() is None for p in processes) and time.monotonic() < end, [x.read_text() for x in logs]
            time.sleep(0.05)
        before, began = sum(map(cpu_seconds, processes)) + of_ended_children(), time.monotonic()
        processes[-1].send_signal(number)
        statuses = [process.wait(TIME_LIMIT_S) for process in processes]
        spent, took = of_ended_children() - before, time.monotonic() - began
    said = [log.read_text(errors="replace") for log in logs]
    assert statuses == [Stopped.status] * count, said
    sentence = f"error: asked to stop, after step {newest_step(workdir)}; {AGAIN}"
    assert [words.splitlines()[-1] for words in said] == [sentence] * count
    assert spent < WITHIN_S * count, f"{spent:.1f} s of a processor, {took:.1f} s by the clock"
