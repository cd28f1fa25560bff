"""Tasks from files of rows: JSONL and parquet."""

import json
import math
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from dppo_jax.data.examples import Example, Task, answer_task
from dppo_jax.errors import UserError, first_line, nearest
from dppo_jax.files import parse_json, user_path
from dppo_jax.rewards.labels import check_labels
from dppo_jax.rewards.verifiers import VERIFIERS, text_fault

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"developer": "system", "human": "user", "gpt": "assistant", "model": "assistant", "function": "tool"}
OWN_KEYS = ("prompt", "messages", "answer")
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
    *, name: str | None, path: str | None, settings: dict[str, Any], size: int | None, seed: int, verifier: str
) -> Task:
    """One JSON object a line, with prompt or messages, and answer. Blank lines are skipped, but counted as rows.

    The task's left_out says how many they are, and how many rows come after the first `size`; those are not read.
    """
    file = _rows_file("jsonl", path, settings, verifier)
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()  # without a byte-order mark
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    full = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    rows = ((number, _parse(line, f"{file}, row {number}")) for number, line in full[:size])
    return _rows_task(file, rows, len(full), len(lines) - len(full), size, verifier)


def load_parquet(
    *, name: str | None, path: str | None, settings: dict[str, Any], size: int | None, seed: int, verifier: str
) -> Task:
    """A parquet table with the columns prompt or messages, and answer. `size` as in `load_jsonl`."""
    import pyarrow.parquet

    file = _rows_file("parquet", path, settings, verifier)
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            table = opened.read()
        names, count = list(table.column_names), table.num_rows
    except Exception as error:  # a damaged file may make the library raise errors of any class
        raise UserError(f"{file} cannot be read as parquet: {first_line(error):.200}") from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{file} has two columns of the name {_shown(twice[0])}")
    columns = {name: _column(file, name, table.column(name).slice(0, size)) for name in names}
    rows = (
        (number, {name: values[number - 1] for name, values in columns.items()})
        for number in range(1, (count if size is None else min(count, size)) + 1)
    )
    return _rows_task(file, rows, count, 0, size, verifier)


def _rows_file(kind: str, path: str | None, settings: dict[str, Any], verifier: str) -> Path:
    if not path:
        raise UserError(f"data.kind={kind!r} needs data.path, a file of rows")
    if settings:
        names = f"{sorted(settings)!s:.200}"
        raise UserError(
            f"data.kind={kind!r} takes no data.settings, but got {names}; clear them: --config.data.settings={{}}"
        )
    if verifier == "task":
        raise UserError(f"data.kind={kind!r} has no scorer of its own; set data.verifier to one of {sorted(VERIFIERS)}")
    file = user_path(path, "data.path")
    try:
        is_file, is_several = file.is_file(), file.is_dir() or any(mark in str(file) for mark in "*?[,")
    except OSError:  # a name that is too long
        is_file = is_several = False
    if not is_file:
        hint = "; it names one file: lists, patterns and folders are not read yet" if is_several else ""
        raise UserError(f"data.path: there is no file {_shown(path, 200)}{hint}")
    return file


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
        raise ValueError(f"the key {_shown(next(key for key in keys if keys.count(key) > 1))} stands there twice")
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


