"""The config of a run, from what it stored."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import base


def stored_config(stored: Mapping[str, Any]) -> ConfigDict:
    """From a config.json, or what a checkpoint holds of it: lists are tuples again, "inf" is a number where it was one,
    and keys that are new since have their defaults."""
    config = base.get_config()
    with config.unlocked():
        _fill(config, stored)
    return config


def _fill(section: ConfigDict, stored: Mapping[str, Any]) -> None:
    section.unlock()
    for key, value in stored.items():
        if isinstance(value, Mapping):
            if not isinstance(section.get(key), ConfigDict):
                section[key] = ConfigDict()
            _fill(section[key], value)
            continue
        before = section.get(key)
        if value in ("inf", "-inf", "nan") and not isinstance(before, str):
            value = float(value)
        with section.ignore_type():
            section[key] = tuple(value) if isinstance(value, list) else value
