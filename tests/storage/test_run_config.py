"""config.json, and what may change when a run goes on."""

import json
import math

import pytest

from dppo_jax.errors import UserError, WriteError
from dppo_jax.storage.run_config import changed, flatten, plain, read_config, write_config


def test_config_is_stored_as_strict_json(tmp_path):
    config = {"steps": 3, "loss": {"ratio_cap": math.inf, "name": "cispo"}, "stop": (1, 2), "clip": None}
    write_config(tmp_path / "new", config)
    stored = json.loads((tmp_path / "new" / "config.json").read_text(), parse_constant=pytest.fail)
    assert stored == {"steps": 3, "loss": {"ratio_cap": "inf", "name": "cispo"}, "stop": [1, 2], "clip": None}
    assert read_config(tmp_path / "new") == stored == plain(config)
    flat = {"steps": 3, "loss.ratio_cap": "inf", "loss.name": "cispo", "stop": "[1, 2]", "clip": None}
    assert flatten(stored) == flat


def test_resuming_with_another_config_names_the_keys():
    config = {"steps": 3, "loss": {"name": "cispo"}, "checkpoint": {"every": 1, "keep": 2}, "seed": 0, "gone": 1}
    longer = {**config, "steps": 9, "checkpoint": {"every": 5, "keep": 2}}
    assert changed(flatten(config), flatten(longer), "run") == ["checkpoint.every: 1 -> 5", "steps: 3 -> 9"]
    other = {"steps": 9, "loss": {"name": "pg_is"}, "checkpoint": config["checkpoint"], "seed": 0, "fresh": 2}
    with pytest.raises(UserError) as error:
        changed(flatten(config), flatten(other), "run")
    for part in ("loss.name was 'cispo' and is now 'pg_is'", "gone was 1 and is now absent", "--workdir"):
        assert part in str(error.value)
    assert "steps" not in str(error.value) and "checkpoint" not in str(error.value)
    assert len(changed(flatten(config), flatten(other), "run", may_change=("*",))) == 4
    assert changed(flatten(config), flatten(config), "run") == []


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no config.json"):
        read_config(tmp_path)
    for text, complaint in (("{", "broken JSON"), ("[1]", "must hold a JSON object"), ("9" * 5000, "digits")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=complaint):
            read_config(tmp_path)


def test_a_config_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "config.json.part").mkdir()  # in the way
    with pytest.raises(WriteError, match="cannot write to .*: Is a directory"):
        write_config(tmp_path, {"steps": 1})
