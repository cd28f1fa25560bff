"""Paths that a user gives, on a disk or in a bucket, and the small files at them: found, read and written in one place,
each fault one sentence.

A path on a disk is a pathlib.Path, an address gs://BUCKET/... or s3://BUCKET/... an etils.epath.Path. Both have the
same methods, and where they differ (status, links, renames, folders that are only prefixes) a function here knows both.
`to_path` makes the right one of a text: pathlib would make gs://b the folder gs:.

Nothing here imports jax: reward workers may.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import os
import pathlib
import re
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any, BinaryIO, TypeAlias

from etils import epath

from dppo_jax.errors import UserError, reason

Path: TypeAlias = pathlib.Path | epath.Path

BUCKETS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # the package that reads each, and the extra that installs it

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/+)(.*)", re.DOTALL)
_SURROGATES = re.compile("[\ud800-\udfff]")
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 120, 120, 60


def check_path(path: str | os.PathLike[str], key: str, *, pattern: bool = False) -> str:
    """The path as text. UserError for an address that is not read here, or a character that no file name has.
    pattern: whether the path may be one of several files, with * ? [ and ]."""
    text = os.fspath(path)
    if "\0" in text or _SURROGATES.search(text):
        raise UserError(f"{key} = {text!r:.200} holds a character that no file name can have")
    match = _ADDRESS.fullmatch(text)
    if not match:
        return text
    scheme, slashes, rest = match.groups()
    if scheme not in BUCKETS:
        if not rest:
            return text
        known = " and ".join(f"{name}://" for name in BUCKETS)
        raise UserError(f"{key} = {text!r:.200}: {scheme}:// addresses are neither read nor written; {known} are")
    if not rest:
        raise UserError(f"{key} = {text!r} names no bucket: write {scheme}://BUCKET/NAME")
    if len(slashes) != 2:
        raise UserError(f"{key} = {text!r:.200} must have two slashes: write {scheme}://{rest:.100}")
    if any(part in ("", ".", "..") for part in rest.rstrip("/").split("/")):
        raise UserError(f"{key} = {text!r:.200} has an empty name, . or .. in it, which no bucket resolves")
    # Clients cut an address at # and ?, and take the others for patterns even where they delete.
    if odd := sorted({*rest} & {*("#" if pattern else "#?*[]")}):
        raise UserError(f"{key} = {text!r:.200} has {odd[0]} in it, which clients of buckets do not take as it stands")
    return text


def to_path(path: str | os.PathLike[str]) -> Path:
    """The path of a text, in a bucket where it begins so. UserError where the package that reads the bucket is not
    installed."""
    text = os.fspath(path)
    scheme = text.partition("://")[0]
    if scheme in BUCKETS and "://" in text:
        _prepare(scheme)
        return epath.Path(text)
    return pathlib.Path(text)


def is_bucket(path: Path) -> bool:
    """Whether it is the address of a bucket, or in one."""
    return not isinstance(path, pathlib.Path)


@functools.cache
def _prepare(scheme: str) -> None:
    package, extra = BUCKETS[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{scheme}:// addresses need the package {package}, which is not installed: pip install {package} "
            f"(or dppo_jax[{extra}])"
        )
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask each bucket for its kind
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):  # gcsfs takes it; TensorStore has a name of its own for it
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator if "://" in emulator else f"http://{emulator}")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
    import fsspec

    for name in ("gs", "gcs", "s3"):  # other processes write too: what a folder holds is asked each time
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)


def filesystem(path: Path) -> Any:
    """fsspec's, of a path in a bucket."""
    import fsspec

    return fsspec.filesystem(str(path).partition("://")[0])


def user_path(
    path: str | os.PathLike[str], key: str = "path", *, reach: bool = True, pattern: bool = False
) -> Path:
    """The path with ~ expanded; nothing need be there. `key`: the flag or config key that gave it, for the sentence.
    reach: whether a bucket is asked for it. pattern: as of `check_path`.

    Raises: UserError as `check_path`, for a ~ of nobody, and for a path that cannot be asked for: too long a name, a
    folder above it that is closed to us, a bucket without credentials.
    """
    text = check_path(path, key, pattern=pattern)
    if "://" in text[:5]:
        found = to_path(text.rstrip("/"))
        return _reached(found, key) if reach else found
    try:
        expanded = pathlib.Path(text).expanduser()
    except RuntimeError:  # no HOME, or no such user
        raise UserError(f"{key} = {text!r:.200}: no home folder is known for ~; write the path out") from None
    try:
        expanded.stat()
    except (FileNotFoundError, NotADirectoryError):  # whoever needs it says so
        pass
    except OSError as error:
        raise UserError(f"{key} = {text!r:.200}: {error.strerror}") from None
    return expanded


def disk_path(path: str | os.PathLike[str], key: str = "path") -> pathlib.Path:
    """The same, of a file that must be on a disk: code that is run, and what is locked. UserError for an address."""
    found = user_path(path, key)
    if not isinstance(found, pathlib.Path):
        raise UserError(f"{key} = {str(path)!r:.200} must be on a disk of this machine, not in a bucket")
    return found


