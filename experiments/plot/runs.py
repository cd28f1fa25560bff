"""Run folders as curves: which runs are one curve, and what it is called."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from configs.methods import METHODS, loss_of
from dppo_jax.errors import UserError, nearest
from dppo_jax.files import Path, is_bucket, to_path
from dppo_jax.storage.loggers.tensorboard import EVENTS
from dppo_jax.storage.run_config import flatten, read_config
from dppo_jax.storage.run_log import Scalars, read_scalars

NAMED_BY = "loss.name"
OF_A_SWEEP = re.compile(r"(?P<name>.+?)(_x[0-9.e+-]+)?/seed_\d+")  # the end of a run's folder
MOST_KEYS = 2  # with more keys that differ, curves of one name are told apart by folders


class Curve(NamedTuple):
    """Runs that are drawn as one curve."""

    label: str
    runs: list[Scalars]


def group_runs(folders: Sequence[str], key: str | None = None) -> list[Curve]:
    """Reads the runs and puts those of one config together, in the order given. A folder given twice counts once.

    key: dotted name of the config key that names the curves. None: the method of a sweep's run, else loss.name, or the
    folder of a run without it.
    With "seed", seeds are curves of their own.
    """
    paths = {_resolved(to_path(folder)): folder for folder in folders}
    folder_of = {path.parent if path.name == EVENTS else path: folder for path, folder in paths.items()}
    unique = list(folder_of)
    names = [p.name for p in unique]
    if len(set(names)) < len(names):
        shared = os.path.commonprefix([f"{p.parent}/" for p in unique]).rpartition("/")[0]
        names = [str(p).removeprefix(f"{shared}/") for p in unique]
    runs = [read_scalars(folder) for folder in folder_of.values()]
    configs = [_config(path, folder, key) for path, folder in folder_of.items()]
    if key is None:
        configs = [_with_method(path, config) for path, config in zip(unique, configs, strict=True)]
    members: dict[str, list[int]] = {}
    for i, (path, config) in enumerate(zip(unique, configs, strict=True)):
        members.setdefault(_curve_key(path, config, key), []).append(i)
    labels = _labels(list(members.values()), names, configs, NAMED_BY if key is None else key)
    return [Curve(label, [runs[i] for i in group]) for label, group in zip(labels, members.values(), strict=True)]


def method_or_loss(folder: Path, loss: str) -> str:
    """What a run trains: the method that a sweep named its folder by, or this loss, its config's."""
    found = OF_A_SWEEP.fullmatch(f"{folder.parent.name}/{folder.name}")
    named = found is not None and found["name"] in METHODS and loss_of(found["name"]) == loss
    return found["name"] if found is not None and named else loss


def _with_method(path: Path, config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The config with the method in the place of its loss."""
    if config is None or not isinstance(config.get(NAMED_BY), str):
        return config
    return config | {NAMED_BY: method_or_loss(path, config[NAMED_BY])}


def _resolved(path: Path) -> Path:
    return path if is_bucket(path) else path.resolve()


def _config(path: Path, folder: str, key: str | None) -> dict[str, Any] | None:
    """Flat; None where there is none and no key is asked for."""
    if key is None and not (path / "config.json").exists():
        return None
    config = flatten(read_config(path))
    if key is not None and key not in config:
        if within := [name for name in config if name.startswith(f"{key}.")]:
            raise UserError(f"--group {key!r} is a section of the config; name one of its keys: {', '.join(within)}")
        raise UserError(f"run folder {folder!r} has no config key {key!r}{nearest(key, config)}")
    return config


def _curve_key(path: Path, config: Mapping[str, Any] | None, key: str | None) -> str:
    """The config without its seed; a run without a config is a curve of its own."""
    if config is None:
        return str(path)
    return json.dumps({k: v for k, v in config.items() if k != "seed" or k == key}, sort_keys=True)


def _labels(
    groups: Sequence[Sequence[int]], names: Sequence[str], configs: Sequence[Mapping[str, Any] | None], key: str
) -> list[str]:
    """The config's value under `key`, with what else tells curves of one value apart; or the folders' names."""
    firsts = [configs[group[0]] for group in groups]
    alike: dict[str, list[int]] = {}
    for i, config in enumerate(firsts):
        if config is not None and config.get(key) is not None:
            value = _shown(config[key])
            alike.setdefault(value if isinstance(config[key], str) else f"{key}={value}", []).append(i)
    labels = [_label([names[i] for i in group]) for group in groups]
    for value, curves in alike.items():
        curve_configs = [firsts[i] or {} for i in curves]
        differing = [
            k for k in sorted({k for config in curve_configs for k in config} - {"seed", key})
            if len({_shown(config.get(k)) for config in curve_configs}) > 1
        ]  # fmt: skip
        for i, config in zip(curves, curve_configs, strict=True):
            if len(differing) > MOST_KEYS:
                labels[i] = f"{value}: {labels[i]}"
                continue
            differences = "".join(f", {k}={_shown(config.get(k))}" for k in differing)
            labels[i] = f"{value}{differences}{_count(groups[i])}"
    if len(set(labels)) < len(labels):
        labels = [", ".join(names[i] for i in group) for group in groups]
    return labels


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "unset" if value is None else str(value)


def _count(runs: Sequence) -> str:
    return f" ({len(runs)} runs)" if len(runs) > 1 else ""


def _label(names: Sequence[str]) -> str:
    """What the folder names share, without a dangling "seed": a_seed0, a_seed1 -> "a (2 runs)"."""
    if len(names) == 1:
        return names[0]
    common = os.path.commonprefix(list(names))
    if any(name[len(common) :][:1].isdigit() for name in names):
        common = common.rstrip("0123456789")
    common = re.sub(r"[-_./ ]+(seed|s)?[-_= ]*$", "", common)
    return f"{common if common else names[0]}{_count(names)}"
