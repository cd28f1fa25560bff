"""Where a config's models are: directories here, or names on the hub."""

import contextlib
import functools
from collections.abc import Iterator

from ml_collections import ConfigDict

from dppo_jax.errors import UserError
from dppo_jax.files import Path, user_path
from dppo_jax.storage import hub


def model_directory(config: ConfigDict, key: str = "policy") -> Path:
    """policy.path, or the path of another section, which must be set; of a name on the hub, its files in the cache,
    fetched if need be. UserError."""
    section = section_of(config, key)
    if not section.path:
        raise UserError(f"{key}.path is empty: set it to a Hugging Face model directory, or a name on the hub")
    if hub_name(config, key):
        with no_directory(section.path):
            return hub.model_directory(section.path, section.commit or section.revision).folder
    for name in ("revision", "commit"):
        if section[name]:
            raise UserError(
                f"{key}.{name} = {section[name]!r} is of a model on the hub, and {key}.path = {section.path!r} is a "
                f"directory: clear it: --config.{key}.{name}="
            )
    return user_path(section.path, f"{key}.path")


def hub_name(config: ConfigDict, key: str = "policy") -> str | None:
    """The name on the hub in a section's path, ORG/NAME; None where it can be none, or is a directory here."""
    path = section_of(config, key).path
    return path if hub.is_name(path) and not user_path(path, f"{key}.path").is_dir() else None


def section_of(config: ConfigDict, key: str) -> ConfigDict:
    return functools.reduce(lambda section, name: section[name], key.split("."), config)


@contextlib.contextmanager
def no_directory(path: str) -> Iterator[None]:
    """A UserError on a name of the hub also says that it is no directory, which may have been meant."""
    try:
        yield
    except UserError as error:
        raise UserError(f"there is no directory {path!r}, and {error}") from None
