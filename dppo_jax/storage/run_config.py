"""The config that a run stores, and what may differ when the run goes on.

It stands in WORKDIR/config.json, for people and plots, and in every checkpoint, which is what counts.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from dppo_jax.errors import UserError, writing
from dppo_jax.files import make_folder, read_json_object, to_path, write_text

NAME = "config.json"
# Keys that a resumed run may set anew (dotted names, * for any).
MAY_CHANGE = (
    "steps", "sft.epochs", "train.staleness", "train.micro_rows", "train.max_skipped", "rollout.slots", "rollout.cache",
    "rollout.pages", "rollout.chunk", "reward.replies_per_worker", "compile_cache", "label_cache", "checkpoint.*",
    "log.*", "mesh.*",
)  # fmt: skip


def plain(value: Any) -> Any:
    """The value as strict JSON holds it: tuples as lists, numbers that are not finite as "inf", "-inf", "nan"."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists and tuples become JSON text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, (list, tuple)) else value
    return flat


def changed(
    before: Mapping[str, Any], after: Mapping[str, Any], where: str, may_change: Sequence[str] = MAY_CHANGE
) -> list[str]:
    """What differs between two flat configs, such as "steps: 100 -> 200"; keys matching `may_change` may.

    Raises: UserError naming the other keys that differ. `where` is the run, for the sentence.
    """
    absent = object()
    differing = [k for k in sorted({*before, *after}) if before.get(k, absent) != after.get(k, absent)]

    def show(flat: Mapping[str, Any], key: str) -> str:
        return repr(flat[key]) if key in flat else "absent"

    fixed = [k for k in differing if not any(fnmatchcase(k, pattern) for pattern in may_change)]
    if fixed:
        changes = [f"{k} was {show(before, k)} and is now {show(after, k)}" for k in fixed[:5]]
        changes += [f"{len(fixed) - 5} more keys differ"] if len(fixed) > 5 else []
        raise UserError(
            f"cannot resume {where!r} with another config: {'; '.join(changes)}; "
            "set the stored values, or take another --workdir"
        )
    return [f"{k}: {show(before, k)} -> {show(after, k)}" for k in differing]


def write_config(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Stores the config, nested, in workdir/config.json, whole or not at all. UserError, WriteError."""
    path = to_path(workdir) / NAME
    make_folder(path.parent)
    with writing(path):
        write_text(path, json.dumps(plain(config), indent=2, allow_nan=False) + "\n")


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_config` stored. Raises UserError where there is none, or it is no JSON object."""
    path = to_path(workdir) / NAME
    if not path.exists():
        raise UserError(f"run folder {str(workdir)!r} holds no {NAME}")
    return read_json_object(path)
