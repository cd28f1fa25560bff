"""Tasks from data sets of the Hugging Face hub: the parquet or JSONL files of one split, as one task."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from dppo_jax.data.examples import Example, Task
from dppo_jax.data.rows import load_jsonl, load_parquet
from dppo_jax.errors import UserError
from dppo_jax.rewards.verifiers import VERIFIERS
from dppo_jax.storage.hub import dataset_files

READERS = {".parquet": load_parquet, ".jsonl": load_jsonl}


def load_hub(
    *,
    name: str | None,
    path: str | None,
    size: int | None,
    verifier: str,
    subset: str = "",
    split: str = "train",
    revision: str = "",
    **settings: Any,
) -> Task:
    """The rows of a split, of all its files in order. `size` as in `load_jsonl`; the rest as in `storage.hub`."""
    if not name:
        raise UserError("data.kind='hub' needs data.name, such as 'openai/gsm8k'")
    if path:
        raise UserError(f"data.kind='hub' reads data.name on the hub; unset data.path={path!r}")
    if verifier == "task":
        raise UserError(f"data.kind='hub' has no scorer of its own; set data.verifier to one of {sorted(VERIFIERS)}")
    files = dataset_files(name, subset, split, revision).files
    load = READERS[files[0].suffix]
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    first: Task | None = None
    for file in files:
        if size is not None and len(examples) >= size:
            left_out["beyond_size"] += _count(file)
            continue
        remaining = None if size is None else size - len(examples)
        task = load(name=None, path=str(file), size=remaining, verifier=verifier, **settings)
        first = first or task
        examples += task.examples
        left_out.update(task.left_out)
    assert first is not None
    return dataclasses.replace(first, name=name, examples=examples, left_out=dict(left_out))


def _count(file: Path) -> int:
    """Rows of a file, none of which is read."""
    import pyarrow.parquet

    try:
        if file.suffix == ".parquet":
            return pyarrow.parquet.read_metadata(file).num_rows
        with file.open("rb") as lines:
            return sum(bool(line.strip()) for line in lines)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {error!s:.200}") from None