def _column(file: Path, name: str, column: Any) -> list[Any]:
    """A column's values in Python. What Python cannot hold, such as nanoseconds, is text where no key of ours names it.

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
    if name not in OWN_KEYS:
        try:
            return column.cast(pyarrow.string()).to_pylist()
        except Exception:
            pass
    fault, number = f"the column {_shown(name)} ({str(kind):.60}) cannot be read", 0
    for number in range(1, len(column) + 1):
        try:
            column[number - 1].as_py()
        except Exception as error:
            raise UserError(f"{file}, row {number}: {fault}: {first_line(error):.200}") from None
    raise UserError(f"{file}: {fault}")


def _rows_task(
    file: Path, rows: Iterator[tuple[int, Any]], count: int, blank: int, size: int | None, verifier: str
) -> Task:
    if not count:
        raise UserError(f"{file} holds no rows")
    examples = [_row_example(f"{file}, row {number}", row, verifier) for number, row in rows]
    check_labels(verifier, [(example.where, example.answer) for example in examples])
    return answer_task(file.name, examples, verifier, {"blank": blank, "beyond_size": count - len(examples)})


def _row_example(where: str, row: Any, verifier: str) -> Example:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with 'prompt' or 'messages' and 'answer', got {_shown(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    keys = f"keys: {sorted(row)!s:.200}"
    if ("prompt" in row) == ("messages" in row):
        number = "both" if "prompt" in row else "neither"
        raise UserError(f"{where}: has {number} of 'prompt' and 'messages', of which it needs one; {keys}")
    if "answer" not in row:
        raise UserError(f"{where}: has no 'answer'; {keys}")
    prompt = _text_prompt(where, row["prompt"]) if "prompt" in row else _messages(where, row["messages"])
    answer = _answer(where, row["answer"])
    fault = text_fault(verifier, answer)
    if fault:
        raise UserError(f"{where}: the answer {_shown(row['answer'])} {fault}")
    meta = {key: value for key, value in row.items() if key not in OWN_KEYS}
    return Example(prompt, answer, meta, where)


def _text_prompt(where: str, prompt: Any) -> str:
    if isinstance(prompt, str) and prompt.strip():
        if prompt.lstrip()[:2] in ("[{", "[ ") and _is_conversation(_read(prompt)):
            raise UserError(f"{where}: 'prompt' holds messages as JSON text; write them as a list named 'messages'")
        return prompt
    if _is_conversation(prompt):
        raise UserError(f"{where}: 'prompt' holds messages; name it 'messages'")
    raise UserError(f"{where}: 'prompt' must be text, not {_shown(prompt)}")


def _is_conversation(value: Any) -> bool:
    value = value if isinstance(value, list | tuple) else [value]
    return bool(value) and all(isinstance(m, dict) and ({"role", "content"} <= {*m} or "from" in m) for m in value)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _messages(where: str, messages: Any) -> tuple[dict[str, str], ...]:
    """The conversation, which must end where the policy is to answer."""
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise UserError(f"{where}: 'messages' must be a list of role and content texts, not {_shown(messages)}")
    for number, message in enumerate(messages, start=1):
        _check_message(f"{where}, message {number}", message)
    last_role, roles = messages[-1]["role"], [message["role"] for message in messages]
    if last_role == "assistant":
        raise UserError(
            f"{where}: 'messages' end with the assistant's turn, so the prompt would hold the reply; end them with "
            "the user's"
        )
    if "user" not in roles or last_role == "system":
        raise UserError(f"{where}: 'messages' must end with a user's or a tool's, after a user's, not {_shown(roles)}")
    return tuple({key: value for key, value in message.items() if value is not None} for message in messages)


def _check_message(where: str, message: dict[str, Any]) -> None:
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        raise UserError(f"{where}: has 'from' and 'value'; name them 'role' and 'content'")
    if not isinstance(role, str) or content is None:
        raise UserError(f"{where}: needs texts 'role' and 'content', but is {_shown(message)}")
    if role not in ROLES:
        hint = f"; the nearest is {OTHER_ROLES[role]!r}" if role in OTHER_ROLES else nearest(role[:80], ROLES)
        raise UserError(f"{where}: unknown role {_shown(role)}{hint}")
    if isinstance(content, list | dict):
        raise UserError(f"{where}: 'content' must be one text; parts such as {{'type', 'text'}} are not supported")
    if not isinstance(content, str):
        raise UserError(f"{where}: 'content' must be text, not {_shown(content)}")
    if not content.strip():
        raise UserError(f"{where}: the content of the {role}'s message is empty")


def _answer(where: str, answer: Any) -> str:
    """Text as it is; a whole number without a fraction or an exponent, any other as it is written."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, int | float | Decimal):
        raise UserError(f"{where}: 'answer' must be text or a number, not {_shown(answer)}")
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


def _shown(value: Any, length: int = 80) -> str:
    """A value inside a sentence: one line, and short."""
    text = repr(value[:length] if isinstance(value, str) else value)
    return text if len(text) <= length + 4 else f"{text[:length]}..."
