"""experiments.checkpoints, and what a checkpoint says of what made it."""

import json
import platform
import subprocess
import sys

import flax
import jax
import optax
import orbax.checkpoint as ocp
import pytest

from dppo_jax.errors import UserError
from dppo_jax.storage.checkpoint import Checkpoints, differences, made_by
from dppo_jax.storage.run_log import read_scalars
from experiments import checkpoints as command
from experiments.chaos.inputs.states import state
from tests.helpers.fixtures import hurried, run, run_config, tiny
from tests.helpers.places import ROOT


def asked(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["checkpoints", *arguments])
    command.main()
    return capsys.readouterr().out


def test_the_steps_of_a_run_are_listed_with_their_damage_and_values(tmp_path, monkeypatch, capsys):
    values = {"2": 0.25, "4": 0.5}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for number, step in enumerate((2, 4, 6)):
            known = dict(list(values.items())[:number])
            checkpoints.save(step, state(step), {"best": {"tag": "reward/mean", "values": known}, "made_by": made_by()})
    largest = max((tmp_path / "checkpoints" / "4" / "default").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    before = sorted(tmp_path.rglob("*"))
    rows = json.loads(asked(monkeypatch, capsys, str(tmp_path), "--json"))
    assert [(row["step"], row["best"]) for row in rows] == [(2, 0.25), (4, 0.5), (6, None)]
    for row in rows:
        files = [path for path in (tmp_path / "checkpoints" / str(row["step"])).rglob("*") if path.is_file()]
        assert row["bytes"] == sum(path.stat().st_size for path in files)
        assert row["made_by"] == made_by()
    name = largest.relative_to(tmp_path)
    assert [row["damage"] for row in rows] == [None, f"{name}: its bytes are not those written", None]
    lines = asked(monkeypatch, capsys, str(tmp_path)).splitlines()
    assert len(lines) == 4 and lines[1].endswith("; whole") and f"damaged: {name}" in lines[2]
    assert sorted(tmp_path.rglob("*")) == before
    for step in (2, 6):
        (tmp_path / "checkpoints" / str(step) / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit) as none_is_whole:
        asked(monkeypatch, capsys, str(tmp_path))
    assert none_is_whole.value.code == 1 and capsys.readouterr().out.count("; damaged: ") == 3
    with pytest.raises(UserError, match=f"holds no folder checkpoints/; give a run's folder, {tmp_path}$"):
        asked(monkeypatch, capsys, str(tmp_path / "checkpoints"))


def test_a_checkpoint_says_what_made_it(tmp_path, tmp_path_factory, monkeypatch, capsys):
    changes = dict(steps=1, eval__every=1, checkpoint__best="eval/sums/avg")
    with hurried(tmp_path_factory):
        run(run_config(tiny(tmp_path_factory), **changes), tmp_path)
        [row] = json.loads(asked(monkeypatch, capsys, str(tmp_path), "--json"))
        assert row["best"] == read_scalars(tmp_path)["eval/sums/avg"][1][-1]  # of the newest step the log alone has it
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            found = checkpoints.about(1)["made_by"]
    commit = found.pop("commit", None)
    versions = {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__}
    versions |= {"python": platform.python_version(), "orbax-checkpoint": ocp.__version__}
    assert found.pop("jaxlib") == jax.lib.__version__
    assert found == versions | {"platform": jax.default_backend(), "devices": jax.device_count(), "processes": 1}
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert commit in (head, f"{head}+changed")


def test_other_versions_and_devices_are_told():
    now = made_by()
    assert differences(now) == differences({}) == differences(now | {"commit": "another"}) == []
    assert differences(now | {"jax": "0.1.2", "devices": 64}) == [
        f"the checkpoint was made with jax 0.1.2, here {now['jax']}; devices 64, here {now['devices']}: numbers may "
        "differ in their last bits"
    ]
