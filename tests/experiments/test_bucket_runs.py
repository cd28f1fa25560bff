"""Whole runs in a bucket of a real server on this machine: killed, gone on with, evaluated, plotted, exported."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dppo_jax.files import files_in, names_in, read_text, to_path
from dppo_jax.models import load_policy
from dppo_jax.storage.run_log import MACHINE, read_scalars
from tests.devices.test_hosts import free_port, side_by_side
from tests.helpers.bucket_proxy import in_front_of
from tests.helpers.bucket_servers import BUCKET, in_environment, serving
from tests.helpers.fixtures import hurried, hurried_environment, run, run_config, same, tiny
from tests.helpers.places import ROOT

HOME = f"gs://{BUCKET}"
STEPS = 6
OUTAGE_S = 60

CONFIG = """
from pathlib import Path

from tests.helpers.fixtures import run_config


def get_config():
    c = run_config(Path({folder!r}), steps={steps})
    c.policy.path = "{home}/model"
    c.data.path = c.eval.sets.sums.path = "{home}/data/questions-*.jsonl"
    return c
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Path]:
    """A folder with a config, whose model and data are in a bucket; commands run in it and leave nothing there."""
    folder, local = tmp_path_factory.mktemp("here"), tiny(tmp_path_factory)
    with serving("gs") as environment, in_environment(environment):
        for file in sorted((local / "model").iterdir()):
            to_path(f"{HOME}/model/{file.name}").write_bytes(file.read_bytes())
        to_path(f"{HOME}/data/questions-1.jsonl").write_bytes((local / "questions.jsonl").read_bytes())
        (folder / "config.py").write_text(CONFIG.format(folder=str(local), steps=STEPS, home=HOME))
        yield folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.py"]  # no gs:, no ~


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{module}", *arguments]


