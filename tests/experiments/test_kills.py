"""SIGKILLs at random instants, over the kinds of state that a run has: bit for bit the undisturbed run."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dppo_jax.storage.run_log import event_files
from tests.helpers.fixtures import config_file, hurried, hurried_environment, run, same, small_config, tiny
from tests.helpers.places import ROOT

KILLS = 4
STEPS = 40
KINDS: dict[str, dict] = {
    "plain": {},
    "staleness": dict(train__staleness=1),
    "lag": dict(rollout__lag=3),
    "lora": dict(lora__rank=2),
    "critic": dict(advantage__name="gae"),
    "in flight": dict(rollout__in_flight=2, rollout__max_age=3, rollout__slots=8),
    "exact": dict(rollout__exact=True, train__pack=False),
    "entropies in flight": dict(loss__name="estr", rollout__in_flight=2, rollout__max_age=3, rollout__slots=8),
    "privileged critic": dict(
        advantage__name="gae", critic__bounds=(0.0, 1.0), critic__targets="monte_carlo", critic__lam_alpha=0.4,
        critic__privileged="answer", critic__template="{privileged}={prompt}", critic__max_prompt_len=11,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one(kind, tmp_path, tmp_path_factory):
    folder = tiny(tmp_path_factory)
    changes = dict(steps=STEPS, checkpoint__every=2, checkpoint__keep=2, checkpoint__export=True, log__histograms=0)
    changes |= dict(log__samples=0) | KINDS[kind]
    with hurried(tmp_path_factory):
        whole = run(small_config(folder, **changes), tmp_path / "whole").folder
    size = sum(file.stat().st_size for file in event_files(whole)) // STEPS
    config = config_file(tmp_path / "config.py", folder, **changes)
    killed, seed = tmp_path / "killed", list(KINDS).index(kind)
    command = [sys.executable, "-m", "tests.helpers.kills", str(config), str(killed), str(KILLS), str(seed), str(size)]
    environment = hurried_environment(tmp_path_factory)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    log = killed.with_suffix(".log")
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    assert len(done.stdout.split()) == KILLS and int(done.stdout.split()[-1]) > 0  # some of them cost a few steps
    same(whole, killed)
    policies = (load_file(folder / "policy" / "model.safetensors") for folder in (whole, killed))
    jax.tree.map(np.testing.assert_array_equal, *policies)
