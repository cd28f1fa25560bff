"""What hangs within a step ends with all stacks, the phase's name and a status of its own. Each is a real run."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.run.stuck import STUCK
from tests.helpers.fixtures import hurried_environment, tiny
from tests.helpers.places import ROOT

LIMIT_S = 8

BEGIN = """
import sys, time
import jax, jax.numpy as jnp
from pathlib import Path
from tests.helpers.fixtures import small_config
from experiments.train import train

config = small_config(Path(sys.argv[1]), steps=3, log__stuck_s=LIMIT_S, log__histograms=0, log__samples=0)
"""
# Its workers may have an hour for a reply.
REWARD = """
own = Path(sys.argv[2]).parent / "own.py"
own.write_text("import time\\ndef score(reply, answer):\\n    time.sleep(600)\\n")
config.reward.function, config.reward.time_limit_s = f"{own}:score", 3600.0
"""
ENVIRONMENT = """
own = Path(sys.argv[2]).parent / "own.py"
own.write_text('''
import time
class Game:
    def reset(self, seed):
        return "1+1=", {}
    def step(self, action):
        time.sleep(600)
''')
config.data.kind, config.data.name, config.data.path, config.data.size = "environment", f"{own}:Game", "", 8
config.data.verifier, config.reward.time_limit_s = "task", 3600.0
"""
DEVICE = """
from dppo_jax import train_step
from jax.experimental import io_callback
before = train_step.loss_inputs
def stuck_on_the_device():
    time.sleep(600)
def loss_inputs(packed, head):
    io_callback(stuck_on_the_device, None)
    return before(packed, head)
train_step.loss_inputs = loss_inputs
"""
# A regular expression that backtracks for ever, inside C, which does not let go of the interpreter's lock.
LOCK = """
import re
from dppo_jax.rewards import verifiers
def holds_the_lock(reply, answer):
    re.fullmatch("(a*)*b", "a" * 60)
verifiers.VERIFIERS["last_number"] = holds_the_lock
"""


def ended(tmp_path_factory, workdir: Path, planted: str) -> tuple[int, str]:
    code = (BEGIN + planted).replace("LIMIT_S", str(LIMIT_S)) + "\ntrain(config, Path(sys.argv[2]))\n"
    command = [sys.executable, "-c", code, str(tiny(tmp_path_factory)), str(workdir)]
    environment = hurried_environment(tmp_path_factory) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("planted", "phase", "function"),
    [(REWARD, "reward", "_outcome"), (ENVIRONMENT, "rollout", "draw"), (DEVICE, "train", "stuck_on_the_device")],
    ids=["reward", "environment", "device"],
)
def test_what_hangs_is_named_and_nothing_outlives_the_run(tmp_path_factory, tmp_path, planted, phase, function):
    """A worker that did would hold stderr, and `ended` wait for it until its own limit."""
    status, said = ended(tmp_path_factory, tmp_path / "run", planted)
    assert status == STUCK, said
    assert f"error: step 0: the phase '{phase}' is stuck" in said and f"in {function}" in said
    told = (tmp_path / "run" / "stuck.txt").read_text()
    assert told.startswith("error: step 0: the phase") and f"in {function}" in told and "in loop" in told


def test_what_holds_the_interpreters_lock_ends_too(tmp_path_factory, tmp_path):
    status, said = ended(tmp_path_factory, tmp_path / "run", LOCK)
    assert status == 1 and said.count("Timeout (") == 1 and "in holds_the_lock" in said
