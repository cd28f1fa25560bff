"""What goes wrong in the workers' own machinery is an error in one sentence: never a 0, never a hang."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

from dppo_jax.data.examples import Example, Task
from dppo_jax.errors import UserError
from dppo_jax.rewards.answers import AnswerVerifier
from dppo_jax.rewards.scorer import MAX_TIME_LIMIT_S, Scorer
from tests.helpers import hostile
from tests.helpers.places import ROOT


def isolated(verify=hostile.process_id, **changes):
    imports = changes.pop("worker_imports", ("tests.helpers.hostile",))
    task = Task("test", (), verify, isolated=True, worker_imports=imports)
    return Scorer(task, **{"workers": 2, "time_limit_s": 20, **changes})


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), 3e9, 1e300, MAX_TIME_LIMIT_S + 1])
def test_a_time_limit_out_of_bounds_is_refused(limit):
    with pytest.raises(UserError, match="reward.time_limit_s must be positive and at most 3600 seconds, not"):
        isolated(time_limit_s=limit)


def test_the_largest_time_limit_works():
    with isolated(time_limit_s=MAX_TIME_LIMIT_S) as scorer:
        rewards, counts = scorer.submit([""] * 2, [Example("", "")] * 2).result()
    assert rewards.all() and counts == {"killed": 0, "failed": 0, "refused": 0}


def test_a_worker_that_cannot_import_what_it_needs():
    with isolated(worker_imports=("tests.helpers.hostile", "no_such_module")) as scorer:
        pending = scorer.submit([""] * 3, [Example("", "")] * 3)
        with pytest.raises(UserError, match="the reward workers cannot start: .*no_such_module") as error:
            pending.result()
    assert "\n" not in str(error.value)


def test_a_memory_limit_that_cannot_be_set():
    with isolated(memory_limit_mib=2**60) as scorer:
        with pytest.raises(UserError, match="the reward workers cannot start: OverflowError"):
            scorer.submit([""], [Example("", "")]).result()


def test_an_example_that_cannot_travel_to_a_worker():
    with isolated() as scorer:
        pending = scorer.submit([""], [Example("", "", {"made by": lambda: 0})])
        with pytest.raises(UserError, match="the reward workers failed: .*lambda"):
            pending.result()


def test_workers_killed_between_two_batches_are_replaced():
    """As the kernel does it when memory runs out."""
    with isolated() as scorer:
        first, _ = scorer.submit([""] * 20, [Example("", "")] * 20).result()
        for pid in set(map(int, first)):
            os.kill(pid, signal.SIGKILL)
        time.sleep(1)
        again, counts = scorer.submit([""] * 20, [Example("", "")] * 20).result()
    assert again.all() and not set(again) & set(first) and sum(counts.values()) == 0


def test_the_loss_of_the_process_that_starts_workers_is_no_zero():
    """Its workers seem to have ended all at once."""
    with isolated(hostile.waits) as scorer:
        pending = scorer.submit(["30"] * 8, [Example("", "")] * 8)
        time.sleep(2)
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        with pytest.raises(UserError, match="the reward workers failed: ") as error:
            pending.result()
        assert "\n" not in str(error.value)
    with isolated() as scorer:  # there is another by then
        assert scorer.submit([""], [Example("", "")]).result()[0].all()


PROGRAM = """
import os, signal, sys, threading, time
from tests.helpers import hostile
from dppo_jax.data.examples import Example, Task
from dppo_jax.errors import run_main
from dppo_jax.rewards.scorer import Scorer


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where Ctrl-C is ignored
    task = Task("test", (), hostile.waits, isolated=sys.argv[1] == "workers", worker_imports=("tests.helpers.hostile",))
    with Scorer(task, workers=1, time_limit_s=60) as scorer:
        scorer.ready()
        pending = scorer.submit(["5"], [Example("", "")])
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()
        pending.result()
        print("not interrupted")


if __name__ == "__main__":
    run_main(main)
"""


@pytest.mark.parametrize("where", ["workers", "thread"])
def test_an_interruption_of_the_program_still_ends_it(where, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", where],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def environment_of(process: Path) -> str:
    """As it was when its program began; "" where it cannot be read."""
    try:
        return (process / "environ").read_text()
    except OSError:
        return ""


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells a process that its parent ended")
def test_workers_end_with_a_killed_program(tmp_path):
    """One that hears no other signal, too."""
    program = PROGRAM.replace("hostile.waits", "hostile.ignores").replace("signal.SIGINT)", "signal.SIGKILL)")
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LEFT": str(tmp_path)}
    nowhere = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = subprocess.run([sys.executable, tmp_path / "program.py", "workers"], env=environment, **nowhere)
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 30
    while left := [at for at in Path("/proc").glob("[0-9]*") if str(tmp_path) in environment_of(at)]:
        if time.monotonic() > end:
            for process in left:
                os.kill(int(process.name), signal.SIGKILL)
            pytest.fail(f"{len(left)} processes are left")
        time.sleep(0.1)


def test_a_closed_scorer_leaves_nobody_waiting():
    scorer = isolated(hostile.waits)
    pending = scorer.submit(["30"], [Example("", "")])
    scorer.close()
    with pytest.raises(UserError, match="the reward workers failed"):
        pending.result()


def test_a_thread_has_the_same_bounds():
    with pytest.raises(UserError, match="must be positive"):
        Scorer(Task("test", (), AnswerVerifier("exact_match"), isolated=False), workers=1, time_limit_s=float("inf"))
