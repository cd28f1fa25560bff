"""Tasks from data sets of the Hugging Face hub: the parquet or JSONL files of one split, as one task."""

from typing import Any

from dppo_jax.data.examples import Task
from dppo_jax.data.rows import check_verifier, jsonl_task, parquet_task
from dppo_jax.data.shapes import PLAIN, Reading
from dppo_jax.errors import UserError
from dppo_jax.storage.hub import dataset_files

TASK_OF = {".parquet": parquet_task, ".jsonl": jsonl_task}


def load_hub(
    *,
    name: str | None,
    path: str | None,
    settings: dict[str, Any],
    size: int | None,
    seed: int,
    verifier: str,
    reading: Reading = PLAIN,
    subset: str = "",
    split: str = "train",
    revision: str = "",
) -> Task:
    """The rows of a split, of all its files in order. `size` as in `load_jsonl`; the last three as in `storage.hub`."""
    if not name:
        raise UserError("data.kind='hub' needs data.name, such as 'openai/gsm8k'")
    if path:
        raise UserError(f"data.kind='hub' reads data.name on the hub; unset data.path={path!r}")
    if settings:
        names = f"{sorted(settings)!s:.200}"
        raise UserError(
            f"data.kind='hub' takes no data.settings, but got {names}; clear them: --config.data.settings={{}}"
        )
    check_verifier("hub", verifier, reading)
    files = dataset_files(name, subset, split, revision).files
    return TASK_OF[files[0].suffix](name, files, size, verifier, reading)
