"""Kills at random instants, over the kinds of state that a run has: bit for bit the undisturbed run."""

import json
import subprocess
import sys

import pytest

from dppo_jax.storage.run_log import RunLog
from experiments.chaos.trials import differences
from tests.helpers.fixtures import config_file, hurried_environment, tiny
from tests.helpers.places import ROOT

# Of each call: the kinds of experiments.chaos, the kills over all of them, and changes of the config.
IN_FLIGHT = dict(rollout__in_flight=2, rollout__max_age=3, rollout__slots=8)
CALLS: dict[str, tuple[str, int, dict]] = {
    "every kind": ("plain,staleness,lag,in_flight,lora,critic,two_hosts", 10, dict(rollout__slots=8)),
    "exact": ("plain", 2, dict(rollout__exact=True, train__pack=False)),
    "entropies in flight": ("plain", 2, dict(loss__name="estr", **IN_FLIGHT)),
    "privileged critic": (
        "critic", 2,
        dict(
            critic__bounds=(0.0, 1.0), critic__targets="monte_carlo", critic__lam_alpha=0.4,
            critic__privileged="answer", critic__template="{privileged}={prompt}", critic__max_prompt_len=11,
            advantage__name="gae",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_runs_that_are_killed_end_as_the_undisturbed_ones(call, tmp_path, tmp_path_factory):
    kinds, kills, changes = CALLS[call]
    changes = dict(steps=24, checkpoint__every=2, checkpoint__keep=2, log__histograms=0, log__samples=0) | changes
    config = config_file(tmp_path / "config.py", tiny(tmp_path_factory), **changes)
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.chaos", "--config", str(config), "--workdir", str(tmp_path / "chaos"),
            "--kinds", kinds, "--kills", str(kills), "--seed", "1",
        ],
        cwd=ROOT, env=hurried_environment(tmp_path_factory), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    said = "".join(path.read_text()[-2000:] for path in (tmp_path / "chaos").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + said
    found = json.loads((tmp_path / "chaos" / "chaos.json").read_text())
    assert [one["kind"] for one in found] == kinds.split(",")
    assert sum(one["resumes"] for one in found) == kills == sum(sum(one["ends"].values()) for one in found)
    assert all(one["most_lost"] <= 3 for one in found)  # a checkpoint every other step, one of them being written
    assert all(not one["failures"] and one["rounds"] for one in found)


def test_a_run_that_is_not_the_undisturbed_one_is_told(tmp_path):
    for name, last in (("one", 0.5), ("two", 0.25)):
        with RunLog(tmp_path / name, hparams={}, resume_step=0, total_steps=2) as log:
            for step, value in ((0, 1.0), (1, last)):
                log.scalars(step, {"reward/mean": value, "time/train": value})
    assert list(differences(tmp_path / "one", tmp_path / "one")) == []
    assert list(differences(tmp_path / "one", tmp_path / "two")) == ["reward/mean differs from step 1 on"]