@pytest.fixture(scope="module")
def environment(tmp_path_factory, here) -> dict[str, str]:
    return hurried_environment(tmp_path_factory) | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def said(here, environment) -> tuple[str, str]:
    """Of a run that is killed when its checkpoint of step 4 is whole, and of the same command again."""
    train = command("train", "--config", "config.py", "--workdir", f"{HOME}/run")
    with subprocess.Popen(train, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as first:
        commit = to_path(f"{HOME}/run/checkpoints/4/commit_success.txt")
        while not commit.exists():
            assert first.poll() is None, first.stdout and first.stdout.read().decode()
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        before = first.communicate()[0].decode()
        assert first.returncode == -signal.SIGKILL, before
    again = subprocess.run(train, cwd=here, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    return before, again.stderr


@pytest.fixture(scope="module")
def on_a_disk(tmp_path_factory) -> Path:
    """The same run on a disk, never killed."""
    with hurried(tmp_path_factory):
        return run(run_config(tiny(tmp_path_factory), steps=STEPS), tmp_path_factory.mktemp("disk") / "run").folder


def lines_of(folder: Path) -> list[dict]:
    """The lines of JSON, without the clock's."""
    texts = [read_text(path) for path in files_in(folder) if path.name.startswith("scalars")]
    lines = sorted((json.loads(line) for text in texts for line in text.splitlines()), key=lambda line: line["step"])
    return [{tag: x for tag, x in line.items() if not tag.startswith(MACHINE)} for line in lines]


def test_a_killed_run_goes_on_and_its_numbers_are_those_of_a_disk_to_the_bit(said, on_a_disk):
    assert "going on from the checkpoint at step 4" in said[1]
    same(to_path(f"{HOME}/run"), on_a_disk, but=MACHINE)
    assert lines_of(to_path(f"{HOME}/run")) == lines_of(on_a_disk)


def test_what_is_left_is_as_on_a_disk(said, on_a_disk):
    names = names_in(to_path(f"{HOME}/run"))
    names.remove("scalars.0001.jsonl")  # of the second process
    assert names == sorted(path.name for path in on_a_disk.iterdir())
    assert names_in(to_path(f"{HOME}/run/checkpoints")) == ["2", "4", "6"]


def test_tensorboards_own_reader_finds_the_same_scalars(said):
    reader = EventAccumulator(f"{HOME}/run/tb", size_guidance={"scalars": 0})
    reader.Reload()
    for tag, (steps, values) in read_scalars(to_path(f"{HOME}/run")).items():
        events = reader.Scalars(tag)
        assert [event.step for event in events] == steps.tolist(), tag
        np.testing.assert_array_equal(np.float32([event.value for event in events]), np.float32(values), err_msg=tag)


def test_the_exported_policy_is_that_of_a_disk(said, on_a_disk):
    with_bucket, without = (load_policy(f"{place}/policy", dtype="float32") for place in (f"{HOME}/run", on_a_disk))
    tokens = np.arange(8)[None]
    for one, other in zip(*(p.logits(p.params, tokens) for p in (with_bucket, without)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert names_in(to_path(f"{HOME}/run/policy")) == sorted(path.name for path in (on_a_disk / "policy").iterdir())


def test_it_is_evaluated_and_plotted_into_the_bucket(said, here, environment):
    results = f"{HOME}/results/run.parquet"
    for source in (["--checkpoint", f"{HOME}/run"], ["--policy", f"{HOME}/run/policy"]):
        arguments = ["--config", "config.py", *source, *(["--results", results] if "--checkpoint" in source else [])]
        found = subprocess.run(command("eval", *arguments), cwd=here, env=environment, capture_output=True, text=True)
        assert found.returncode == 0 and "eval/sums/avg " in found.stdout, found.stderr
    assert names_in(to_path(f"{HOME}/results")) == ["run.parquet"]
    plot = command("plot", "--runs", f"{HOME}/run", "--out", f"{HOME}/curves.png")
    subprocess.run(plot, cwd=here, env=environment, check=True)
    assert to_path(f"{HOME}/curves.png").read_bytes().startswith(b"\x89PNG")


def test_two_hosts_train_in_the_bucket_and_one_of_them_writes(here, on_a_disk, tmp_path_factory, environment):
    workdir = f"{HOME}/two"
    meeting = ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", "2"]
    train = ["-m", "experiments.train", "--config", str(here / "config.py"), "--workdir", workdir, *meeting]
    commands = [[*train, "--process_id", str(number)] for number in range(2)]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    ended = side_by_side(tmp_path_factory.mktemp("two"), commands, environment | flags)
    assert [status for status, _ in ended] == [0, 0], ended
    assert len([name for name in names_in(to_path(f"{workdir}/tb")) if "tfevents" in name]) == 1
    found, want = read_scalars(to_path(workdir)), read_scalars(on_a_disk)
    for tag in ("reward/mean", "response/length_mean", "grad_norm"):
        np.testing.assert_allclose(found[tag][1], want[tag][1], rtol=1e-4, err_msg=tag)




# --- a bucket that fails ---


def last_line(said: str) -> str:
    assert "Traceback" not in said, said
    return said.strip().splitlines()[-1]


def test_a_bucket_that_may_only_be_read_is_one_sentence_at_the_start(said, here, environment):
    """The run that is there stays as it is."""
    before = {str(path): path.read_bytes() for path in files_in(to_path(f"{HOME}/run"))}
    with in_front_of(environment) as proxy:
        proxy.mode = "read_only"
        train = command("train", "--config", "config.py", "--workdir", f"{HOME}/run", f"--config.steps={STEPS + 2}")
        done = subprocess.run(train, cwd=here, env=environment | proxy.environment, capture_output=True, text=True)
    sentence = last_line(done.stderr)
    assert done.returncode == 2 and proxy.refused and sentence.startswith("error: ") and f"{HOME}/run" in sentence
    assert {str(path): path.read_bytes() for path in files_in(to_path(f"{HOME}/run"))} == before


def test_a_bucket_that_answers_503_for_a_minute_costs_no_more_than_a_kill(here, on_a_disk, environment):
    """The run waits for it and goes on, or ends in one sentence; the same command then ends as on a disk."""
    workdir = f"{HOME}/outage"
    train = command("train", "--config", "config.py", "--workdir", workdir)
    commit = to_path(f"{workdir}/checkpoints/2/commit_success.txt")
    with in_front_of(environment) as proxy:
        environment = environment | proxy.environment
        with subprocess.Popen(train, cwd=here, env=environment, stderr=subprocess.PIPE, text=True) as first:
            while not commit.exists():
                assert first.poll() is None, first.communicate()
                time.sleep(0.02)
            proxy.mode = "down"
            with contextlib.suppress(subprocess.TimeoutExpired):
                first.wait(OUTAGE_S)
            down_s = OUTAGE_S if first.poll() is None else 0
            proxy.mode = ""
            ended = first.communicate()[1]
        assert proxy.refused, "the run was over before"
        assert first.returncode == 0 or (first.returncode == 2 and last_line(ended).startswith("error: ")), ended
        print(f"{first.returncode} after an outage of {down_s} s, {proxy.refused} requests refused: {last_line(ended)}")
        again = subprocess.run(train, cwd=here, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    same(to_path(workdir), on_a_disk, but=MACHINE)


def test_chaos_in_the_bucket(here, environment):
    chaos = command("chaos", "--config", "config.py", "--workdir", "chaos", "--bucket", f"{HOME}/chaos")
    chaos += ["--kinds", "bucket", "--kills", "1", "--faults", "none", "--config.checkpoint.export=False"]
    try:
        done = subprocess.run(chaos, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "| bucket | 1 in " in done.stdout, done.stdout + done.stderr
    finally:
        shutil.rmtree(here / "chaos", ignore_errors=True)
