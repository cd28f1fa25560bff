"""Names of the hub at the commits that a run began with: it goes on with those, whatever their branches are since."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dppo_jax.errors import UserError
from dppo_jax.files import Path
from dppo_jax.storage import hub
from dppo_jax.storage.run_config import NAME, flatten, read_config
from experiments.run.check_data import data_sections
from experiments.run.model_files import hub_name, no_directory, section_of

MODELS = ("policy", "reward.model", "teacher")  # sections that name a model


class Pin(NamedTuple):
    """A section that names a repository of the hub, and which."""

    key: str  # of the section: "policy", "reward.model", "teacher", "data", "eval.sets.NAME"
    section: ConfigDict
    kind: str  # model | dataset
    name: str


def pinned(config: ConfigDict, begun: Path | None = None, unread: Sequence[str] = ()) -> ConfigDict:
    """The config with `commit` of every model and data set that it takes from the hub, but for `unread` sections.

    Of a run that began in the folder `begun` with the same name and revision it is that run's, without asking the hub.
    UserError where the hub shows no such name, or cannot be reached and the cache does not know it.
    """
    if not any(_pins(config)):
        return config
    config = config.copy_and_resolve_references()
    recorded = _recorded(begun)
    for key, section, kind, name in _pins(config):
        if section.commit or key in unread:
            continue
        same = recorded.get(f"{key}.revision") == section.revision and name == recorded.get(
            f"{key}.{'path' if kind == 'model' else 'name'}"
        )
        found = recorded.get(f"{key}.commit", "") if same else ""
        if not hub.COMMIT.fullmatch(str(found)):
            with no_directory(name) if kind == "model" else contextlib.nullcontext():
                found = hub.commit_of(kind, name, section.revision)
        section.commit = found
    return config


def _pins(config: ConfigDict) -> Iterator[Pin]:
    for key in MODELS:
        if name := hub_name(config, key):
            yield Pin(key, section_of(config, key), "model", name)
    for key, data in data_sections(config).items():
        if data.kind == "hub":
            yield Pin(key, data, "dataset", data.name)


def _recorded(folder: Path | None) -> dict[str, Any]:
    """The flat config of a run's folder; nothing of a folder without one, or with one that cannot be read, which is
    told where the checkpoint is compared."""
    if folder is None or not (folder / NAME).is_file():
        return {}
    try:
        return flatten(read_config(folder))
    except UserError:
        return {}
