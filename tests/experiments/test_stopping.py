"""Runs that are asked to stop: within a rollout, and in two processes of which one is asked; and what they say of it."""

import contextlib
import functools
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from dppo_jax.devices import peers
from dppo_jax.errors import Stopped
from experiments.run.evaluation import Evaluation
from experiments.run.saving import Saving
from tests.devices.test_hosts import environment, free_port
from tests.experiments.test_conversing import TALKS
from tests.helpers.fixtures import Run, hurried, run, run_config, same, small_config, tiny
from tests.helpers.kills import newest_step
from tests.helpers.places import ROOT

TIME_LIMIT_S = 400
WITHIN_S = 10  # from the signal to the end, of the quickstart


# --- within a rollout ---

# Chunks are of two decode steps, so that every rollout asks several times.
SHORT = dict(steps=4, checkpoint__every=0, rollout__chunk=2)
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
    """(name) -> a case's run that nobody asks to stop."""

    @functools.cache
    def one(name: str) -> Run:
        make, changes = CASES[name]
        with hurried(tmp_path_factory), pytest.MonkeyPatch.context() as patch:
            asks = Asks(patch)
            whole = run(make(tiny(tmp_path_factory), **(changes | SHORT)), tmp_path_factory.mktemp("whole") / "run")
        for place in PLACES:  # more than once in each of them: what is abandoned is under way
            assert place[0] != name or asks.count(place[1:]) > 1
        return whole

    return one


@pytest.mark.parametrize(("name", "place", "done"), PLACES)
def test_within_a_rollout_the_last_whole_step_is_saved(name, place, done, undisturbed, tmp_path, tmp_path_factory):
    """The run ends where it is asked, and goes on as if it had not been. No step was due to be saved."""
    whole, workdir = undisturbed(name), tmp_path / "run"
    with hurried(tmp_path_factory):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as error:
            asks = Asks(patch, stop_at=(place, done))
            run(whole.config, workdir)
        assert asks[-1] == (place, done) and asks.count(asks[-1]) == 1
        assert newest_step(workdir) == done
        assert str(error.value).startswith(f"asked to stop, after step {done}, " if done else "asked to stop, before")
        run(whole.config, workdir)
    same(whole.folder, workdir)
