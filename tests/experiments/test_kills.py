"""Kills at random instants, and other faults, over the kinds of state that a run has: bit for bit as undisturbed."""

import json
import subprocess
import sys

import pytest

from dppo_jax.files import to_path
from dppo_jax.storage.run_log import RunLog
from experiments.chaos.compare import differences
from tests.helpers.fixtures import config_file, hurried_environment, tiny
from tests.helpers.places import ROOT

# Of each call: the kinds of experiments.chaos, the kills over all of them, the faults, and changes of the config.
IN_FLIGHT = dict(rollout__in_flight=2, rollout__max_age=3, rollout__slots=8)
CALLS: dict[str, tuple[str, int, str, dict]] = {
    "every kind": (
        "plain,staleness,lag,in_flight,lora,critic,two_hosts", 10, "full_disk,damaged,clock,stopped_peer",
        dict(rollout__slots=8),
    ),
    "exact": ("plain", 2, "none", dict(rollout__exact=True, train__pack=False)),
    "entropies in flight": ("plain", 2, "none", dict(loss__name="estr", **IN_FLIGHT)),
    "privileged critic": (
        "critic", 2, "none",
        dict(
            critic__bounds=(0.0, 1.0), critic__targets="monte_carlo", critic__lam_alpha=0.4,
            critic__privileged="answer", critic__template="{privileged}={prompt}", critic__max_prompt_len=11,
            advantage__name="gae",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_runs_that_are_disturbed_end_as_the_undisturbed_ones(call, tmp_path, tmp_path_factory):
    kinds, kills, faults, changes = CALLS[call]
    changes = dict(steps=16, checkpoint__every=2, checkpoint__export=True, log__histograms=0, log__samples=0) | changes
    config = config_file(tmp_path / "config.py", tiny(tmp_path_factory), checkpoint__keep=2, **changes)
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.chaos", "--config", str(config), "--workdir", str(tmp_path / "chaos"),
            "--kinds", kinds, "--kills", str(kills), "--faults", faults, "--seed", "1",
        ],
        cwd=ROOT, env=hurried_environment(tmp_path_factory), capture_output=True, text=True, timeout=2400,
    )  # fmt: skip
    said = "".join(path.read_text()[-2000:] for path in (tmp_path / "chaos").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + said
    found = {part["outcome"]["kind"]: part for part in json.loads((tmp_path / "chaos" / "chaos.json").read_text())}
    outcomes = [part["outcome"] for part in found.values()]
    assert sorted(found) == sorted(kinds.split(","))
    assert sum(one["resumes"] for one in outcomes) == kills == sum(sum(one["ends"].values()) for one in outcomes)
    assert any(one["resumed_saved"] for one in outcomes)
    told = {fault["name"]: fault["said"] for part in found.values() for fault in part["faults"]}
    assert sorted(told) == (sorted(faults.split(",")) if faults != "none" else [])
    if told:
        assert "could not be written" in told["full_disk"] or "cannot write to" in told["full_disk"]
        assert "its bytes are not those written" in told["damaged"] and "was lost" in told["stopped_peer"]


def test_a_run_that_is_not_the_undisturbed_one_is_told(tmp_path):
    for name, last in (("one", 0.5), ("two", 0.25)):
        with RunLog(tmp_path / name, hparams={}, resume_step=0, total_steps=2) as log:
            for step, value in ((0, 1.0), (1, last)):
                log.scalars(step, {"reward/mean": value, "time/train": value})
        (tmp_path / name / "policy").mkdir()
        to_path(tmp_path / name / "policy" / "model.safetensors").write_text(name)
    assert differences(tmp_path / "one", tmp_path / "one") == []
    expected = ["reward/mean differs from step 1 on", "policy/model.safetensors is another"]
    assert differences(tmp_path / "one", tmp_path / "two") == expected
