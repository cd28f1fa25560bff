"""What makes a checkpoint beside its config: versions, devices, and the commit of this project."""

import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

from dppo_jax.files import to_path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
NUMBERS = ("python", *PACKAGES, "platform", "devices", "processes")  # what numbers depend on
TIME_LIMIT_S = 10  # of git


def made_by() -> dict[str, Any]:
    """Of this process, as JSON holds it. Without git, or outside of its checkout, there is no commit."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    devices = {"platform": jax.default_backend(), "devices": jax.device_count(), "processes": jax.process_count()}
    return versions | devices | ({"commit": found} if (found := _commit()) else {})


def differences(saved: Mapping[str, Any]) -> list[str]:
    """A sentence where a checkpoint was made with other versions or devices than are here; none of an earlier version
    of checkpoints, which does not say."""
    now = made_by()
    differing = [name for name in NUMBERS if name in saved and saved[name] != now[name]]
    found = [f"{name} {saved[name]}, here {now[name]}" for name in differing]
    if not found:
        return []
    return [f"the checkpoint was made with {'; '.join(found)}: numbers may differ in their last bits"]


@functools.cache
def _commit() -> str:
    """Of the checkout that this file is in, with "+changed" where tracked files were; "": there is none."""
    root = to_path(__file__).parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True, timeout=TIME_LIMIT_S
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+changed" if changes else "")
