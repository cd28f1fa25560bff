"""The quickstart's run in two processes, of which one is asked to stop: both save the same step and end."""

import contextlib
import signal
import subprocess
import sys
import time

import pytest

from dppo_jax.errors import Stopped
from tests.devices.test_hosts import environment, free_port
from tests.helpers.places import ROOT

TIME_LIMIT_S = 200
COUNT = 2


def hear_ctrl_c() -> None:
    """Tests may run where nobody hears it: in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_both_save_the_same_step_and_end(tmp_path, tmp_path_factory, number):
    """The last one is asked. Steps before were saved by the clock of the first."""
    run, meeting = tmp_path / "run", ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", str(COUNT)]
    command = [sys.executable, "-m", "experiments.train", "--config=configs/quickstart.py", f"--workdir={run}"]
    command += ["--config.steps=100000", "--config.checkpoint.every_s=1.0"]
    env = environment(tmp_path_factory, 1)
    logs = [tmp_path / f"{process}.log" for process in range(COUNT)]
    with contextlib.ExitStack() as stack:
        processes = []
        for process, log in enumerate(logs):
            flags = [*meeting, "--process_id", str(process)]
            out = stack.enter_context(open(log, "wb"))
            processes.append(
                subprocess.Popen([*command, *flags], cwd=ROOT, env=env, stdout=out, stderr=out, preexec_fn=hear_ctrl_c)
            )
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        end = time.monotonic() + TIME_LIMIT_S
        while len(list(run.glob("checkpoints/[0-9]*/manifest.json"))) < 2:
            assert all(p.poll() is None for p in processes) and time.monotonic() < end, [x.read_text() for x in logs]
            time.sleep(0.05)
        asked = time.monotonic()
        processes[-1].send_signal(number)
        statuses = [process.wait(TIME_LIMIT_S) for process in processes]
        took = time.monotonic() - asked
    said = [log.read_text(errors="replace") for log in logs]
    assert statuses == [Stopped.status] * COUNT, said
    newest = max(int(path.parent.name) for path in run.glob("checkpoints/[0-9]*/manifest.json"))
    sentence = f"error: asked to stop, after step {newest}; started again, the run goes on from its checkpoint"
    for words in said:
        assert words.splitlines()[-1] == sentence
    print(f"{number.name}: {took:.1f} s")
