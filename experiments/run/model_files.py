"""Where a config's model is: a directory here, or a name on the hub."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from dppo_jax.errors import UserError
from dppo_jax.files import user_path
from dppo_jax.storage import hub


def model_directory(config: ConfigDict) -> Path:
    """policy.path, which must be set; of a name on the hub, its files in the cache, fetched if need be. UserError."""
    policy = config.policy
    if not policy.path:
        raise UserError("policy.path is empty: set it to a Hugging Face model directory, or a name on the hub")
    if hub_name(config):
        with no_directory(policy.path):
            return hub.model_directory(policy.path, policy.commit or policy.revision).folder
    for key in ("revision", "commit"):
        if policy[key]:
            raise UserError(
                f"policy.{key} = {policy[key]!r} is of a model on the hub, and policy.path = {policy.path!r} is a "
                f"directory: clear it: --config.policy.{key}="
            )
    return user_path(policy.path, "policy.path")


def hub_name(config: ConfigDict) -> str | None:
    """The name on the hub in policy.path, ORG/NAME; None where it can be none, or is a directory here."""
    path = config.policy.path
    return path if hub.is_name(path) and not user_path(path, "policy.path").is_dir() else None


@contextlib.contextmanager
def no_directory(path: str) -> Iterator[None]:
    """A UserError on a name of the hub also says that it is no directory, which may have been meant."""
    try:
        yield
    except UserError as error:
        raise UserError(f"there is no directory {path!r}, and {error}") from None
