"""Tasks from files of rows: JSONL and parquet."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

from dppo_jax.data.examples import Example, Task, answer_task
from dppo_jax.errors import UserError, first_line
from dppo_jax.rewards.labels import check_labels
from dppo_jax.rewards.verifiers import VERIFIERS, text_fault


def load_jsonl(
    *, name: str | None, path: str | None, settings: dict[str, Any], size: int | None, seed: int, verifier: str
) -> Task:
    """One JSON object a line, with prompt or messages, and answer. Blank lines are skipped, but counted."""
    file = _rows_file("jsonl", path, settings, verifier)
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{file}, row {number}: broken JSON: {error}") from error
    return _rows_task(file, rows, size, verifier)


def load_parquet(
    *, name: str | None, path: str | None, settings: dict[str, Any], size: int | None, seed: int, verifier: str
) -> Task:
    """A parquet table with the columns prompt or messages, and answer."""
    import pyarrow
    import pyarrow.parquet

    file = _rows_file("parquet", path, settings, verifier)
    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {first_line(error)}") from error
    return _rows_task(file, list(enumerate(table.to_pylist(), start=1)), size, verifier)


def _rows_file(kind: str, path: str | None, settings: dict[str, Any], verifier: str) -> Path:
    if not path:
        raise UserError(f"data.kind={kind!r} needs data.path, a file of rows")
    if settings:
        raise UserError(f"data.kind={kind!r} takes no data.settings, but got {sorted(settings)}")
    if verifier == "task":
        raise UserError(f"data.kind={kind!r} has no scorer of its own; set data.verifier to one of {sorted(VERIFIERS)}")
    if not Path(path).is_file():
        raise UserError(f"data.path: there is no file {path!r}")
    return Path(path)


def _rows_task(file: Path, rows: list[tuple[int, Any]], size: int | None, verifier: str) -> Task:
    if not rows:
        raise UserError(f"{file} holds no rows")
    examples = [_row_example(f"{file}, row {number}", row, verifier) for number, row in rows[:size]]
    check_labels(verifier, [(f"{file}, row {n}", e.answer) for (n, _), e in zip(rows, examples, strict=False)])
    return answer_task(file.name, examples, verifier)


def _row_example(where: str, row: Any, verifier: str) -> Example:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with 'prompt' or 'messages' and 'answer', got {row!r:.80}")
    row = {key: value for key, value in row.items() if value is not None}
    if ("prompt" in row) == ("messages" in row):
        number = "both" if "prompt" in row else "neither"
        raise UserError(f"{where}: has {number} of 'prompt' and 'messages', of which it needs one; keys: {sorted(row)}")
    if "prompt" in row and not (isinstance(row["prompt"], str) and row["prompt"].strip()):
        raise UserError(f"{where}: 'prompt' must be text, not {row['prompt']!r:.80}")
    if "messages" in row and not _are_messages(row["messages"]):
        raise UserError(f"{where}: 'messages' must be a list of role and content texts, not {row['messages']!r:.80}")
    if "answer" not in row:
        raise UserError(f"{where}: has no 'answer'; keys: {sorted(row)}")
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal):
        raise UserError(f"{where}: 'answer' must be text or a number, not {answer!r:.80}")
    fault = text_fault(verifier, str(answer))
    if fault:
        raise UserError(f"{where}: the answer {answer!r} {fault}")
    prompt = row["prompt"] if "prompt" in row else tuple(dict(message) for message in row["messages"])
    meta = {key: value for key, value in row.items() if key not in ("prompt", "messages", "answer")}
    return Example(prompt, str(answer), meta)


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
