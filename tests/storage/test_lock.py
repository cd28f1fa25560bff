"""One run at a time in a folder: real processes that hold the lock, die with it, or only seem to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from dppo_jax.errors import UserError
from dppo_jax.storage import lock
from dppo_jax.storage.lock import NAME, locked
from tests.helpers.places import ROOT

HOLDER = """
import sys
import time
from pathlib import Path

from dppo_jax.storage.lock import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_folder_in_use_is_refused_by_process_host_and_time(tmp_path, holder):
    with pytest.raises(UserError) as error, locked(tmp_path):
        pass
    assert str(error.value).startswith(
        f"{tmp_path} is in use by another run, process {holder.pid} on {socket.gethostname()}, begun 2"
    )
    assert (tmp_path / NAME).is_file()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_lock_whose_process_is_gone_is_taken_over_at_once(tmp_path, holder, end, monkeypatch):
    monkeypatch.setattr(lock, "WATCH_S", 1e9)  # nobody is watched
    holder.send_signal(end)
    holder.wait()
    assert json.loads((tmp_path / NAME).read_text())["process"] == holder.pid
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    assert not (tmp_path / NAME).exists()


def test_a_stopped_process_still_holds_its_folder(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="is in use"), locked(tmp_path):
        pass


def test_a_lock_of_another_machine_is_watched(tmp_path, monkeypatch, capsys):
    """Its lock cannot be seen from here; its heartbeats can. Whatever its clock says."""
    monkeypatch.setattr(lock, "WATCH_S", 1.5)
    about = {"host": "elsewhere", "process": 7, "started": "2001-01-01", "beat": 3}
    (tmp_path / NAME).write_text(json.dumps(about))
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["host"] == socket.gethostname()
    assert "was left by a run process 7 on elsewhere, begun 2001-01-01" in capsys.readouterr().err
    beating = f"""
import json, time
for beat in range(100):
    with open({str(tmp_path / "next")!r}, "w") as file:
        file.write(json.dumps({about!r} | dict(beat=beat)))
    __import__("os").replace({str(tmp_path / "next")!r}, {str(tmp_path / NAME)!r})
    time.sleep(0.1)
"""
    monkeypatch.setattr(lock, "WATCH_S", 60.0)
    with subprocess.Popen([sys.executable, "-c", beating]) as process:
        while not (tmp_path / NAME).exists():
            time.sleep(0.01)
        with pytest.raises(UserError, match="in use by another run, process 7 on elsewhere"), locked(tmp_path):
            pass
        process.kill()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 7}', "\x00" * 10])
def test_a_lock_file_that_says_nothing(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lock, "WATCH_S", 0.1)
    (tmp_path / NAME).write_text(text)
    with locked(tmp_path):
        pass


def test_many_at_once_and_one_has_it(tmp_path):
    """Eight processes that take and leave the folder; whoever has it finds nobody else in it."""
    racing = """
import sys, os, time
from pathlib import Path
from dppo_jax.errors import UserError
from dppo_jax.storage.lock import locked
folder, got = Path(sys.argv[1]), 0
while got < 5:
    try:
        with locked(folder):
            os.mkdir(folder / "inside")
            time.sleep(0.01)
            os.rmdir(folder / "inside")
            got += 1
    except UserError:
        time.sleep(0.002)
"""
    racers = [subprocess.Popen([sys.executable, "-c", racing, str(tmp_path)], cwd=ROOT) for _ in range(8)]
    assert [racer.wait() for racer in racers] == [0] * 8
