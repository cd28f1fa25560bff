"""Tasks from files of rows: JSONL and parquet."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from dppo_jax.data.examples import UNSCORED, Example, Task
from dppo_jax.data.labels import with_good_labels
from dppo_jax.data.messages import read_prompt, split_last_turn
from dppo_jax.data.shapes import (
    OWN,
    PLAIN,
    Reading,
    Shape,
    cut,
    cut_fault,
    fields,
    find,
    prompts_alone,
    recognise,
    shown,
)
from dppo_jax.data.shards import shards
from dppo_jax.errors import UserError, first_line, lookup, reason
from dppo_jax.files import Path, parse_json, to_path
from dppo_jax.rewards.answers import answer_task
from dppo_jax.rewards.verifiers import VERIFIERS

DEEPEST = 64  # lists and objects inside one another: a row also travels to reward workers


class Written(float):
    """A number that keeps the text it was written as."""

    text: str

    def __new__(cls, text: str) -> "Written":
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __reduce__(self) -> tuple[Any, ...]:
        return (Written, (self.text,))


def load_jsonl(
    *,
    name: str | None,
    path: str | None,
    settings: dict[str, Any],
    size: int | None,
    seed: int,
    verifier: str,
    reading: Reading = PLAIN,
) -> Task:
    """One JSON object a line, in one of the shapes of `shapes.SHAPES`. Blank lines are skipped, but counted as rows.

    path: a file, a folder of them, or a pattern; see `shards`. The task's left_out says how many lines are blank, and
    how many rows come after the first `size`; those are not read.
    """
    files = _files("jsonl", path, settings, verifier, reading)
    return jsonl_task(task_name(path, files), files, size, verifier, reading)


def jsonl_task(name: str, files: Sequence[Path], size: int | None, verifier: str, reading: Reading) -> Task:
    """Of files in order; the rest as in `load_jsonl`."""
    rows: list[tuple[str, Any]] = []
    count, blank = 0, 0
    for file in files:
        try:
            lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()  # without a byte-order mark
        except OSError as error:
            raise UserError(f"{file} cannot be read: {reason(error)}") from None
        full = [(f"{file}, row {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not full:
            raise UserError(f"{file} holds no rows")
        left = None if size is None else max(0, size - count)
        rows += [(where, _parse(line, where)) for where, line in full[:left]]
        count, blank = count + len(full), blank + len(lines) - len(full)
    return _rows_task(name, rows, count, blank, verifier, reading)


def load_parquet(
    *,
    name: str | None,
    path: str | None,
    settings: dict[str, Any],
    size: int | None,
    seed: int,
    verifier: str,
    reading: Reading = PLAIN,
) -> Task:
    """Parquet tables whose columns have one of the shapes of `shapes.SHAPES`. `path` and `size` as in `load_jsonl`."""
    files = _files("parquet", path, settings, verifier, reading)
    return parquet_task(task_name(path, files), files, size, verifier, reading)


def parquet_task(name: str, files: Sequence[Path], size: int | None, verifier: str, reading: Reading) -> Task:
    """Of files in order; the rest as in `load_jsonl`."""
    rows: list[tuple[str, Any]] = []
    count = 0
    for file in files:
        columns, found = _table(file, None if size is None else max(0, size - count), reading)
        if not found:
            raise UserError(f"{file} holds no rows")
        names = list(columns)
        rows += [
            (f"{file}, row {number}", dict(zip(names, values, strict=True)))
            for number, values in enumerate(zip(*columns.values(), strict=True), start=1)
        ]
        count += found
    return _rows_task(name, rows, count, 0, verifier, reading)


def _table(file: Path, size: int | None, reading: Reading) -> tuple[dict[str, list[Any]], int]:
    """The columns of a file, of its first `size` rows, and how many rows it has."""
    import pyarrow.parquet

    try:
        with file.open("rb") as stored, pyarrow.parquet.ParquetFile(stored, page_checksum_verification=True) as opened:
            count, names = opened.metadata.num_rows, list(opened.schema_arrow.names)
            table = opened.read() if size != 0 else None
            count = count if table is None else table.num_rows
    except Exception as error:  # a damaged file may make the library raise errors of any class
        raise UserError(f"{file} cannot be read as parquet: {first_line(error):.200}") from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{file} has two columns of the name {shown(twice[0])}")
    if table is None:
        return {}, count
    return {name: _column(file, name, table.column(name).slice(0, size), reading.columns) for name in names}, count


def _files(kind: str, path: str | None, settings: dict[str, Any], verifier: str, reading: Reading) -> list[Path]:
    if not path:
        raise UserError(f"data.kind={kind!r} needs data.path, a file of rows")
    if settings:
        names = f"{sorted(settings)!s:.200}"
        raise UserError(
            f"data.kind={kind!r} takes no data.settings, but got {names}; clear them: --config.data.settings={{}}"
        )
    check_verifier(kind, verifier, reading)
    return shards(kind, path)


def check_verifier(kind: str, verifier: str, reading: Reading) -> None:
    """UserError where neither data.verifier nor a column names what scores the replies."""
    if verifier == "task" and not reading.verifier:
        raise UserError(f"data.kind={kind!r} has no scorer of its own; set data.verifier to one of {sorted(VERIFIERS)}")


def task_name(path: str | None, files: Sequence[Path]) -> str:
    """What a task is called in sentences: its file, or its folder or pattern and how many files that is."""
    if len(files) == 1:
        return files[0].name
    return f"{to_path(path or '.').name} ({len(files)} files)"


def _parse(line: bytes, where: str) -> Any:
    """The value of one line."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error}") from None
    value = parse_json(text, where, parse_float=Written, object_pairs_hook=_object)
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value, where)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} stands there twice")
    return fields


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ())
        ]
    if level:
        raise UserError(f"{where}: lists and objects nested more than {DEEPEST} deep")


