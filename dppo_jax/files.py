"""Paths that a user gives, and the small files at them: found, read and written in one place, each fault one sentence.

Nothing here imports jax: reward workers may.
"""

import json
import os
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dppo_jax.errors import UserError

_BUCKET = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(?=/?[^/])")  # pathlib leaves gs:/b of gs://b
_SURROGATES = re.compile("[\ud800-\udfff]")
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 120, 120, 60


def check_path(path: str | os.PathLike[str], key: str) -> str:
    """The path as text. UserError for an address of a bucket (not read yet), or a character that no file name has."""
    text = os.fspath(path)
    if match := _BUCKET.match(text):
        raise UserError(
            f"{key} = {text!r:.200}: {match[1]}:// addresses are neither read nor written yet; mount the bucket, or "
            "copy it to a folder, and name that"
        )
    if "\0" in text or _SURROGATES.search(text):
        raise UserError(f"{key} = {text!r:.200} holds a character that no file name can have")
    return text


def user_path(path: str | os.PathLike[str], key: str = "path") -> Path:
    """The path with ~ expanded; nothing need be there. `key`: the flag or config key that gave it, for the sentence.

    Raises: UserError as `check_path`, for a ~ of nobody, and for a path that cannot be asked for: too long a name, a
    folder above it that is closed to us.
    """
    text = check_path(path, key)
    try:
        expanded = Path(text).expanduser()
    except RuntimeError:  # no HOME, or no such user
        raise UserError(f"{key} = {text!r:.200}: no home folder is known for ~; write the path out") from None
    try:
        expanded.stat()
    except (FileNotFoundError, NotADirectoryError):  # whoever needs it says so
        pass
    except OSError as error:
        raise UserError(f"{key} = {text!r:.200}: {error.strerror}") from None
    return expanded


def is_file(path: Path) -> bool:
    """Whether there is one: False where nothing has the name, UserError where a folder, a pipe, a link to nothing or
    the like has it."""
    if os.path.isfile(path):
        return True
    if os.path.lexists(path):
        raise UserError(f"{path} is neither a file nor a link to one")
    return False


def shown(value: Any) -> str:
    """Like repr, but short enough for a sentence, however long or deep the value is."""
    try:
        return _REPR.repr(value)
    except ValueError:  # the limit on an integer's digits
        return f"<{type(value).__name__} of more digits than Python writes>"


def make_folder(folder: Path) -> None:
    """Makes it, parents included, if need be. UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from None


def read_text(path: Path) -> str:
    """The whole file, UTF-8. UserError where it cannot be read, or is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(
    text: str,
    where: str,
    *,
    parse_float: Callable[[str], Any] | None = None,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value of a JSON text. `where`: file, and row or key, for the sentence. The other two as in `json.loads`.

    Raises: UserError for what is no JSON, an integer of more digits or a nesting deeper than Python reads, and lone
    surrogates, which are JSON but no text; also for a ValueError of a hook.
    """
    try:
        value = json.loads(text, parse_float=parse_float, object_pairs_hook=object_pairs_hook)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON: {error}") from None
    except ValueError as error:  # the limit on digits, or a hook's
        raise UserError(f"{where}: {str(error).split(';')[0]}") from None
    except RecursionError:
        raise UserError(f"{where}: JSON that is nested too deeply") from None
    if "\\u" in text or _SURROGATES.search(text):
        check_text(value, where)
    return value


def check_text(value: Any, where: str) -> None:
    """UserError where a text, or one inside lists and objects, holds a lone surrogate: it cannot be encoded."""
    to_check = [value]
    while to_check:
        item = to_check.pop()
        if isinstance(item, str):
            if match := _SURROGATES.search(item):
                raise UserError(f"{where}: a lone surrogate, \\u{ord(match[0]):04x}, which is no character")
        elif isinstance(item, dict):
            to_check += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            to_check += item


def read_json(path: Path) -> Any:
    """The value of a JSON file. UserError as of `read_text` and `parse_json`."""
    return parse_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """The same, where it must be an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: a kill leaves the old one. OSError."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
