"""Problems with the share of a policy's replies that are right: which a training set keeps, and as which rows."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from dppo_jax.data.examples import Example

SHARE = "share"  # the column
_OWN = ("prompt", "messages", "answer", SHARE)


class Chosen(NamedTuple):
    """Which problems are kept, in their order, and how many are not, by the share that is right."""

    kept: np.ndarray  # i[...], numbers of problems
    too_hard: int  # below the lower bound
    too_easy: int  # above the upper one


def choose(shares: np.ndarray, low: float, high: float) -> Chosen:
    """The problems whose share, f[Q], is at least `low` and at most `high`."""
    inside = (shares >= low) & (shares <= high)
    return Chosen(np.flatnonzero(inside), int((shares < low).sum()), int((shares > high).sum()))


def table_of(examples: Sequence[Example], shares: np.ndarray) -> tuple[pyarrow.Table, list[str]]:
    """Rows that data.kind=parquet reads as they stand (prompt or messages, answer), with the share and whatever else
    the examples' own rows held; and sentences on what is not as it was there."""
    several = any(example.also for example in examples)
    texts = [example.prompt if isinstance(example.prompt, str) else None for example in examples]
    conversations = [None if isinstance(example.prompt, str) else list(example.prompt) for example in examples]
    columns: dict[str, list[Any]] = {"prompt": texts, "messages": conversations}
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    columns["answer"] = [list(example.labels) if several else example.answer for example in examples]
    columns[SHARE] = shares.tolist()
    remarks = []
    for key in dict.fromkeys(key for example in examples for key in example.meta):
        name = key
        while name in columns or name in _OWN:
            name = f"original_{name}"
        if name != key:
            remarks.append(f"the column {key!r} is {name!r} here")
        columns[name] = [example.meta.get(key) for example in examples]
    arrays = {}
    for name, values in columns.items():
        arrays[name] = _array(values)
        if arrays[name] is None:
            remarks.append(f"the column {name!r}, whose values are of several kinds, is JSON text here")
            arrays[name] = pyarrow.array([None if x is None else json.dumps(x, default=str) for x in values])
    return pyarrow.table(arrays), remarks


def _array(values: list[Any]) -> pyarrow.Array | None:
    """None of values that a parquet column cannot hold."""
    try:
        array = pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
        return None
    return array if _storable(array.type) else None


def _storable(kind: pyarrow.DataType) -> bool:
    """Whether parquet has this type: it has no structure without fields."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return not (pyarrow.types.is_struct(kind) and not inner) and all(map(_storable, inner))