def _column(file: Path, name: str, column: Any, asked: frozenset[str]) -> list[Any]:
    """A column's values in Python. What Python cannot hold, such as nanoseconds, is text where nothing asks for it.

    Raises: UserError naming the row.
    """
    import pyarrow

    kind = column.type
    try:
        if pyarrow.types.is_dictionary(kind):
            column, kind = column.cast(kind.value_type), kind.value_type
        values = column.to_pylist()
        if pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind):  # 0.1, not 0.10000000149011612
            float_type = np.float32 if pyarrow.types.is_float32(kind) else np.float16
            values = [None if value is None else Written(str(float_type(value))) for value in values]
        for number, value in enumerate(values, start=1):
            if isinstance(value, list | dict):
                _check_depth(value, f"{file}, row {number}")
        return values
    except UserError:
        raise
    except Exception:
        pass
    if name not in asked:
        try:
            return column.cast(pyarrow.string()).to_pylist()
        except Exception:
            pass
    fault, number = f"the column {shown(name)} ({str(kind):.60}) cannot be read", 0
    for number in range(1, len(column) + 1):
        try:
            column[number - 1].as_py()
        except Exception as error:
            raise UserError(f"{file}, row {number}: {fault}: {first_line(error):.200}") from None
    raise UserError(f"{file}: {fault}")


def _rows_task(
    name: str, rows: Sequence[tuple[str, Any]], count: int, blank: int, verifier: str, reading: Reading
) -> Task:
    """rows: place and values of those that are used. count: how many the source has, blank ones aside."""
    unscored = verifier == UNSCORED and not reading.last_turn
    if reading.last_turn:
        rows = [(where, split_last_turn(where, row, reading.answer, reading.prompt)) for where, row in rows]
    shape = prompts_alone(rows, reading) if unscored else recognise(rows, reading)
    found = [_row_example(where, row, shape, verifier, reading.verifier) for where, row in rows]
    examples = [e for e, _ in found] if unscored else with_good_labels(name, found, verifier, reading)
    left_out = {"blank": blank, "beyond_size": count - len(rows), "bad_label": len(rows) - len(examples)}
    distinct = {(str(example.prompt), example.labels) for example in examples}
    several = sum(bool(example.also) for example in examples)
    remarks = [f"read as {shape}"] if shape.name else []
    if reading.verifier:
        used = Counter(example.verifier or verifier for example in examples)
        counted = ", ".join(f"{scorer} ({count})" for scorer, count in sorted(used.items()))
        remarks += [f"verifiers by the column {shown(reading.verifier)}: {counted}"]
    remarks += [f"rows with several labels, any of which is right: {several}"] if several else []
    task = answer_task(name, examples, verifier, left_out)
    return replace(task, duplicates=len(examples) - len(distinct), remarks=tuple(remarks))


def _row_example(
    where: str, row: Any, shape: Shape, verifier: str, verifier_column: str
) -> tuple[Example, str | None]:
    """The example, and why its row holds no label, as the end of a sentence; None where it holds one."""
    column, prompt, answer = fields(where, row, shape)
    labels, fault = _labels(where, shape, answer) if shape.answer else (("",), None)
    own = {column, shape.answer, *(OWN.prompt if shape.prompt == OWN.prompt else ())}
    meta = {key: value for key, value in row.items() if key not in own and value is not None}
    own_verifier = _verifier(where, row, verifier, verifier_column) if verifier_column else ""
    return Example(read_prompt(where, column, prompt), labels[0], meta, where, labels[1:], own_verifier), fault


def _verifier(where: str, row: Any, verifier: str, column: str) -> str:
    """What the row's column says, if that is not the task's verifier; a row may have null where the task has one."""
    named = find(row, column)
    if named is None and verifier != "task":
        return ""
    if not isinstance(named, str):
        raise UserError(f"{where}: {shown(column)} must be one of {sorted(VERIFIERS)}, not {shown(named)}")
    try:
        lookup(VERIFIERS, named, f"verifier in {column!r:.80}")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return "" if named == verifier else named


def _labels(where: str, shape: Shape, answer: Any) -> tuple[tuple[str, ...], str | None]:
    """The label, or all of a list, without repetition; what is wrong with them, as the end of a sentence."""
    if answer is None or answer == []:
        return ("",), f"has no {shown(shape.answer)}" if answer is None else f"{shown(shape.answer)} is an empty list"
    texts = [_answer(where, shape.answer, item) for item in (answer if isinstance(answer, list) else [answer])]
    labels = [cut(text, shape.cut) for text in texts]
    if None in labels:
        text = texts[labels.index(None)]
        return ("",), f"{shown(shape.answer)}, {shown(text[-80:])}, {cut_fault(shape.cut)}"
    return tuple(dict.fromkeys(label for label in labels if label is not None)), None


def _answer(where: str, column: str, answer: Any) -> str:
    """Text as it is; a whole number without a fraction or an exponent, any other as it is written."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, int | float | Decimal):
        raise UserError(f"{where}: {shown(column)} must be text or a number, not {shown(answer)}")
    if isinstance(answer, int):
        return str(answer)
    text = answer.text if isinstance(answer, Written) else str(answer)
    if not math.isfinite(answer):
        raise UserError(f"{where}: the answer {text:.80} is no finite number")
    try:
        exact = Decimal(text)
    except InvalidOperation:  # an exponent of more digits than Decimal has
        return text
    if exact == 0:
        return "0" if answer == 0 else text
    if exact == exact.to_integral_value():
        return f"{exact.to_integral_value():f}"
    return f"{exact:f}" if isinstance(answer, Decimal) else text