def _reached(path: Path, key: str) -> Path:
    """A path in a bucket. UserError where the bucket cannot be asked for it."""
    system, bucket = filesystem(path), "/".join(str(path).split("/")[:3])
    try:
        system.info(str(path))
    except FileNotFoundError:
        try:
            system.info(bucket)
        except FileNotFoundError:
            raise UserError(f"{key} = {str(path)!r:.200}: there is no bucket {bucket}") from None
        except Exception:  # of one who may not ask for the bucket itself
            pass
    except Exception as error:  # of the bucket's client, its credentials, or the network
        raise UserError(f"{key} = {str(path)!r:.200} cannot be reached: {reason(error):.300}") from None
    return path


def absolute(path: Path) -> Path:
    """From the root on. An address is that already."""
    return path.absolute() if isinstance(path, pathlib.Path) else path


def has_file(path: Path) -> bool:
    """Whether there is a file, or a link to one; False too for a name that cannot be asked for."""
    return os.path.isfile(path) if isinstance(path, pathlib.Path) else path.is_file()


def is_file(path: Path) -> bool:
    """Whether there is one: False where nothing has the name, UserError where a folder, a pipe, a link to nothing or
    the like has it."""
    if has_file(path):
        return True
    if is_bucket(path):
        return False
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
    """Makes it, parents included, if need be; in a bucket there is nothing to make. UserError."""
    if is_bucket(folder):
        if folder.is_file():
            raise UserError(f"cannot make the folder {str(folder)!r}: a file has the name")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from None


def names_in(folder: Path) -> list[str]:
    """What a folder holds, sorted; in a bucket nothing where there is no such folder. OSError."""
    if not is_bucket(folder):
        return sorted(os.listdir(folder))
    try:
        return sorted(path.name for path in folder.iterdir() if path != folder)
    except FileNotFoundError:
        return []


def files_in(folder: Path) -> list[Path]:
    """All files of a folder and of those inside, sorted by path, links to files among them. OSError."""
    if is_bucket(folder):
        scheme = str(folder).partition("://")[0]
        found = [epath.Path(f"{scheme}://{name}") for name in filesystem(folder).find(str(folder))]
        return sorted(path for path in found if path != folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_of(path: Path) -> int:
    """Bytes of a file. OSError."""
    return path.stat().st_size if isinstance(path, pathlib.Path) else path.stat().length


def open_to_read(path: Path) -> BinaryIO:
    """The bytes of a large file, which can be sought in. OSError."""
    if is_bucket(path):  # in requests that are large beside what one costs
        return filesystem(path).open(str(path), "rb", block_size=2**24)
    return path.open("rb")


def read_ranges(path: Path, starts: list[int], size: int) -> list[bytes]:
    """`size` bytes of a file from each start on; of a bucket's several at a time. OSError."""
    if is_bucket(path):
        several = len(starts)
        return filesystem(path).cat_ranges([str(path)] * several, starts, [start + size for start in starts])
    with path.open("rb") as file:
        return [file.read(size) for start in starts if file.seek(start) is not None]


def remove_tree(folder: Path) -> None:
    """A folder with all that it holds. OSError."""
    if is_bucket(folder):
        with contextlib.suppress(FileNotFoundError):
            filesystem(folder).rm(str(folder), recursive=True)
    else:
        shutil.rmtree(folder)


def move_tree(folder: Path, target: Path) -> None:
    """A folder with all that it holds, under another name. In a bucket each file is copied there, and then all are
    removed here: a kill between the two leaves both. OSError."""
    if is_bucket(folder):
        system = filesystem(folder)
        for path in files_in(folder):
            system.copy(str(path), str(target / path.relative_to(folder)))
        remove_tree(folder)
    else:
        shutil.move(folder, target)


def copy_file(source: Path, target: Path) -> None:
    """The bytes of a file, on whichever side it lies. OSError."""
    with source.open("rb") as before, target.open("wb") as after:
        shutil.copyfileobj(before, after, 2**24)


@contextlib.contextmanager
def local_folder(folder: Path, *, without: str = "") -> Iterator[pathlib.Path]:
    """A folder as one on this machine's disk: itself or, of a bucket's, a copy for as long as the `with` is open, but
    for files whose name matches the pattern `without`. OSError."""
    if isinstance(folder, pathlib.Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dppo_jax-") as name:
        for path in files_in(folder):
            if not (without and fnmatch(path.name, without)):
                target = pathlib.Path(name, path.relative_to(folder))
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_file(path, target)
        yield pathlib.Path(name)


@contextlib.contextmanager
def local_file(path: Path) -> Iterator[pathlib.Path]:
    """A file on this machine's disk: itself or, of a bucket's, a copy for as long as the `with` is open. OSError."""
    if isinstance(path, pathlib.Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="dppo_jax-") as name:
        copy_file(path, pathlib.Path(name, path.name))
        yield pathlib.Path(name, path.name)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[pathlib.Path]:
    """A name on this machine's disk to write a file at, which is at `path` when the `with` closes without an error: a
    kill leaves the old one, or none. OSError."""
    if isinstance(path, pathlib.Path):
        partial = path.with_name(f"{path.name}.part")
        yield partial
        partial.replace(path)
        return
    with tempfile.TemporaryDirectory(prefix="dppo_jax-") as name:
        partial = pathlib.Path(name, path.name)
        yield partial
        copy_file(partial, path)

def read_text(path: Path) -> str:
    """The whole file, UTF-8. UserError where it cannot be read, or is none."""
    if isinstance(path, pathlib.Path) and path.is_fifo():
        raise UserError(f"{path} is a pipe, which would be waited for")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None


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
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
