"""experiments.chaos.inputs: its report, what it finds, and that a process which hangs or ends does not stop it."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dppo_jax.storage.run_log import read_scalars
from experiments.chaos.inputs import runs, trials
from experiments.chaos.inputs.judge import Judged, Wrong
from tests.helpers.places import ROOT


def test_a_trial_of_every_kind(tmp_path):
    """In a process of its own, as for users: it forks."""
    command = [sys.executable, "-m", "experiments.chaos.inputs", "--inputs", "72", "--seed", "5", "--jobs", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert found["failures"] == [] and found["counts"].keys() == trials.KINDS.keys()
    for count in found["counts"].values():
        assert count["inputs"] == 12 == count["refused"] + count["taken"] and count["refused"] > 0
    assert (tmp_path / "out" / "inputs.md").read_text() == done.stdout


def odd(draw: random.Random, _: Path) -> Judged:
    """By its draw: refused, taken, wrong, an error, the process's end, a hang that hears signals, one that does not."""
    kind = draw.choice(["refused", "taken", "wrong", "error", "ends", "sleeps", "hangs", "traceback"])
    if kind == "wrong":
        raise Wrong("it is wrong")
    if kind == "error":
        raise KeyError("deep")
    if kind == "ends":
        os._exit(7)
    if kind == "sleeps":
        time.sleep(60)
    if kind == "hangs":
        os.kill(os.getpid(), 19)  # SIGSTOP
    if kind == "traceback":
        os.write(2, b"Traceback (most recent call last):\n")
    return Judged(kind == "refused", kind)


def test_what_fails_is_told_by_its_number_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(trials.KINDS, "odd", lambda folder: odd)
    monkeypatch.setattr(trials, "LIMIT_S", 0.5)
    monkeypatch.setattr(trials, "GONE_S", 3.0)
    numbers = range(100, 130)
    found = trials.results(["odd"], numbers, 3, 2, tmp_path)
    assert [one.number for one in found] == list(numbers)
    words = {
        "wrong": "it is wrong", "error": "KeyError: 'deep'", "ends": "ended its process with 7",
        "sleeps": "hangs: not done after 0.5 s", "hangs": "hangs, and heard no signal for 3 s",
        "traceback": "a traceback is in",
    }  # fmt: skip
    seen = set()
    for one in found:
        draw = random.Random(f"3 odd {one.number}")
        kind = draw.choice(["refused", "taken", "wrong", "error", "ends", "sleeps", "hangs", "traceback"])
        seen.add(kind)
        assert one.outcome == ("failed" if kind in words else kind) and words.get(kind, "") in one.what, one
    assert len(seen) == 8


@pytest.mark.parametrize("where", [0, 5, 30, -3])
def test_a_log_with_a_damaged_record_is_told(tmp_path, capsys, where):
    """What followed it was gone without a word."""
    runs.write(tmp_path)
    file = sorted((tmp_path / "tb").iterdir())[1]
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    read_scalars(tmp_path)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {file} is damaged: its last ") and said.count("\n") == 1
    file.write_bytes(bytes(data[:-5]))  # of a kill, after the damage that stays
    read_scalars(tmp_path)
    assert ("damaged" in capsys.readouterr().err) == (where >= 0)


def test_a_log_that_was_cut_short_is_no_damage(tmp_path, capsys):
    runs.write(tmp_path)
    file = sorted((tmp_path / "tb").iterdir())[1]
    for size in range(file.stat().st_size - 1, 0, -7):
        os.truncate(file, size)
        read_scalars(tmp_path)
    assert capsys.readouterr().err == ""
