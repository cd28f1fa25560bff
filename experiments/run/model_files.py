"""Where a config's models are: directories here, or names on the hub."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from dppo_jax.errors import UserError
from dppo_jax.files import user_path
from dppo_jax.storage import hub


def model_directory(config: ConfigDict, name: str = "policy") -> Path:
    """policy.path, which must be set; of a name on the hub, its files in the cache, fetched if need be. `name`: of the
    section, "policy" or "teacher". UserError."""
    section = config[name]
    if not section.path:
        raise UserError(f"{name}.path is empty: set it to a Hugging Face model directory, or a name on the hub")
    if hub_name(config, name):
        with no_directory(section.path):
            return hub.model_directory(section.path, section.commit or section.revision).folder
    for key in ("revision", "commit"):
        if section[key]:
            raise UserError(
                f"{name}.{key} = {section[key]!r} is of a model on the hub, and {name}.path = {section.path!r} is a "
                f"directory: clear it: --config.{name}.{key}="
            )
    return user_path(section.path, f"{name}.path")


def hub_name(config: ConfigDict, name: str = "policy") -> str | None:
    """The name on the hub in policy.path, ORG/NAME; None where it can be none, or is a directory here."""
    path = config[name].path
    return path if hub.is_name(path) and not user_path(path, f"{name}.path").is_dir() else None


@contextlib.contextmanager
def no_directory(path: str) -> Iterator[None]:
    """A UserError on a name of the hub also says that it is no directory, which may have been meant."""
    try:
        yield
    except UserError as error:
        raise UserError(f"there is no directory {path!r}, and {error}") from None
